"""The options that all losses share: keywords of `LinearLogits.of`, `StoredLogits.of`.

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


class UncooledLogitsOptions(TypedDict, total=False):
    """What turns given logits into those that a temperature of its own divides."""

    bias: Array | None
    logit_scale: PerRow | None
    logit_softcap: float | None
    class_where: Array | None
    implementation: Implementations


class LogitsOptions(UncooledLogitsOptions, total=False):
    """What turns given logits into final ones, and what computes their statistics."""

    temperature: PerRow | None


class UncooledHeadOptions(UncooledLogitsOptions, total=False):
    """The same of a linear head, and how it is laid out, cut and divided."""

    vocab_axis: int
    vocab_chunk: int | None
    token_chunk: int | None
    gradient_filter_eps: GradientFilter
    axis_name: AxisName | None
    precision: Precision


class LinearHeadOptions(LogitsOptions, UncooledHeadOptions, total=False):
    """The options of a linear head, all together."""


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
