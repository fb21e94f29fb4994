"""Statistics of a vocabulary divided over devices, from the statistics of its parts.

Inside `jax.shard_map` every device holds some classes, in the order of the axis. Each
reduces its own; the numbers per row are merged by collectives. The merge is plain JAX,
so its transpose is right for either setting of `check_vma`: a cotangent of the merged
logsumexp reaches a device multiplied by its share of the exponentials, which turns the
probabilities among its own classes into those among all.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from softlib.typing import AxisName

from .tile import RowStatistics


def merged(
    local: RowStatistics, axis_name: AxisName, offset: Int[Array, ""]
) -> RowStatistics:
    """The statistics of all classes; `offset` is the global id of the first own class.

    `local` must hold lse beside a mean, and the maximum beside an argmax.
    """
    found = RowStatistics(
        # Of this, all but one device hold 0.
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
            # A NaN equals nothing; its row says class 0, as on one device.
            none = jnp.iinfo(jnp.int32).max
            here = jnp.where(local.max_logit == top, offset + local.argmax, none)
            place = lax.pmin(here, axis_name)
            found = found._replace(argmax=jnp.where(place == none, 0, place))
    return found


def first_class(axis_name: AxisName, classes: int) -> Int[Array, ""]:
    """The global id of this device's first class, each device holding `classes`."""
    return lax.axis_index(axis_name) * classes


def _sum(values: Array | None, axis_name: AxisName) -> Array | None:
    return None if values is None else lax.psum(values, axis_name)
