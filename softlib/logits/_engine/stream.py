"""Row statistics of `hidden @ weight` in plain JAX: two streams over the vocabulary.

The logits exist one (rows, classes) tile at a time. Forward, a fold of the statistics;
backward, every tile is computed again and gives its slice of the weight's gradient,
finished within the step, and its share of the hidden gradient. The weight is sliced,
never padded, transposed or copied; the loop order (vocabulary outside, row groups
inside) keeps every sum in float32 without a float32 buffer of the weight's size.

For few rows, where one more product costs more than memory, the forward stream keeps
the raw products of its first classes and the backward one finds them there: of all
classes where these are one tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from softlib._barrier import barrier_on_cpu
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._largest import largest
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import chunks as _chunks, tile as _tile, tile_gradient
from .chunks import Index, RowCut
from .tile import Modifiers, Options, Ranked, RowStatistics, Tile
from .tile_gradient import RawCotangents, RowCotangents


class Head(NamedTuple):
    """The operands of a linear row-statistics operation; rows are one axis."""

    hidden: Float[Array, "rows D"]
    weight: Float[Array, "V D"] | Float[Array, "D V"]
    labels: Int[Array, "rows L"] | None  # -1 for a label outside the vocabulary
    modifiers: Modifiers
    ranked: Ranked | None = None

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(self.hidden, self.weight, *self.modifiers.floating)


class HeadGradient(NamedTuple):
    hidden: Array
    weight: Array
    modifiers: Modifiers  # without class_where

    def added_to(self, weight: Array | None) -> "HeadGradient":
        """With a gradient of the weight that exists already."""
        return self if weight is None else self._replace(weight=weight + self.weight)


class BackwardOperands(NamedTuple):
    head: Head
    rows: RowCotangents
    # Raw products of the first classes, as the forward pass laid them.
    kept: Float[Array, "rows K"] | Float[Array, "K rows"] | None = None
    # A gradient of the weight that exists already; what is found is added to it.
    further: Float[Array, "V D"] | Float[Array, "D V"] | None = None


class RowSums(NamedTuple):
    """What the backward pass adds up per row."""

    hidden: Float[Array, "rows D"] | Float[Array, "D rows"]
    logit_scale: Float[Array, " rows"] | None
    # None also where it follows from the gradient of hidden.
    temperature: Float[Array, " rows"] | None


class ClassSums(NamedTuple):
    """What the backward pass adds up per class."""

    weight: Array
    bias: Float[Array, " classes"] | None
    class_log_weights: Float[Array, " classes"] | None = None


# ------------------------------------------------------------------------------ forward
def forward(options: Options, head: Head) -> RowStatistics:
    cut, size = pieces(options, head)

    def of(group: Index | None) -> RowStatistics:
        mine = rows_of(head, cut, group)
        return statistics(options, mine, size)[0]

    return by_rows(cut, of, head.hidden)


def by_rows(cut: RowCut, of: Callable[[Index | None], Any], like: Array) -> Any:
    """What `of` finds for each group of rows, as arrays over all rows."""
    if cut.whole:
        return of(0)
    piece = jax.eval_shape(of, 0)
    total = match_varying(cut.zeros(piece), like)
    visit = lambda total, group: cut.put(total, of(group), group)
    return cut.joined(cut.fold(visit, total))


def forward_keeping(options: Options, head: Head) -> tuple[RowStatistics, Array | None]:
    """The statistics, with what the backward pass should find stored."""
    size, keep = _kept_classes(options, head)
    if keep == 0:
        return forward(options, head), None
    return statistics(options, head, size, keep)


def kept_shape(options: Options, head: Head) -> tuple[int, int] | None:
    """Shape of the array that `forward_keeping` adds to the statistics, if it does."""
    size, keep = _kept_classes(options, head)
    rows = head.hidden.shape[0]
    if keep == 0:
        return None
    return (keep, rows) if _across(options, head, rows, size) else (rows, keep)


def _kept_classes(options: Options, head: Head) -> tuple[int, int]:
    """Classes of one step, and how many of the first classes keep their products."""
    cut, size = pieces(options, head)
    rows, features = head.hidden.shape
    vocabulary = head.weight.shape[options.vocab_axis]
    if not cut.whole:
        return size, 0
    if size == vocabulary and _is_one_tile(options, head, rows):
        return size, vocabulary
    return size, _chunks.kept_classes(rows, features, vocabulary, size)


def statistics(
    options: Options, head: Head, size: int, keep: int = 0
) -> tuple[RowStatistics, Array | None]:
    """Of rows that are one piece; with the raw products of the first `keep` classes."""
    rows = head.hidden.shape[0]
    vocabulary = head.weight.shape[options.vocab_axis]
    axis = 0 if keep and _across(options, head, rows, size) else 1

    def update(state, start, size):
        part = classes_of(head, start, size, options)
        tile = tile_of(part, options, axis)
        state = _tile.update(
            state,
            tile,
            start,
            head.labels,
            head.ranked,
            part.modifiers,
            exclude_labels=options.exclude_labels,
        )
        return state, tile.raw

    def step_keeping(carry, start, size):
        state, kept = carry
        state, raw = update(state, start, size)
        return state, _chunks.with_slice(kept, raw, start, axis)

    state = _tile.init(options, rows, head.labels, head.ranked, head.dtype)
    state, kept = match_varying(state, head.hidden), None
    if keep:
        shape = (keep, rows) if axis == 0 else (rows, keep)
        kept = match_varying(jnp.zeros(shape, head.dtype), head.hidden)
        state, kept = _chunks.fold(step_keeping, (state, kept), keep, size)
    step = lambda state, start, size: update(state, start, size)[0]
    state = _chunks.fold(step, state, vocabulary, size, keep)
    return _tile.finalize(state, options), kept


@compiled_once(0, 2)
def top_classes(
    options: Options, head: Head, count: int
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The greatest logits of each row and their classes, the lower first on ties.

    -inf and -1 where a row has fewer selected classes than `count`.
    """
    cut, size = pieces(options, head)
    inf = jnp.inf
    features = head.hidden.shape[1]
    vocabulary = head.weight.shape[options.vocab_axis]
    if options.vocab_chunk is None and size < vocabulary:
        # A search in few large tiles takes less time than in many small ones.
        size = max(size, _chunks.search_chunk(cut.size, features, vocabulary))
        size = min(size, vocabulary)

    def of(group: Index | None) -> tuple[Array, Array]:
        mine = rows_of(head, cut, group)

        def found_in(start, size, least=None):
            part = classes_of(mine, start, size, options)
            z = tile_of(part, options).z
            z = _tile.select(z, part.modifiers.class_where, -inf)
            if least is not None:
                # The search passes over what cannot be among the best.
                z = jnp.where(z <= least, -inf, z)
            values, places = largest(z, min(count, size))
            return values, start + places

        def step(best, start, size):
            values, ids = found_in(start, size, best[0][:, -1:])
            ids = jnp.concatenate([best[1], ids], axis=1)
            both = jnp.concatenate([best[0], values], axis=1)
            values, places = largest(both, count)
            return values, jnp.take_along_axis(ids, places, axis=1)

        # The first tile begins, with as many as are asked for.
        first = min(max(size, count), vocabulary)
        best = found_in(0, first)
        values, ids = _chunks.fold(step, best, vocabulary, size, first)
        return values, jnp.where(values == -inf, -1, ids)

    return by_rows(cut, of, head.hidden)


