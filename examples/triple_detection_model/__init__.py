"""The parts of `triple_detection.py`, one idea a file.

`options` the command line, `task` sequences and their answers, `hand_set` one head with
weights that are written down, `model` the network that is trained (both call softlib),
`maps` what a trained head attends to, `cost` exact and polynomial attention against the
length, `report` the picture, `session` all of it in order.
"""
