r"""Verified predictions: the calibration stage of similarity, distance and magnitude.

Calibration points turn outputs of `softlib.softmax.sdm` into quantiles, quantiles into
a second output, and a level of confidence into thresholds above which it is met.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib.numerics import dkw_radius
from softlib.softmax import log_softmax
from softlib.typing import Scalar

from ._gauss_newton import damped_gauss_newton

_matmul = functools.partial(jnp.matmul, precision="highest")


class SDMCalibration(NamedTuple):
    r"""The result of `fit_sdm_calibration`, for `sdm_estimate`.

    Attributes:
        outputs: Row c holds the output of class c of each calibration point of true
            class c, in ascending order, and inf behind them.
        similarities: The same with their rescaled similarities.
        counts: Calibration points of each class, int32.
        weight: $W$, by which quantiles become logits.
        least_similarity: The rescaled similarity from which on predictions are
            accepted; inf if none reaches the level.
        thresholds: The output from which on a prediction of each class is accepted;
            inf for a class that never is.
        level: $\alpha'$, the wanted probability of being right.
    """

    outputs: Float[Array, "*batch C n"]
    similarities: Float[Array, "*batch C n"]
    counts: Int[Array, "*batch C"]
    weight: Float[Array, "*batch C C"]
    least_similarity: Float[Array, "*batch"]
    thresholds: Float[Array, "*batch C"]
    level: Float[Array, "*batch"]


class SDMEstimate(NamedTuple):
    r"""The result of `sdm_estimate`.

    Attributes:
        predictions: The class with the largest output, int32.
        probabilities: The calibrated output $o$.
        lower: That of the prediction if all quantiles err against it by as much as the
            DKW bands allow.
        similarity: The rescaled similarity $\tilde q$.
        lower_similarity: The same at the edge of the bands.
        accepted: Whether `lower_similarity` and `lower` reach their thresholds.
    """

    predictions: Int[Array, "*batch"]
    probabilities: Float[Array, "*batch C"]
    lower: Float[Array, "*batch"]
    similarity: Float[Array, "*batch"]
    lower_similarity: Float[Array, "*batch"]
    accepted: Bool[Array, "*batch"]


@array_arguments
def fit_sdm_calibration(
    probabilities: Float[Array, "n C"],
    similarity: Num[Array, " n"],
    labels: Integer[Array, " n"],
    *,
    level: Scalar = 0.95,
    l2: Scalar = 1e-5,
    max_steps: int = 50,
    where: Bool[Array, " n"] | None = None,
) -> SDMCalibration:
    r"""Calibrates outputs of `softlib.softmax.sdm` on points that trained nothing.

    With $F_c(x)$ the share of calibration points of true class c whose output of c is
    below x, outputs become quantiles $v_c = F_c(p_c)$, the similarity is rescaled by
    that of the prediction, and both give a second output:

    $$\tilde q = v_{\hat y} \log(2 + q), \qquad
      o = \operatorname{softmax}\big(\log(2 + \tilde q)\, W v\big).$$

    $W$ minimises the mean of $-\log_{2 + \tilde q} o_y$ with $\lambda/2\,|W - I|^2$
    added, which is convex. Of all $\tilde q$ that occur the least is chosen such that,
    among the points from there on, at most a share $1 - \alpha'$ of each class has an
    output of its class below $\alpha'$; the thresholds of outputs are the quantiles of
    that share.

    Args:
        probabilities: $p$, the outputs of `softlib.softmax.sdm`, one point a row.
        similarity: $q \geq 0$ of the points, as `softlib.numerics.similarity_depth`
            counts it, integer or floating.
        labels: True classes in [0, C). A point of another class is left out.
        level: $\alpha'$ in (0, 1).
        l2: $\lambda > 0$. It keeps $W$ finite where all points are right. A larger one
            flattens the output, so that fewer predictions are accepted.
        max_steps: Static; steps of Newton's method that are tried at most.
        where: True for the points to use; others may hold anything.

    Returns:
        `SDMCalibration`, float32 or wider. A class without points is never accepted.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: none; a constant to differentiation.
    Cost: $O(n C^3)$ memory and $O(n C^5)$ time per step, as $W$ has $C^2$ entries.
    Source: "Similarity-Distance-Magnitude Universal Verification". Deviations: the
        penalty, in the place of an early stop; a class that no threshold saves does not
        keep others from being accepted.

    Example:
        >>> p = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
        >>> q, labels = jnp.array([9, 4, 6, 8]), jnp.array([0, 0, 1, 1])
        >>> fit = softlib.estimation.fit_sdm_calibration
        >>> found = fit(p, q, labels, level=0.6, l2=1e-3)
        >>> print(f"{found.least_similarity:.2f} {found.thresholds[0]:.2f}")
        1.15 0.98
    """
    function = "fit_sdm_calibration"
    checks.require_floating(function, probabilities=probabilities)
    checks.require_integer(function, labels=labels)
    checks.require_rank(function, "probabilities", probabilities, 2, "(n, C)")
    count, classes = probabilities.shape[-2:]
    shape = (count, classes)
    checks.require_shape(function, "probabilities", probabilities, shape, "one a row")
    for name, of_points in {"similarity": similarity, "labels": labels}.items():
        checks.require_shape(function, name, of_points, (count,), "one per point")
    checks.require_scalar(function, "level", level, 0, 1)
    checks.require_positive_scalars(function, l2=l2)
    checks.require_positive_integer(function, "max_steps", max_steps)
    keep = jnp.ones(count, bool)
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_shape(function, "where", where, (count,), "one per point")
        keep = where
    dtype = accumulator_dtype(probabilities)
    known = jnp.where(keep, labels_in_range(labels, classes), -1)
    arrays = (probabilities.astype(dtype), similarity.astype(dtype), known)
    options = (jnp.asarray(level, dtype), jnp.asarray(l2, dtype))
    return _fit(max_steps, *jax.tree.map(lax.stop_gradient, (*arrays, *options)))


@array_arguments
def sdm_estimate(
    calibration: SDMCalibration,
    probabilities: Float[Array, "*batch C"],
    similarity: Num[Array, "*batch"],
) -> SDMEstimate:
    r"""Calibrated outputs with lower bounds, and which predictions are accepted.

    The band of class c has the half-width `softlib.numerics.dkw_radius` of as many
    draws as its calibration points have a rescaled similarity below that of the
    prediction: what was seldom seen is not trusted. It lowers the quantile of the
    predicted class and raises the others.

    Args:
        calibration: Of `fit_sdm_calibration`.
        probabilities: Outputs of `softlib.softmax.sdm`.
        similarity: $q \geq 0$ of each.

    Returns:
        `SDMEstimate`. A row with NaN, or of a negative similarity, is NaN and not
        accepted.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together.

    Derivatives: none; a constant to differentiation.
    Cost: $O(C \log n + C^2)$ per row.
    Source: "Similarity-Distance-Magnitude Universal Verification".

    Example:
        >>> p, q = jnp.array([[0.9, 0.1], [0.2, 0.8]] * 400), jnp.arange(800) % 100
        >>> fit = softlib.estimation.fit_sdm_calibration(p, q, jnp.arange(800) % 2)
        >>> found = softlib.estimation.sdm_estimate(fit, jnp.array([0.95, 0.05]), 100)
        >>> print(f"{found.probabilities[0]:.2f}, at least {found.lower:.2f}")
        0.87, at least 0.83
    """
    function = "sdm_estimate"
    what = "the result of fit_sdm_calibration"
    checks.require_instance(function, "calibration", calibration, SDMCalibration, what)
    checks.require_floating(function, probabilities=probabilities)
    classes = calibration.counts.shape[-1]
    shape = (*probabilities.shape[:-1], classes)
    checks.require_shape(
        function, "probabilities", probabilities, shape, "the classes of `calibration`"
    )
    checks.require_shape(
        function, "similarity", similarity, shape[:-1], "one per row of `probabilities`"
    )
    dtype = accumulator_dtype(probabilities, calibration.weight)
    wide = jax.tree.map(lambda x: x.astype(dtype), calibration)
    wide = wide._replace(counts=calibration.counts)
    arrays = (wide, probabilities.astype(dtype), similarity.astype(dtype))
    return SDMEstimate(*_estimates(*jax.tree.map(lax.stop_gradient, arrays)))


# ------------------------------------------------------------------------- of one point
def _count_below(known: Array, counts: Array, x: Array) -> Array:
    """Number of values of class c, ascending in row c, that are below x[c]."""
    found = jax.vmap(jnp.searchsorted)(known, x)
    return jnp.minimum(found, counts).astype(x.dtype)


def _share_below(known: Array, counts: Array, x: Array) -> Array:
    """The same as a share; 0 of a class without values."""
    number = jnp.maximum(counts, 1).astype(x.dtype)
    return _count_below(known, counts, x) / number


def _log_output(weight: Array, quantiles: Array, rescaled: Array) -> Array:
    return log_softmax(jnp.log(2 + rescaled) * _matmul(weight, quantiles))


def _estimate(calibration: SDMCalibration, p: Array, q: Array) -> tuple[Array, ...]:
    bad = jnp.isnan(p).any() | ~(q >= 0)
    p, q = jnp.where(bad, 0, p), jnp.where(bad, 0, q)
    prediction = p.argmax()
    v = _share_below(calibration.outputs, calibration.counts, p)
    rescaled = v[prediction] * jnp.log(2 + q)
    everywhere = jnp.full_like(v, rescaled)
    draws = _count_below(calibration.similarities, calibration.counts, everywhere)
    radius = dkw_radius(draws, alpha=calibration.level)
    chosen = prediction == jnp.arange(len(p))
    edge = jnp.clip(jnp.where(chosen, v - radius, v + radius), 0, 1)
    lower_similarity = edge[prediction] * jnp.log(2 + q)
    output = jnp.exp(_log_output(calibration.weight, v, rescaled))
    lower = jnp.exp(_log_output(calibration.weight, edge, lower_similarity)[prediction])
    enough = lower >= calibration.thresholds[prediction]
    similar = lower_similarity >= calibration.least_similarity
    numbers = (output, lower, rescaled, lower_similarity)
    return (
        prediction.astype(jnp.int32),
        *(jnp.where(bad, jnp.nan, number) for number in numbers),
        enough & similar & ~bad,
    )


@compiled_once()
def _estimates(calibration: SDMCalibration, p: Array, q: Array) -> tuple[Array, ...]:
    each = jax.vmap(_estimate, (None, 0, 0))
    found = each(calibration, p.reshape(-1, p.shape[-1]), q.reshape(-1))
    return tuple(of_rows.reshape(q.shape + of_rows.shape[1:]) for of_rows in found)


# ---------------------------------------------------------------------------------- fit
@compiled_once(0)
def _fit(
    max_steps: int, p: Array, q: Array, labels: Array, level: Array, l2: Array
) -> SDMCalibration:
    classes = p.shape[1]
    used = (labels >= 0) & ~jnp.isnan(p).any(-1) & (q >= 0)
    labels = jnp.where(used, labels, -1)
    p, q = jnp.where(used[:, None], p, 0), jnp.where(used, q, 0)
    own = labels[None] == jnp.arange(classes)[:, None]
    by_class = lambda values: jnp.sort(jnp.where(own, values[None], jnp.inf), axis=1)
    of = lambda rows, ids: jnp.take_along_axis(rows, ids[:, None], 1)[:, 0]
    counts = own.sum(1).astype(jnp.int32)
    true = jnp.maximum(labels, 0)
    outputs = by_class(of(p, true))
    v = jax.vmap(_share_below, (None, None, 0))(outputs, counts, p)
    rescaled = of(v, p.argmax(-1)) * jnp.log(2 + q)
    weight = _fit_weight(v, rescaled, labels, l2, max_steps)
    output = jnp.exp(of(_log_outputs(weight, v, rescaled), true))
    least, thresholds = _thresholds(output, rescaled, used, own, level)
    similarities = by_class(rescaled)
    return SDMCalibration(
        outputs, similarities, counts, weight, least, thresholds, level
    )


_log_outputs = jax.vmap(_log_output, (None, 0, 0))


def _fit_weight(
    v: Array, rescaled: Array, labels: Array, l2: Array, max_steps: int
) -> Array:
    """The minimiser of a convex loss, from I: by Newton's method with damping."""
    classes, used = v.shape[1], labels >= 0
    share = used.astype(v.dtype) / jnp.maximum(used.sum(), 1).astype(v.dtype)
    log_base = jnp.log(2 + rescaled)
    hot = jax.nn.one_hot(labels, classes, dtype=v.dtype)  # 0 where it is not used
    identity = jnp.eye(classes, dtype=v.dtype)
    weight_of = lambda x: identity + x.reshape(classes, classes)

    def measure(x: Array) -> tuple[Array, Array]:
        log_o = _log_outputs(weight_of(x), v, rescaled)
        loss = -(share / log_base * (hot * log_o).sum(1)).sum() + l2 * (x @ x) / 2
        slope = share[:, None] * (jnp.exp(log_o) - hot)
        gradient = _matmul(slope.T, v).reshape(-1) + l2 * x
        return loss, jnp.linalg.norm(gradient)

    def linearize(x: Array) -> tuple[Array, Array]:
        """A root of the second derivatives, and residuals that give the gradient."""
        o = jnp.exp(_log_outputs(weight_of(x), v, rescaled))
        root = jnp.sqrt(jnp.maximum(o, jnp.finfo(v.dtype).tiny))
        of_logits = root[:, :, None] * (identity[None] - o[:, None, :])
        scale = jnp.sqrt(log_base * share)[:, None, None, None]
        jacobian = scale * of_logits[..., None] * v[:, None, None, :]
        per_root = jnp.sqrt(share / log_base)[:, None]
        residual = per_root * (root - hot / root)
        return jacobian.reshape(-1, classes**2), residual.reshape(-1)

    tolerance = float(jnp.finfo(v.dtype).eps) ** 0.75
    start = jnp.zeros(classes**2, v.dtype)
    found = damped_gauss_newton(
        start, measure, linearize, max_steps=max_steps, tolerance=tolerance, l2=l2
    )
    return weight_of(found.x)


