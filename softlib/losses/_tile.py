r"""The mathematics of one tile of logits: (rows, classes) of a longer row.

Everything an implementation needs between two matrix products, written once:

    raw -> u = scale * raw + bias -> cap = c * tanh(u / c) -> z = cap / temperature - m,
    z -> the statistics of its rows, and cotangents of the statistics -> those of raw.

Where a class stands for several, `class_log_weights` w counts it as often as e^w says:
lse is that of z + w and the mean is over its softmax; z itself and what is read off it
stay as they are.

An array per row is (rows,), an array per class (classes,), a scalar (). A tile may also
lie the other way, (classes, rows): `class_axis` says which of its axes is the classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from softlib.numerics import RunningMax, RunningMaxState
from softlib.typing import Precision

STATISTICS = (
    "lse",
    "label_logits",
    "mean_logit",
    "sum_logits",
    "sum_squared_logits",
    "max_logit",
    "argmax",
    "label_rank",
    "sum_softplus",
)


# Rows and classes of a block that the gradient filter keeps or drops as a whole.
FILTER_BLOCK = 128


class RowStatistics(NamedTuple):
    r"""Numbers per row of logits; a field that was not asked for is None.

    With $z$ the final logits of a row and sums over its selected classes (float32,
    float64 for float64 arguments):

    Attributes:
        lse: $\log \sum_j e^{z_j}$; -inf if no class is selected.
        label_logits: $z_y$, one per label; 0 for a label outside $[0, V)$.
        mean_logit: $\sum_j p_j z_j$ with $p$ the softmax of $z$, so that the entropy is
            `lse - mean_logit`.
        sum_logits: $\sum_j z_j$.
        sum_squared_logits: $\sum_j z_j^2$.
        max_logit: $\max_j z_j$, without a gradient; -inf if no class is selected.
        argmax: The lowest class that attains it, int32; 0 if no class is selected.
        label_rank: How many selected classes come before the label in descending order
            of $z$, the lower class first on ties, int32: 0 for the argmax. $V$ for a
            label that is outside $[0, V)$ or not selected.
        sum_softplus: $\sum_j \log(1 + e^{z_j})$: what the classes cost, each a question
            of its own, if the row has none of them.

    Derivatives: see `linear_row_statistics`.
    Cost: a handful of numbers per row.

    Example:
        >>> statistics = softlib.losses.row_statistics(jnp.zeros((2, 4)))
        >>> print(statistics.lse.round(4), statistics.argmax)
        [1.3863 1.3863] None
    """

    lse: Float[Array, "*rows"] | None = None
    label_logits: Float[Array, "*rows"] | None = None
    mean_logit: Float[Array, "*rows"] | None = None
    sum_logits: Float[Array, "*rows"] | None = None
    sum_squared_logits: Float[Array, "*rows"] | None = None
    max_logit: Float[Array, "*rows"] | None = None
    argmax: Int[Array, "*rows"] | None = None
    label_rank: Int[Array, "*rows"] | None = None
    sum_softplus: Float[Array, "*rows"] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a row-statistics operation."""

    statistics: tuple[str, ...]
    logit_softcap: float | None = None
    vocab_axis: int = 0
    vocab_chunk: int | None = None
    token_chunk: int | None = None
    gradient_filter_eps: float | None = None
    precision: Precision = None
    # Whether lse, mean_logit and sum_softplus are those of the classes other than the
    # labels, from which a loss near 0 follows without cancellation: lse - z_y rounds to
    # 0 early.
    exclude_labels: bool = False

    def wants(self, *names: str) -> bool:
        return any(name in self.statistics for name in names)

    def including(self, *names: str) -> "Options":
        wanted = tuple(n for n in STATISTICS if n in self.statistics or n in names)
        return dataclasses.replace(self, statistics=wanted)


class Modifiers(NamedTuple):
    """What turns raw products into logits, besides the softcap."""

    bias: Array | None  # (V,)
    logit_scale: Array | None  # () or (rows,)
    temperature: Array | None  # () or (rows,)
    class_where: Bool[Array, "..."] | None  # (V,), or (rows, V) for given logits
    class_log_weights: Array | None = None  # (V,)
    # (rows,), subtracted from the final logits; a constant. A loss that does not change
    # with it takes the mean of the row, and sums of squares are those of deviations.
    centre: Array | None = None

    @property
    def floating(self) -> tuple[Array | None, ...]:
        return (*self[:3], self.class_log_weights)


class Ranked(NamedTuple):
    """The labels whose rank is asked for, with their logits, known beforehand."""

    labels: Int[Array, "rows L"]  # of any value: also those of another device
    logits: Float[Array, "rows L"]


