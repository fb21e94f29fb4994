"""Rows of a source with their labels: the numbers from which losses are composed.

Labels of every kind (an id, a distribution, several ids) become the same numbers per
row, and rows that do not count are masked before any arithmetic.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range

from ._engine.tile import RowStatistics
from ._sources import LinearLogits, Source, StoredLogits, require_per_class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Numbers per row of the source, and masks of rows with special values."""

    statistics: RowStatistics
    where: Bool[Array, "*batch"] | None
    labels: Int[Array, "*batch"] | None = None  # -1: outside the vocabulary
    outside: Bool[Array, "*batch"] | None = None  # a label outside the vocabulary
    no_classes: Bool[Array, "..."] | None = None  # per row, or one for all rows
    # The label has probability 0: it is on an excluded class, or no class of the row
    # has a probability.
    impossible: Bool[Array, "*batch"] | None = None
    infinite: Bool[Array, "*batch"] | None = None  # impossible, with a weight not 0
    class_weight: Float[Array, "*batch"] | None = None  # of the one label
    log_prob: Float[Array, "*batch"] | None = None  # of the one label, if it counts
    # Sums of c_j (lse - z_j) over the classes: with the labels' masses c, and with the
    # same mass for all classes (None without the statistic sum_logits).
    label_cost: Float[Array, "*batch"] | None = None
    uniform_cost: Float[Array, "*batch"] | None = None

    @property
    def lse(self) -> Float[Array, "*batch"]:
        return _lse_to_compute_with(self.statistics)

    @property
    def massless(self) -> Bool[Array, "*batch"]:
        """True for rows in which no class has a probability, also without classes."""
        return massless(self.statistics)

    def counted(self, values: Array, bad: ArrayLike = 0) -> Array:
        """The values, `bad` where `where` is False."""
        return values if self.where is None else jnp.where(self.where, values, bad)


def prepare(
    source: Source,
    names: Sequence[str],
    labels: ArrayLike | None,
    where: ArrayLike | None,
    *,
    class_weights: ArrayLike | None = None,
    distributions: bool = True,
    apart: bool = False,
) -> Rows:
    """Checks labels and `where`, masks rows, and computes statistics of the others.

    `names` must hold lse and all other statistics that the loss reads. With
    `distributions` the labels may be floating if the logits are stored. With `apart`
    log p of a label is computed from the other classes for every source, otherwise for
    stored logits alone: kernels of heads sum over all classes.
    """
    function = source.function
    where = rows_that_count(source, where)
    source = source.masked(where)
    if labels is None:
        return Rows(source.statistics(names), where)

    labels = jnp.asarray(labels)
    weights = per_class(source, class_weights)
    floating = jnp.issubdtype(labels.dtype, jnp.floating)
    if floating and distributions and isinstance(source, StoredLogits):
        return _with_distributions(source, names, labels, where, weights)
    checks.require_integer(function, labels=labels)
    checks.require_shape(
        function, "labels", labels, source.batch_shape, "the batch shape"
    )
    marked = mark(source, labels, where, weights)
    log_prob = empty = None
    apart = apart or isinstance(source, StoredLogits)
    if apart and "label_logits" in names:
        others = source.without_labels().statistics(names, marked.labels)
        statistics, log_prob, empty = _with_label(others, marked)
    else:
        statistics = source.statistics(names, marked.labels)
    uniform = _uniform_cost(source, statistics, 1, weights)
    return with_statistics(marked, statistics, uniform, log_prob, empty)


def prepare_chained(
    source: Source, labels: Array, where: Array | None
) -> tuple[Rows, Source]:
    """`prepare` for log p of ids, and the source for the next term of the loss."""
    names = ("lse", "label_logits")
    if isinstance(source, StoredLogits):
        return prepare(source, names, labels, where, distributions=False), source
    where = rows_that_count(source, where)
    masked = source.masked(where)
    marked = mark(masked, labels, where, None)
    statistics, then = masked.chained_statistics(names, marked.labels)
    rows = with_statistics(marked, statistics, None, None)
    if isinstance(source, LinearLogits):
        source = source.replaced(weight=then.weight)
    return rows, source


class Marked(NamedTuple):
    """Rows with one label each, before their statistics are known; a pytree."""

    labels: Int[Array, "*batch"]  # -1: outside the vocabulary
    where: Bool[Array, "*batch"] | None
    excluded: Bool[Array, "*batch"] | None  # a label on an excluded class
    no_classes: Bool[Array, "..."] | None  # per row, or one for all rows
    class_weight: Float[Array, "*batch"] | None  # of the label