# ----------------------------------------------------------------------------- backward
def backward(options: Options, operands: BackwardOperands) -> HeadGradient:
    head, further = operands.head, operands.further
    cut, size = pieces(options, head)
    classes = class_zeros(head, head.weight.dtype)
    if further is not None:
        classes = classes._replace(weight=further)
    add = further is not None
    sums, classes = gradient_sums(options, operands, cut, size, classes, add=add)
    return gradient_of(head, sums, classes)


def class_zeros(head: Head, weight_dtype: DTypeLike) -> ClassSums:
    """The buffers of the gradients per class, before any row has added to them."""
    one_each = lambda x: None if x is None else jnp.zeros(x.shape, head.dtype)
    zeros = ClassSums(
        jnp.zeros(head.weight.shape, weight_dtype),
        one_each(head.modifiers.bias),
        one_each(head.modifiers.class_log_weights),
    )
    return match_varying(zeros, head.hidden)


def gradient_sums(
    options: Options,
    operands: BackwardOperands,
    cut: RowCut,
    size: int,
    classes: ClassSums,
    *,
    add: bool = False,
) -> tuple[RowSums, ClassSums]:
    """Sums over rows and classes; those over classes are written, or added, in place.

    `classes` are the buffers of the weight's and the bias' gradient.
    """
    head, known, kept, _ = operands

    def cotangents(tiles, parts, start, group):
        (tile,), (part,) = tiles, parts
        rows = cut.take(known, group)
        found = tile_gradient.cotangent_of_raw(
            tile, start, part.labels, rows, options, part.modifiers
        )
        return (found,)

    (sums,), (classes,) = gradient_sums_of_heads(
        (options,), (head,), cotangents, cut, size, (classes,), kept=kept, add=add
    )
    return sums, classes


