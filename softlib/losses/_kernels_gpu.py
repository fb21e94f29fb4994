"""The row-statistics kernels for GPUs, behind the operations of a linear head."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _devices as devices
from pallas_kernels.gpu_mosaic import row_statistics as kernels
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation

from . import _tile
from ._stream import BackwardOperands, Head, HeadGradient
from ._tile import Modifiers, Options, RowCotangents, RowStatistics

# Smaller problems do not fill a tile, and a program of plain JAX is made faster.
LEAST_ROWS, LEAST_CLASSES, LEAST_FEATURES = 64, 2048, 64
# Every label costs a comparison per logit.
MOST_LABELS = 8
# Numbers of classes are kept in float32 while the largest logit is looked for.
MOST_CLASSES = 1 << 24
# The float32 gradient of hidden is addressed with 32 bits.
MOST_ELEMENTS = 1 << 31
# Copies address rows that begin at multiples of 16 bytes.
ALIGNMENT = 8
# All of them the same: products of 16-bit numbers are exact.

NO_TILES = "so many statistics, labels and options do not fit the registers"


def _forward(options: Options, head: Head) -> RowStatistics:
    return RowStatistics(**kernels.forward(_options(options), _operands(head)))


def _backward(options: Options, given: BackwardOperands) -> HeadGradient:
    head, rows, _ = given
    known, of_labels = _known(rows)
    if of_labels is None and not any(name.startswith("g_") for name in known):
        # Only numbers without a gradient were asked for.
        return HeadGradient(*jax.tree.map(jnp.zeros_like, _differentiable(head)))
    found = kernels.gradient(_options(options), _operands(head), known, of_labels)
    bias, scale, temperature, _ = head.modifiers
    return HeadGradient(
        found.hidden,
        found.weight,
        Modifiers(
            _tile.cast_like(bias, found.bias),
            _tile.summed_like(scale, found.per_row.get("logit_scale")),
            _tile.summed_like(temperature, found.per_row.get("temperature")),
            None,
        ),
    )


def _known(rows: RowCotangents) -> tuple[dict[str, Array], Array | None]:
    g = rows.cotangents
    known = {
        "lse": rows.lse,
        "mean_logit": rows.mean_logit,
        "g_lse": g.lse,
        "g_mean_logit": g.mean_logit,
        "g_sum_logits": g.sum_logits,
        "g_sum_squared_logits": g.sum_squared_logits,
    }
    return {n: x for n, x in known.items() if x is not None}, g.label_logits


def _differentiable(head: Head) -> tuple[Any, ...]:
    return head.hidden, head.weight, head.modifiers._replace(class_where=None)


def _options(options: Options) -> kernels.Options:
    return kernels.Options(
        options.statistics, options.logit_softcap, options.gradient_filter_eps
    )


def _operands(head: Head) -> kernels.Operands:
    bias, scale, temperature, where = head.modifiers
    every = lambda x: jnp.broadcast_to(x, head.hidden.shape[:1])
    as_table = lambda table, turn: {
        name: turn(values).astype(jnp.float32)
        for name, values in table.items()
        if values is not None
    }
    return kernels.Operands(
        head.hidden,
        head.weight,
        head.labels,
        as_table({"logit_scale": scale, "temperature": temperature}, every),
        as_table({"bias": bias, "where": where}, lambda x: x),
    )


def _why_not(options: Options, head: Head) -> str | None:
    reason = limits.why_not_hopper(devices.gpu_generation())
    if reason is not None:
        return reason
    (rows, features), classes = head.hidden.shape, head.weight.shape[options.vocab_axis]
    sizes = (
        ("rows", rows, LEAST_ROWS),
        ("classes", classes, LEAST_CLASSES),
        ("features", features, LEAST_FEATURES),
    )
    arrays = {"hidden": head.hidden, "weight": head.weight}
    dtypes = (jnp.bfloat16, jnp.float16)
    reason = limits.why_too_small(sizes) or limits.why_wrong_dtype(arrays, dtypes)
    if reason is not None:
        return reason
    if head.hidden.dtype != head.weight.dtype:
        return f"`hidden` is {head.hidden.dtype}, `weight` is {head.weight.dtype}"
    if head.dtype != jnp.float32:
        return f"the sums are {head.dtype}, not float32"
    return _unfit(options, head)


def _unfit(options: Options, head: Head) -> str | None:
    features, classes = head.hidden.shape[1], head.weight.shape[options.vocab_axis]
    if options.vocab_axis != 0:
        return "the classes of the weight are not its first axis (vocab_axis)"
    if head.hidden.size >= MOST_ELEMENTS:
        return f"{head.hidden.size} numbers in `hidden` are too many to index"
    if features % ALIGNMENT:
        return f"{features} features are not a multiple of {ALIGNMENT}"
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


def _forward_why_not(options: Options, head: Head) -> str | None:
    reason = _why_not(options, head)
    if reason is None and kernels.tiles_of(_options(options), _shapes(head)) is None:
        return NO_TILES
    return reason


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    reason = _why_not(options, given.head)
    if reason is None and _backward_tiles(options, given) is None:
        return NO_TILES
    return reason


def _backward_tiles(options: Options, given: BackwardOperands) -> Any:
    operands, known = _shapes(given.head), _known(given.rows)
    return kernels.backward_tiles_of(_options(options), operands, *known)


def _forward_note(options: Options, head: Head) -> str:
    return str(kernels.tiles_of(_options(options), _shapes(head)))


def _backward_note(options: Options, given: BackwardOperands) -> str:
    tiles = _backward_tiles(options, given)
    if options.gradient_filter_eps is None:
        return str(tiles)
    return f"{tiles}; `gradient_filter_eps` spares the products of blocks dropped"


def _shapes(head: Head) -> kernels.Operands:
    """Enough to choose tiles: nothing is computed with it."""
    given = {n: x for n, x in head.modifiers._asdict().items() if x is not None}
    per_row = {n: x for n, x in given.items() if n in ("logit_scale", "temperature")}
    per_class = {n: x for n, x in given.items() if n not in per_row}
    return kernels.Operands(head.hidden, head.weight, head.labels, per_row, per_class)


FORWARD = Implementation(
    "pallas_gpu", _forward, _forward_why_not, platform="cuda", note=_forward_note
)
BACKWARD = Implementation(
    "pallas_gpu", _backward, _backward_why_not, platform="cuda", note=_backward_note
)
