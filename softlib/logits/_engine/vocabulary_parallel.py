"""Statistics of a vocabulary divided over devices, from those of its shards.

Inside `jax.shard_map` every device holds a shard of the classes, in the order of the
axis. Each device reduces its shard; collectives merge the numbers per row. The merge is
plain JAX, so its transpose is right for either setting of `check_vma`: the cotangent of
the merged logsumexp reaches a device multiplied by its shard's share of the
exponentials, which turns probabilities within the shard into those among all classes.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from softlib.typing import AxisName

from .tile import RowStatistics


def merged(
    local: RowStatistics, axis_name: AxisName, offset: Int[Array, ""]
) -> RowStatistics:
    """Statistics of all classes; `offset` is the global id of the shard's first class.

    `local` must hold lse along with a mean, and the maximum along with an argmax.
    """
    found = RowStatistics(
        # All devices but one hold 0.
        label_logits=_sum(local.label_logits, axis_name),
        sum_logits=_sum(local.sum_logits, axis_name),
        sum_squared_logits=_sum(local.sum_squared_logits, axis_name),
        label_rank=_sum(local.label_rank, axis_name),
        sum_softplus=_sum(local.sum_softplus, axis_name),
    )
    if local.lse is not None:
        top = lax.pmax(lax.stop_gradient(local.lse), axis_name)
        top = jnp.where(top == -jnp.inf, 0, top)
        share = jnp.exp(local.lse - top)
        total = lax.psum(share, axis_name)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
        found = found._replace(lse=lse)
        if local.mean_logit is not None:
            mean = lax.psum(share * local.mean_logit, axis_name) / total
            found = found._replace(mean_logit=mean)
    if local.max_logit is not None:
        top = lax.pmax(lax.stop_gradient(local.max_logit), axis_name)
        found = found._replace(max_logit=top)
        if local.argmax is not None:
            # NaN equals nothing: the argmax of its row is 0, as on one device.
            none = jnp.iinfo(jnp.int32).max
            here = jnp.where(local.max_logit == top, offset + local.argmax, none)
            first = lax.pmin(here, axis_name)
            found = found._replace(argmax=jnp.where(first == none, 0, first))
    return found


def first_class(axis_name: AxisName, classes: int) -> Int[Array, ""]:
    """Global id of this device's first class, if each device holds `classes`."""
    return lax.axis_index(axis_name) * classes


def _sum(values: Array | None, axis_name: AxisName) -> Array | None:
    return None if values is None else lax.psum(values, axis_name)
