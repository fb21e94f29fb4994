r"""The mathematics of one tile of logits, shape (rows, classes).

Everything between the matrix products, written once for all implementations:

    raw -> u = scale * raw + bias -> cap = c * tanh(u / c) -> z = cap / temperature - m,
    z -> the statistics of its rows, and cotangents of the statistics -> those of raw.

`class_log_weights` w count a class e^w times: lse is the logsumexp of z + w, and the
mean is over the softmax of z + w. Other statistics of z do not depend on w.

Arrays per row have shape (rows,), arrays per class (classes,), scalars (). A tile may
also be transposed, (classes, rows): `class_axis` is its axis of classes.
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

from .accelerator import Accelerator

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
    r"""Numbers per row of logits; a field that was not requested is None.

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
        label_rank: Number of selected classes before the label in descending order of
            $z$, the lower class first on ties, int32: 0 for the argmax. $V$ for a label
            that is outside $[0, V)$ or not selected.
        sum_softplus: $\sum_j \log(1 + e^{z_j})$: the sum of the classes' binary
            cross-entropies if none is a positive.

    Derivatives: see `row_statistics`.
    Cost: a handful of numbers per row.

    Example:
        >>> statistics = softlib.logits.row_statistics(jnp.zeros((2, 4)))
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
    """Static options of a row-statistics operation."""

    statistics: tuple[str, ...]
    softcap: float | None = None
    vocab_axis: int = 0
    vocab_chunk: int | None = None
    token_chunk: int | None = None
    gradient_filter_eps: float | None = None
    precision: Precision = None
    # Whether lse, mean_logit and sum_softplus leave the labels out. A loss near 0 is
    # computed from them without cancellation, while lse - z_y rounds to 0.
    exclude_labels: bool = False
    # Whether the gradient of hidden is computed. Then that of the temperature follows
    # from it at little cost.
    hidden_is_learned: bool = True
    # Sizes of the steps on a TPU or GPU; None on a CPU.
    accelerator: Accelerator | None = None

    def on(self, accelerator: Accelerator | None) -> "Options":
        return dataclasses.replace(self, accelerator=accelerator)

    def wants(self, *names: str) -> bool:
        return any(name in self.statistics for name in names)

    def including(self, *names: str) -> "Options":
        wanted = tuple(n for n in STATISTICS if n in self.statistics or n in names)
        return dataclasses.replace(self, statistics=wanted)

    def without(self, *names: str) -> "Options":
        others = tuple(name for name in self.statistics if name not in names)
        return dataclasses.replace(self, statistics=others)


class Modifiers(NamedTuple):
    """Arrays that turn raw products into logits; the softcap is in `Options`."""

    bias: Array | None  # (V,)
    scale: Array | None  # () or (rows,)
    temperature: Array | None  # () or (rows,)
    class_where: Bool[Array, "..."] | None  # (V,), or (rows, V) for given logits
    class_log_weights: Array | None = None  # (V,)
    # (rows,), subtracted from the final logits; a constant. With the mean of each row,
    # sums of squares become sums of squared deviations.
    centre: Array | None = None

    @property
    def floating(self) -> tuple[Any, ...]:
        return (*self[:3], self.class_log_weights)

    def of_classes(self, cut: Callable[[Array, int], Array]) -> "Modifiers":
        """The modifiers of a slice of the classes; `cut` takes an array and an axis."""
        of = lambda array: None if array is None else cut(array, array.ndim - 1)
        return self._replace(
            bias=of(self.bias),
            class_where=of(self.class_where),
            class_log_weights=of(self.class_log_weights),
        )

    def of_rows(self, take: Callable[[Any], Any]) -> "Modifiers":
        """The modifiers of some rows."""
        where = self.class_where
        per_entry = where is not None and where.ndim > 1
        return self._replace(
            scale=take(self.scale),
            temperature=take(self.temperature),
            class_where=take(where) if per_entry else where,
            centre=take(self.centre),
        )


NO_MODIFIERS = Modifiers(None, None, None, None)


class Ranked(NamedTuple):
    """Labels whose rank is computed, with their logits, which must be known."""

    labels: Int[Array, "rows L"]  # any ids, also those of another device
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
    if modifiers.scale is not None:
        scale = over_rows(modifiers.scale.astype(raw.dtype), class_axis)
        u = _of_finite(u, lambda u: u * scale)
    if modifiers.bias is not None:
        u = u + over_classes(modifiers.bias.astype(raw.dtype), class_axis)
    saturation = None
    if options.softcap is not None:
        saturation = jnp.tanh(u / options.softcap)
        u = options.softcap * saturation
    if modifiers.temperature is not None:
        temperature = over_rows(modifiers.temperature.astype(raw.dtype), class_axis)
        u = _of_finite(u, lambda u: u / temperature)
    if modifiers.centre is not None:
        u = u - over_rows(modifiers.centre.astype(raw.dtype), class_axis)
    return Tile(raw, saturation, u, class_axis)


