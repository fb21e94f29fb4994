"""Judging given text by its given log-probabilities: a number per text.

Extraction of memorised text:

- `calibrated_confidence`: in each of several sampled continuations
- `identical_groups`: which of them are the same
"""

from ._extraction import (
    calibrated_confidence as calibrated_confidence,
    identical_groups as identical_groups,
)

__all__ = ["calibrated_confidence", "identical_groups"]
