"""The parts of `utility_probability.py`, one idea a file.

`options` the command line, `dictionary` words with their pronunciations, `gru` the
model, `choices` candidates and the choice among them (the lines that use softlib),
`report` the picture, `session` all of it in order.
"""
