"""Objects to train on: read, made, rendered, fetched."""
