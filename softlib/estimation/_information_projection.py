r"""Risk of a maximum-likelihood fit of an exponential family to any truth.

The fit approaches the information projection of the truth, the member of the family
with the same expected statistics, and the risk says how fast in the number of samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar

from ._gauss_newton import damped_gauss_newton

type LogPartition = Callable[[Array], Array]


class ExponentialFamilyFit(NamedTuple):
    r"""The result of `fit_exponential_family`.

    Attributes:
        coefficients: $\hat\theta$, float32 or wider.
        gradient_norm: Of the negative log-likelihood per sample, which is the distance
            between the expected statistics and their means.
        num_steps: Steps that were tried, int32.
        converged: Whether `gradient_norm` is within the tolerance.
        risk: `projection_risk` of the samples' covariance and the fitted model's.
        bayes_error: `bayes_error_lower_bound` of the risk: 1/2 is a fit that nobody can
            tell from the projection.
    """

    coefficients: Float[Array, "*batch p"]
    gradient_norm: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]
    risk: Float[Array, "*batch"]
    bayes_error: Float[Array, "*batch"]


@array_arguments
def fit_exponential_family(
    statistics: Float[Array, "n p"],
    log_partition: LogPartition,
    *,
    initial: Float[Array, " p"] | None = None,
    max_steps: int = 100,
    tolerance: float | None = None,
) -> ExponentialFamilyFit:
    r"""Maximum likelihood in an exponential family, and the risk of the fit.

    Minimises $\psi(\theta) - \langle \bar T, \theta \rangle$, which is convex, by
    Newton's method with damping, and estimates how far the fit is from the information
    projection of whatever the samples came from.

    Args:
        statistics: $T(x_i)$, one sample a row, $n \geq 2$.
        log_partition: $\psi$, a function of $\theta$ (p,) with a scalar value, +inf or
            NaN where it is not defined.
        initial: Where to start, a point with a finite $\psi$; None is 0.
        max_steps: Static; steps that are tried at most.
        tolerance: Static; on the norm of the gradient. None is
            $\varepsilon^{3/4}$, that is 6e-6 in float32 and 2e-12 in float64.

    Returns:
        `ExponentialFamilyFit`, float32 (float64 if an argument is). Statistics that
        depend on each other do not determine $\theta$: the risk is NaN, and the search
        ends where the Hessian has no Cholesky factor, unconverged. If no finite maximum
        exists (means on the boundary), the coefficients grow until the gradient is
        small, or `converged` is False. NaN in `statistics` gives NaN.

    Raises:
        TypeError: An array is not floating, or an option has the wrong type.
        ValueError: There are fewer than 2 samples, shapes do not fit together, or
            `log_partition` has no scalar value.

    Derivatives: forward mode, through the steps. Reverse mode raises JAX's error on
        `while_loop`.
    Cost: a Hessian of `log_partition` and O(p^3) a step.
    Source: "MLE convergence speed to information projection of exponential family:
        Criterion for model dimension and sample size".

    Example:
        >>> counts = jnp.array([[1.0], [3.0], [2.0], [2.0]])
        >>> poisson = lambda theta: jnp.exp(theta).sum()
        >>> fit = softlib.estimation.fit_exponential_family(counts, poisson)
        >>> print(f"{jnp.exp(fit.coefficients[0]):.2f} {fit.risk:.4f}")
        2.00 0.0417
    """
    function = "fit_exponential_family"
    checks.require_floating(function, statistics=statistics, initial=initial)
    checks.require_rank(function, "statistics", statistics, 2, "(n, p)")
    count, size = statistics.shape[-2:]
    checks.require_shape(
        function, "statistics", statistics, (count, size), "one problem; vmap for more"
    )
    if count < 2:
        raise ValueError(
            f"{function}: `statistics` must have at least 2 rows, got {count}."
        )
    checks.require_positive_integer(function, "max_steps", max_steps)
    if tolerance is not None:
        checks.require_positive_number(function, "tolerance", tolerance)
    if initial is None:
        initial = jnp.zeros_like(statistics, shape=(size,))
    checks.require_shape(function, "initial", initial, (size,), "columns of statistics")
    dtype = accumulator_dtype(statistics, initial)
    if tolerance is None:
        tolerance = float(jnp.finfo(dtype).eps) ** 0.75
    samples, start = statistics.astype(dtype), initial.astype(dtype)
    _require_scalar_value(function, log_partition, start)
    mean = samples.mean(0)
    deviations = samples - mean[None]
    psi = lambda theta: log_partition(theta).astype(dtype).reshape(())

    def measure(theta: Array) -> tuple[Array, Array]:
        value, slope = jax.value_and_grad(psi)(theta)
        loss = value - (mean * theta).sum()
        return loss, jnp.linalg.norm(slope - mean)

    def linearize(theta: Array) -> tuple[Array, Array]:
        # A square root of the Hessian is the Jacobian whose Gauss-Newton step is
        # Newton's: J^T J is the Hessian and J^T r the gradient.
        root = jnp.linalg.cholesky(jax.hessian(psi)(theta))
        slope = jax.grad(psi)(theta) - mean
        residual = lax.linalg.triangular_solve(
            root, slope[:, None], left_side=True, lower=True
        )
        return root.T, residual[:, 0]

    end = damped_gauss_newton(
        start,
        measure,
        linearize,
        max_steps=max_steps,
        tolerance=tolerance,
        cancelled=lambda theta: jnp.abs(mean * theta).sum(),
    )
    covariance = jnp.matmul(deviations.T, deviations, precision="highest") / (count - 1)
    risk = projection_risk(covariance, jax.hessian(psi)(end.x), num_samples=count)
    return ExponentialFamilyFit(
        # With NaN in an argument the start would be returned.
        jnp.where(jnp.isfinite(end.loss), end.x, jnp.nan),
        end.norm,
        end.iteration,
        end.norm <= tolerance,
        risk,
        bayes_error_lower_bound(risk),
    )


@array_arguments
def projection_risk(
    data_covariance: Float[Array, "*batch p p"],
    model_covariance: Float[Array, "*batch p p"],
    *,
    num_samples: Scalar,
) -> Float[Array, "*batch"]:
    r"""Expected divergence of a maximum-likelihood fit from the projection, in nats.

    To first order in $1 / n$, with covariances of the sufficient statistics under the
    truth, $C$, and under the projection $P_{\theta^*}$, $V$,

    $$\mathbb{E}\, \mathrm{KL}(P_{\theta^*} \| P_{\hat\theta}) \approx
      \frac{\operatorname{tr}(V^{-1} C)}{2n},$$

    which is $p / (2n)$ if the truth belongs to the family.

    Args:
        data_covariance: $C$.
        model_covariance: $V$, the Hessian of the log-partition function. If it is not
            positive definite, up to rounding, the result is NaN: leave out statistics
            that are combinations of others.
        num_samples: $n \geq 1$, a number or a traced scalar.

    Returns:
        The risk, float32 (float64 if an argument is).

    Raises:
        TypeError: An array is not floating.
        ValueError: Matrices are not square, their shapes differ, or `num_samples` is
            below 1.

    Derivatives: forward and reverse mode, any order.
    Cost: a Cholesky factorisation and two triangular solves, O(p^3).
    Source: "MLE convergence speed to information projection of exponential family:
        Criterion for model dimension and sample size".

    Example:
        >>> risk = softlib.estimation.projection_risk
        >>> print(risk(2 * jnp.eye(3), jnp.eye(3), num_samples=100))
        0.03
    """
    function = "projection_risk"
    checks.require_floating(
        function, data_covariance=data_covariance, model_covariance=model_covariance
    )
    checks.require_rank(
        function, "model_covariance", model_covariance, 2, "(*batch, p, p)"
    )
    square = (*model_covariance.shape[:-1], model_covariance.shape[-2])
    checks.require_shape(
        function, "model_covariance", model_covariance, square, "square matrices"
    )
    checks.require_shape(
        function, "data_covariance", data_covariance, square, "as `model_covariance`"
    )
    checks.require_scalar(function, "num_samples", num_samples, 1, math.inf)
    dtype = accumulator_dtype(data_covariance, model_covariance)
    model = model_covariance.astype(dtype)
    root = jnp.linalg.cholesky(model)
    solve = lambda right: lax.linalg.triangular_solve(
        root, right, left_side=True, lower=True
    )
    # L^-1 C L^-T, of which only the diagonal counts.
    whitened = solve(jnp.swapaxes(solve(data_covariance.astype(dtype)), -1, -2))
    trace = jnp.trace(whitened, axis1=-2, axis2=-1)
    # A pivot is what the statistics before leave of a variance; rounding leaves some.
    variances = jnp.diagonal(model, axis1=-2, axis2=-1)
    pivots = jnp.diagonal(root, axis1=-2, axis2=-1) ** 2
    least = 10 * model.shape[-1] * jnp.finfo(dtype).eps
    independent = (pivots > least * variances).all(-1)
    count = jnp.asarray(num_samples, dtype)
    return jnp.where(independent, trace / (2 * count), jnp.nan)


@array_arguments
def second_order_projection_risk(
    model_cumulants: Float[Array, "*batch 3"],
    *,
    num_samples: Scalar,
    data_moments: Float[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Risk of a family with one parameter, to the second order in $1 / n$, in nats.

    With cumulants $\kappa_2, \kappa_3, \kappa_4$ of the statistic under the projection,
    central moments $c_2, c_3$ under the truth, and the variance as a function of the
    mean, $V' = \kappa_3 / \kappa_2$, $V'' = \kappa_4 / \kappa_2^2 - \kappa_3^2 /
    \kappa_2^3$,

    $$R = \frac{c_2}{2 \kappa_2 n} + \frac1{n^2} \left[ -\frac{V' c_3}{3 \kappa_2^2}
      + \frac{3 c_2^2}{4} \Big(\frac{V'^2}{\kappa_2^3} - \frac{V''}{2 \kappa_2^2}\Big)
      \right] .$$

    Args:
        model_cumulants: $\kappa_2 > 0$, $\kappa_3$, $\kappa_4$: those of
            `log_partition_cumulants` but the first. NaN if $\kappa_2$ is not positive.
        num_samples: $n \geq 1$, a number or a traced scalar.
        data_moments: $c_2, c_3$. None: the truth belongs to the family, they are
            $\kappa_2, \kappa_3$.

    Returns:
        The risk, float32 (float64 if an argument is).

    Raises:
        TypeError: An array is not floating.
        ValueError: The last axis has another size, batch shapes differ, or
            `num_samples` is below 1.

    Derivatives: forward and reverse mode, any order.
    Cost: O(1) per family.
    Source: "MLE convergence speed to information projection of exponential family:
        Criterion for model dimension and sample size". The expansion is derived from
        $\mathrm{KL} = \int_0^\delta t / V(\mu + t)\, dt$ for a mean that is off by
        $\delta$.

    Example:
        >>> exponential = jnp.array([1.0, 2.0, 6.0])
        >>> risk = softlib.estimation.second_order_projection_risk
        >>> print(risk(exponential, num_samples=10).round(6))
        0.059167
    """
    function = "second_order_projection_risk"
    checks.require_floating(
        function, model_cumulants=model_cumulants, data_moments=data_moments
    )
    checks.require_rank(function, "model_cumulants", model_cumulants, 1, "(*batch, 3)")
    batch = model_cumulants.shape[:-1]
    checks.require_shape(
        function, "model_cumulants", model_cumulants, (*batch, 3), "second to fourth"
    )
    checks.require_shape(
        function, "data_moments", data_moments, (*batch, 2), "second and third"
    )
    checks.require_scalar(function, "num_samples", num_samples, 1, math.inf)
    dtype = accumulator_dtype(model_cumulants, data_moments)
    k2, k3, k4 = jnp.moveaxis(model_cumulants.astype(dtype), -1, 0)
    c2, c3 = k2, k3
    if data_moments is not None:
        c2, c3 = jnp.moveaxis(data_moments.astype(dtype), -1, 0)
    positive = k2 > 0
    k2 = jnp.where(positive, k2, 1)
    # Ratios of powers without units: k2^3 of a small variance would underflow.
    spread, skew, data_skew = c2 / k2, k3 / k2**1.5, c3 / k2**1.5
    kurtosis = (k4 / k2) / k2
    bracket = -skew * data_skew / 3
    bracket += 0.75 * spread**2 * (1.5 * skew**2 - 0.5 * kurtosis)
    count = jnp.asarray(num_samples, dtype)
    risk = (spread / 2 + bracket / count) / count
    return jnp.where(positive, risk, jnp.nan)