def mark(
    source: Source,
    labels: Integer[Array, "*batch"],
    where: Bool[Array, "*batch"] | None,
    class_weights: Float[Array, " V"] | None,
) -> Marked:
    labels = labels_in_range(labels, source.num_classes)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    class_weight = None
    if class_weights is not None:
        counts = labels >= 0 if where is None else where & (labels >= 0)
        class_weight = jnp.where(counts, source.at_labels(class_weights, labels), 1)
    excluded = _on_excluded_classes(source, labels)
    return Marked(labels, where, excluded, without_classes(source), class_weight)


def without_classes(source: Source) -> Bool[Array, "..."] | None:
    """True for rows without selected classes; None if there are no such rows."""
    if source.modifiers.class_where is None:
        return None
    return jnp.asarray(source.count_classes()) == 0


def _with_label(
    others: RowStatistics, marked: Marked
) -> tuple[RowStatistics, Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """Statistics of all classes from those of the others, log p, and empty rows.

    In float32 lse - z_y is 0 once the label is 17 nats above the others, and so is its
    slope, p_y - 1. softplus(lse of the others - z_y) is the same number without
    cancellation: it and its slope, the others' probability, decay until exp underflows.
    In an empty row no class has a probability; that is known before the logarithm.
    """
    assert others.lse is not None
    assert others.label_logits is not None
    counts = marked.labels >= 0
    if marked.excluded is not None:
        counts = counts & ~marked.excluded
    # A logit of +inf makes its row NaN, that of the label as any other.
    own = jnp.where(others.label_logits == jnp.inf, jnp.nan, others.label_logits)
    own = jnp.where(counts, own, -jnp.inf)
    empty = (others.lse == -jnp.inf) & (own == -jnp.inf)
    of_others, own = jnp.where(empty, 0, others.lse), jnp.where(empty, 0, own)
    # One logarithm for both: lse = max + rest and softplus(excess) = excess^+ + rest.
    # Both sides of each selection have the same value and slope at excess = 0, unlike
    # those of a maximum or an absolute value: derivatives of any order are right.
    excess = jnp.where(counts, of_others - jnp.where(counts, own, 0), 0)
    ahead = excess > 0
    rest = _log1p_exp(jnp.where(ahead, -excess, excess))
    log_prob = 0 - (jnp.where(ahead, excess, 0) + rest)
    lse = jnp.where(counts, jnp.where(ahead, of_others, own) + rest, of_others)
    mean = others.mean_logit
    if mean is not None:
        finite = jnp.where(own == -jnp.inf, 0, own)
        mean = jnp.exp(of_others - lse) * mean + jnp.exp(own - lse) * finite
        mean = jnp.where(empty, 0, mean)
    lse = jnp.where(empty, -jnp.inf, lse)
    log_prob = jnp.where(empty, 0, log_prob)
    return others._replace(lse=lse, mean_logit=mean), log_prob, empty


# By this rule the slope is a function of x alone; otherwise two kernels would share the
# exponential, which XLA would store.
@jax.custom_jvp
def _log1p_exp(x: Array) -> Array:
    """log(1 + e^x) for x <= 0."""
    return jnp.log1p(jnp.exp(x))


@_log1p_exp.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return _log1p_exp(x), jax.nn.sigmoid(x) * dx


def with_statistics(
    marked: Marked,
    statistics: RowStatistics,
    uniform_cost: Array | None,
    log_prob: Array | None = None,
    empty: Array | None = None,
) -> Rows:
    labels, where, excluded, no_classes, class_weight = marked
    impossible = impossible_labels(statistics, excluded, empty=empty)
    rows = Rows(
        statistics,
        where,
        labels,
        outside=labels < 0,
        no_classes=no_classes,
        impossible=impossible,
        infinite=impossible,
        class_weight=class_weight,
        uniform_cost=uniform_cost,
    )
    if statistics.label_logits is None:
        return rows
    if log_prob is None:
        own = jnp.where(rows.massless, 0, statistics.label_logits)
        log_prob = own - rows.lse
    label_cost = 0 - log_prob  # not -log_prob: a certain label costs 0, not -0
    rows = dataclasses.replace(rows, log_prob=log_prob)
    if class_weight is None:
        return dataclasses.replace(rows, label_cost=label_cost)
    infinite = impossible & (class_weight != 0)
    label_cost = weigh(class_weight, jnp.where(impossible, jnp.inf, label_cost))
    return dataclasses.replace(rows, infinite=infinite, label_cost=label_cost)


def prepare_several(
    source: Source,
    names: Sequence[str],
    labels: ArrayLike,
    where: ArrayLike | None,
    *,
    label_weights: ArrayLike | None,
    label_where: ArrayLike | None,
    class_weights: ArrayLike | None,
) -> Rows:
    """`prepare` for class ids (*batch, L), whose weighted costs are summed.

    A row for which `label_where` keeps no label does not count.
    """
    function, batch = source.function, source.batch_shape
    labels = jnp.asarray(labels)
    checks.require_integer(function, labels=labels)
    if labels.ndim != len(batch) + 1 or labels.shape[:-1] != batch:
        axes = ", ".join(map(str, (*batch, "L")))
        raise ValueError(
            f"{function}: `labels` must have shape ({axes}) (several per row), "
            f"got {labels.shape}."
        )
    kept = jnp.asarray(True if label_where is None else label_where)
    checks.require_boolean(function, label_where=kept)
    why = "the shape of `labels`"
    if label_where is not None:
        checks.require_shape(function, "label_where", kept, labels.shape, why)
    kept = jnp.broadcast_to(kept, labels.shape)
    where = rows_that_count(source, where)
    if label_where is not None or labels.shape[-1] == 0:
        some = kept.any(-1)
        where = some if where is None else where & some
    if where is not None:
        kept = kept & where[..., None]

    weights = kept.astype(source.dtype)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)
    if label_weights is not None:
        weights = jnp.asarray(label_weights)
        checks.require_floating(function, label_weights=weights)
        checks.require_shape(function, "label_weights", weights, labels.shape, why)
    # The engine ignores a label of -1: logit 0, no gradient.
    weights = jnp.where(kept, weights, 0).astype(_wide(weights))
    labels = jnp.where(kept, labels_in_range(labels, source.num_classes), -1)
    outside = kept & (labels < 0)

    source = source.masked(where)
    statistics = source.statistics(names, labels)
    assert statistics.label_logits is not None
    mass = weights.sum(-1)
    factors = per_class(source, class_weights)
    if factors is not None:
        own = jnp.where(labels < 0, 1, source.at_labels(factors, labels))
        weights = weights * own
    excluded = _on_excluded_classes(source, labels)
    impossible = impossible_labels(statistics, excluded, several=True)
    costs = _lse_to_compute_with(statistics)[..., None] - statistics.label_logits
    label_cost = weigh(weights, jnp.where(impossible, jnp.inf, costs)).sum(-1)
    return Rows(
        statistics,
        where,
        outside=outside.any(-1),
        no_classes=without_classes(source),
        infinite=(impossible & (weights != 0)).any(-1),
        label_cost=label_cost,
        uniform_cost=_uniform_cost(source, statistics, mass, factors),
    )