# (tile, rows and classes of each head; first class; group of rows) -> of each tile
type TileCotangents = Callable[
    [tuple[Tile, ...], tuple[Head, ...], Index, Index | None],
    tuple[RawCotangents, ...],
]


def gradient_sums_of_heads(
    options: tuple[Options, ...],
    heads: tuple[Head, ...],
    cotangents: TileCotangents,
    cut: RowCut,
    size: int,
    classes: tuple[ClassSums, ...],
    *,
    kept: Array | None = None,
    add: bool = False,
) -> tuple[tuple[RowSums, ...], tuple[ClassSums, ...]]:
    """`gradient_sums` of heads over one vocabulary, whose tiles are visited together.

    The cotangents of a head's tile may depend on the tiles of all. `kept` are the raw
    products of the first classes of a single head.
    """
    vocabulary = heads[0].weight.shape[options[0].vocab_axis]
    lies_across = lambda own, head: _across(own, head, cut.size, size)
    across = cut.whole and all(map(lies_across, options, heads))
    class_axis = 0 if across else 1
    copies = size < vocabulary and _are_many(cut.size)
    copied = _copied_on_cpu if copies else lambda array: array
    zeros = lambda head, *shape: match_varying(
        jnp.zeros(shape, head.dtype), head.hidden
    )

    def products(own: Options, mine: Head, found: RawCotangents):
        # Products in the dtype of the operands, as forward; their sums are wider.
        draw = found.raw.astype(_product_dtype(mine))
        if across:
            columns = copied(mine.weight.T)
            dhidden = product(columns, draw, (1, 0), own, mine.dtype)
            dweight = product(draw, mine.hidden, (1, 0), own, mine.dtype)
        else:
            columns = copied(mine.hidden.T)
            contract = (1, own.vocab_axis)
            dhidden = product(draw, mine.weight, contract, own, mine.dtype)
            dweight = product(columns, draw, (1, 0), own, mine.dtype)
        dtemperature = None if _follows(own, mine) else found.temperature
        of_rows = RowSums(dhidden, found.logit_scale, dtemperature)
        return of_rows, ClassSums(dweight, found.bias, found.class_log_weights)

    def of_tile(total, parts, start, group, raw):
        """One tile's share of the sums per row and per class, of every head."""
        mine = tuple(rows_of(part, cut, group) for part in parts)
        if raw is None:
            tiles = tuple(map(lambda m, o: tile_of(m, o, class_axis), mine, options))
        else:
            own, modifiers = options[0], mine[0].modifiers
            tiles = (_tile.logits_of(raw, own, modifiers, class_axis),)
        found = cotangents(tiles, mine, start, group)
        pairs = tuple(map(products, options, mine, found))
        of_rows, of_classes = zip(*pairs, strict=True)
        return cut.add(total, of_rows, group), of_classes

    def none_of(head: Head, size: int) -> ClassSums:
        one_each = lambda x: None if x is None else zeros(head, size)
        return ClassSums(
            zeros(head, head.hidden.shape[1], size),
            one_each(head.modifiers.bias),
            one_each(head.modifiers.class_log_weights),
        )

    def step(carry, start, size, raw=None):
        total, buffers = carry
        parts = tuple(map(lambda h, o: classes_of(h, start, size, o), heads, options))
        if cut.whole:
            total, found = of_tile(total, parts, start, 0, raw)
        else:

            def visit(both, group):
                total, found = both
                total, more = of_tile(total, parts, start, group, None)
                return total, jax.tree.map(jnp.add, found, more)

            none = tuple(none_of(head, size) for head in heads)
            total, found = cut.fold(visit, (total, none))

        def write(buffer, values, axis):
            if add:
                old = _chunks.slice_of(buffer, start, size, axis)
                values = old + values
            return _chunks.with_slice(buffer, values, start, axis)

        def written(own: Options, buffer: ClassSums, found: ClassSums) -> ClassSums:
            slice_ = found.weight.astype(buffer.weight.dtype)
            if own.vocab_axis == 0 and not across:
                slice_ = copied(slice_).T
            per_class = (
                None if old is None else write(old, new, 0)
                for old, new in zip(buffer[1:], found[1:], strict=True)
            )
            return ClassSums(write(buffer.weight, slice_, own.vocab_axis), *per_class)

        return total, tuple(map(written, options, buffers, found))

    def step_kept(carry, start, size):
        assert kept is not None
        raw = _chunks.slice_of(kept, start, size, class_axis)
        return step(carry, start, size, raw)

    def piece(own: Options, head: Head) -> RowSums:
        rows, features = cut.size, head.hidden.shape[1]
        per_row = lambda operand: None if operand is None else zeros(head, rows)
        return RowSums(
            zeros(head, features, rows) if across else zeros(head, rows, features),
            per_row(head.modifiers.logit_scale),
            None if _follows(own, head) else per_row(head.modifiers.temperature),
        )

    total = cut.zeros(tuple(map(piece, options, heads)))
    carry = (match_varying(total, heads[0].hidden), classes)
    first = 0
    if kept is not None:
        assert cut.whole
        assert len(heads) == 1
        first = kept.shape[class_axis]
        carry = _chunks.fold(step_kept, carry, first, size)
    total, classes = _chunks.fold(step, carry, vocabulary, size, first)
    sums = cut.joined(total)
    if across:
        sums = tuple(own._replace(hidden=own.hidden.T) for own in sums)
    return sums, classes


