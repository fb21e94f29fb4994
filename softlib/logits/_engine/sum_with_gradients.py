"""The sum of a loss over rows, with its gradients computed in the forward pass.

The gradients of a loss per row need the cotangents of all rows. They are known only in
the backward pass, which has to compute the logits again: four products. A sum has one
cotangent, a scalar factor of the gradients. So the forward pass forms the logits of a
block of rows, computes their statistics and pulls the loss back at once: three
products.

It takes memory for a block of logits, and for the gradients until the backward pass. If
there are several blocks, the weight's gradient is summed in float32.

On a TPU or GPU a block of the logits of all classes would be small beside the weight
that each block reads. There all rows are one block, and the logits that exceed the
memory for a block are computed again: four products, in large steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib import _dispatch
from softlib._dispatch import Implementation, Operation, absent
from softlib._sharding import match_varying
from softlib._symbolic import has_symbolic_shape
from softlib.typing import Implementations

from . import chunks as _chunks, operations, stream as _stream, tile as _tile
from .accelerator import Accelerator
from .chunks import RowCut
from .head import ClassSums, Head, HeadGradient, RowSums
from .stream import BackwardOperands
from .tile import Options, RowStatistics
from .tile_gradient import RowCotangents


class RowTerms(NamedTuple):
    """Arguments of a loss besides the statistics, per row or for all rows.

    `factors` (pytree, rows first) and `scalars` (pytree of scalars) have gradients,
    `marks` (pytree, rows first) have none.
    """

    factors: Any
    scalars: Any
    marks: Any


class SumOperands(NamedTuple):
    head: Head
    terms: RowTerms


# (statistics, terms of the same rows) -> loss of each of these rows
type RowLoss = Callable[[RowStatistics, RowTerms], Float[Array, " rows"]]


def total(
    names: Implementations,
    options: Options,
    loss: RowLoss,
    operands: SumOperands,
) -> Float[Array, ""]:
    """Sum of `loss` over all rows; all statistics that it reads have gradients."""
    made = _dispatch.plan(operations.LINEAR, names, options, operands.head)
    # Blocks of rows need a known size; the plain form streams without.
    if made.is_reference or has_symbolic_shape(operands.head.hidden):
        return _plain(names, options, loss, operands)
    if not _is_quicker(options, operands.head):
        return _plain(names, options, loss, operands)
    return _total(names, options, loss, operands)


def _is_quicker(options: Options, head: Head) -> bool:
    """Whether gradients in the forward pass take less time than a loss per row.

    They store the logits of a block, which a stream does not. That is faster if a
    product takes longer than storing its result, or if the logits are so few that both
    store them. A given `token_chunk` always chooses it.
    """
    rows, features = head.hidden.shape
    few = rows * head.weight.shape[options.vocab_axis] <= _chunks.WHOLE
    asked = options.token_chunk is not None
    return asked or few or features >= _chunks.KEPT_FEATURES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _total(
    names: Implementations, options: Options, loss: RowLoss, operands: SumOperands
) -> Float[Array, ""]:
    return _plain(names, options, loss, operands)


def _plain(
    names: Implementations, options: Options, loss: RowLoss, operands: SumOperands
) -> Float[Array, ""]:
    statistics = operations.linear(names, options, operands.head)
    return loss(statistics, operands.terms).sum()


def _total_forward(
    names: Implementations, options: Options, loss: RowLoss, operands: SumOperands
):
    return _dispatch.run(LINEAR_SUM, names, (options, loss), operands)


def _total_backward(
    names: Implementations,
    options: Options,
    loss: RowLoss,
    gradients: tuple[HeadGradient, Any, Any],
    cotangent: Float[Array, ""],
):
    scaled = lambda g: (g.astype(cotangent.dtype) * cotangent).astype(g.dtype)
    head, factors, scalars = jax.tree.map(scaled, gradients)
    return (
        SumOperands(
            head.as_operands(),
            RowTerms(factors, scalars, None),
        ),
    )


_total.defvjp(_total_forward, _total_backward)


def _note(options: tuple[Options, RowLoss], operands: SumOperands) -> str | None:
    return operations.gradient_note(options[0], operands)


class _Sums(NamedTuple):
    """Sums over blocks of rows."""

    value: Float[Array, ""]
    classes: ClassSums
    scalars: Any
    rows: _chunks.Total  # of _PerRow


class _PerRow(NamedTuple):
    head: RowSums
    factors: Any


def _value_and_gradients(
    options_and_loss: tuple[Options, RowLoss], operands: SumOperands
) -> tuple[Float[Array, ""], tuple[HeadGradient, Any, Any]]:
    options, loss = options_and_loss
    head, terms = operands
    vocabulary = head.weight.shape[options.vocab_axis]
    cut = _blocks(options, head)

    def of_block(group, classes):
        mine = _stream.rows_of(head, cut, group)
        own = RowTerms(
            cut.take(terms.factors, group), terms.scalars, cut.take(terms.marks, group)
        )
        rows = mine.hidden.shape[0]
        size, keep = _stream.classes_per_step(options, head, rows), vocabulary
        if options.accelerator is not None:
            keep = options.accelerator.kept_classes(rows, keep, size, head.dtype)

        def buffers():
            return _stream.products_buffer(options, mine, size, keep) if keep else None

        found, kept = _stream.statistics(
            operations.with_residuals(options), mine, size, buffers
        )

        def value(statistics, factors, scalars):
            return loss(statistics, RowTerms(factors, scalars, own.marks)).sum()

        asked = _tile.only(found, options)
        found_value, pull = jax.vjp(value, asked, own.factors, own.scalars)
        cotangents, factors, scalars = pull(jnp.ones_like(found_value))
        known = RowCotangents(found.lse, found.mean_logit, cotangents)
        sums, classes = _stream.gradient_sums(
            options,
            BackwardOperands(mine, known, kept),
            RowCut(1, rows),
            size,
            classes,
            add=not cut.whole,
        )
        return found_value, scalars, _PerRow(sums, factors), classes

    def visit(sums: _Sums, group) -> _Sums:
        value, scalars, per_row, classes = of_block(group, sums.classes)
        return _Sums(
            sums.value + value,
            classes,
            jax.tree.map(jnp.add, sums.scalars, scalars),
            cut.put(sums.rows, per_row, group),
        )

    # Several blocks add to the weight's gradient, which must not be narrow then.
    wide = head.weight.dtype if cut.whole else head.dtype
    classes = head.class_buffers(wide)
    value, scalars, per_row, _ = jax.eval_shape(of_block, 0, classes)
    zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
    start = _Sums(zeros(value), classes, zeros(scalars), cut.zeros(per_row))
    sums = cut.fold(visit, match_varying(start, head.hidden))
    rows_found: _PerRow = cut.joined(sums.rows)
    gradient = head.gradient(rows_found.head, sums.classes)
    return sums.value, (gradient, rows_found.factors, sums.scalars)


def _blocks(options: Options, head: Head) -> RowCut:
    """The blocks of rows; a gradient filter needs contiguous ones."""
    if options.accelerator is not None and options.token_chunk is None:
        return _stream.pieces(options, head)[0]
    vocabulary = head.weight.shape[options.vocab_axis]
    strided = options.gradient_filter_eps is None
    return _chunks.row_blocks(
        head.rows, vocabulary, options.token_chunk, strided=strided
    )


def _on_accelerator(
    options_and_loss: tuple[Options, RowLoss], operands: SumOperands, copies: int
) -> tuple[Float[Array, ""], tuple[HeadGradient, Any, Any]]:
    options, loss = options_and_loss
    options = options.on(Accelerator(copies))
    return _value_and_gradients((options, loss), operands)


LINEAR_SUM = Operation(
    "linear_sum_with_gradients",
    (
        absent("pallas_tpu", "tpu"),
        absent("pallas_gpu", "cuda"),
        Implementation(
            "xla", _value_and_gradients, note=_note, accelerated=_on_accelerator
        ),
    ),
)
