"""The options of a linear head that a loss passes on: keywords of `LinearLogits.of`.

`linear_softmax_cross_entropy` explains them and `row_statistics` those of the stream.
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
    """Options of a head besides its arrays: modifiers, and those of the computation."""

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
    """Raises for a misspelt keyword of `**options`, as any other signature does."""
    for name in names:
        if name not in known:
            options = ", ".join(sorted(known))
            raise TypeError(
                f"{function}: `**options` must be among {options}, got {name!r}."
            )
