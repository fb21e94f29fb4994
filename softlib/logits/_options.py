"""The options of a linear head that a loss passes on: keywords of `LinearLogits.of`.

What each means is written in `linear_softmax_cross_entropy` and, for the layout of the
stream, in `row_statistics`.
"""

from collections.abc import Collection, Iterable
from typing import TypedDict

from jaxtyping import Array

from softlib.typing import (
    AxisName,
    GradientFilter,
    Implementations,
    PerRow,
    Precision,
)


class LinearHeadOptions(TypedDict, total=False):
    """What a head is given besides its arrays: modifiers, and how it is computed."""

    bias: Array | None
    scale: PerRow | None
    softcap: float | None
    temperature: PerRow | None
    class_where: Array | None
    vocab_axis: int
    vocab_chunk: int | None
    token_chunk: int | None
    gradient_filter_eps: GradientFilter
    axis_name: AxisName | None
    precision: Precision
    implementation: Implementations


def require_known(
    function: str,
    names: Iterable[str],
    known: Collection[str],
) -> None:
    """A misspelt keyword of `**options` is an error, as in any other signature."""
    for name in names:
        if name not in known:
            options = ", ".join(sorted(known))
            raise TypeError(
                f"{function}: `**options` must be among {options}, got {name!r}."
            )
