"""What the notebooks are made of: figures, widgets, exercises, and their runner."""
