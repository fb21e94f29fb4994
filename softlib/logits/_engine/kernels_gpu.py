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
        options.statistics, options.softcap, options.gradient_filter_eps
    )


def _operands(head: Head) -> plans.Operands:
    tables = shared.tables_of(head)
    return plans.Operands(head.hidden, head.weight, head.labels, *tables)


def _why_not(options: Options, head: Head) -> str | None:
    hidden, weight = head.hidden.dtype, head.weight.dtype
    reason = limits.why_not_hopper(devices.gpu_generation())
    reason = reason or shared.why_not_arrays(options, head, (jnp.bfloat16, jnp.float16))
    if reason is not None:
        return reason
    if hidden != weight:
        return f"`hidden` is {hidden}, `weight` is {weight}"
    if head.dtype != jnp.float32:
        return f"the sums are {head.dtype}, not float32"
    if options.vocab_axis != 0:
        return "the classes of the weight are not its first axis (vocab_axis)"
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


def _forward_note(options: Options, head: Head) -> str:
    return str(plans.tiles_of(_options(options), _shapes(head)))


def _backward_note(options: Options, given: BackwardOperands) -> str:
    tiles = _backward_tiles(options, given)
    if options.gradient_filter_eps is None:
        return str(tiles)
    return f"{tiles}; `gradient_filter_eps` spares the products of blocks dropped"


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