def weigh(weights: Array, costs: Array) -> Array:
    """The product, 0 for a weight of 0 even if the cost is infinite.

    An infinite cost has no gradient.
    """
    infinite = costs == jnp.inf
    finite = weights * jnp.where(infinite, 0, costs)
    limit = lax.stop_gradient(weights) * jnp.inf
    return jnp.where(infinite & (weights != 0), limit, finite)


def impossible_labels(
    statistics: RowStatistics,
    excluded: Array | None,
    *,
    several: bool = False,
    empty: Bool[Array, "*batch"] | None = None,
) -> Bool[Array, "..."]:
    """True for labels on excluded classes, and in rows without a probability."""
    found = massless(statistics) if empty is None else empty
    if several:
        found = found[..., None]
    return found if excluded is None else found | excluded


def rows_that_count(
    source: Source, where: ArrayLike | None
) -> Bool[Array, "*batch"] | None:
    if where is None:
        return None
    function, batch = source.function, source.batch_shape
    return checks.checked_where(function, where, batch, "the batch shape")


def per_class(source: Source, class_weights: ArrayLike | None) -> Array | None:
    if class_weights is None:
        return None
    weights = jnp.asarray(class_weights)
    require_per_class(source, "class_weights", weights)
    return weights.astype(_wide(weights))


def _wide(array: Array) -> DTypeLike:
    return accumulator_dtype(array)


def _on_excluded_classes(source: Source, labels: Array) -> Bool[Array, "..."] | None:
    where = source.modifiers.class_where
    if where is None:
        return None
    return (source.at_labels(where.astype(jnp.int32), labels) == 0) & (labels >= 0)


