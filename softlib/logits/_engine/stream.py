"""Row statistics of logits in plain JAX: two streams over the vocabulary.

The logits exist one (rows, classes) tile at a time. The forward stream folds the
statistics. The backward stream computes every tile again; a step finishes its slice of
the weight's gradient and adds to the gradient of hidden. The weight is sliced, never
padded, transposed or copied. The loop order (vocabulary outside, groups of rows inside)
keeps every sum in float32 without a float32 buffer of the weight's size.

The forward stream may keep the first tiles for the backward stream, which saves a
product, in one of the forms of `kept`: on a CPU with few rows, of all classes if they
are one tile; on an accelerator in the memory that `accelerator` allows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib._barrier import barrier_on_cpu
from softlib._compiled_once import compiled_once
from softlib._largest import largest
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import (
    chunks as _chunks,
    kept as _kept,
    slices as _slices,
    tile as _tile,
    tile_gradient,
)
from .accelerator import Accelerator
from .chunks import Index, RowCut
from .head import Head
from .kept import Kept, Products
from .operand import Operand
from .tile import Options, RowStatistics, Tile
from .tile_gradient import RawCotangents, RowCotangents


class BackwardOperands(NamedTuple):
    """The operands of a gradient: head, residuals and cotangents."""

    head: Any  # Operand
    rows: RowCotangents
    # Of the first classes, in the layout of the forward pass.
    kept: Kept | None = None
    # An existing gradient of the weight, to which that of this head is added.
    further: Float[Array, "V D"] | Float[Array, "D V"] | None = None


# ------------------------------------------------------------------------------ forward
def forward(options: Options, head: Operand) -> RowStatistics:
    cut, size = pieces(options, head)

    def of(group: Index | None) -> RowStatistics:
        mine = rows_of(head, cut, group)
        return statistics(options, mine, size)[0]

    return by_rows(cut, of, head.like)


def by_rows(cut: RowCut, of: Callable[[Index | None], Any], like: Array) -> Any:
    """Results of `of(group)` for all groups of rows, as arrays over all rows."""
    if cut.whole:
        return of(0)
    piece = jax.eval_shape(of, 0)
    total = match_varying(cut.zeros(piece), like)
    visit = lambda total, group: cut.put(total, of(group), group)
    return cut.joined(cut.fold(visit, total))


def fold_logits[Carry](
    options: Options,
    head: Operand,
    begin: Callable[[int], Carry],
    step: Callable[[Carry, Array, Index, Any], Carry],
    of_rows: Any,
) -> Carry:
    """Folds `step(carry, z, start, of_rows)` over tiles of the final logits.

    `z` are the logits of a group of rows and of the classes from `start` on, -inf where
    a class is not selected. `step` gets `of_rows`, numbers per row, of these rows only.
    `begin(rows)` makes the carry of a group. The result holds the carries of all rows.
    """
    cut, size = pieces(options, head)

    def of(group: Index | None) -> Carry:
        mine, own = rows_of(head, cut, group), cut.take(of_rows, group)

        def visit(carry: Carry, start: Index, size: int) -> Carry:
            sliced = classes_of(mine, start, size, options)
            z = tile_of(sliced, options).z
            z = _tile.select(z, sliced.modifiers.class_where, -jnp.inf)
            return step(carry, z, start, own)

        return _chunks.fold(visit, begin(mine.rows), head.vocabulary(options), size)

    return by_rows(cut, of, head.like)


def forward_keeping(options: Options, head: Head) -> tuple[RowStatistics, Kept | None]:
    """The statistics, and what the machine of these steps keeps."""
    if options.accelerator is None:
        keep = _kept_classes(options, head)[1]
    else:
        keep = _kept.classes_of_exponentials(options, head)
    if keep == 0:
        return forward(options, head), None
    size = classes_per_step(options, head, head.rows)
    return statistics(options, head, size, lambda: kept_buffers(options, head))


def kept_buffers(options: Options, head: Head, value: float = 0.0) -> Kept | None:
    """Arrays for what `forward_keeping` keeps, of one value; None if it is nothing."""
    if options.accelerator is not None:
        return _kept.exponentials(options, head, value)
    size, keep = _kept_classes(options, head)
    return products_buffer(options, head, size, keep, value) if keep else None


def products_buffer(
    options: Options, head: Operand, size: int, keep: int, value: float = 0.0
) -> Products:
    """An array for the raw products of `keep` classes in steps of `size`."""
    rows = head.rows
    shape = (keep, rows) if _across(options, head, rows, size) else (rows, keep)
    return Products(match_varying(jnp.full(shape, value, head.dtype), head.like))


def _kept_classes(options: Options, head: Operand) -> tuple[int, int]:
    """Classes per step, and the number of first classes whose products are kept."""
    cut, size = pieces(options, head)
    rows, vocabulary = head.rows, head.vocabulary(options)
    if not cut.whole:
        return size, 0
    if size == vocabulary and head.is_one_tile(options, rows):
        return size, vocabulary
    return size, _chunks.kept_classes(rows, head.features, vocabulary, size)


def statistics(
    options: Options,
    head: Operand,
    size: int,
    buffers: Callable[[], Kept | None] = lambda: None,
) -> tuple[RowStatistics, Kept | None]:
    """Statistics of one group of rows, and what fills the buffers that it makes."""
    rows = head.rows
    vocabulary = head.vocabulary(options)
    state = _tile.init(options, rows, head.labels, head.ranked, head.dtype)
    state, kept = match_varying(state, head.like), buffers()
    axis = 0 if kept is not None and _across(options, head, rows, size) else 1

    def update(state, start, size):
        sliced = classes_of(head, start, size, options)
        tile = tile_of(sliced, options, axis)
        state = _tile.update(
            state,
            tile,
            start,
            head.labels,
            head.ranked,
            sliced.modifiers,
            exclude_labels=options.exclude_labels,
        )
        return state, tile, sliced.modifiers

    def step_keeping(carry, start, size):
        state, kept = carry
        state, tile, modifiers = update(state, start, size)
        return state, kept.with_step(state, tile, start, modifiers)

    first = 0
    if kept is not None:
        first = kept.count(axis)
        state, kept = _chunks.fold(step_keeping, (state, kept), first, size)
    step = lambda state, start, size: update(state, start, size)[0]
    state = _chunks.fold(step, state, vocabulary, size, first)
    return _tile.finalize(state, options), kept


@compiled_once(0, 2)
def top_classes(
    options: Options, head: Operand, count: int
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The greatest logits of each row and their classes, the lower first on ties.

    Logits -inf and classes -1 fill up rows with fewer selected classes than `count`.
    """
    cut, size = pieces(options, head)
    inf = jnp.inf
    features = head.features
    vocabulary = head.vocabulary(options)
    if options.vocab_chunk is None and size < vocabulary:
        # A search in few large tiles takes less time than in many small ones.
        size = max(size, _chunks.search_chunk(cut.size, features, vocabulary))
        size = min(size, vocabulary)

    def of(group: Index | None) -> tuple[Array, Array]:
        mine = rows_of(head, cut, group)

        def found_in(start, size, least=None):
            sliced = classes_of(mine, start, size, options)
            z = tile_of(sliced, options).z
            z = _tile.select(z, sliced.modifiers.class_where, -inf)
            if least is not None:
                # The search skips entries that cannot be among the best.
                z = jnp.where(z <= least, -inf, z)
            values, columns = largest(z, min(count, size))
            return values, start + columns

        def step(best, start, size):
            values, ids = found_in(start, size, best[0][:, -1:])
            ids = jnp.concatenate([best[1], ids], axis=1)
            both = jnp.concatenate([best[0], values], axis=1)
            values, columns = largest(both, count)
            return values, jnp.take_along_axis(ids, columns, axis=1)

        # The first tile starts the search and has at least `count` classes.
        first = min(max(size, count), vocabulary)
        best = found_in(0, first)
        values, ids = _chunks.fold(step, best, vocabulary, size, first)
        return values, jnp.where(values == -inf, -1, ids)

    return by_rows(cut, of, head.like)


