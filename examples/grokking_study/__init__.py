"""The parts of `grokking.py`, one idea a file.

`options` the command line, `task` the sums and a network for them, `methods` the losses
and optimisers that are compared (the one place that calls softlib to train), `training`
the loop and what it records, `report` the picture, `session` all of it in order.
"""
