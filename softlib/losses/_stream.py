"""Row statistics of `hidden @ weight` in plain JAX: two streams over the vocabulary.

The logits exist one (rows, classes) tile at a time. Forward, a fold of the statistics;
backward, every tile is computed again and gives its slice of the weight's gradient,
finished within the step, and its share of the hidden gradient. The weight is sliced,
never padded, transposed or copied; the loop order (vocabulary outside, row groups
inside) keeps every sum in float32 without a float32 buffer of the weight's size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying

from . import _chunks, _tile
from ._tile import Modifiers, Options, RowCotangents, RowStatistics


class Head(NamedTuple):
    """The operands of a linear row-statistics operation; rows are one axis."""

    hidden: Float[Array, "rows D"]
    weight: Float[Array, "V D"] | Float[Array, "D V"]
    labels: Int[Array, "rows L"] | None  # -1 for a label outside the vocabulary
    bias: Float[Array, " V"] | None
    logit_scale: Float[Array, "..."] | None
    temperature: Float[Array, "..."] | None
    class_where: Array | None

    @property
    def modifiers(self) -> Modifiers:
        return Modifiers(
            self.bias, self.logit_scale, self.temperature, self.class_where
        )

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(
            self.hidden, self.weight, self.bias, self.logit_scale, self.temperature
        )


class HeadGradient(NamedTuple):
    hidden: Array
    weight: Array
    bias: Array | None
    logit_scale: Array | None
    temperature: Array | None


class BackwardOperands(NamedTuple):
    head: Head
    rows: RowCotangents


class _Sums(NamedTuple):
    """What the backward pass adds up per row, in the grouped view of `_chunks`."""

    hidden: Float[Array, "R G D"] | Float[Array, "D 1 R"]
    logit_scale: Float[Array, "R G"] | None
    temperature: Float[Array, "R G"] | None


class _ClassSums(NamedTuple):
    """What the backward pass adds up per class, within one step."""

    weight: Float[Array, "D classes"] | Float[Array, "classes D"]
    bias: Float[Array, " classes"] | None


def forward(options: Options, head: Head) -> RowStatistics:
    rows = head.hidden.shape[0]
    vocabulary = head.weight.shape[options.vocab_axis]
    groups, size = _pieces(options, head)

    def of_group(group: int | Int[Array, ""]) -> RowStatistics:
        mine = _rows_of(head, group, groups)

        def step(state, start, size):
            part = _classes_of(mine, start, size, options)
            z = _logits(part, options).z
            return _tile.update(state, z, start, mine.labels, part.class_where)

        state = _tile.init(options, rows // groups, mine.labels, head.dtype)
        state = match_varying(state, head.hidden)
        return _tile.finalize(_chunks.fold(step, state, vocabulary, size), options)

    if groups == 1:
        return of_group(0)
    visit = lambda carry, group: (carry, of_group(group))
    _, stacked = lax.scan(visit, None, jnp.arange(groups))
    return jax.tree.map(lambda a: _chunks.ungrouped(jnp.moveaxis(a, 0, 1)), stacked)


def backward(options: Options, operands: BackwardOperands) -> HeadGradient:
    head, statistics = operands
    rows, features = head.hidden.shape
    vocabulary = head.weight.shape[options.vocab_axis]
    groups, size = _pieces(options, head)
    dtype = head.dtype
    # Which way a tile lies decides which operands of the products are transposed. Over
    # a table (V, D) it lies best as (classes, rows), and the gradient of hidden as (D,
    # rows); turning that costs a copy, so this is done only where hidden is small.
    # Few rows are bound by reading the weight: there a copy of its slice does not pay.
    many = rows // groups >= 256
    across = options.vocab_axis == 0 and groups == 1 and many
    copied = _copied_on_cpu if many else lambda array: array
    zeros = lambda *shape: match_varying(jnp.zeros(shape, dtype), head.hidden)

    def of_tile(sums, part, start, group):
        """One tile's share of the sums per row and per class."""
        mine = _rows_of(part, group, groups)
        known = jax.tree.map(lambda a: _chunks.group_of(a, group, groups), statistics)
        tile = _logits(mine, options, class_axis=0 if across else 1)
        found = _tile.cotangent_of_raw(
            tile, start, mine.labels, known, options, mine.modifiers
        )
        # Products in the dtype of the operands, as forward; their sums are wider.
        raw = found.raw.astype(_product_dtype(head))
        if across:
            columns = copied(mine.weight.T)
            dhidden = product(columns, raw, (1, 0), options, dtype)
            dweight = product(raw, mine.hidden, (1, 0), options, dtype)
        else:
            columns = copied(mine.hidden.T)
            dhidden = product(raw, mine.weight, (1, options.vocab_axis), options, dtype)
            dweight = product(columns, raw, (1, 0), options, dtype)
        add = lambda total, more: _chunks.add_to_group(total, more, group, groups)
        added = _Sums(dhidden, found.logit_scale, found.temperature)
        return jax.tree.map(add, sums, added), _ClassSums(dweight, found.bias)

    def step(carry, start, size):
        sums, dweight, dbias = carry
        part = _classes_of(head, start, size, options)
        if groups == 1:
            sums, classes = of_tile(sums, part, start, 0)
        else:

            def visit(group, both):
                sums, classes = both
                sums, more = of_tile(sums, part, start, group)
                return sums, jax.tree.map(jnp.add, classes, more)

            none = _ClassSums(
                zeros(features, size), None if dbias is None else zeros(size)
            )
            sums, classes = lax.fori_loop(0, groups, visit, (sums, none))
        slice_ = classes.weight.astype(dweight.dtype)
        if options.vocab_axis == 0 and not across:
            slice_ = copied(slice_).T
        dweight = lax.dynamic_update_slice_in_dim(
            dweight, slice_, start, options.vocab_axis
        )
        if dbias is not None:
            assert classes.bias is not None
            dbias = lax.dynamic_update_slice_in_dim(dbias, classes.bias, start, 0)
        return sums, dweight, dbias

    row_sums = lambda operand: (
        None if operand is None else zeros(rows // groups, groups)
    )
    sums = _Sums(
        zeros(features, 1, rows) if across else zeros(rows // groups, groups, features),
        row_sums(head.logit_scale),
        row_sums(head.temperature),
    )
    dweight = match_varying(jnp.zeros_like(head.weight), head.hidden)
    dbias = None if head.bias is None else zeros(vocabulary)
    sums, dweight, dbias = _chunks.fold(step, (sums, dweight, dbias), vocabulary, size)
    dhidden = _chunks.ungrouped(sums.hidden)
    per_row = functools.partial(jax.tree.map, _chunks.ungrouped)  # None stays None
    return HeadGradient(
        (dhidden.T if across else dhidden).astype(head.hidden.dtype),
        dweight,
        _tile.cast_like(head.bias, dbias),
        _tile.summed_like(head.logit_scale, per_row(sums.logit_scale)),
        _tile.summed_like(head.temperature, per_row(sums.temperature)),
    )


def _pieces(options: Options, head: Head) -> tuple[int, int]:
    """The number of row groups and of classes per step."""
    rows, features = head.hidden.shape
    vocabulary = head.weight.shape[options.vocab_axis]
    groups = _chunks.row_groups(rows, features)
    size = options.vocab_chunk
    if size is None:
        size = _chunks.vocab_chunk(rows // groups, features, vocabulary)
    return groups, min(size, vocabulary)


def _classes_of(head: Head, start: Any, size: int, options: Options) -> Head:
    def cut(array: Array, axis: int = 0) -> Array:
        return lax.dynamic_slice_in_dim(array, start, size, axis)

    return head._replace(
        weight=cut(head.weight, options.vocab_axis),
        bias=jax.tree.map(cut, head.bias),
        class_where=jax.tree.map(cut, head.class_where),
    )


def _rows_of(head: Head, group: Any, groups: int) -> Head:
    def take(array: Array) -> Array:
        return _chunks.group_of(array, group, groups) if array.ndim else array

    return head._replace(
        hidden=take(head.hidden),
        labels=jax.tree.map(take, head.labels),
        logit_scale=jax.tree.map(take, head.logit_scale),
        temperature=jax.tree.map(take, head.temperature),
    )


def _logits(head: Head, options: Options, class_axis: int = 1) -> _tile.Tile:
    operands = (head.hidden, head.weight)
    contract = (1, 1 - options.vocab_axis)
    if class_axis == 0:
        operands, contract = operands[::-1], contract[::-1]
    raw = product(*operands, contract, options, head.dtype)
    return _tile.logits_of(raw, options, head.modifiers, class_axis)


def _copied_on_cpu(array: Array) -> Array:
    """The array, laid out in memory as it stands before a product or a transpose.

    XLA folds a transpose into the product next to it. On a CPU a product of transposed
    operands takes up to a quarter longer, more than the copy; elsewhere it does not.
    """
    keep = lambda array: array
    return lax.platform_dependent(array, cpu=lax.optimization_barrier, default=keep)


def _product_dtype(head: Head) -> Any:
    return jnp.promote_types(head.hidden.dtype, head.weight.dtype)


def product(
    a: Array, b: Array, contract: tuple[int, int], options: Options, dtype: Any
) -> Array:
    common = jnp.promote_types(a.dtype, b.dtype)
    return lax.dot_general(
        a.astype(common),
        b.astype(common),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=options.precision,
        preferred_element_type=dtype,
    )
