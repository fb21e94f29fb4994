"""The best labels of each row, of a linear head that has very many."""

from typing import NamedTuple, Unpack

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments

from ._options import LinearHeadOptions
from ._sources import LinearHead


class TopK(NamedTuple):
    """The greatest logits of each row, in falling order.

    Attributes:
        logits: Their values, -inf where a row has fewer classes.
        classes: Their ids, int32, the lower first on ties; -1 where there is none.

    Derivatives: none; the logits are constant to differentiation.
    Cost: two numbers per row and place.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> print(softlib.losses.linear_top_k(hidden, table, k=2).classes)
        [[0 1]
         [1 2]]
    """

    logits: Float[Array, "*batch k"]
    classes: Int[Array, "*batch k"]


@array_arguments
def linear_top_k(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    *,
    k: int,
    **options: Unpack[LinearHeadOptions],
) -> TopK:
    """The k classes that a linear head puts first, without the logits of its rows.

    The ranking that `precision_at_k` and its relatives look at; an exact search among
    all labels.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        k: Static, at least 1 and at most the number of classes (of a device).
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`,
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `axis_name` and `precision`, as
            in `linear_softmax_cross_entropy`. `implementation` must be None or "xla"
            and `gradient_filter_eps` None.

    Returns:
        `TopK` of shape (*batch, k); logits in float32 (float64 for float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: none; the logits are constant to differentiation.
    Cost: the forward pass of `linear_row_statistics`, in tiles of 16 MiB, and per tile
        a search for its greatest k logits, which for small D takes longer than the
        products.
    Source: exact maximum inner product search.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> print(softlib.losses.linear_top_k(hidden, table, k=1).logits)
        [[1.]
         [2.]]
    """
    function = "linear_top_k"
    if options.get("implementation") not in (None, "xla"):
        raise ValueError(
            f"{function}: `implementation` must be None or 'xla', "
            f"got {options['implementation']!r}."
        )
    if options.get("gradient_filter_eps") is not None:
        raise ValueError(
            f"{function}: `gradient_filter_eps` must be None where there is no "
            f"gradient, got {options['gradient_filter_eps']!r}."
        )
    source = LinearHead.of(function, hidden, weight, **options)
    checks.require_positive_integer(function, "k", k)
    own = weight.shape[source.options.vocab_axis]
    if k > own:
        raise ValueError(
            f"{function}: `k` must be at most the number of classes, {own}, got {k}."
        )
    found = TopK(*source.top_classes(k))
    if source.axis_name is None:
        return found
    return _merged(found, source.axis_name, own)


def _merged(found: TopK, axis_name: str | tuple[str, ...], own: int) -> TopK:
    """The best of all devices, the same on each."""
    device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    classes = jnp.where(found.classes < 0, -1, found.classes + device * own)

    def gathered(array: Array) -> Array:
        # A sum of what each device puts into its own place, zeros elsewhere: unlike
        # that of an all-gather its result is known to be the same on all devices.
        mine = jnp.arange(devices)[:, None] == device
        spread = jnp.where(mine, array[..., None, :], 0)
        return lax.psum(spread, axis_name).reshape(*array.shape[:-1], -1)

    logits, places = lax.top_k(gathered(found.logits), found.logits.shape[-1])
    return TopK(logits, jnp.take_along_axis(gathered(classes), places, axis=-1))