# ------------------------------------------------------------------------------ forward
class State(NamedTuple):
    """Statistics of the classes so far; fields that are not needed are None."""

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
        asked = without_labels(present, labels, start, tile)

    exponentials = state.exponentials
    if exponentials is not None:
        weigh = None
        if exponentials.weighted is not None:
            finite = without_inf(present)  # p_j z_j is 0 where z_j is -inf
            weigh = lambda e: (e * finite).sum(axis)
        exponentials = _ACCUMULATOR.update(
            exponentials, weighted(asked, modifiers, axis), axis=axis, weigh=weigh
        )

    label_logits = state.label_logits
    if label_logits is not None:
        # Read from this tile: z_y of another product could exceed lse by rounding.
        assert labels is not None
        local = labels - start
        inside = (local >= 0) & (local < z.shape[axis])
        columns = jnp.where(inside, local, 0)
        at = functools.partial(jnp.take_along_axis, z, mode="promise_in_bounds")
        found = at(columns.T, axis=0).T if axis == 0 else at(columns, axis=1)
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
            attained = present == over_rows(top, axis)
            first = jnp.where(attained, ids, z.shape[axis]).min(axis)
            argmax = jnp.where(top > max_logit, start + first, argmax)
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
    """Number of classes of a tile that come before each label."""
    z, axis = tile.z, tile.class_axis
    ids = start + lax.broadcasted_iota(jnp.int32, z.shape, axis)

    def one(label: Array, logit: Array) -> Array:
        label, logit = over_rows(label, axis), over_rows(logit, axis)
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
    # Without the barrier, XLA computes them again in each of their many readers, and
    # keeps the tile until then.
    return lax.optimization_barrier(only(found, options))


def only(statistics: RowStatistics, options: Options) -> RowStatistics:
    """The statistics in `options`, without those added for the backward pass."""
    return RowStatistics(
        **{name: getattr(statistics, name) for name in options.statistics}
    )


# ---------------------------------------------------------------------------- selection
def select(
    z: Array,
    class_where: Bool[Array, "..."] | None,
    other: Any,
    class_axis: int = 1,
) -> Array:
    """The logits of selected classes, `other` elsewhere."""
    if class_where is None:
        return z
    where = class_where
    if where.ndim == 1:
        where = over_classes(where, class_axis)
    return jnp.where(where, z, other)


def weighted(present: Array, modifiers: Modifiers, class_axis: int) -> Array:
    """Logits plus the logarithmic weights of their classes."""
    weights = modifiers.class_log_weights
    if weights is None:
        return present
    return present + over_classes(weights.astype(present.dtype), class_axis)


def without_inf(z: Array) -> Array:
    """Logits with 0 for -inf: a class of probability 0 adds 0 to a sum over p."""
    return jnp.where(z == -jnp.inf, 0, z)


def _of_finite(u: Array, function: Callable[[Array], Array]) -> Array:
    """function(u), but -inf where u is -inf: there derivatives are 0, not 0 * inf."""
    return jnp.where(u == -jnp.inf, u, function(without_inf(u)))


def over_rows(value: Any, class_axis: int) -> Any:
    """A number per row, or one for all, in a shape that broadcasts to a tile."""
    return jnp.expand_dims(value, class_axis) if value.ndim else value


def over_classes(value: Any, class_axis: int) -> Any:
    return jnp.expand_dims(value, 1 - class_axis)


def without_labels(
    present: Array,
    labels: Int[Array, "rows L"] | None,
    start: int | Int[Array, ""],
    tile: Tile,
) -> Array:
    """The tile with -inf at the labels."""
    assert labels is not None
    ones = jnp.ones(labels.shape, present.dtype)
    return jnp.where(scattered(ones, labels - start, tile) > 0, -jnp.inf, present)


def scattered(
    values: Float[Array, "rows L"], columns: Int[Array, "rows L"], tile: Tile
) -> Array:
    # Comparisons fuse and add in a fixed order; a scatter with repeated labels uses
    # atomics on a GPU.
    z, axis = tile.z, tile.class_axis
    ids = lax.broadcasted_iota(columns.dtype, z.shape, axis)

    def one(column: Array, value: Array) -> Array:
        return jnp.where(ids == over_rows(column, axis), over_rows(value, axis), 0)

    count = columns.shape[1]
    if count <= 8:
        total = jnp.zeros_like(z)
        for i in range(count):
            total = total + one(columns[:, i], values[:, i])
        return total
    at = lambda array, i: lax.dynamic_index_in_dim(array, i, 1, keepdims=False)
    add = lambda i, total: total + one(at(columns, i), at(values, i))
    return lax.fori_loop(0, count, add, jnp.zeros_like(z))
