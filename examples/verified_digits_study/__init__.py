"""Selective classification of digits; `session.run` is the whole of it.

`digits.py` draws images, `network.py` trains and finds similar ones, `rules.py` accepts
predictions.
"""