def gradient_of(head: Head, sums: RowSums, classes: ClassSums) -> HeadGradient:
    """The sums in the dtypes and shapes of the operands."""
    bias, scale, temperature = head.modifiers[:3]
    log_weights = head.modifiers.class_log_weights
    dtemperature = sums.temperature
    if temperature is not None and dtemperature is None:
        # z = s h W / T: by Euler's theorem of homogeneous functions.
        of_hidden = (head.hidden.astype(head.dtype) * sums.hidden).sum(1)
        dtemperature = 0 - of_hidden / temperature.astype(head.dtype)
    return HeadGradient(
        sums.hidden.astype(head.hidden.dtype),
        classes.weight.astype(head.weight.dtype),
        Modifiers(
            tile_gradient.cast_like(bias, classes.bias),
            tile_gradient.summed_like(scale, sums.logit_scale),
            tile_gradient.summed_like(temperature, dtemperature),
            None,
            tile_gradient.cast_like(log_weights, classes.class_log_weights),
        ),
    )


def _follows(options: Options, head: Head) -> bool:
    """Whether the gradient of the temperature follows from that of `hidden`.

    From tiles it takes a sum over each, which keeps one or two more of them at a time.
    It needs that where the gradient of `hidden` is of rounded tiles, or not of all, or
    would be another product that nobody asks for.
    """
    return (
        options.hidden_is_learned
        and head.modifiers.bias is None
        and options.logit_softcap is None
        and options.gradient_filter_eps is None
        and _product_dtype(head) == head.dtype
    )


