"""The row-statistics kernels for GPUs, behind the operations of a linear head."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _devices as devices
from pallas_kernels.gpu_mosaic import row_statistics_plan as plans
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation

from . import kernel_operands as shared
from .head import Head, HeadGradient
from .stream import BackwardOperands
from .tile import Options, RowStatistics
from .tile_gradient import RowCotangents

# The float32 gradient of hidden is addressed with 32 bits.
MOST_ELEMENTS = 1 << 31
# Copies address rows that begin at multiples of 16 bytes.
ALIGNMENT = 8
WIDTHS = (jnp.bfloat16, jnp.float16)  # dtypes of products

NO_TILES = "so many statistics, labels and options do not fit the registers"


def _forward(options: Options, head: Head) -> RowStatistics:
    from pallas_kernels.gpu_mosaic import row_statistics as kernels

    return RowStatistics(**kernels.forward(_options(options), _operands(head)))


def _backward(options: Options, given: BackwardOperands) -> HeadGradient:
    from pallas_kernels.gpu_mosaic import row_statistics as kernels

    head, rows, _, further = given
    known, of_labels = _known(rows)
    if of_labels is None and not any(name.startswith("g_") for name in known):
        # Only statistics without a gradient were computed.
        zeros = HeadGradient(*jax.tree.map(jnp.zeros_like, _differentiable(head)))
        return zeros.added_to(further)
    found = kernels.gradient(_options(options), _operands(head), known, of_labels)
    gradient = shared.gradient_of(
        head, found.hidden, found.weight, found.bias, found.per_row
    )
    return gradient.added_to(further)


def _known(rows: RowCotangents) -> tuple[dict[str, Array], Array | None]:
    return shared.known_of(rows), rows.cotangents.label_logits


def _differentiable(head: Head) -> tuple[Any, ...]:
    return head.hidden, head.weight, head.modifiers._replace(class_where=None)


def _options(options: Options) -> plans.Options:
    return plans.Options(
        options.statistics,
        options.softcap,
        options.gradient_filter_eps,
        options.vocab_axis,
    )


def _operands(head: Head) -> plans.Operands:
    tables = shared.tables_of(head)
    return plans.Operands(head.hidden, head.weight, head.labels, *tables)


def _why_not(options: Options, head: Head) -> str | None:
    hidden, weight = head.hidden.dtype, head.weight.dtype
    reason = limits.why_not_hopper(devices.gpu_generation())
    reason = reason or shared.why_not_sizes(options, head)
    reason = reason or limits.why_wrong_dtype({"hidden": head.hidden}, WIDTHS)
    if reason is not None:
        return reason
    if weight not in (hidden, jnp.float32):
        return f"`hidden` is {hidden}, `weight` is {weight}"
    if head.dtype != jnp.float32:
        return f"the sums are {head.dtype}, not float32"
    if _is_rounded(head) and limits.is_exact(options.precision):
        return f"it rounds a float32 `weight` to {hidden} (precision)"
    if options.vocab_axis == 1 and head.weight.shape[1] % ALIGNMENT:
        return (
            f"{head.weight.shape[1]} classes, which are the rows of memory of a weight "
            f"(D, V), are not a multiple of {ALIGNMENT}"
        )
    if head.hidden.size >= MOST_ELEMENTS:
        return f"{head.hidden.size} numbers in `hidden` are too many to index"
    if head.hidden.shape[1] % ALIGNMENT:
        return f"{head.hidden.shape[1]} features are not a multiple of {ALIGNMENT}"
    return shared.why_not_options(options, head)


def _forward_why_not(options: Options, head: Head) -> str | None:
    reason = _why_not(options, head)
    if reason is None and plans.tiles_of(_options(options), _shapes(head)) is None:
        return NO_TILES
    return reason


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    reason = _why_not(options, given.head)
    if reason is None and _backward_tiles(options, given) is None:
        return NO_TILES
    return reason


def _backward_tiles(options: Options, given: BackwardOperands) -> Any:
    operands, known = _shapes(given.head), _known(given.rows)
    return plans.backward_tiles_of(_options(options), operands, *known)


def _is_rounded(head: Head) -> bool:
    return head.weight.dtype != head.hidden.dtype


def _forward_note(options: Options, head: Head) -> str:
    tiles = plans.tiles_of(_options(options), _shapes(head))
    assert tiles is not None
    return str(tiles) + _cost_of_rounding(head, tiles.chunk)


def _backward_note(options: Options, given: BackwardOperands) -> str:
    tiles = _backward_tiles(options, given)
    note = str(tiles) + _cost_of_rounding(given.head, tiles.chunk)
    if options.gradient_filter_eps is not None:
        note += "; `gradient_filter_eps` spares the products of blocks dropped"
    return note


def _cost_of_rounding(head: Head, classes: int | None) -> str:
    """A clause about a float32 weight; empty for others."""
    if not _is_rounded(head):
        return ""
    features, size = head.hidden.shape[1], head.hidden.dtype.itemsize
    assert classes is not None
    classes = min(classes, head.weight.size // features)
    copied = classes * features * size / 2**20
    return (
        f"; the float32 weight is rounded to {head.hidden.dtype} in copies of "
        f"{classes} classes, {copied:.3g} MiB"
    )


def _shapes(head: Head) -> plans.Operands:
    """Operands for the choice of tiles only, which reads their shapes."""
    given = {n: x for n, x in head.modifiers._asdict().items() if x is not None}
    per_row = {n: x for n, x in given.items() if n in ("scale", "temperature")}
    per_class = {n: x for n, x in given.items() if n not in per_row}
    return plans.Operands(head.hidden, head.weight, head.labels, per_row, per_class)


FORWARD = Implementation(
    "pallas_gpu", _forward, _forward_why_not, platform="cuda", note=_forward_note
)
BACKWARD = Implementation(
    "pallas_gpu", _backward, _backward_why_not, platform="cuda", note=_backward_note
)
