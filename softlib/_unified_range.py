"""The range of scores that sums against a known reference hold, and its checks."""

from collections.abc import Sequence
from typing import Literal

from jax.typing import ArrayLike

type RangeCriterion = Literal["row_max", "elementwise"]
"""The scores that must lie in the valid range: the largest of a row, or all of it."""

CRITERIA = ("row_max", "elementwise")


def require_range(function: str, valid_range: tuple[ArrayLike, ArrayLike]) -> None:
    if not isinstance(valid_range, Sequence) or isinstance(valid_range, str):
        raise TypeError(
            f"{function}: `valid_range` must be a pair (a, b), got {valid_range!r}."
        )
    if len(valid_range) != 2:
        raise ValueError(
            f"{function}: `valid_range` must be a pair (a, b), got "
            f"{len(valid_range)} values."
        )
    require_ordered(function, *valid_range)


def require_ordered(function: str, low: ArrayLike, high: ArrayLike) -> None:
    # Traced bounds are not checked: with an empty range every row needs recomputation.
    if (
        isinstance(low, int | float)
        and isinstance(high, int | float)
        and not low < high
    ):
        raise ValueError(
            f"{function}: `valid_range` must be a pair (a, b) with a < b, got "
            f"({low}, {high})."
        )