@array_arguments
def log_partition_cumulants(
    log_partition: LogPartition,
    theta: Float[Array, "..."],
    *,
    direction: Float[Array, "..."] | None = None,
    order: int = 4,
) -> Float[Array, " order"]:
    r"""Cumulants of a statistic under a member of an exponential family.

    They are derivatives of the log-partition function: the mean, the variance, and the
    third and fourth cumulants of $\langle T, v \rangle$ are those of $\psi(\theta + t
    v)$ by $t$ at 0, by nested forward mode.

    Args:
        log_partition: $\psi$, a function of an array like `theta` with a scalar value.
        theta: A scalar, or an array of several parameters.
        direction: $v$; None: ones, for a scalar the statistic itself.
        order: Static number of cumulants, at least 1.

    Returns:
        Cumulants from the first on, float32 (float64 if `theta` is).

    Raises:
        TypeError: An array is not floating, or `order` is no Python int.
        ValueError: `direction` has another shape, `order` is below 1, or
            `log_partition` has no scalar value.

    Derivatives: those of `log_partition`.
    Cost: about $2^k$ times `log_partition` for the last of $k$ cumulants.
    Source: "MLE convergence speed to information projection of exponential family:
        Criterion for model dimension and sample size".

    Example:
        >>> cumulants = softlib.estimation.log_partition_cumulants
        >>> print(cumulants(jnp.exp, jnp.zeros(())))  # of a Poisson law of mean 1
        [1. 1. 1. 1.]
    """
    function = "log_partition_cumulants"
    checks.require_floating(function, theta=theta, direction=direction)
    if direction is None:
        direction = jnp.ones_like(theta)
    checks.require_shape(function, "direction", direction, theta.shape, "as `theta`")
    checks.require_positive_integer(function, "order", order)
    dtype = accumulator_dtype(theta, direction)
    point, along = theta.astype(dtype), direction.astype(dtype)
    _require_scalar_value(function, log_partition, point)
    derivative = lambda t: log_partition(point + t * along).astype(dtype).reshape(())
    found, origin = [], jnp.zeros((), dtype)
    for _ in range(order):
        derivative = jax.jacfwd(derivative)
        found.append(derivative(origin))
    return jnp.stack(found)


