r"""Gaussian naive Bayes: moments of each class, streamed and merged, and their head.

A batch is centred by its own means before it is squared; two batches are merged with
the square of what their means differ by. No difference of large squares is formed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, cast, common_dtype
from softlib._ids import labels_in_range
from softlib.logits import LinearLogits
from softlib.typing import Scalar


class NaiveBayesState(NamedTuple):
    """Counts, means and squared deviations of each class; a pytree.

    Start from `NaiveBayesState.zeros`.

    Attributes:
        count: Examples of each class.
        mean: Mean of each feature in each class, 0 for a class without examples.
        squared_deviations: Their sums over the examples; divided by `count` they are
            the variances.

    Derivatives: a pytree of arrays, nothing more.
    Cost: 2 K D + K numbers.
    Source: as `naive_bayes_update`.

    Example:
        >>> state = softlib.estimation.NaiveBayesState.zeros(3, 5)
        >>> print(state.count, state.mean.shape)
        [0. 0. 0.] (3, 5)
    """

    count: Float[Array, "*batch K"]
    mean: Float[Array, "*batch K D"]
    squared_deviations: Float[Array, "*batch K D"]

    @classmethod
    def zeros(
        cls,
        num_classes: int,
        num_features: int,
        dtype: jax.typing.DTypeLike = "float32",
    ) -> "NaiveBayesState":
        """Returns the state of no example, float32 or wider.

        Args:
            num_classes: K.
            num_features: D.
            dtype: Of the features that follow; float64 if they are.
        """
        function = "NaiveBayesState.zeros"
        checks.require_positive_integer(function, "num_classes", num_classes)
        checks.require_integer_from(function, "num_features", num_features, 0)
        wide = accumulator_dtype(jnp.dtype(dtype))
        sums = jnp.zeros((num_classes, num_features), wide)
        return cls(jnp.zeros(num_classes, wide), sums, sums)


class LinearHead(NamedTuple):
    """Weight and bias of a linear head: scores are `x @ weight.T + bias`.

    Attributes:
        weight: One row per class.
        bias: One number per class; -inf for a class that is impossible.
    """

    weight: Float[Array, "*batch K D"]
    bias: Float[Array, "*batch K"]


@array_arguments
def naive_bayes_update(
    state: NaiveBayesState,
    x: Float[Array, "n D"],
    labels: Integer[Array, " n"],
    *,
    where: Bool[Array, " n"] | None = None,
) -> NaiveBayesState:
    r"""The state after one more batch of examples.

    In one batch or in many, the result is the same up to rounding, also for features
    whose mean is large beside their deviation.

    Args:
        state: Of the examples before; `NaiveBayesState.zeros` of none.
        x: Features, one example a row.
        labels: Classes in [0, K). Another one makes the state NaN: it would belong to
            no class, and to leave it out would hide it.
        where: True for the examples that count; elsewhere `x` and `labels` may hold
            anything.

    Returns:
        The state, float32 (float64 if an argument is). It is fit for `jax.lax.scan`.

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order, with respect to `state` and `x`.
    Cost: O(n D + K D): three passes over the batch.
    Source: "Revisiting Discriminative vs. Generative Classifiers: Theory and
        Implications".

    Example:
        >>> x, labels = jnp.array([[1.0], [3.0], [7.0]]), jnp.array([0, 0, 1])
        >>> state = softlib.estimation.NaiveBayesState.zeros(2, 1)
        >>> state = softlib.estimation.naive_bayes_update(state, x, labels)
        >>> print(state.count, state.mean[:, 0], state.squared_deviations[:, 0])
        [2. 1.] [2. 7.] [2. 0.]
    """
    function = "naive_bayes_update"
    checks.require_floating(function, x=x)
    checks.require_integer(function, labels=labels)
    checks.require_rank(function, "x", x, 2, "(n, D)")
    count, features = x.shape[-2:]
    checks.require_shape(function, "x", x, (count, features), "one batch")
    checks.require_shape(function, "labels", labels, (count,), "rows of `x`")
    state = _checked(function, "state", state)
    classes = state.count.shape[-1]
    checks.require_shape(
        function, "state.mean", state.mean, (classes, features), "columns of `x`"
    )
    keep = jnp.ones(count, bool) if where is None else where
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, (count,), "rows of `x`")
    dtype = accumulator_dtype(x, *state)
    known = labels_in_range(labels, classes)
    valid = keep & (known >= 0)
    # Dropped by the sums: an id that is one too large.
    owner = jnp.where(valid, known, classes)
    rows = jnp.where(valid[:, None], x.astype(dtype), 0)

    def sums(values: Array) -> Array:
        return jax.ops.segment_sum(values, owner, num_segments=classes)

    number = sums(valid.astype(dtype))

    def centred(values: Array) -> tuple[Array, Array]:
        mean = sums(values) / jnp.maximum(number, 1)[:, None]
        own = jnp.take(mean, jnp.where(valid, known, 0), axis=0)
        return mean, jnp.where(valid[:, None], values - own, 0)

    mean, deviations = centred(rows)
    # Once more, for what the rounding of a long sum left.
    rest, deviations = centred(deviations)
    batch = NaiveBayesState(number, mean + rest, sums(deviations * deviations))
    merged = _merged(state, batch, dtype)
    stray = (keep & (known < 0)).any()
    return jax.tree.map(lambda field: jnp.where(stray, jnp.nan, field), merged)


@array_arguments
def naive_bayes_merge(
    state: NaiveBayesState, other: NaiveBayesState
) -> NaiveBayesState:
    r"""The state of the examples of both states together.

    With counts $n_a, n_b$ and $n = n_a + n_b$, class by class,

    $$\mu = \frac{n_a \mu_a + n_b \mu_b}{n}, \qquad
      S = S_a + S_b + \frac{n_a n_b}{n} (\mu_a - \mu_b)^2 .$$

    It is associative and commutative up to rounding, and a class without examples is
    neutral: states of several devices or of a `jax.lax.scan` merge in any order.

    Args:
        state: One state.
        other: Another of the same shapes.

    Returns:
        The state, float32 (float64 if an argument is).

    Raises:
        TypeError: A field is not floating.
        ValueError: Shapes differ or do not fit together.

    Derivatives: forward and reverse mode, any order.
    Cost: O(K D).
    Source: as `naive_bayes_update`.

    Example:
        >>> update = softlib.estimation.naive_bayes_update
        >>> empty = softlib.estimation.NaiveBayesState.zeros(1, 1)
        >>> one = update(empty, jnp.array([[1.0]]), jnp.array([0]))
        >>> two = update(empty, jnp.array([[3.0]]), jnp.array([0]))
        >>> both = softlib.estimation.naive_bayes_merge(one, two)
        >>> print(both.count, both.mean[0], both.squared_deviations[0])
        [2.] [2.] [2.]
    """
    function = "naive_bayes_merge"
    state = _checked(function, "state", state)
    other = _checked(function, "other", other)
    for name, one, two in zip(state._fields, state, other, strict=True):
        checks.require_shape(
            function, f"other.{name}", two, one.shape, "that of `state`"
        )
    return _merged(state, other, accumulator_dtype(*state, *other))


@array_arguments
def naive_bayes_head(
    state: NaiveBayesState, *, var_smoothing: Scalar = 1e-9
) -> LinearHead:
    r"""Linear head of Gaussian naive Bayes with variances that the classes share.

    With class shares $\pi_k$, means $\mu_k$ and the variances of each feature, $v_j =
    \sum_k \pi_k v_{kj} + \epsilon$,

    $$W_k = \mu_k / v, \qquad
      b_k = \log \pi_k - \tfrac12 \sum_j \mu_{kj}^2 / v_j,$$

    whose scores are the joint log-densities up to a number that is the same for all
    classes: their softmax is the posterior. `naive_bayes_logits` gives the scores of
    examples with less rounding: it centres the features, without which this head
    loses digits if a mean is large beside the deviation.

    Args:
        state: Of the examples.
        var_smoothing: $\epsilon \geq 0$, a number or a traced scalar. A feature that
            varies in no class has that variance: choose it relative to the largest
            one.

    Returns:
        `LinearHead` in the dtype of the state. A class without examples has weight 0
        and bias -inf, so that its probability is 0; without any example all are. A
        variance of 0 that is not smoothed makes the head infinite or NaN.

    Raises:
        TypeError: A field is not floating.
        ValueError: Shapes do not fit together, or `var_smoothing` is negative.

    Derivatives: forward and reverse mode, any order, in classes with examples.
    Cost: O(K D).
    Source: as `naive_bayes_update`.

    Example:
        >>> x, labels = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
        >>> state = softlib.estimation.NaiveBayesState.zeros(2, 1)
        >>> state = softlib.estimation.naive_bayes_update(state, x, labels)
        >>> head = softlib.estimation.naive_bayes_head(state)
        >>> print(head.weight[:, 0], head.bias.round(1))
        [1. 5.] [ -1.2 -13.2]
    """
    function = "naive_bayes_head"
    state = _checked(function, "state", state)
    checks.require_scalar(function, "var_smoothing", var_smoothing, 0, float("inf"))
    return _shared_head(_ClassMoments.of(state, var_smoothing))


@array_arguments
def naive_bayes_logits(
    state: NaiveBayesState,
    x: Float[Array, "*rows D"],
    *,
    var_smoothing: Scalar = 1e-9,
    shared_variance: bool = True,
) -> LinearLogits:
    r"""Scores of Gaussian naive Bayes as logits of a linear head.

    Up to a number per example that is the same for all classes they are
    $\log \pi_k + \log p(x \mid k)$, so that every loss, metric and search takes them.
    With shared variances the head is `naive_bayes_head` of features from which the
    mean of all examples is subtracted. With variances per class the log-density is
    quadratic, $-\tfrac12 \sum_j [(x_j - \mu_{kj})^2 / v_{kj} + \log v_{kj}]$: linear in
    the centred features and their squares.

    Args:
        state: Of the examples that it was fitted to.
        x: Features of the examples to score.
        var_smoothing: $\epsilon \geq 0$, added to all variances; a number or a traced
            scalar.
        shared_variance: Static; whether classes share the variance of a feature.

    Returns:
        `softlib.LinearLogits` of shape (*rows, K), float32 (float64 if an argument
        is); -inf for a class without examples.

    Raises:
        TypeError: An array is not floating.
        ValueError: Shapes do not fit together, or `var_smoothing` is negative.

    Derivatives: those of the function that takes the logits.
    Cost: O(rows D + K D); the scores are never formed.
    Source: as `naive_bayes_update`.

    Example:
        >>> x, labels = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
        >>> state = softlib.estimation.NaiveBayesState.zeros(2, 1)
        >>> state = softlib.estimation.naive_bayes_update(state, x, labels)
        >>> logits = softlib.estimation.naive_bayes_logits(state, jnp.array([[3.0]]))
        >>> print(softlib.losses.softmax_cross_entropy(logits, jnp.array([0])).round(4))
        [0.6931]
    """
    function = "naive_bayes_logits"
    checks.require_floating(function, x=x)
    checks.require_rank(function, "x", x, 1, "(*rows, D)")
    state = _checked(function, "state", state)
    classes, features = state.mean.shape[-2:]
    checks.require_shape(
        function, "state.mean", state.mean, (classes, features), "one state"
    )
    checks.require_shape(
        function, "x", x, (*x.shape[:-1], features), "features of `state`"
    )
    checks.require_scalar(function, "var_smoothing", var_smoothing, 0, float("inf"))
    dtype = accumulator_dtype(x, *state)
    state = jax.tree.map(lambda field: field.astype(dtype), state)
    moments = _ClassMoments.of(state, var_smoothing)
    # The class-independent x . centre / v has no part in the softmax, only in rounding.
    centre = (moments.shares[:, None] * moments.mean).sum(0)
    moments = moments._replace(mean=moments.mean - centre[None])
    x = x.astype(dtype) - centre.reshape((1,) * (x.ndim - 1) + (features,))
    if shared_variance:
        head = _shared_head(moments)
        return LinearLogits(x, head.weight, bias=head.bias, precision="highest")
    inverse = jnp.where(moments.present[:, None], 1 / moments.own_variance, 0)
    logs = jnp.where(moments.present[:, None], jnp.log(moments.own_variance), 0)
    weight = jnp.concatenate([moments.mean * inverse, -0.5 * inverse], axis=-1)
    bias = moments.log_shares - 0.5 * (moments.mean**2 * inverse + logs).sum(-1)
    both = jnp.concatenate([x, x * x], axis=-1)
    return LinearLogits(both, weight, bias=bias, precision="highest")


class _ClassMoments(NamedTuple):
    """Shares, means and smoothed variances of classes."""

    present: Array
    shares: Array
    log_shares: Array
    mean: Array
    own_variance: Array
    shared_variance: Array

    @classmethod
    def of(cls, state: NaiveBayesState, var_smoothing: Scalar) -> "_ClassMoments":
        count, mean, squares = state
        dtype = count.dtype
        total = count.sum(-1, keepdims=True)
        present = count != 0  # NaN is no reason to hide a class
        number = jnp.where(present, count, 1)
        shares = count / jnp.where(total == 0, 1, total)
        logs = jnp.where(present, jnp.log(jnp.where(present, shares, 1)), -jnp.inf)
        own = squares / number[..., None]
        (smoothing,) = cast(dtype, jnp.asarray(var_smoothing))
        # The mean of variances, weighted by the shares: the sum over all examples.
        shared = squares.sum(-2) / jnp.where(total == 0, 1, total)
        return cls(present, shares, logs, mean, own + smoothing, shared + smoothing)


def _shared_head(moments: _ClassMoments) -> LinearHead:
    variance = moments.shared_variance[..., None, :]
    weight = jnp.where(moments.present[..., None], moments.mean / variance, 0)
    bias = moments.log_shares - 0.5 * (moments.mean * weight).sum(-1)
    return LinearHead(weight, bias)


def _checked(function: str, name: str, state: NaiveBayesState) -> NaiveBayesState:
    """The state as arrays of one dtype."""
    checks.require_instance(function, name, state, NaiveBayesState, "a NaiveBayesState")
    state = NaiveBayesState(*map(jnp.asarray, state))
    checks.require_floating(
        function,
        **{f"{name}.{k}": v for k, v in zip(state._fields, state, strict=True)},
    )
    checks.require_rank(function, f"{name}.mean", state.mean, 2, "(*batch, K, D)")
    shape = state.mean.shape
    checks.require_shape(
        function, f"{name}.count", state.count, shape[:-1], "one per class"
    )
    checks.require_shape(
        function,
        f"{name}.squared_deviations",
        state.squared_deviations,
        shape,
        "that of the means",
    )
    dtype = accumulator_dtype(common_dtype(*state))
    return NaiveBayesState(*(field.astype(dtype) for field in state))


def _merged(
    state: NaiveBayesState, other: NaiveBayesState, dtype: jnp.dtype
) -> NaiveBayesState:
    state, other = (
        NaiveBayesState(*(field.astype(dtype) for field in each))
        for each in (state, other)
    )
    total = state.count + other.count
    share = other.count / jnp.where(total == 0, 1, total)
    between = other.mean - state.mean
    both = state.squared_deviations + other.squared_deviations
    # n_a n_b / n of the formula, and the mean as a step, which keeps equal means.
    between_squares = (state.count * share)[..., None] * between * between
    mean = state.mean + share[..., None] * between
    return NaiveBayesState(total, mean, both + between_squares)
