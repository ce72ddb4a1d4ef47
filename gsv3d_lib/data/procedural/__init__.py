"""Objects that are made by rules: shapes, textures, families."""