@array_arguments
def bayes_error_lower_bound(
    divergence: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    r"""Least error of telling two laws apart from one sample, from their divergence.

    Two laws with $\mathrm{KL} \leq D$, each as likely beforehand, have a Bayes error of
    at least $(1 - \sqrt{D / 2}) / 2$, by Pinsker's inequality.

    Args:
        divergence: $D \geq 0$ in nats, in either direction; NaN below 0.

    Returns:
        The bound in [0, 1/2], 0 from $D = 2$ on; float32 (float64 if `divergence` is).

    Raises:
        TypeError: `divergence` is not floating.

    Derivatives: forward and reverse mode where it is neither 0 nor 2.
    Cost: O(1) per entry.
    Source: "MLE convergence speed to information projection of exponential family:
        Criterion for model dimension and sample size".

    Example:
        >>> print(softlib.estimation.bayes_error_lower_bound(jnp.array([0.02, 0.5])))
        [0.45 0.25]
    """
    checks.require_floating("bayes_error_lower_bound", divergence=divergence)
    divergence = divergence.astype(accumulator_dtype(divergence))
    return jnp.maximum(1 - jnp.sqrt(divergence / 2), 0) / 2


@array_arguments
def pn_criterion(
    risk: Float[Array, "*batch"], *, bayes_error: Scalar = 0.45
) -> Bool[Array, "*batch"]:
    r"""Whether a fit is as good as the projection, for an observer of one sample.

    Accepts a number of parameters $p$ and of samples $n$ if a Bayes error $e$ at least
    is guaranteed between the two: risk $\leq 2 (1 - 2e)^2$. For $e = 0.45$ and a truth
    in the family that is $p \leq 0.04\, n$.

    Args:
        risk: Of `projection_risk`, in nats; NaN is not accepted.
        bayes_error: $e$ in [0, 1/2], a number or a traced scalar.

    Returns:
        True where the risk is small enough.

    Raises:
        TypeError: `risk` is not floating.
        ValueError: `bayes_error` is out of range.

    Derivatives: none.
    Cost: O(1) per entry.
    Source: "MLE convergence speed to information projection of exponential family:
        Criterion for model dimension and sample size".

    Example:
        >>> print(softlib.estimation.pn_criterion(jnp.array([0.01, 0.03])))
        [ True False]
    """
    function = "pn_criterion"
    checks.require_floating(function, risk=risk)
    checks.require_scalar(function, "bayes_error", bayes_error, 0, 0.5)
    dtype = accumulator_dtype(risk)
    most = 2 * (1 - 2 * jnp.asarray(bayes_error, dtype)) ** 2
    return risk.astype(dtype) <= most


def _require_scalar_value(
    function: str, log_partition: LogPartition, theta: Array
) -> None:
    shape = jax.eval_shape(log_partition, theta).shape
    if shape != ():
        raise ValueError(
            f"{function}: `log_partition` must give a scalar, got shape {shape}."
        )
