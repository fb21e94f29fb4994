"""An ascent to the worst point of a ball, one for each example."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib.typing import Scalar


@array_arguments
def projected_gradient_ascent(
    objective: Callable[[Float[Array, "B ..."]], Float[Array, " B"]],
    x: Float[Array, "B ..."],
    *,
    radius: Scalar,
    norm: float,
    num_steps: int,
    step_size: Scalar,
    key: Key[Array, ""],
    bounds: tuple[float, float] | None = None,
) -> Float[Array, "B ..."]:
    r"""Points of a ball around each example at which an objective is large.

    From a random point of the ball, `num_steps` times a step along the gradient (its
    sign for $\ell_\infty$, its direction for $\ell_2$) and back into the ball: the
    usual attack. Returned is the best point that was visited, example by example.

    Args:
        objective: A value per example, of which only its own input is changed. Any
            number is better than NaN.
        x: The centres.
        radius: Of the ball, at least 0; a number or a traced scalar.
        norm: Static; 2 or `math.inf`, over all axes but the first.
        num_steps: Static number of steps.
        step_size: Length of a step in the norm, at least 0; a number or a traced
            scalar. `2.5 * radius / num_steps` reaches every point of the ball.
        key: Of the random start.
        bounds: Static least and largest value of an entry, as of an image, or None.

    Returns:
        Points of the dtype and shape of `x`, within the radius of it (up to rounding).

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` has no axis, the objective is not one number per example, or an
            option is out of range.

    Derivatives: 0; the points are constants to what is trained on them.
    Cost: `num_steps` + 1 values and gradients of the objective, one after another.
    Source: "Towards Deep Learning Models Resistant to Adversarial Attacks".

    Example:
        >>> target = jnp.array([[1.0, 0.0]])
        >>> found = softlib.optim.projected_gradient_ascent(
        ...     lambda x: (x * target).sum(-1), jnp.zeros((1, 2)), radius=0.5,
        ...     norm=2, num_steps=20, step_size=0.1, key=jax.random.key(0))
        >>> print(found.round(2) + 1)
        [[1.5 1. ]]
    """
    function = "projected_gradient_ascent"
    x = jnp.asarray(x)
    checks.require_floating(function, x=x)
    checks.require_rank(function, "x", x, 1, "(B, ...)")
    checks.require_one_of(function, "norm", norm, (2, math.inf))
    checks.require_positive_integer(function, "num_steps", num_steps)
    checks.require_scalar(function, "radius", radius, 0, math.inf)
    checks.require_scalar(function, "step_size", step_size, 0, math.inf)
    centre = lax.stop_gradient(x).astype(accumulator_dtype(x))
    centre, radius, step_size = promoted(centre, radius, step_size)
    of = lambda points: lax.stop_gradient(objective(points.astype(x.dtype)))
    found = jax.eval_shape(objective, x).shape
    if found != x.shape[:1]:
        raise ValueError(
            f"{function}: `objective` must give one number per example, shape "
            f"{x.shape[:1]}, got {found}."
        )
    gradient = jax.grad(lambda points: objective(points.astype(x.dtype)).sum())

    def project(points: Array) -> Array:
        change = points - centre
        if norm == 2:
            length = _length(change)
            change = change * jnp.where(length > radius, radius / _some(length), 1)
        else:
            change = jnp.clip(change, -radius, radius)
        points = centre + change
        # A box contains the centres, so that cutting brings a point nearer to them.
        return points if bounds is None else jnp.clip(points, *bounds)

    def step(_, state):
        points, best, value = state
        slope = gradient(points)
        direction = jnp.sign(slope) if norm != 2 else slope / _some(_length(slope))
        points = project(points + step_size * direction)
        now = of(points)
        better = (now > value) | jnp.isnan(value)
        best = jnp.where(_like(better, best), points, best)
        return points, best, jnp.where(better, now, value)

    start = project(centre + radius * _random(key, centre, norm))
    state = (start, start, of(start))
    _, best, _ = lax.fori_loop(0, num_steps, step, state)
    return lax.stop_gradient(best).astype(x.dtype)


def _random(key: Array, like: Array, norm: float) -> Array:
    """Uniform in the unit ball of the norm, one for each example."""
    if norm != 2:
        return jax.random.uniform(key, like.shape, like.dtype, -1, 1)
    key_direction, key_length = jax.random.split(key)
    direction = jax.random.normal(key_direction, like.shape, like.dtype)
    size = math.prod(like.shape[1:])
    length = jax.random.uniform(key_length, like.shape[:1], like.dtype) ** (1 / size)
    return direction / _some(_length(direction)) * _like(length, like)


def _length(points: Array) -> Array:
    axes = tuple(range(1, points.ndim))
    return jnp.sqrt((points**2).sum(axes, keepdims=True))


def _some(length: Array) -> Array:
    return jnp.where(length > 0, length, 1)


def _like(per_example: Array, points: Array) -> Array:
    return per_example.reshape(-1, *(1,) * (points.ndim - 1))
