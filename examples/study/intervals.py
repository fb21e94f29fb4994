"""Intervals of a study's numbers, by resampling its seeds, items or positions."""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and what it may be off by.

    Attributes:
        value: The statistic of all samples.
        low: Lower end of the interval; NaN where there is none.
        high: Upper end.
        level: Share of such intervals that hold the true value.
        count: Number of samples.
    """

    value: float
    low: float
    high: float
    level: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(
    *samples: np.ndarray,
    statistic: Callable[..., float] = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The statistic of the samples and its percentile bootstrap interval.

    Several arrays of equal length are resampled together, entry by entry: scores and
    labels of the same items, two methods on the same seeds. `statistic` takes one
    array for each. A draw whose statistic is NaN (an AUROC of one class) counts for
    nothing. With one sample there is no interval.
    """
    arrays = [np.asarray(sample) for sample in samples]
    count = len(arrays[0])
    value = float(statistic(*arrays))
    if count < 2:
        return Interval(value, float("nan"), float("nan"), level, count)
    # Not scipy.stats.bootstrap, which gives no interval once a draw is NaN.
    found = [
        statistic(*(array[chosen] for array in arrays))
        for chosen in np.random.default_rng(seed).integers(count, size=(draws, count))
    ]
    tail = (1 - level) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return Interval(value, float(low), float(high), level, count)


def of_seeds(values: np.ndarray, *, level: float = 0.95) -> Interval:
    """The mean over a few seeds and its Student interval.

    With fewer than some twenty values, resampling them gives intervals that are too
    short.
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"), level, len(values))
    error = scipy.stats.sem(values)
    # All seeds alike: the interval is a point, where SciPy gives NaN.
    half = float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    return Interval(mean, mean - half, mean + half, level, len(values))
