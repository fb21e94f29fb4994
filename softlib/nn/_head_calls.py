"""Common code of both output heads, after their parameters became arrays."""

from typing import Any

from flax.typing import Dtype
from jaxtyping import Array

from softlib.logits import LinearLogits


def logits_of(
    hidden: Array,
    table: Array,
    bias: Array | None,
    scale: float | None,
    softcap: float | None,
    dtype: Dtype | None,
    **options: Any,
) -> LinearLogits:
    """The logits, with hidden and table in the dtype of the products.

    `options` are those of `LinearLogits` that a call of a head chooses.
    """
    if dtype is not None:
        hidden, table = hidden.astype(dtype), table.astype(dtype)
    own = {"scale": scale, "softcap": softcap}
    return LinearLogits(hidden, table, bias=bias, **own, **options)