# ------------------------------------------------------------------------------- pieces
# Fewer rows are bound by reading the weight: there a copy of its slice does not pay.
_MANY = 256


def _are_many(rows: int) -> bool:
    return is_symbolic(rows) or rows >= _MANY


def _across(options: Options, head: Head, rows: int, size: int) -> bool:
    """Whether a tile of `size` classes of rows that are one piece is (classes, rows).

    Which way it lies decides which operands of the products are transposed. Over a
    table (V, D) it lies best across, and the gradient of hidden as (D, rows); turning
    that costs a copy, so this is done only where all rows are one piece. The one tile
    of all classes is quicker as (rows, classes), without any copy.
    """
    several = size < head.weight.shape[options.vocab_axis]
    return options.vocab_axis == 0 and several and _are_many(rows)


def pieces(options: Options, head: Head) -> tuple[RowCut, int]:
    """How the rows are cut, and the number of classes per step."""
    rows, features = head.hidden.shape
    strided = options.gradient_filter_eps is None
    cut = _chunks.row_cut(rows, features, options.token_chunk, strided=strided)
    return cut, classes_per_step(options, head, cut.size)


def classes_per_step(options: Options, head: Head, rows: int) -> int:
    vocabulary = head.weight.shape[options.vocab_axis]
    size = options.vocab_chunk
    if size is None:
        size = vocabulary
        if not _is_one_tile(options, head, rows):
            size = _chunks.vocab_chunk(rows, head.hidden.shape[1], vocabulary)
        if head.modifiers.centre is not None:
            size = _chunks.halved(size)  # raw products are read again: two tiles
    return min(size, vocabulary)


def _is_one_tile(options: Options, head: Head, rows: int) -> bool:
    """Whether logits, and a gradient of the weight before it is rounded, are small."""
    if is_symbolic(rows):
        return False
    rounded = head.weight.dtype != head.dtype
    of_class = max(rows, head.hidden.shape[1] if rounded else 1)
    return of_class * head.weight.shape[options.vocab_axis] <= _chunks.WHOLE


def classes_of(head: Head, start: Any, size: int, options: Options) -> Head:
    def cut(array: Array, axis: int = 0) -> Array:
        return _chunks.slice_of(array, start, size, axis)

    modifiers = head.modifiers
    return head._replace(
        weight=cut(head.weight, options.vocab_axis),
        modifiers=modifiers._replace(
            bias=jax.tree.map(cut, modifiers.bias),
            class_where=jax.tree.map(cut, modifiers.class_where),
            class_log_weights=jax.tree.map(cut, modifiers.class_log_weights),
        ),
    )


def rows_of(head: Head, cut: RowCut, group: Index | None) -> Head:
    take = lambda tree: cut.take(tree, group)
    modifiers = head.modifiers
    return head._replace(
        hidden=take(head.hidden),
        labels=take(head.labels),
        ranked=take(head.ranked),
        modifiers=modifiers._replace(
            logit_scale=take(modifiers.logit_scale),
            temperature=take(modifiers.temperature),
            centre=take(modifiers.centre),
        ),
    )


def tile_of(head: Head, options: Options, class_axis: int = 1) -> Tile:
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
    return barrier_on_cpu(array)


def _product_dtype(head: Head) -> Any:
    return common_dtype(head.hidden.dtype, head.weight.dtype)


def product(
    a: Array, b: Array, contract: tuple[int, int], options: Options, dtype: Any
) -> Array:
    common = common_dtype(a.dtype, b.dtype)
    return lax.dot_general(
        a.astype(common),
        b.astype(common),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=options.precision,
        preferred_element_type=dtype,
    )
