"""What the positions say together, with intervals over texts."""

import itertools
from typing import Any

import numpy as np
from study import intervals
from study.intervals import Interval

from .mixtures import VARIANTS, Followed

MEANS = ("nearest", "same_best", "heaviest", "second", "blend")
LAWS = ("heaviest", "blend", "second")
BINS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
LEAST = 10  # positions of a bin that is shown
LEVELS = np.linspace(0, 1, 41)


def means(followed: Followed, texts: np.ndarray) -> dict[str, Any]:
    """Means over positions, of each variant.

    Args:
        followed: Entries (positions, variants).
        texts: The text that each position is in.
    """
    found: dict[str, Any] = {}
    for at, variant in enumerate(VARIANTS):
        of = {name: _column(followed, name, at) for name in MEANS}
        found[variant] = {name: mean(values, texts) for name, values in of.items()}
        found[variant]["chance"] = mean(1 / _column(followed, "count", at), texts)
        # On the same positions, so that what they have in common cancels.
        less = of["nearest"] - _column(followed, "nearest", VARIANTS.index("random"))
        found[variant]["nearest_less_random"] = mean(less, texts)
    return found


def by_weight(followed: Followed, texts: np.ndarray) -> dict[str, Any]:
    """How often a mixture is followed, against the weight of its heaviest token."""
    found: dict[str, Any] = {variant: [] for variant in VARIANTS}
    for at, variant in enumerate(VARIANTS):
        weight = _column(followed, "weight", at)
        nearest = _column(followed, "nearest", at)
        for low, high in itertools.pairwise(BINS):
            inside = (weight > low) & (weight <= high)
            if inside.sum() >= LEAST:
                share = mean(nearest[inside], texts[inside])
                found[variant].append({"weight": weight[inside].mean(), "share": share})
    return found


def distances(followed: Followed) -> dict[str, Any]:
    """Quantiles of the divergences of the law after a concept token from others."""
    quantiles = {n: np.quantile(_column(followed, n, 0), LEVELS) for n in LAWS}
    return {"levels": LEVELS, **quantiles}


def mean(values: np.ndarray, texts: np.ndarray) -> Interval:
    """The mean over positions; those of one text are drawn together."""
    _, at = np.unique(texts, return_inverse=True)
    return intervals.bootstrap(
        np.bincount(at, values),
        np.bincount(at),
        statistic=lambda sums, counts: sums.sum() / counts.sum(),
    )


def _column(followed: Followed, name: str, at: int) -> np.ndarray:
    return np.asarray(getattr(followed, name), np.float64)[:, at]