# ----------------------------------------------------------------------------- backward
def backward(options: Options, operands: BackwardOperands) -> Any:
    """The gradient of the operands, in their dtypes."""
    head, further = operands.head, operands.further
    cut, size = pieces(options, head)
    classes = head.class_buffers()
    if further is not None:
        classes = classes._replace(weight=further)
    add = further is not None
    sums, classes = gradient_sums(options, operands, cut, size, classes, add=add)
    return head.gradient(sums, classes)


def gradient_sums(
    options: Options,
    operands: BackwardOperands,
    cut: RowCut,
    size: int,
    classes: Any,
    *,
    add: bool = False,
) -> tuple[Any, Any]:
    """Gradients per row, and the buffers per class, written or added to in place.

    `classes` are the operand's `class_buffers`, perhaps with other sums in them.
    """
    head, known, kept, _ = operands

    def cotangents(tiles, slices, start, group):
        (tile,), (sliced,) = tiles, slices
        rows = cut.take(known, group)
        found = tile_gradient.cotangent_of_raw(
            tile, start, sliced.labels, rows, options, sliced.modifiers
        )
        return (found,)

    (sums,), (classes,) = gradient_sums_of_heads(
        (options,), (head,), cotangents, cut, size, (classes,), kept=kept, add=add
    )
    return sums, classes


