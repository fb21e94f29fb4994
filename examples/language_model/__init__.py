"""The parts of `train_language_model.py`, one idea a file.

`options` the command line, `corpus` text to batches, `model` the transformer,
`objective` the loss (the one place that calls softlib), `training` the loop,
`checkpoints` exact resume, `sampling` generated text, `memory` what a loss needs while
it runs, `report` numbers and the picture, `session` all of it in order.
"""
