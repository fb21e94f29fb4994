"""Pruning by magnitude: the smallest weights become 0."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments


class Pruned(NamedTuple):
    """The result of `prune_by_magnitude`.

    Attributes:
        weight: The kept weights, 0 elsewhere.
        where: True for the kept weights.

    Derivatives: of `weight` 1 where it is kept; `where` has none.
    Cost: a copy, and a byte for each weight.

    Example:
        >>> found = softlib.quantize.prune_by_magnitude(jnp.arange(4.0), sparsity=0.5)
        >>> print(found.where)
        [False False  True  True]
    """

    weight: Float[Array, "*shape"]
    where: Bool[Array, "*shape"]


@array_arguments
def prune_by_magnitude(
    weight: Float[Array, "*shape"],
    *,
    sparsity: float,
    axis: int | tuple[int, ...] | None = None,
) -> Pruned:
    r"""Keeps the weights of largest magnitude and sets the others to 0.

    Of $n$ weights $\lfloor \mathrm{sparsity} \cdot n + 1/2 \rfloor$ become 0, of the
    whole array or of each row. On ties the later one goes. NaN counts as the largest
    magnitude: it is never hidden.

    Args:
        weight: Any array.
        sparsity: Static share in [0, 1) of weights that become 0.
        axis: Static; the axes of a row. None ranks all weights together.

    Returns:
        The pruned weight and where it is kept; `softlib.quantize.quantize_groups` takes
        the latter.

    Raises:
        TypeError: `weight` is not floating, or `sparsity` is no Python number.
        ValueError: `sparsity` is out of range, or `axis` is none of `weight`.

    Derivatives: of kept weights 1, of others 0.
    Cost: a sort of each row.
    Source: "Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM
        Inference with Transferable Prompt".

    Example:
        >>> weight = jnp.array([[3.0, -1.0], [0.5, -2.0]])
        >>> found = softlib.quantize.prune_by_magnitude(weight, sparsity=0.5, axis=1)
        >>> print(found.weight)
        [[ 3.  0.]
         [ 0. -2.]]
    """
    function = "prune_by_magnitude"
    checks.require_floating(function, weight=weight)
    checks.require_number(function, "sparsity", sparsity)
    if not 0 <= sparsity < 1:
        raise ValueError(f"{function}: `sparsity` must be in [0, 1), got {sparsity}.")
    checks.require_axes(function, "axis", axis, weight.ndim)
    several = range(weight.ndim) if axis is None else axis
    several = (several,) if isinstance(several, int) else several
    axes = sorted(each % weight.ndim for each in several)
    last = range(weight.ndim - len(axes), weight.ndim)
    turned = jnp.moveaxis(weight, axes, last)
    length = math.prod(weight.shape[a] for a in axes)
    rows = turned.reshape(*turned.shape[: weight.ndim - len(axes)], length)
    dropped = math.floor(sparsity * length + 0.5)
    size = jnp.where(jnp.isnan(rows), jnp.inf, jnp.abs(rows))
    # The place of each weight in the order of falling magnitude; stable on ties.
    order = jnp.argsort(size, axis=-1, stable=True, descending=True)
    place = jnp.argsort(order, axis=-1)
    kept = (place < length - dropped).reshape(turned.shape)
    where = jnp.moveaxis(kept, last, axes)
    return Pruned(jnp.where(where, weight, 0), where)
