"""The parts of `length_extrapolation.py`, one idea a file.

`options` the command line, `text` bytes to batches, `model` a character model with one
of four attentions (the one place that calls softlib), `aligned` one matching key among
many, `report` the picture, `session` all of it in order.
"""
