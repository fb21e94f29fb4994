"""The row-statistics kernels for TPUs, behind the operations of a linear head."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu import row_statistics as kernels
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation

from . import _tile
from ._stream import BackwardOperands, Head, HeadGradient
from ._tile import Modifiers, Options, RowStatistics

# Smaller problems do not fill a tile, and a program of plain JAX is made faster.
LEAST_ROWS, LEAST_CLASSES, LEAST_FEATURES = 64, 2048, 64
# Every label costs a comparison per logit.
MOST_LABELS = 8
# Numbers of classes are kept in float32 while the largest logit is looked for.
MOST_CLASSES = 1 << 24


def _forward(options: Options, head: Head) -> RowStatistics:
    found = kernels.forward(_options(options), _operands(head))
    return RowStatistics(**found)


def _backward(options: Options, given: BackwardOperands) -> HeadGradient:
    head, rows, _ = given
    asked, operands, g = _options(options), _operands(head), rows.cotangents
    known = {
        "lse": rows.lse,
        "mean_logit": rows.mean_logit,
        "g_lse": g.lse,
        "g_mean_logit": g.mean_logit,
        "g_sum_logits": g.sum_logits,
        "g_sum_squared_logits": g.sum_squared_logits,
    }
    known = {name: value for name, value in known.items() if value is not None}
    of_rows = kernels.gradient_of_hidden(asked, operands, known, g.label_logits)
    of_classes = kernels.gradient_of_weight(asked, operands, known, g.label_logits)
    bias, scale, temperature, _ = head.modifiers
    per_row = of_rows.per_row
    return HeadGradient(
        of_rows.hidden,
        of_classes.weight,
        Modifiers(
            _tile.cast_like(bias, of_classes.bias),
            _tile.summed_like(scale, per_row.get("logit_scale")),
            _tile.summed_like(temperature, per_row.get("temperature")),
            None,
        ),
    )


def _options(options: Options) -> kernels.Options:
    return kernels.Options(
        options.statistics,
        options.logit_softcap,
        options.vocab_axis,
        limits.PRECISIONS[options.precision],
        options.gradient_filter_eps,
    )


def _operands(head: Head) -> kernels.Operands:
    bias, scale, temperature, where = head.modifiers
    rows = head.hidden.shape[0]
    every = lambda x: jnp.broadcast_to(x, (rows,))
    per_row = {"logit_scale": scale, "temperature": temperature}
    per_class = {"bias": bias, "where": where}
    present = lambda table: {k: v for k, v in table.items() if v is not None}
    return kernels.Operands(
        head.hidden,
        head.weight,
        head.labels,
        {name: every(x) for name, x in present(per_row).items()},
        {name: x.astype(jnp.float32) for name, x in present(per_class).items()},
    )


def _why_not(options: Options, head: Head) -> str | None:
    (rows, features), classes = head.hidden.shape, head.weight.shape[options.vocab_axis]
    sizes = (
        ("rows", rows, LEAST_ROWS),
        ("classes", classes, LEAST_CLASSES),
        ("features", features, LEAST_FEATURES),
    )
    arrays = {"hidden": head.hidden, "weight": head.weight}
    dtypes = (jnp.float32, jnp.bfloat16)
    reason = limits.why_too_small(sizes) or limits.why_wrong_dtype(arrays, dtypes)
    if reason is not None:
        return reason
    if head.dtype != jnp.float32:
        return f"the sums are {head.dtype}, not float32"
    if options.exclude_labels:
        return "it does not leave the labels out of the sums"
    if head.ranked is not None:
        return "it has no label_rank"
    if head.labels is not None and head.labels.shape[1] > MOST_LABELS:
        return f"{head.labels.shape[1]} labels a row are more than {MOST_LABELS}"
    if options.wants("argmax") and classes >= MOST_CLASSES:
        return f"{classes} classes are too many for argmax"
    if options.vocab_chunk is not None or options.token_chunk is not None:
        return "it chooses its own tiles (vocab_chunk, token_chunk)"
    return limits.why_no_precision(options.precision)


def _no_tiles(kinds: tuple[Any, ...], options: Options, head: Head) -> str | None:
    found = [kernels.tiles_of(k, _options(options), _shapes(head)) for k in kinds]
    return "no tile fits the vector memory" if None in found else None


def _forward_why_not(options: Options, head: Head) -> str | None:
    return _why_not(options, head) or _no_tiles(("forward",), options, head)


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    kinds = ("hidden", "weight")
    return _why_not(options, given.head) or _no_tiles(kinds, options, given.head)


def _forward_note(options: Options, head: Head) -> str:
    return str(kernels.tiles_of("forward", _options(options), _shapes(head)))


def _backward_note(options: Options, given: BackwardOperands) -> str:
    asked, shapes = _options(options), _shapes(given.head)
    hidden, weight = (kernels.tiles_of(k, asked, shapes) for k in ("hidden", "weight"))
    note = f"{hidden} for hidden, {weight} for the weight"
    if options.gradient_filter_eps is not None:
        note += "; `gradient_filter_eps` spares the products of tiles dropped whole"
    return note


def _shapes(head: Head) -> kernels.Operands:
    """Enough to choose tiles: nothing is computed with it."""
    empty: dict[str, Array] = {}
    return kernels.Operands(head.hidden, head.weight, head.labels, empty, empty)


FORWARD = Implementation(
    "pallas_tpu", _forward, _forward_why_not, platform="tpu", note=_forward_note
)
BACKWARD = Implementation(
    "pallas_tpu", _backward, _backward_why_not, platform="tpu", note=_backward_note
)