class Tile(NamedTuple):
    raw: Float[Array, "rows classes"]
    saturation: Float[Array, "rows classes"] | None  # tanh(u / c)
    z: Float[Array, "rows classes"]
    class_axis: int


def logits_of(
    raw: Array, options: Options, modifiers: Modifiers, class_axis: int = 1
) -> Tile:
    u = raw
    if modifiers.logit_scale is not None:
        scale = _over_rows(modifiers.logit_scale.astype(raw.dtype), class_axis)
        u = _of_finite(u, lambda u: u * scale)
    if modifiers.bias is not None:
        u = u + _over_classes(modifiers.bias.astype(raw.dtype), class_axis)
    saturation = None
    if options.logit_softcap is not None:
        saturation = jnp.tanh(u / options.logit_softcap)
        u = options.logit_softcap * saturation
    if modifiers.temperature is not None:
        temperature = _over_rows(modifiers.temperature.astype(raw.dtype), class_axis)
        u = _of_finite(u, lambda u: u / temperature)
    if modifiers.centre is not None:
        u = u - _over_rows(modifiers.centre.astype(raw.dtype), class_axis)
    return Tile(raw, saturation, u, class_axis)


# ------------------------------------------------------------------------------ forward
class State(NamedTuple):
    """Statistics of the classes seen so far; a part that nobody needs is None."""

    exponentials: RunningMaxState | None
    label_logits: Array | None
    sum_logits: Array | None
    sum_squared_logits: Array | None
    max_logit: Array | None
    argmax: Array | None
    label_rank: Array | None
    sum_softplus: Array | None


_ACCUMULATOR = RunningMax()


def init(
    options: Options,
    rows: int,
    labels: Int[Array, "rows L"] | None,
    ranked: Ranked | None,
    dtype: DTypeLike,
) -> State:
    zeros = lambda *names: jnp.zeros(rows, dtype) if options.wants(*names) else None
    exponentials = None
    if options.wants("lse", "mean_logit"):
        exponentials = _ACCUMULATOR.init((rows,), dtype, weighted=zeros("mean_logit"))
    label_logits = None
    if options.wants("label_logits"):
        assert labels is not None
        label_logits = jnp.zeros(labels.shape, dtype)
    track_max = options.wants("max_logit", "argmax")
    return State(
        exponentials,
        label_logits,
        zeros("sum_logits"),
        zeros("sum_squared_logits"),
        jnp.full(rows, -jnp.inf, dtype) if track_max else None,
        jnp.zeros(rows, jnp.int32) if options.wants("argmax") else None,
        None if ranked is None else jnp.zeros(ranked.labels.shape, jnp.int32),
        zeros("sum_softplus"),
    )


def update(
    state: State,
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    ranked: Ranked | None,
    modifiers: Modifiers,
    *,
    exclude_labels: bool = False,
) -> State:
    """Adds the classes `start, start + 1, ...` to the statistics."""
    z, axis, class_where = tile.z, tile.class_axis, modifiers.class_where
    present = select(z, class_where, -jnp.inf, axis)  # for maxima and exponentials
    counted = select(z, class_where, 0, axis)  # for sums
    asked = present
    if exclude_labels:
        asked = _without_labels(present, labels, start, tile)

    exponentials = state.exponentials
    if exponentials is not None:
        weigh = None
        if exponentials.weighted is not None:
            finite = _without_inf(present)  # p_j z_j is 0 where z_j is -inf
            weigh = lambda e: (e * finite).sum(axis)
        exponentials = _ACCUMULATOR.update(
            exponentials, _weighted(asked, modifiers, axis), axis=axis, weigh=weigh
        )

    label_logits = state.label_logits
    if label_logits is not None:
        # From this very tile: by another product z_y could exceed lse by rounding.
        assert labels is not None
        local = labels - start
        inside = (local >= 0) & (local < z.shape[axis])
        places = jnp.where(inside, local, 0)
        if axis == 0:
            found = jnp.take_along_axis(z, places.T, axis=0).T
        else:
            found = jnp.take_along_axis(z, places, axis=1)
        label_logits = jnp.where(inside, found, label_logits)

    label_rank = state.label_rank
    if label_rank is not None:
        assert ranked is not None
        label_rank = label_rank + _count_before(tile, start, ranked, class_where)

    plus = lambda total, terms: None if total is None else total + terms().sum(axis)
    max_logit, argmax = state.max_logit, state.argmax
    if max_logit is not None:
        present = lax.stop_gradient(present)
        top = present.max(axis)
        if argmax is not None:
            # The lowest index that attains the maximum. (jnp.argmax reduces values and
            # indices together, which XLA does not vectorise on a CPU.)
            ids = lax.broadcasted_iota(jnp.int32, z.shape, axis)
            attained = present == _over_rows(top, axis)
            place = jnp.where(attained, ids, z.shape[axis]).min(axis)
            argmax = jnp.where(top > max_logit, start + place, argmax)
        max_logit = jnp.maximum(max_logit, top)
    return State(
        exponentials,
        label_logits,
        plus(state.sum_logits, lambda: counted),
        plus(state.sum_squared_logits, lambda: counted * counted),
        max_logit,
        argmax,
        label_rank,
        plus(state.sum_softplus, lambda: jax.nn.softplus(asked)),
    )


