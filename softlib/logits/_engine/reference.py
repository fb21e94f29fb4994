"""The statistics of whole rows by their definitions: what all other forms must equal.

JAX differentiates them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import tile
from .tile import Modifiers, Options, Ranked, RowStatistics


def statistics(
    options: Options,
    raw: Array,
    labels: Array | None,
    ranked: Ranked | None,
    modifiers: Modifiers,
) -> RowStatistics:
    """The statistics by their definitions, of whole rows."""
    z = tile.logits_of(raw, options, modifiers).z
    where = modifiers.class_where
    present = tile.select(z, where, -jnp.inf)
    counted = tile.select(z, where, 0)
    asked = present
    if options.exclude_labels:
        assert labels is not None
        classes = jnp.arange(z.shape[1])[None, None, :]
        own = (classes == labels[..., None]).any(1)
        asked = jnp.where(own, -jnp.inf, present)
    weighed = asked
    if modifiers.class_log_weights is not None:
        weighed = weighed + modifiers.class_log_weights.astype(z.dtype)[None]
    top = jax.lax.stop_gradient(weighed).max(1)
    empty = top == -jnp.inf
    shift = jnp.where(empty, 0, top)
    exponentials = jnp.exp(weighed - shift[:, None])
    # Selected before the logarithm too: 0 * inf in a derivative is NaN.
    total = jnp.where(empty, 1, exponentials.sum(1))
    lse = jnp.where(empty, -jnp.inf, shift + jnp.log(total))
    p = exponentials / total[:, None]
    finite = jnp.where(weighed == -jnp.inf, 0, present)
    found = RowStatistics(
        lse=lse,
        mean_logit=(p * finite).sum(1),
        sum_logits=counted.sum(1),
        sum_squared_logits=(counted * counted).sum(1),
        max_logit=jax.lax.stop_gradient(present).max(1),
        argmax=jnp.argmax(present, axis=1).astype(jnp.int32),
        sum_softplus=jax.nn.softplus(asked).sum(1),
    )
    if labels is not None:
        inside = labels >= 0
        at = jnp.take_along_axis(z, jnp.where(inside, labels, 0), axis=1)
        found = found._replace(label_logits=jnp.where(inside, at, 0))
    if ranked is not None:
        others = z[:, None, :]
        own, ids = ranked.logits[..., None], ranked.labels[..., None]
        classes = jnp.arange(z.shape[1])[None, None, :]
        before = (others > own) | ((others == own) & (classes < ids))
        before = before & (classes != ids)
        if where is not None:
            before = before & where.reshape(-1, 1, z.shape[1])
        found = found._replace(label_rank=before.sum(-1, dtype=jnp.int32))
    return tile.only(found, options)
