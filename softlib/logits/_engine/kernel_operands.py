"""Operands and limits that the adapters of the row-statistics kernels share."""

import jax.numpy as jnp
from jaxtyping import Array

from softlib import _kernel_limits as limits

from . import tile_gradient
from .head import Head, HeadGradient
from .tile import Modifiers, Options
from .tile_gradient import RowCotangents

# Smaller problems do not fill a tile, and plain JAX compiles faster.
LEAST_ROWS, LEAST_CLASSES, LEAST_FEATURES = 64, 2048, 64
# Every label costs a comparison per logit.
MOST_LABELS = 8
# The search for the largest logit holds class ids in float32.
MOST_CLASSES = 1 << 24


def known_of(rows: RowCotangents) -> dict[str, Array]:
    """Residuals and cotangents per row by name, but those of label logits."""
    g = rows.cotangents
    known = {
        "lse": rows.lse,
        "mean_logit": rows.mean_logit,
        "g_lse": g.lse,
        "g_mean_logit": g.mean_logit,
        "g_sum_logits": g.sum_logits,
        "g_sum_squared_logits": g.sum_squared_logits,
    }
    return {name: value for name, value in known.items() if value is not None}


def tables_of(head: Head) -> tuple[dict[str, Array], dict[str, Array]]:
    """Float32 numbers per row, and per class, by name."""
    bias, scale, temperature, where = head.modifiers[:4]
    every = lambda x: jnp.broadcast_to(x, head.hidden.shape[:1])
    wide = lambda x: x.astype(jnp.float32)
    present = lambda table: {k: v for k, v in table.items() if v is not None}
    per_row = present({"scale": scale, "temperature": temperature})
    per_class = present({"bias": bias, "where": where})
    return (
        {name: wide(every(x)) for name, x in per_row.items()},
        {name: wide(x) for name, x in per_class.items()},
    )


def gradient_of(
    head: Head,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    per_row: dict[str, Array],
) -> HeadGradient:
    """Results of kernels in the shapes and dtypes of the operands."""
    modifiers = Modifiers(
        tile_gradient.cast_like(head.modifiers.bias, bias),
        tile_gradient.summed_like(head.modifiers.scale, per_row.get("scale")),
        tile_gradient.summed_like(
            head.modifiers.temperature, per_row.get("temperature")
        ),
        None,
    )
    return HeadGradient(hidden, weight, modifiers)


def why_not_sizes(options: Options, head: Head) -> str | None:
    (rows, features), classes = head.hidden.shape, head.weight.shape[options.vocab_axis]
    sizes = (
        ("rows", rows, LEAST_ROWS),
        ("classes", classes, LEAST_CLASSES),
        ("features", features, LEAST_FEATURES),
    )
    return limits.why_too_small(sizes)


def why_not_options(options: Options, head: Head) -> str | None:
    classes = head.weight.shape[options.vocab_axis]
    if options.wants("sum_softplus"):
        return "it has no sum_softplus"
    if options.exclude_labels:
        return "it does not leave the labels out of the sums"
    if head.modifiers.class_log_weights is not None:
        return "it counts every class once (class_log_weights)"
    if head.modifiers.centre is not None:
        return "it does not centre the logits of a row"
    if head.ranked is not None:
        return "it has no label_rank"
    if head.labels is not None and head.labels.shape[1] > MOST_LABELS:
        return f"{head.labels.shape[1]} labels a row are more than {MOST_LABELS}"
    if options.wants("argmax") and classes >= MOST_CLASSES:
        return f"{classes} classes are too many for argmax"
    if options.vocab_chunk is not None or options.token_chunk is not None:
        return "it chooses its own tiles (vocab_chunk, token_chunk)"
    return limits.why_no_precision(options.precision)