def _uniform_cost(
    source: Source,
    statistics: RowStatistics,
    mass: Array | int,
    class_weights: Array | None,
) -> Float[Array, "*batch"] | None:
    """Mass times the mean of lse - z_j over selected classes, weighted by a_j."""
    if statistics.sum_logits is None:
        return None
    if class_weights is None:
        cost = mean_cost(statistics, source.count_classes())
        return None if cost is None else mass * cost
    lse = _lse_to_compute_with(statistics)
    classes = jnp.maximum(source.count_classes(), 1)
    assert isinstance(source, StoredLogits)
    weights = jnp.broadcast_to(class_weights, source.logits.shape)
    outside = _outside(source)
    if outside is not None:
        weights = jnp.where(outside, 0, weights)
    total, of_logits = _summed(weights, source.materialize(), outside)
    of_logits = jnp.where(massless(statistics), 0, of_logits)
    return mass * (total * lse - of_logits) / classes


def mean_cost(
    statistics: RowStatistics, classes: ArrayLike
) -> Float[Array, "..."] | None:
    """Mean of lse - z_j over the selected classes; 0 in a massless row."""
    if statistics.sum_logits is None:
        return None
    total = jnp.where(massless(statistics), 0, statistics.sum_logits)
    mean = total / jnp.maximum(classes, 1)
    return _lse_to_compute_with(statistics) - mean


def _with_distributions(
    source: StoredLogits,
    names: Sequence[str],
    labels: Float[Array, "*batch V"],
    where: Array | None,
    class_weights: Array | None,
) -> Rows:
    function, shape = source.function, source.logits.shape
    if "argmax" in names:
        raise TypeError(
            f"{function}: `labels` must be class ids (an integer dtype) to be correct "
            f"or not, got {labels.dtype}."
        )
    checks.require_shape(function, "labels", labels, shape, "the shape of `logits`")
    labels = labels.astype(_wide(labels))
    if where is not None:
        labels = jnp.where(where[..., None], labels, 0)
    statistics = source.statistics([n for n in names if n != "label_logits"])
    uniform = _uniform_cost(source, statistics, labels.sum(-1), class_weights)
    if class_weights is not None:
        labels = labels * jnp.broadcast_to(class_weights, shape)
    outside = _outside(source)
    impossible = impossible_masses(labels, massless(statistics), outside)
    total, of_logits = _summed(labels, source.materialize(), outside)
    of_logits = jnp.where(massless(statistics), 0, of_logits)
    statistics = statistics._replace(label_logits=of_logits)
    return Rows(
        statistics,
        where,
        no_classes=without_classes(source),
        impossible=impossible,
        infinite=impossible,
        label_cost=total * _lse_to_compute_with(statistics) - of_logits,
        uniform_cost=uniform,
    )


def impossible_masses(
    masses: Float[Array, "*batch V"],
    massless: Bool[Array, "*batch"],
    outside: Bool[Array, "*batch V"] | None,
) -> Bool[Array, "*batch"]:
    """True for rows with mass on an excluded class, or with mass if massless."""
    found = massless[..., None]
    found = found if outside is None else found | outside
    return ((masses != 0) & found).any(-1)


def _outside(source: StoredLogits) -> Bool[Array, "*batch V"] | None:
    """The classes that are not selected."""
    where = source.modifiers.class_where
    return None if where is None else jnp.broadcast_to(~where, source.logits.shape)


def _summed(
    coefficients: Float[Array, "*batch V"],
    z: Float[Array, "*batch V"],
    outside: Bool[Array, "*batch V"] | None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Sums of the coefficients, and of their products with the selected logits."""
    # A class without a coefficient adds 0 even if its logit is -inf.
    ignored = (coefficients == 0) & (z == -jnp.inf)
    if outside is not None:
        ignored = ignored | outside
    product = jnp.where(ignored, 0, coefficients * jnp.where(ignored, 0, z))
    return coefficients.sum(-1), product.sum(-1)


def massless(statistics: RowStatistics) -> Bool[Array, "*batch"]:
    assert statistics.lse is not None
    return statistics.lse == -jnp.inf


def _lse_to_compute_with(statistics: RowStatistics) -> Float[Array, "*batch"]:
    """The logsumexp; 0 in a massless row."""
    assert statistics.lse is not None
    return jnp.where(massless(statistics), 0, statistics.lse)
