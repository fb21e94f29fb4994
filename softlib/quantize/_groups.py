"""Rounds groups of weights to few bits."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

from ._packing import require_bits
from ._quantized_array import QuantizedArray


@array_arguments
def quantize_groups(
    weight: Float[Array, "*batch size"],
    *,
    bits: int = 4,
    group_size: int = 128,
    is_symmetric: bool = False,
    where: Bool[Array, "*batch size"] | None = None,
) -> QuantizedArray:
    r"""Rounds each group of neighbours of the last axis to a grid of its own.

    With $n = 2^{\mathrm{bits}} - 1$ steps from the smallest to the largest weight,
    $s = (\max - \min) / n$ and $q_i = \mathrm{round}((w_i - \min) / s)$, ties to even:
    the smallest weight stays as it is. Symmetric, without a zero, $s = \max |w_i| / (
    2^{\mathrm{bits} - 1} - 1)$ and $q_i = \mathrm{round}(w_i / s)$: 0 stays 0. Either
    way a weight is off by $s / 2$ at most.

    Args:
        weight: Rounded along its last axis, that of the inputs in a table of shape
            (outputs, inputs).
        bits: Static, 2 to 8.
        group_size: Static number of weights that share a scale; divides the last axis.
        is_symmetric: Static; a grid around 0 without a zero.
        where: True for the weights that count; the others are exactly 0 and in no range
            (`prune_by_magnitude`).

    Returns:
        Codes, scales and zeros, these in float32 (float64 if `weight` is). A group
        whose weights are all alike has scale 1 and codes 0, or keeps the one number
        and 0 exactly if it is symmetric. A weight that is not finite makes its group
        NaN.

    Raises:
        TypeError: `weight` is not floating, `where` is not bool, or a static argument
            is of the wrong kind.
        ValueError: `bits` is out of range, `group_size` does not divide the last axis,
            or `where` has another shape.

    Derivatives: of scale and zero those of maximum and minimum; codes have none.
    Cost: a few passes over the weight.
    Source: "Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM
        Inference with Transferable Prompt".

    Example:
        >>> weight = jnp.array([[0.0, 1.1, 1.9, 3.0]])
        >>> found = softlib.quantize.quantize_groups(weight, bits=2, group_size=4)
        >>> print(found.codes, found.scale, found.decode())
        [[0 1 2 3]] [[1.]] [[0. 1. 2. 3.]]
    """
    function = "quantize_groups"
    checks.require_floating(function, weight=weight)
    checks.require_rank(function, "weight", weight, 1, "(..., size)")
    checks.require_boolean(function, where=where)
    checks.require_shape(function, "where", where, weight.shape, "that of `weight`")
    require_bits(function, bits, 2, 8)
    require_group_size(function, group_size, weight)
    dtype = accumulator_dtype(weight)
    shape = (*weight.shape[:-1], weight.shape[-1] // group_size, group_size)
    groups = weight.astype(dtype).reshape(shape)
    counts = jnp.ones(shape, bool) if where is None else where.reshape(shape)
    if is_symmetric:
        size = jnp.where(counts, jnp.abs(groups), 0).max(-1)
        steps, lowest = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
        scale, zero = _positive(size / steps), None
        codes = jnp.round(groups / scale[..., None]) - lowest
    else:
        steps = 2**bits - 1
        some = counts.any(-1)
        zero = jnp.where(counts, groups, jnp.inf).min(-1)
        top = jnp.where(counts, groups, -jnp.inf).max(-1)
        # Selected before the difference, which is NaN for a group without weights.
        zero, top = jnp.where(some, zero, 0), jnp.where(some, top, 0)
        scale = _positive((top - zero) / steps)
        codes = jnp.round((groups - zero[..., None]) / scale[..., None])
    known = jnp.isfinite(scale)
    codes = jnp.where(counts & known[..., None], codes, 0)
    codes = jnp.clip(codes, 0, 2**bits - 1).astype(jnp.int32).reshape(weight.shape)
    scale = jnp.where(known, scale, jnp.nan)
    return QuantizedArray(codes, bits=bits, scale=scale, zero=zero, where=where)


def require_group_size(
    function: str, group_size: object, weight: Array, multiple: int = 1
) -> None:
    """Requires a size of groups that divides the last axis."""
    checks.require_positive_integer(function, "group_size", group_size)
    assert isinstance(group_size, int)
    length = weight.shape[-1]
    if length % group_size or group_size % multiple:
        of = "" if multiple == 1 else f"be a multiple of {multiple} and "
        raise ValueError(
            f"{function}: `group_size` must {of}divide the last axis of `weight` "
            f"({length}), got {group_size}."
        )


def _positive(scale: Float[Array, "*groups"]) -> Float[Array, "*groups"]:
    """1 for a scale of 0: nothing is divided by 0."""
    return jnp.where(scale == 0, 1, scale)
