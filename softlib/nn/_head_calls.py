"""What both output heads do once their parameters are arrays."""

from typing import TypedDict

from flax.typing import Dtype
from jaxtyping import Array

from softlib.logits import LinearLogits
from softlib.typing import AxisName, GradientFilter, Implementations, PerRow, Precision


class CallOptions(TypedDict, total=False):
    """Arguments of `softlib.LinearLogits` that a call of a head chooses."""

    temperature: PerRow | None
    class_where: Array | None
    axis_name: AxisName | None
    vocab_chunk: int | None
    token_chunk: int | None
    gradient_filter_eps: GradientFilter
    precision: Precision
    implementation: Implementations


def logits_of(
    hidden: Array,
    table: Array,
    bias: Array | None,
    logit_scale: float | None,
    logit_softcap: float | None,
    dtype: Dtype | None,
    options: CallOptions,
) -> LinearLogits:
    """The logits, with hidden and table in the dtype of the products."""
    if dtype is not None:
        hidden, table = hidden.astype(dtype), table.astype(dtype)
    own = {"scale": logit_scale, "softcap": logit_softcap}
    return LinearLogits(hidden, table, bias=bias, **own, **options)
