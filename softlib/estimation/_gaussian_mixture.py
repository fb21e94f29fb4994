r"""Mixtures of spherical Gaussians by expectation maximisation."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.softmax import logsumexp
from softlib.typing import Scalar

_matmul = functools.partial(jnp.matmul, precision="highest")


class GaussianMixture(NamedTuple):
    """Parameters of a mixture of spherical Gaussians.

    Attributes:
        log_weight: Logarithms of the shares, -inf for a component without one.
        mean: One row per component.
        variance: Of each feature in a component, positive.
    """

    log_weight: Float[Array, " K"]
    mean: Float[Array, "K D"]
    variance: Float[Array, " K"]


class GaussianMixtureStep(NamedTuple):
    """The result of `gaussian_mixture_step`.

    Attributes:
        mixture: The parameters after the step.
        log_likelihood: Log-density of each example *before* the step, in nats; 0 for
            examples that do not count.
    """

    mixture: GaussianMixture
    log_likelihood: Float[Array, " n"]


class GaussianMixtureFit(NamedTuple):
    """The result of `fit_gaussian_mixture`.

    Attributes:
        mixture: The parameters, float32 or wider.
        log_likelihood: Mean log-density of the sample, in nats.
        num_steps: Steps that were taken, int32.
        converged: Whether the last step gained no more than the tolerance.
        history: Mean log-density before each step, the last value repeated; it never
            falls but by rounding.
    """

    mixture: GaussianMixture
    log_likelihood: Float[Array, ""]
    num_steps: Int[Array, ""]
    converged: Bool[Array, ""]
    history: Float[Array, " steps"]


@array_arguments
def gaussian_mixture_log_joint(
    x: Float[Array, "*rows D"], mixture: GaussianMixture
) -> Float[Array, "*rows K"]:
    r"""Logarithm of share times density of every component.

    $$\log \pi_k - \tfrac12 \Big( \frac{|x - \mu_k|^2}{v_k} + D \log (2 \pi v_k) \Big)$$

    The logsumexp over components is the log-density, the softmax the responsibilities:
    features of unlabelled data for a model of few labels.

    Args:
        x: Examples.
        mixture: The parameters.

    Returns:
        The logarithms, float32 (float64 if an argument is); -inf for a component
        without a share.

    Raises:
        TypeError: An array is not floating, or `mixture` is no `GaussianMixture`.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order.
    Cost: O(rows K D) time, component by component: differences are formed before they
        are squared, because the expanded square cancels.
    Source: "On the Provable Advantage of Unsupervised Pretraining".

    Example:
        >>> mixture = softlib.estimation.GaussianMixture(
        ...     jnp.log(jnp.array([0.5, 0.5])), jnp.array([[0.0], [2.0]]), jnp.ones(2)
        ... )
        >>> joint = softlib.estimation.gaussian_mixture_log_joint(
        ...     jnp.array([[1.0], [2.0]]), mixture)
        >>> print(softlib.softmax.softmax(joint).round(2)[:, 0])
        [0.5  0.12]
    """
    function = "gaussian_mixture_log_joint"
    checks.require_rank(function, "x", x, 1, "(*rows, D)")
    mixture = _checked(function, x, mixture)
    x = x.astype(mixture.mean.dtype)
    flat = x.reshape(-1, x.shape[-1])
    joint = _log_joint(flat, mixture)
    return joint.reshape(*x.shape[:-1], joint.shape[-1])


@array_arguments
def gaussian_mixture_step(
    x: Float[Array, "n D"],
    mixture: GaussianMixture,
    *,
    min_variance: Scalar = 1e-6,
    where: Bool[Array, " n"] | None = None,
) -> GaussianMixtureStep:
    r"""One step of expectation maximisation, which never lowers the likelihood.

    With the responsibilities $r_{ik}$ and $N_k = \sum_i r_{ik}$: shares $N_k / n$,
    means $\sum_i r_{ik} x_i / N_k$, and variances around these new means. The
    likelihood rises, or stays, if no variance was below `min_variance`.

    Args:
        x: The sample.
        mixture: The parameters before the step.
        min_variance: Least variance, positive; a number is static, an array traced.
            Without one the likelihood grows without limit at a component with a single
            example.
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        `GaussianMixtureStep`, float32 (float64 if an argument is). A component that
        is responsible for nothing keeps mean and variance, and has a share of 0.
        Without any example that counts the parameters stay.

    Raises:
        TypeError: An array is not floating, or an argument has the wrong type.
        ValueError: Shapes do not fit together, or `min_variance` is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: O(n K D).
    Source: "On the Provable Advantage of Unsupervised Pretraining".

    Example:
        >>> mixture = softlib.estimation.GaussianMixture(
        ...     jnp.log(jnp.array([0.5, 0.5])), jnp.array([[0.0], [9.0]]), jnp.ones(2))
        >>> step = softlib.estimation.gaussian_mixture_step(
        ...     jnp.array([[1.0], [-1.0], [8.0], [12.0]]), mixture)
        >>> print(step.mixture.mean[1], step.mixture.variance)
        [10.] [1. 4.]
    """
    function = "gaussian_mixture_step"
    checks.require_positive_scalars(function, min_variance=min_variance)
    x, mixture, keep = _sample(function, x, mixture, where)
    return _step(x, mixture, keep, jnp.asarray(min_variance, x.dtype))


@array_arguments
def fit_gaussian_mixture(
    x: Float[Array, "n D"],
    initial: GaussianMixture,
    *,
    min_variance: Scalar = 1e-6,
    max_steps: int = 200,
    tolerance: float = 1e-6,
    where: Bool[Array, " n"] | None = None,
) -> GaussianMixtureFit:
    r"""Maximum likelihood of a mixture of spherical Gaussians by repeated steps.

    Args:
        x: The sample, without labels.
        initial: Where to start, such as the means of `softlib.quantize.kmeans`. Equal
            components stay equal.
        min_variance: Least variance, as in `gaussian_mixture_step`.
        max_steps: Static; where to stop at the latest.
        tolerance: Static; gain of the mean log-density at which to stop, positive.
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        `GaussianMixtureFit`. The optimum is a local one, near `initial`. NaN in an
        example that counts makes the result NaN.

    Raises:
        TypeError: An array is not floating, or an argument has the wrong type.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward mode, through the steps. Reverse mode raises JAX's error on
        `while_loop`.
    Cost: O(n K D) a step.
    Source: "On the Provable Advantage of Unsupervised Pretraining".

    Example:
        >>> initial = softlib.estimation.GaussianMixture(
        ...     jnp.log(jnp.array([0.5, 0.5])), jnp.array([[0.0], [1.0]]), jnp.ones(2))
        >>> fit = softlib.estimation.fit_gaussian_mixture(
        ...     jnp.array([[1.0], [-1.0], [8.0], [12.0]]), initial)
        >>> print(fit.mixture.mean[1].round(2), fit.converged)
        [10.] True
    """
    function = "fit_gaussian_mixture"
    checks.require_positive_scalars(function, min_variance=min_variance)
    checks.require_positive_integer(function, "max_steps", max_steps)
    checks.require_positive_number(function, "tolerance", tolerance)
    x, initial, keep = _sample(function, x, initial, where, "initial")
    least = jnp.asarray(min_variance, x.dtype)
    initial = initial._replace(variance=jnp.maximum(initial.variance, least))
    return _fit(x, initial, keep, least, max_steps, tolerance)


def _checked(
    function: str, x: Array, mixture: GaussianMixture, name: str = "mixture"
) -> GaussianMixture:
    """The mixture, which errors call `name`, in the dtype of the sums."""
    what = "a GaussianMixture"
    checks.require_instance(function, name, mixture, GaussianMixture, what)
    mixture = GaussianMixture(*map(jnp.asarray, mixture))
    named = dict(zip(mixture._fields, mixture, strict=True))
    checks.require_floating(
        function, x=x, **{f"{name}.{k}": each for k, each in named.items()}
    )
    checks.require_rank(function, f"{name}.mean", mixture.mean, 2, "(K, D)")
    shape = (mixture.mean.shape[-2], x.shape[-1])
    checks.require_shape(
        function, f"{name}.mean", mixture.mean, shape, "features of `x`"
    )
    for k in ("log_weight", "variance"):
        checks.require_shape(
            function, f"{name}.{k}", named[k], shape[:1], "one per component"
        )
    dtype = accumulator_dtype(x, *mixture)
    return GaussianMixture(*(field.astype(dtype) for field in mixture))


def _sample(
    function: str,
    x: Array,
    mixture: GaussianMixture,
    where: Array | None,
    name: str = "mixture",
) -> tuple[Array, GaussianMixture, Array]:
    """The checked arguments in the dtype of the sums; 0 where nothing counts."""
    checks.require_floating(function, x=x)
    checks.require_rank(function, "x", x, 2, "(n, D)")
    checks.require_shape(function, "x", x, x.shape[-2:], "one sample; vmap for more")
    mixture = _checked(function, x, mixture, name)
    keep = jnp.ones(x.shape[0], bool) if where is None else where
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, x.shape[:1], "rows of `x`")
    x = jnp.where(keep[:, None], x.astype(mixture.mean.dtype), 0)
    return x, mixture, keep


def _squared_distances(x: Array, means: Array) -> Array:
    return lax.map(lambda mean: ((x - mean[None]) ** 2).sum(-1), means).T


@compiled_once()
def _log_joint(x: Array, mixture: GaussianMixture) -> Array:
    variance = mixture.variance[None]
    size = x.shape[-1] * jnp.log(2 * math.pi * variance)
    distances = _squared_distances(x, mixture.mean)
    return mixture.log_weight[None] - 0.5 * (distances / variance + size)


@compiled_once()
def _step(
    x: Array, mixture: GaussianMixture, keep: Array, least: Array
) -> GaussianMixtureStep:
    joint = _log_joint(x, mixture)
    density = logsumexp(joint)
    # An example so far away that all densities are 0 belongs to nothing.
    possible = density != -jnp.inf
    shares = jnp.exp(joint - jnp.where(possible, density, 0)[:, None])
    shares = jnp.where(keep[:, None], shares, 0)
    count = shares.sum(0)
    some = count != 0
    number = jnp.where(some, count, 1)[:, None]
    # Relative to the old means: a mean that is large takes no digits of the change.
    moved = lambda inputs: _matmul(inputs[0], x - inputs[1][None])
    mean = mixture.mean + lax.map(moved, (shares.T, mixture.mean)) / number
    squares = (shares * _squared_distances(x, mean)).sum(0)
    variance = squares / (number[:, 0] * x.shape[-1])
    total = keep.sum(dtype=x.dtype)
    weight = jnp.log(jnp.where(some, count, 1) / jnp.maximum(total, 1))
    weight = jnp.where(some, weight, -jnp.inf)
    return GaussianMixtureStep(
        GaussianMixture(
            jnp.where(total == 0, mixture.log_weight, weight),
            mean,
            jnp.where(some, jnp.maximum(variance, least), mixture.variance),
        ),
        jnp.where(keep, density, 0),
    )


class _Search(NamedTuple):
    mixture: GaussianMixture
    value: Array
    gain: Array
    iteration: Array
    history: Array


@compiled_once(4, 5)
def _fit(
    x: Array,
    initial: GaussianMixture,
    keep: Array,
    least: Array,
    max_steps: int,
    tolerance: float,
) -> GaussianMixtureFit:
    total = jnp.maximum(keep.sum(dtype=x.dtype), 1)

    def running(state: _Search) -> Array:
        return (state.gain > tolerance) & (state.iteration < max_steps)

    def advance(state: _Search) -> _Search:
        mixture, _ = _step(x, state.mixture, keep, least)
        value = _mean_density(x, mixture, keep, total)
        later = jnp.arange(max_steps + 1) > state.iteration
        history = jnp.where(later, value, state.history)
        gain = value - state.value
        return _Search(mixture, value, gain, state.iteration + 1, history)

    value = _mean_density(x, initial, keep, total)
    history = jnp.full(max_steps + 1, value)
    start = _Search(
        initial,
        value,
        jnp.full_like(value, jnp.inf),
        jnp.zeros((), jnp.int32),
        history,
    )
    end = lax.while_loop(running, advance, start)
    mixture = jax.tree.map(
        lambda field: jnp.where(jnp.isnan(end.value), jnp.nan, field), end.mixture
    )
    return GaussianMixtureFit(
        mixture, end.value, end.iteration, end.gain <= tolerance, end.history
    )


def _mean_density(
    x: Array, mixture: GaussianMixture, keep: Array, total: Array
) -> Array:
    density = logsumexp(_log_joint(x, mixture))
    return jnp.where(keep, density, 0).sum() / total
