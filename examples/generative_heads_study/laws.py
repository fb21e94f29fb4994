"""Two laws with independent features in two classes, and the error of a head."""

from typing import NamedTuple

import numpy as np
from scipy import stats

BAYES_ERROR = 0.04


class Law(NamedTuple):
    """Normal features with means +m and -m in the classes 1 and 0.

    Attributes:
        mean: m of each feature.
        scale: Standard deviation of each.
    """

    mean: np.ndarray
    scale: np.ndarray

    def draw(
        self, rng: np.random.Generator, repeats: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Examples (repeats, count, D) and their labels, as many of each class."""
        labels = np.broadcast_to(np.arange(count) % 2, (repeats, count))
        noise = rng.normal(size=(repeats, count, len(self.mean)))
        x = (2 * labels - 1)[..., None] * self.mean + self.scale * noise
        return x.astype(np.float32), labels

    def error(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Of heads (..., 2, D) and (..., 2), exact: a score is normal, too."""
        w, b = np.diff(weight, axis=-2)[..., 0, :], np.diff(bias, axis=-1)[..., 0]
        along = w @ self.mean
        length = np.sqrt((w * w) @ self.scale**2)
        length = np.where(length == 0, 1e-30, length)
        cdf = stats.norm.cdf
        return (cdf((-along - b) / length) + cdf((-along + b) / length)) / 2

    def bayes_error(self) -> float:
        return float(stats.norm.cdf(-np.linalg.norm(self.mean / self.scale)))


def even(dimension: int) -> Law:
    """The same Bayes error in any dimension: each feature says less in a higher one."""
    separation = -stats.norm.ppf(BAYES_ERROR)
    mean = np.full(dimension, separation / np.sqrt(dimension))
    return Law(mean, np.ones(dimension))


def half_noisy(dimension: int) -> Law:
    """That of the paper: means 1, the first half of the features of variance D."""
    noisy = np.arange(dimension) < dimension // 2
    return Law(np.ones(dimension), np.where(noisy, np.sqrt(dimension), 1.0))


LAWS = {"even": even, "half noisy": half_noisy}
