"""What the notebooks are made of: figures, widgets, exercises, and the runner behind
`make`.
"""
