"""Logits less the mean of their row, for losses of deviations from the mean.

A variance from sums of squares loses digits if the mean is large: logits with mean 1000
and standard deviation 1 give 1.09 in float32. So the engine subtracts a number per row
from each logit before it is squared. Losses of deviations do not depend on this number,
so it has no derivative.
"""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from softlib._sharding import in_auto_mode

from ._source_rows import all_of
from ._sources import LinearLogits, Source


def without_infinite(source: Source) -> Source:
    """The source with classes excluded whose final logit is -inf."""
    finite = source.finite_classes()
    if finite is None:
        return source
    counts = all_of([finite, source.class_where])
    return source.replaced(modifiers=source.modifiers._replace(class_where=counts))


def centred(source: Source) -> Source:
    """The source with logits less the mean of their row, up to rounding."""
    classes = jnp.maximum(source.count_classes(), 1)
    linear = isinstance(source, LinearLogits)
    if not linear or source.options.softcap is not None:
        total = source.statistics(("sum_logits",)).sum_logits
        assert total is not None
        mean = total / classes
    else:
        mean = _sum_of_linear_head(source) / classes
    # A row with NaN or infinities is not centred.
    mean = lax.stop_gradient(jnp.where(jnp.isfinite(mean), mean, 0))
    modifiers = source.modifiers._replace(centre=mean)
    return source.replaced(modifiers=modifiers)


def _sum_of_linear_head(source: LinearLogits) -> Float[Array, "*batch"]:
    """Sum of each row's logits: from the sum of the weight, without a stream."""
    batch, dtype, axis = source.batch_shape, source.dtype, source.options.vocab_axis

    def total(hidden, weight, modifiers):
        bias, scale, temperature, where = modifiers[:4]
        if where is not None:
            weight = jnp.where(jnp.expand_dims(where, 1 - axis), weight, 0)
            bias = None if bias is None else jnp.where(where, bias, 0)
        of_classes = weight.sum(axis, dtype=dtype)
        of_bias = jnp.zeros((), dtype) if bias is None else bias.sum(dtype=dtype)
        if source.axis_name is not None:
            of_classes = lax.psum(of_classes, source.axis_name)
            of_bias = lax.psum(of_bias, source.axis_name)
        u = jnp.einsum(
            "...d,d->...",
            hidden,
            of_classes,
            precision=source.options.precision,
            preferred_element_type=dtype,
        )
        u = u if scale is None else u * scale.astype(dtype)
        u = u + of_bias
        return u if temperature is None else u / temperature.astype(dtype)

    specs = lambda spec: PartitionSpec(*spec[: len(batch)])
    return in_auto_mode(
        total,
        specs,
        lax.stop_gradient(source.hidden),
        lax.stop_gradient(source.weight),
        lax.stop_gradient(source.modifiers),
    )
