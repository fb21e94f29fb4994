"""The row-statistics kernels for TPUs, behind the operations of a linear head."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu import row_statistics_plan as plans
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation

from . import kernel_operands as shared
from .head import Head, HeadGradient
from .stream import BackwardOperands
from .tile import Options, RowStatistics


def _forward(options: Options, head: Head) -> RowStatistics:
    from pallas_kernels.tpu import row_statistics as kernels

    found = kernels.forward(_options(options), _operands(head))
    return RowStatistics(**found)


def _backward(options: Options, given: BackwardOperands) -> HeadGradient:
    from pallas_kernels.tpu import row_statistics as kernels

    head, rows, _, further = given
    asked, operands, g = _options(options), _operands(head), rows.cotangents
    known = shared.known_of(rows)
    of_rows = kernels.gradient_of_hidden(asked, operands, known, g.label_logits)
    of_classes = kernels.gradient_of_weight(asked, operands, known, g.label_logits)
    gradient = shared.gradient_of(
        head, of_rows.hidden, of_classes.weight, of_classes.bias, of_rows.per_row
    )
    return gradient.added_to(further)


def _options(options: Options) -> plans.Options:
    return plans.Options(
        options.statistics,
        options.softcap,
        options.vocab_axis,
        limits.PRECISIONS[options.precision],
        options.gradient_filter_eps,
    )


def _operands(head: Head) -> plans.Operands:
    tables = shared.tables_of(head)
    return plans.Operands(head.hidden, head.weight, head.labels, *tables)


def _why_not(options: Options, head: Head) -> str | None:
    arrays = {"hidden": head.hidden, "weight": head.weight}
    reason = shared.why_not_sizes(options, head)
    reason = reason or limits.why_wrong_dtype(arrays, (jnp.float32, jnp.bfloat16))
    if reason is None and head.dtype != jnp.float32:
        return f"the sums are {head.dtype}, not float32"
    return reason or shared.why_not_options(options, head)


def _no_tiles(kinds: tuple[Any, ...], options: Options, head: Head) -> str | None:
    found = [plans.tiles_of(k, _options(options), _shapes(head)) for k in kinds]
    return "no tile fits the vector memory" if None in found else None


def _forward_why_not(options: Options, head: Head) -> str | None:
    return _why_not(options, head) or _no_tiles(("forward",), options, head)


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    kinds = ("hidden", "weight")
    return _why_not(options, given.head) or _no_tiles(kinds, options, given.head)


def _forward_note(options: Options, head: Head) -> str:
    return str(plans.tiles_of("forward", _options(options), _shapes(head)))


def _backward_note(options: Options, given: BackwardOperands) -> str:
    asked, shapes = _options(options), _shapes(given.head)
    hidden, weight = (plans.tiles_of(k, asked, shapes) for k in ("hidden", "weight"))
    note = f"{hidden} for hidden, {weight} for the weight"
    if options.gradient_filter_eps is not None:
        note += "; `gradient_filter_eps` spares the products of tiles dropped whole"
    return note


def _shapes(head: Head) -> plans.Operands:
    """Operands for the choice of tiles only, which reads their shapes."""
    empty: dict[str, Array] = {}
    return plans.Operands(head.hidden, head.weight, head.labels, empty, empty)


FORWARD = Implementation(
    "pallas_tpu", _forward, _forward_why_not, platform="tpu", note=_forward_note
)
BACKWARD = Implementation(
    "pallas_tpu", _backward, _backward_why_not, platform="tpu", note=_backward_note
)
