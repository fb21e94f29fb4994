"""Judging given text by its given log-probabilities: a number per text.

Rewards and preferences from two language models:

- `density_ratio_reward`, `annotate_preferences`, `PreferenceAnnotation`

Extraction of memorised text:

- `calibrated_confidence`: in each of several sampled continuations
- `identical_groups`: which of them are the same
"""

from ._density_ratio import (
    PreferenceAnnotation as PreferenceAnnotation,
    annotate_preferences as annotate_preferences,
    density_ratio_reward as density_ratio_reward,
)
from ._extraction import (
    calibrated_confidence as calibrated_confidence,
    identical_groups as identical_groups,
)

__all__ = [
    "PreferenceAnnotation",
    "annotate_preferences",
    "calibrated_confidence",
    "density_ratio_reward",
    "identical_groups",
]