# (tiles, slices of the heads, first class, group of rows) -> cotangents of each tile
type TileCotangents = Callable[
    [tuple[Tile, ...], tuple[Operand, ...], Index, Index | None],
    tuple[RawCotangents, ...],
]


def gradient_sums_of_heads(
    options: tuple[Options, ...],
    heads: tuple[Operand, ...],
    cotangents: TileCotangents,
    cut: RowCut,
    size: int,
    classes: tuple[Any, ...],
    *,
    kept: Kept | None = None,
    add: bool = False,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """`gradient_sums` of several operands over the same classes, in one stream.

    Cotangents of a tile may depend on the tiles of all operands. `kept` is of the first
    classes of a single head only.
    """
    vocabulary = heads[0].vocabulary(options[0])
    lies_across = lambda own, head: _across(own, head, cut.size, size)
    across = cut.whole and all(map(lies_across, options, heads))
    class_axis = 0 if across else 1
    on_cpu = options[0].accelerator is None
    copies = on_cpu and size < vocabulary and _are_many(cut.size)
    copied = _copied_on_cpu if copies else lambda array: array

    def of_tile(total, slices, start, group, known):
        """Adds a tile to the sums per row; its sums per class, and its entries."""
        mine = tuple(sliced.rows_of(cut, group) for sliced in slices)
        if known is None:
            tiles = tuple(map(lambda m, o: tile_of(m, o, class_axis), mine, options))
        else:
            tiles = (known.tile(options[0], mine[0], start, class_axis),)
        found = cotangents(tiles, mine, start, group)
        pulled = [
            sliced.pull(own, cotangent, across, copied)
            for sliced, own, cotangent in zip(mine, options, found, strict=True)
        ]
        of_rows, of_classes, entries = zip(*pulled, strict=True)
        return cut.add(total, of_rows, group), of_classes, entries

    def step(carry, start, size, known=None):
        total, buffers = carry
        slices = tuple(map(lambda h, o: classes_of(h, start, size, o), heads, options))
        if cut.whole:
            total, found, entries = of_tile(total, slices, start, 0, known)
        else:

            def visit(both, group):
                total, found, entries = both
                total, more, own = of_tile(total, slices, start, group, None)
                entries = cut.put(entries, own, group)
                return total, jax.tree.map(jnp.add, found, more), entries

            none = tuple(
                head.no_class_sums(own, size)
                for head, own in zip(heads, options, strict=True)
            )
            no_entries = cut.zeros(
                tuple(sliced.no_entries(cut.size) for sliced in slices)
            )
            no_entries = match_varying(no_entries, heads[0].like)
            total, found, entries = cut.fold(visit, (total, none, no_entries))
            entries = cut.joined(entries)

        def write(buffer, values, axis):
            if add:
                old = _slices.slice_of(options[0], buffer, start, size, axis)
                values = old + values
            return _slices.with_slice(options[0], buffer, values, start, axis)

        operands = zip(heads, options, buffers, found, entries, strict=True)
        buffers = tuple(
            head.written(own, buffer, sums, own_entries, write, across, copied)
            for head, own, buffer, sums, own_entries in operands
        )
        return total, buffers

    def step_kept(carry, start, size):
        assert kept is not None
        known = kept.of_classes(start, size, class_axis)
        return step(carry, start, size, known)

    none = tuple(
        head.no_row_sums(own, cut.size, across)
        for head, own in zip(heads, options, strict=True)
    )
    carry = (match_varying(cut.zeros(none), heads[0].like), classes)
    first = 0
    if kept is not None:
        assert cut.whole
        assert len(heads) == 1
        first = kept.count(class_axis)
        carry = _chunks.fold(step_kept, carry, first, size)
    total, classes = _chunks.fold(step, carry, vocabulary, size, first)
    sums = cut.joined(total)
    if across:
        sums = tuple(map(lambda head, own: head.turned(own), heads, sums))
    return sums, classes


# ------------------------------------------------------------------------------- pieces
# With fewer rows, reading the weight takes longest: a copy of its slice does not pay.
_MANY = 256


def _are_many(rows: int) -> bool:
    return is_symbolic(rows) or rows >= _MANY


def _across(options: Options, head: Operand, rows: int, size: int) -> bool:
    """Whether tiles of `size` classes have shape (classes, rows), for uncut rows.

    The layout decides which operands of the products are transposed. For a table (V, D)
    tiles (classes, rows) are fastest, with the gradient of hidden as (D, rows). Its
    transpose costs a copy, so rows must be one group. A single tile of all classes is
    faster as (rows, classes), without any copy. Matrix units take operands of either
    layout, and sums over classes are fastest if these are the last axis.
    """
    if options.accelerator is not None:
        return False
    several = size < head.vocabulary(options)
    return head.lies_across(options) and several and _are_many(rows)


def pieces(options: Options, head: Operand) -> tuple[RowCut, int]:
    """The groups of rows, and the number of classes per step."""
    strided = options.gradient_filter_eps is None
    machine = options.accelerator
    most = None if machine is None else machine.most_rows(head.dtype)
    cut = _chunks.row_cut(
        head.rows, head.features, options.token_chunk, strided=strided, most=most
    )
    return cut, classes_per_step(options, head, cut.size)


def classes_per_step(options: Options, head: Operand, rows: int) -> int:
    vocabulary = head.vocabulary(options)
    size = options.vocab_chunk
    machine = options.accelerator
    if size is None and machine is not None:
        size = machine.classes(rows, head.features, vocabulary, head.dtype)
    elif size is None:
        size = vocabulary
        if not head.is_one_tile(options, rows):
            size = _chunks.vocab_chunk(rows, head.features, vocabulary)
        if head.modifiers.centre is not None:
            size = _chunks.halved(size)  # raw products are read again: two tiles
    return min(size, vocabulary)


def steps_on_accelerators(options: Options, head: Operand) -> str | None:
    """A sentence fragment: the steps of the stream there; None if it is one tile."""
    steps = pieces(options.on(Accelerator()), head)
    return steps_in_words(*steps, head.vocabulary(options))


def steps_in_words(cut: RowCut, size: int, vocabulary: int) -> str | None:
    if size == vocabulary:
        return None
    rows = "all rows" if cut.whole else f"{cut.size} rows"
    return f"on a TPU or GPU a step takes {size} classes of {rows}"


def classes_of(operand: Operand, start: Any, size: int, options: Options) -> Any:
    """The operand of a slice of the classes."""
    return operand.classes_of(start, size, options)


def rows_of(operand: Operand, cut: RowCut, group: Index | None) -> Any:
    """The operand of a group of rows."""
    return operand.rows_of(cut, group)


def tile_of(operand: Operand, options: Options, class_axis: int = 1) -> Tile:
    """The tile of logits of an operand sliced to rows and classes."""
    raw = operand.raw(options, class_axis)
    return _tile.logits_of(raw, options, operand.modifiers, class_axis)


def _copied_on_cpu(array: Array) -> Array:
    """The array with a barrier on CPUs, so that a transpose of it is a copy in memory.

    XLA folds a transpose into the product next to it. On a CPU a product of transposed
    operands takes up to a quarter longer, which is more than the copy takes.
    """
    return barrier_on_cpu(array)