def _thresholds(
    output: Array, rescaled: Array, used: Array, own: Array, level: Array
) -> tuple[Array, Array]:
    """The least rescaled similarity that serves, and outputs of the classes there."""
    if not output.size:
        nothing = jnp.full(own.shape[0], jnp.inf, output.dtype)
        return jnp.asarray(jnp.inf, output.dtype), nothing
    order = jnp.argsort(jnp.where(used, -rescaled, jnp.inf))  # the most similar first
    own, output = own[:, order], output[order]
    # Rounded up where the product ends just below a whole number.
    more = 1 + 4 * jnp.finfo(level.dtype).eps
    allowed = lambda count: jnp.floor((1 - level) * count.astype(level.dtype) * more)
    number = jnp.cumsum(own, 1)
    fail = jnp.cumsum(own & (output < level)[None], 1)
    serves = (fail.astype(level.dtype) <= allowed(number)).all(0) & used[order]
    # Points of equal similarity enter together.
    at = jnp.where(used, rescaled, -jnp.inf)[order]
    last = jnp.concatenate([at[1:] != at[:-1], jnp.ones(1, bool)])
    least = jnp.where(serves & last, at, jnp.inf).min()
    inside = own & (at >= least)[None]
    count = inside.sum(1)
    ascending = jnp.sort(jnp.where(inside, output[None], jnp.inf), axis=1)
    place = allowed(count).astype(jnp.int32)[:, None]
    thresholds = jnp.take_along_axis(ascending, place, 1)[:, 0]
    return least, jnp.where(count > 0, thresholds, jnp.inf)