def _count_before(
    tile: Tile,
    start: int | Int[Array, ""],
    ranked: Ranked,
    class_where: Bool[Array, "..."] | None,
) -> Int[Array, "rows L"]:
    """How many classes of a tile come before each of the labels."""
    z, axis = tile.z, tile.class_axis
    ids = start + lax.broadcasted_iota(jnp.int32, z.shape, axis)

    def one(label: Array, logit: Array) -> Array:
        label, logit = _over_rows(label, axis), _over_rows(logit, axis)
        before = (z > logit) | ((z == logit) & (ids < label))
        before = select(before & (ids != label), class_where, False, axis)
        return before.sum(axis, dtype=jnp.int32)

    return lax.map(lambda pair: one(*pair), (ranked.labels.T, ranked.logits.T)).T


def finalize(state: State, options: Options) -> RowStatistics:
    lse = mean = None
    if state.exponentials is not None:
        lse = _ACCUMULATOR.finalize(state.exponentials)
        mean = _ACCUMULATOR.mean(state.exponentials)
    found = RowStatistics(
        lse,
        state.label_logits,
        mean,
        state.sum_logits,
        state.sum_squared_logits,
        state.max_logit,
        state.argmax,
        state.label_rank,
        state.sum_softplus,
    )
    return only(found, options)


def only(statistics: RowStatistics, options: Options) -> RowStatistics:
    """Drops what was computed for the backward pass but not asked for."""
    return RowStatistics(
        **{name: getattr(statistics, name) for name in options.statistics}
    )


# ----------------------------------------------------------------------------- backward
class RowCotangents(NamedTuple):
    """Per row: what the backward pass knows besides the operands."""

    lse: Array | None  # of the forward pass; None if no exponential is needed
    mean_logit: Array | None  # of the forward pass
    cotangents: RowStatistics


class RawCotangents(NamedTuple):
    """Cotangents of one tile, with respect to what made it."""

    raw: Float[Array, "rows classes"]  # of the raw products, scale included
    bias: Array | None  # (classes,)
    logit_scale: Array | None  # (rows,)
    temperature: Array | None  # (rows,)
    class_log_weights: Array | None = None  # (classes,)


