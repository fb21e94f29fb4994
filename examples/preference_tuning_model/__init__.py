"""The parts of `preference_tuning.py`; the whole run in order is `session`.

`options` command line, `text` addresses as windows of tokens, `model` log-probabilities
of sequences and every loss, `pairs` drawn continuations and who prefers which, `tuning`
and `unlearning` the two studies, `report` the picture.
"""
