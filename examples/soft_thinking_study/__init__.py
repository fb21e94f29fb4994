"""The parts of `soft_thinking.py`, one idea a file.

`options` the command line, `texts` what the model reads and writes, `mixtures` what is
fed at a place of a text and what follows (the lines that use softlib), `summaries` what
all places say together, `report` the picture, `session` all of it in order.
"""