def cotangent_of_raw(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> RawCotangents:
    dz = _cotangent_of_logits(tile, start, labels, rows, options, modifiers)
    found = through_modifiers(tile, dz, modifiers)
    if modifiers.class_log_weights is not None:
        dweights = _cotangent_of_weights(tile, start, labels, rows, options, modifiers)
        found = found._replace(class_log_weights=dweights)
    if options.gradient_filter_eps is None:
        return found
    # Only the products are spared: sums per class and per row stay exact.
    kept = _not_negligible(tile, start, labels, rows, options, modifiers)
    return found._replace(raw=jnp.where(kept, found.raw, 0))


def through_modifiers(tile: Tile, dz: Array, modifiers: Modifiers) -> RawCotangents:
    """From the cotangent of the final logits to those of what made them."""
    axis, dtype = tile.class_axis, dz.dtype
    dtemperature = None
    du = dz
    if modifiers.temperature is not None:
        temperature = _over_rows(modifiers.temperature.astype(dtype), axis)
        finite = _without_inf(tile.z)
        if modifiers.centre is not None:
            finite = finite + _over_rows(modifiers.centre.astype(dtype), axis)
        dtemperature = -(dz * finite / temperature).sum(axis)
        du = du / temperature
    if tile.saturation is not None:
        du = du * (1 - tile.saturation * tile.saturation)
    dbias = None if modifiers.bias is None else du.sum(1 - axis)
    dscale, draw = None, du
    if modifiers.logit_scale is not None:
        dscale = (du * _without_inf(tile.raw)).sum(axis)
        draw = du * _over_rows(modifiers.logit_scale.astype(dtype), axis)
    return RawCotangents(draw, dbias, dscale, dtemperature)


def _cotangent_of_logits(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> Array:
    """The cotangent of z, for p = exp(z - lse) and the mean logit m, term by term.

    p (g_lse + g_mean (1 + z - m)) + g_sum + 2 g_squared z + g_softplus sigmoid(z)
    + sum of g_label onehot. With `exclude_labels` p and sigmoid(z) are 0 at the labels.
    """
    z, axis, g = tile.z, tile.class_axis, rows.cotangents
    per_row = functools.partial(_over_rows, class_axis=axis)
    class_where = modifiers.class_where
    dz = None
    others = labels if options.exclude_labels else None
    if g.lse is not None or g.mean_logit is not None:
        p = _probabilities(tile, rows, modifiers, start, others)
        factors = [] if g.lse is None else [per_row(g.lse)]
        if g.mean_logit is not None:
            assert rows.mean_logit is not None
            deviation = 1 + _without_inf(z) - per_row(rows.mean_logit)
            factors.append(per_row(g.mean_logit) * deviation)
        # The deviation is garbage where a class is excluded; p is an exact 0 there, but
        # 0 * inf would be NaN.
        dz = select(p * sum(factors), class_where, 0, axis)
    of_sums = None
    if g.sum_logits is not None:
        of_sums = jnp.broadcast_to(per_row(g.sum_logits), z.shape)
    if g.sum_squared_logits is not None:
        twice = 2 * per_row(g.sum_squared_logits) * _without_inf(z)
        of_sums = twice if of_sums is None else of_sums + twice
    if g.sum_softplus is not None:
        weighed = z if others is None else _without_labels(z, others, start, tile)
        slopes = per_row(g.sum_softplus) * jax.nn.sigmoid(weighed)
        of_sums = slopes if of_sums is None else of_sums + slopes
    if of_sums is not None:
        of_sums = select(of_sums, class_where, 0, axis)
        dz = of_sums if dz is None else dz + of_sums
    if g.label_logits is not None:
        assert labels is not None
        of_labels = _scattered(g.label_logits, labels - start, tile)
        dz = of_labels if dz is None else dz + of_labels
    return jnp.zeros_like(z) if dz is None else dz


def _cotangent_of_weights(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> Array:
    """Per class, that of its logarithmic weight: the sum of p (g_lse + g_mean (z - m)).

    Unlike a change of z it moves only the distribution over which the mean is taken.
    """
    z, axis, g = tile.z, tile.class_axis, rows.cotangents
    if g.lse is None and g.mean_logit is None:
        return jnp.zeros(z.shape[axis], z.dtype)
    others = labels if options.exclude_labels else None
    p = _probabilities(tile, rows, modifiers, start, others)
    slopes = [] if g.lse is None else [_over_rows(g.lse, axis)]
    if g.mean_logit is not None:
        assert rows.mean_logit is not None
        deviation = _without_inf(z) - _over_rows(rows.mean_logit, axis)
        slopes.append(_over_rows(g.mean_logit, axis) * deviation)
    return select(p * sum(slopes), modifiers.class_where, 0, axis).sum(1 - axis)


def _probabilities(
    tile: Tile,
    rows: RowCotangents,
    modifiers: Modifiers,
    start: int | Int[Array, ""] = 0,
    excluded_labels: Int[Array, "rows L"] | None = None,
) -> Array:
    """Of a tile's classes, among all; an exact 0 where a class is excluded."""
    assert rows.lse is not None
    return jnp.exp(log_probabilities(tile, rows.lse, modifiers, start, excluded_labels))


def log_probabilities(
    tile: Tile,
    lse: Float[Array, " rows"],
    modifiers: Modifiers,
    start: int | Int[Array, ""] = 0,
    excluded_labels: Int[Array, "rows L"] | None = None,
) -> Array:
    """Of a tile's classes, for the lse of all; -inf where a class is excluded."""
    # An empty row has lse = -inf: there p must be 0, not exp(-inf + inf).
    offset = jnp.where(lse == -jnp.inf, 0, lse)
    present = select(tile.z, modifiers.class_where, -jnp.inf, tile.class_axis)
    if excluded_labels is not None:
        present = _without_labels(present, excluded_labels, start, tile)
    present = _weighted(present, modifiers, tile.class_axis)
    return present - _over_rows(offset, tile.class_axis)


def _not_negligible(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> Bool[Array, "..."]:
    """Where a gradient filter keeps the cotangents: in blocks of 128 x 128.

    A block is negligible if |p - onehot| < eps in all of its rows that have a
    cotangent, with onehot 1 at each of the row's labels. Rows and classes of the tile
    start at multiples of 128, so that every way to cut the whole drops the same blocks.
    """
    z, axis = tile.z, tile.class_axis
    assert options.gradient_filter_eps is not None
    others = labels if options.exclude_labels else None
    distance = _probabilities(tile, rows, modifiers, start, others)
    if labels is not None:
        ones = jnp.ones(labels.shape, z.dtype)
        onehot = jnp.minimum(_scattered(ones, labels - start, tile), 1)
        distance = jnp.abs(distance - onehot)
    active = jnp.zeros(z.shape[1 - axis], bool)
    for cotangent in jax.tree.leaves(rows.cotangents):
        some = cotangent != 0
        active = active | (some.any(1) if some.ndim > 1 else some)
    large = (distance >= options.gradient_filter_eps) & _over_rows(active, axis)
    # A NaN is not small.
    large = large | jnp.isnan(distance)

    first, second = (-(-length // FILTER_BLOCK) for length in z.shape)
    padded = jnp.pad(
        large,
        [
            (0, n * FILTER_BLOCK - length)
            for n, length in zip((first, second), z.shape, strict=True)
        ],
    )
    blocks = padded.reshape(first, FILTER_BLOCK, second, FILTER_BLOCK).any((1, 3))
    spread = jnp.repeat(jnp.repeat(blocks, FILTER_BLOCK, 0), FILTER_BLOCK, 1)
    return spread[: z.shape[0], : z.shape[1]]


def _without_labels(
    present: Array,
    labels: Int[Array, "rows L"] | None,
    start: int | Int[Array, ""],
    tile: Tile,
) -> Array:
    """-inf at the labels."""
    assert labels is not None
    ones = jnp.ones(labels.shape, present.dtype)
    return jnp.where(_scattered(ones, labels - start, tile) > 0, -jnp.inf, present)


def _scattered(
    values: Float[Array, "rows L"], columns: Int[Array, "rows L"], tile: Tile
) -> Array:
    # Comparisons instead of a scatter: they fuse, and they add in a fixed order, while
    # a scatter with repeated labels uses atomics on a GPU.
    z, axis = tile.z, tile.class_axis
    ids = lax.broadcasted_iota(columns.dtype, z.shape, axis)

    def one(column: Array, value: Array) -> Array:
        return jnp.where(ids == _over_rows(column, axis), _over_rows(value, axis), 0)

    count = columns.shape[1]
    if count <= 8:
        total = jnp.zeros_like(z)
        for i in range(count):
            total = total + one(columns[:, i], values[:, i])
        return total
    at = lambda array, i: lax.dynamic_index_in_dim(array, i, 1, keepdims=False)
    add = lambda i, total: total + one(at(columns, i), at(values, i))
    return lax.fori_loop(0, count, add, jnp.zeros_like(z))


def cast_like(operand: Array | None, gradient: Array | None) -> Array | None:
    """A gradient in the dtype of its operand; None for None."""
    if operand is None or gradient is None:
        return None
    return gradient.astype(operand.dtype)


def summed_like(operand: Array | None, per_row: Array | None) -> Array | None:
    """The gradient of an operand that is a scalar or one per row; None for None."""
    if operand is None or per_row is None:
        return None
    return cast_like(operand, per_row if operand.ndim else per_row.sum())


# ---------------------------------------------------------------------------- selection
def select(
    z: Array,
    class_where: Bool[Array, "..."] | None,
    other: Any,
    class_axis: int = 1,
) -> Array:
    """The entries of the selected classes, `other` elsewhere."""
    if class_where is None:
        return z
    where = class_where
    if where.ndim == 1:
        where = _over_classes(where, class_axis)
    return jnp.where(where, z, other)


def _weighted(present: Array, modifiers: Modifiers, class_axis: int) -> Array:
    """Logits whose exponentials count as often as the weights of the classes say."""
    weights = modifiers.class_log_weights
    if weights is None:
        return present
    return present + _over_classes(weights.astype(present.dtype), class_axis)


def _without_inf(z: Array) -> Array:
    """0 for -inf: what a class of probability 0 adds to a sum over p."""
    return jnp.where(z == -jnp.inf, 0, z)


def _of_finite(u: Array, function: Callable[[Array], Array]) -> Array:
    """-inf stays -inf; its derivatives are 0 times a number, not 0 times infinity."""
    return jnp.where(u == -jnp.inf, u, function(_without_inf(u)))


def _over_rows(value: Array, class_axis: int) -> Array:
    """One number per row, or one for all, as something to combine with a tile."""
    return jnp.expand_dims(value, class_axis) if value.ndim else value


def _over_classes(value: Array, class_axis: int) -> Array:
    return jnp.expand_dims(value, 1 - class_axis)
