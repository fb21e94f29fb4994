"""The best of very many classes of each row."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments

from ._sources import Logits, Source, source_of


class TopK(NamedTuple):
    """The greatest logits of each row, in falling order.

    Attributes:
        logits: Their values, -inf where a row has fewer classes.
        classes: Their ids, int32, the lower first on ties; -1 where there is none.

    Derivatives: none; the logits are constant to differentiation.
    Cost: 2 k numbers per row.

    Example:
        >>> logits = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
        >>> print(softlib.logits.top_k(logits, k=2).classes)
        [[0 1]
         [1 2]]
    """

    logits: Float[Array, "*batch k"]
    classes: Int[Array, "*batch k"]


@array_arguments
def top_k(logits: Logits, *, k: int) -> TopK:
    """The k classes with the greatest logits of each row, and these logits.

    It is the ranking for `softlib.metrics.precision_at_k` and related metrics. A linear
    head is searched exactly, without forming its logits.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`, whose
            `implementation` must be None or "xla" and `gradient_filter_eps` None.
        k: Static, at least 1 and at most the number of classes (of a device).

    Returns:
        `TopK` of shape (*batch, k); logits in float32 (float64 for float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `k` is out of range, or an option of the logits has no meaning here.

    Derivatives: none; the logits are constant to differentiation.
    Cost: for an array, a search in it; for a linear head, the forward pass of
        `row_statistics` in tiles of 16 MiB, and a search for the greatest k logits of
        each tile, which takes longer than the products for small D.
    Source: exact maximum inner product search.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> print(softlib.logits.top_k(logits, k=1).logits)
        [[1.]
         [2.]]
    """
    function = "top_k"
    source = source_of(function, logits)
    require_forward_stream(source)
    checks.require_positive_integer(function, "k", k)
    own = source.own_classes
    if k > own:
        raise ValueError(
            f"{function}: `k` must be at most the number of classes, {own}, got {k}."
        )
    found = TopK(*source.top_classes(k))
    if source.axis_name is None:
        return found
    return _merged(found, source.axis_name, own)


def require_forward_stream(source: Source) -> None:
    """Raises if an option names a kernel, or a gradient filter where none is used."""
    function = source.function
    if source.implementation not in (None, "xla"):
        raise ValueError(
            f"{function}: `implementation` of the logits must be None or 'xla', "
            f"got {source.implementation!r}."
        )
    if source.options.gradient_filter_eps is not None:
        raise ValueError(
            f"{function}: `gradient_filter_eps` of the logits must be None where there "
            f"is no gradient, got {source.options.gradient_filter_eps!r}."
        )


def _merged(found: TopK, axis_name: str | tuple[str, ...], own: int) -> TopK:
    """The best classes of all devices, the same on each."""
    device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    classes = jnp.where(found.classes < 0, -1, found.classes + device * own)

    def gathered(array: Array) -> Array:
        # A sum of arrays that are zero outside each device's slot: unlike the result of
        # an all-gather, JAX knows that it is the same on all devices.
        mine = jnp.arange(devices)[:, None] == device
        spread = jnp.where(mine, array[..., None, :], 0)
        return lax.psum(spread, axis_name).reshape(*array.shape[:-1], -1)

    logits, indices = lax.top_k(gathered(found.logits), found.logits.shape[-1])
    return TopK(logits, jnp.take_along_axis(gathered(classes), indices, axis=-1))
