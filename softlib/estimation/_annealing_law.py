r"""The loss of training as it depends on the schedule of the learning rate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype, promoted
from softlib.recurrent import linear_recurrence
from softlib.typing import Scalar

from ._gauss_newton import damped_gauss_newton

# Exponents at which the fit starts; curves of training have one between 0.1 and 1.5.
EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2)

_matmul = functools.partial(jnp.matmul, precision="highest")


class AnnealingAreas(NamedTuple):
    """Areas under a schedule, along the axes of its learning rates.

    Attributes:
        forward: $S_1$, the sum of the learning rates so far.
        annealing: $S_2$, the area between the schedule and its delayed self.
    """

    forward: Float[Array, "..."]
    annealing: Float[Array, "..."]


class AnnealingLaw(NamedTuple):
    r"""The loss $L_0 + A S_1^{-\alpha} - C S_2$ of a schedule; a pytree.

    Attributes:
        floor: $L_0 \geq 0$.
        scale: $A \geq 0$.
        gain: $C \geq 0$; of annealing.
        exponent: $\alpha \geq 0$.
    """

    floor: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]
    gain: Float[Array, "*batch"]
    exponent: Float[Array, "*batch"]

    def loss(self, areas: AnnealingAreas) -> Float[Array, "..."]:
        """Predicts the loss at every step; +inf where no step has been made.

        Args:
            areas: Of `annealing_areas`; broadcasts against the parameters.
        """
        forward, annealing, floor, scale, gain, exponent = map(
            jnp.asarray, promoted(*areas, *self)
        )
        moved = forward > 0
        power = jnp.where(moved, forward, 1) ** -exponent
        return floor + scale * jnp.where(moved, power, jnp.inf) - gain * annealing


class AnnealingLawFit(NamedTuple):
    """The result of `fit_annealing_law`.

    Attributes:
        law: The `AnnealingLaw`; NaN if an argument holds NaN.
        objective: Sum of the Huber losses of the residuals of the logarithm.
        mean_absolute_error: Of the predicted losses, on the points that were fitted.
        gradient_norm: Of the objective by the logarithms of the parameters, divided by
            `huber_delta` and the number of points; 0 at a stationary point.
        num_steps: Steps that were tried from the best start, int32.
        converged: Whether `gradient_norm` is within the tolerance.
    """

    law: AnnealingLaw
    objective: Float[Array, "*batch"]
    mean_absolute_error: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


@array_arguments
def annealing_areas(
    learning_rates: Float[Array, "..."], *, decay: Scalar = 0.999, axis: int = -1
) -> AnnealingAreas:
    r"""Two areas of a schedule of learning rates, which determine the loss.

    With rates $\eta_0, \dots, \eta_s$,

    $$S_1(s) = \sum_{i \leq s} \eta_i, \qquad S_2(s) = \sum_{i \leq s} m_i, \qquad
      m_0 = 0, \quad m_i = \lambda m_{i-1} + \eta_{i-1} - \eta_i .$$

    $S_1$ is how far training could go, $S_2$ grows as the rate falls, with a delay of
    about $1 / (1 - \lambda)$ steps.

    Args:
        learning_rates: The rate of every step; evaluate an Optax schedule by
            `jax.vmap(schedule)(jnp.arange(num_steps))`. Give the steps of a warm-up the
            maximal rate: it is not annealing backwards.
        decay: $\lambda$ in [0, 1]; a number is static, an array traced.
        axis: Static; the axis of time.

    Returns:
        `AnnealingAreas`, float32 (float64 if `learning_rates` is). In float32 sums of
        100,000 steps are right to about 1e-6 and, as $1 / (1 - \lambda)$ is rounded
        with $\lambda$, annealing to 2e-5 for 0.999.

    Raises:
        TypeError: `learning_rates` is not floating.
        ValueError: There is no such axis, or `decay` is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: O(T) per schedule and a depth of log T, by `softlib.recurrent`.
    Source: "Scaling Law with Learning Rate Annealing".

    Example:
        >>> rates = jnp.array([4.0, 4.0, 2.0, 1.0])
        >>> areas = softlib.estimation.annealing_areas(rates, decay=0.5)
        >>> print(areas.forward, areas.annealing)
        [ 4.  8. 10. 11.] [0. 0. 2. 4.]
    """
    function = "annealing_areas"
    checks.require_floating(function, learning_rates=learning_rates)
    checks.require_rank(function, "learning_rates", learning_rates, 1, "(time)")
    checks.require_axes(function, "axis", axis, learning_rates.ndim)
    checks.require_scalar(function, "decay", decay, 0, 1)
    dtype = accumulator_dtype(learning_rates)
    rates = jnp.moveaxis(learning_rates.astype(dtype), axis, 0)
    falls = jnp.concatenate([jnp.zeros_like(rates[:1]), rates[:-1] - rates[1:]])
    ones = jnp.ones((1,) * rates.ndim, dtype)
    momentum = linear_recurrence(jnp.asarray(decay, dtype) * ones, falls)
    # Sums as trees, which round log T times and not T times.
    sums = (linear_recurrence(ones, each) for each in (rates, momentum))
    return AnnealingAreas(*(jnp.moveaxis(each, 0, axis) for each in sums))


@array_arguments
def fit_annealing_law(
    forward: Float[Array, "*points"],
    annealing: Float[Array, "*points"],
    losses: Float[Array, "*points"],
    *,
    huber_delta: float = 1e-3,
    max_steps: int = 200,
    tolerance: float | None = None,
    where: Bool[Array, "*points"] | None = None,
) -> AnnealingLawFit:
    r"""The law of the loss that fits measured curves, from several starts.

    Minimises the sum of Huber losses of $\log L - \log y$ over the positive parameters
    of `AnnealingLaw`, by damped Gauss-Newton in their logarithms from a grid of
    exponents. At each of them the other parameters start at a linear least-squares
    fit. The best end is returned.

    Fit on a curve that has a flat part and a decay: one cosine does not tell the
    exponent from the gain, and predicts other schedules worse, however well it fits.

    Args:
        forward: $S_1$ at the points measured; several curves may be stacked. Where it
            is not positive the point does not count.
        annealing: $S_2$ there.
        losses: $y > 0$. Smooth single-batch losses before.
        huber_delta: Static; from this residual on, points weigh less.
        max_steps: Static; steps that are tried at most from a start.
        tolerance: Static; on `gradient_norm`. None is $10 \sqrt\varepsilon$.
        where: True for the points that count; the others may hold anything.

    Returns:
        `AnnealingLawFit`, float32 (float64 if an argument is). A parameter that the
        points do not determine (the gain, for a constant rate) keeps that of its
        start. NaN if a counting loss is not positive or no point counts.

    Raises:
        TypeError: An array is not floating, `where` is not boolean, or an option has
            the wrong type.
        ValueError: Shapes differ, or an option is out of range.

    Derivatives: forward mode, through the steps. Reverse mode raises JAX's error on
        `while_loop`.
    Cost: O(points) per step and start; the 11 starts run side by side until the
        slowest is done.
    Source: "Scaling Law with Learning Rate Annealing". Deviations: Gauss-Newton with
        closed-form starts instead of L-BFGS-B over a grid of all parameters; the
        objective is the same.

    Example:
        >>> rates = jnp.linspace(0.2, 1.0, 40)[::-1]
        >>> areas = softlib.estimation.annealing_areas(rates, decay=0.9)
        >>> law = softlib.estimation.AnnealingLaw(*jnp.array([2.0, 1.0, 0.1, 0.5]))
        >>> fit = softlib.estimation.fit_annealing_law(*areas, law.loss(areas))
        >>> print(abs(fit.law.loss(areas) - law.loss(areas)).max() < 1e-4)
        True
    """
    function = "fit_annealing_law"
    checks.require_floating(
        function, forward=forward, annealing=annealing, losses=losses
    )
    same = "that of `forward`"
    checks.require_shape(function, "annealing", annealing, forward.shape, same)
    checks.require_shape(function, "losses", losses, forward.shape, same)
    checks.require_positive_number(function, "huber_delta", huber_delta)
    checks.require_positive_integer(function, "max_steps", max_steps)
    if tolerance is not None:
        checks.require_positive_number(function, "tolerance", tolerance)
    where = checks.checked_where(function, where, forward.shape, same)
    dtype = accumulator_dtype(forward, annealing, losses)
    if tolerance is None:
        tolerance = 10 * float(jnp.finfo(dtype).eps) ** 0.5
    flat = lambda each: each.astype(dtype).reshape(-1)
    moved = where.reshape(-1) & (forward.reshape(-1) > 0)
    points = _Points(flat(forward), flat(annealing), flat(losses), moved)
    return _fit(points, float(huber_delta), max_steps, tolerance)


class _Points(NamedTuple):
    forward: Array
    annealing: Array
    losses: Array
    where: Array


@compiled_once(1, 2, 3)
def _fit(
    points: _Points, delta: float, max_steps: int, tolerance: float
) -> AnnealingLawFit:
    where = points.where
    count = where.sum(dtype=points.losses.dtype)
    masked = lambda x, other: jnp.where(where, x, other)
    mean = lambda x: masked(x, 0).sum() / count
    log_losses = jnp.log(masked(points.losses, 1))
    # Units in which all parameters of a fit are about 1, and power and scale apart.
    log_forward = jnp.log(masked(points.forward, 1))
    middle = mean(log_forward)
    log_forward = masked(log_forward - middle, 0)
    unit = jnp.exp(mean(log_losses))
    most = masked(jnp.abs(points.annealing), 0).max(initial=0)
    annealing = masked(points.annealing / jnp.where(most > 0, most, 1), 0)
    goal = masked(points.losses / unit, 1)

    def parts(logs: Array) -> tuple[Array, Array, Array]:
        floor, scale, gain, exponent = jnp.exp(logs)
        power = scale * jnp.exp(-exponent * log_forward)
        loss = floor + power - gain * annealing
        jacobian = jnp.stack(
            [
                jnp.broadcast_to(floor, loss.shape),
                power,
                -gain * annealing,
                -power * exponent * log_forward,
            ],
            axis=1,
        )
        # A loss of the search that is not positive has no logarithm: NaN, no step.
        log_ratio = jnp.log(jnp.where(loss > 0, loss, jnp.nan)) - jnp.log(goal)
        return masked(log_ratio, 0), jacobian / loss[:, None], loss

    def linearize(logs: Array) -> tuple[Array, Array]:
        residual, jacobian, _ = parts(logs)
        # Weights that make least squares have the gradient of Huber's loss.
        size = jnp.abs(residual)
        weight = jnp.sqrt(delta / jnp.maximum(size, delta))
        weight = masked(weight, 0) / delta
        return weight[:, None] * jacobian, weight * residual

    def measure(logs: Array) -> tuple[Array, Array]:
        residual, jacobian, _ = parts(logs)
        size = jnp.abs(residual)
        # In units of delta^2 and of a point; the gradient in those of delta.
        near = (size / delta) ** 2 / 2
        huber = jnp.where(size <= delta, near, size / delta - 0.5)
        slope = masked(jnp.clip(residual / delta, -1, 1), 0)
        gradient = _matmul(slope, jacobian) / count
        return mean(huber), jnp.linalg.norm(gradient)

    def start(exponent: Array) -> Array:
        """Returns logarithms of what is linear, by least squares of relative errors."""
        power = jnp.exp(-exponent * log_forward)
        terms = (jnp.ones_like(power), power, -annealing)
        columns = jnp.stack([masked(each / goal, 0) for each in terms])
        normal = _matmul(columns, columns.T)
        ridge = 1e-6 * jnp.trace(normal) * jnp.eye(3, dtype=normal.dtype)
        found = jnp.linalg.solve(normal + ridge, columns.sum(1))
        # Below 0 is outside: from near the boundary instead.
        return jnp.log(jnp.append(jnp.maximum(found, 1e-2), exponent))

    def search(exponent: Array):
        return damped_gauss_newton(
            start(exponent),
            measure,
            linearize,
            max_steps=max_steps,
            tolerance=tolerance,
        )

    ends = jax.vmap(search)(jnp.asarray(EXPONENTS, goal.dtype))
    best = jnp.where(jnp.isfinite(ends.loss), ends.loss, jnp.inf).argmin()
    end = jax.tree.map(lambda each: each[best], ends)
    floor, scale, gain, exponent = jnp.exp(
        jnp.where(jnp.isfinite(end.loss), end.x, jnp.nan)
    )
    law = AnnealingLaw(
        floor * unit,
        scale * unit * jnp.exp(exponent * middle),
        gain * unit / jnp.where(most > 0, most, 1),
        exponent,
    )
    error = mean(jnp.abs(parts(end.x)[2] - goal)) * unit
    total = delta**2 * count
    return AnnealingLawFit(
        law, end.loss * total, error, end.norm, end.iteration, end.norm <= tolerance
    )
