"""Projected gradient ascent: balls, boxes, kinks and NaN."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from softlib.optim import projected_gradient_ascent
from tests.host import jnp


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finds_the_corner_of_a_linear_objective(norm, dtype):
    random = np.random.default_rng(0)
    slope = jnp.asarray(random.normal(size=(3, 2, 4)), jnp.float32)
    x = jnp.asarray(random.normal(size=slope.shape), dtype)
    found = jax.jit(
        lambda x, key, radius: projected_gradient_ascent(
            lambda points: (points * slope).sum((1, 2)),
            x,
            radius=radius,
            norm=norm,
            num_steps=30,
            step_size=0.05,
            key=key,
        )
    )(x, jax.random.key(0), 0.25)
    assert found.dtype == x.dtype
    length = jnp.sqrt((slope**2).sum((1, 2), keepdims=True))
    direction = jnp.sign(slope) if norm == math.inf else slope / length
    wanted = np.float32(x) + 0.25 * np.asarray(direction)
    np.testing.assert_allclose(
        np.float32(found), wanted, atol=2e-3 if dtype == "float32" else 4e-2
    )


@pytest.mark.parametrize("norm", [2, math.inf])
def test_stays_in_ball_and_box_and_never_gets_worse(norm):
    """Of an objective with many maxima, and steps that are far too long."""
    x = jax.random.uniform(jax.random.key(1), (6, 10))
    objective = lambda points: jnp.sin(20 * points).sum(1)

    @functools.partial(jax.jit, static_argnames="num_steps")
    def ascend(num_steps):
        found = projected_gradient_ascent(
            objective,
            x,
            radius=0.3,
            norm=norm,
            num_steps=num_steps,
            step_size=0.5,
            key=jax.random.key(2),
            bounds=(0.0, 1.0),
        )
        return found, objective(found)

    before = -jnp.inf
    for num_steps in (1, 12):
        found, value = ascend(num_steps)
        assert (jnp.linalg.norm(found - x, norm, axis=1) <= 0.3 + 1e-6).all()
        assert ((found >= 0) & (found <= 1)).all()
        assert (value >= before).all()
        before = value
    assert value.mean() > objective(x).mean() + 1


def test_leaves_points_at_which_the_objective_is_nan():
    """As of a model that overflows there: a start without a value is no best point."""
    unknown = lambda x: jax.lax.stop_gradient(jnp.where(x > 0, 0, jnp.nan))
    found = projected_gradient_ascent(
        lambda x: (x + unknown(x)).sum(-1),
        jnp.zeros((16, 1)),
        radius=1.0,
        norm=math.inf,
        num_steps=8,
        step_size=0.3,
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(found, 1)


def test_starts_at_random_and_leaves_a_norm_at_its_kink():
    """From the centre the gradient of the distance is 0: it would stay there."""
    x = jnp.zeros((4, 3))
    length = lambda points: jnp.where(
        (points == 0).all(1), 0, jnp.linalg.norm(points + 1e-30, axis=1)
    )
    options: dict[str, Any] = {"radius": 1.0, "norm": 2, "step_size": 0.2}
    found = jax.jit(
        lambda x, key: projected_gradient_ascent(
            length, x, num_steps=20, key=key, **options
        )
    )(x, jax.random.key(0))
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_adversaries_are_constants_and_a_radius_of_zero_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def attack(x, radius):
        return projected_gradient_ascent(
            lambda points: (points**2).sum(1),
            x,
            radius=radius,
            norm=math.inf,
            num_steps=3,
            step_size=0.1,
            key=jax.random.key(1),
        )

    slope = jax.jit(jax.grad(lambda x: attack(x, 0.1).sum()))(x)
    np.testing.assert_array_equal(slope, 0)
    np.testing.assert_allclose(jax.jit(attack)(x, 0.0), x, rtol=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((2, 3), int)}, TypeError, "`x` must have a floating dtype"),
        ({"x": jnp.ones(())}, ValueError, "`x` must have at least 1 axis"),
        ({"norm": 1}, ValueError, "`norm` must be one of 2, inf, got 1"),
        ({"num_steps": 0}, ValueError, "`num_steps` must be at least 1, got 0"),
        ({"radius": -1.0}, ValueError, "`radius` must be >= 0, got -1"),
        (
            {"objective": lambda x: x.sum()},
            ValueError,
            r"`objective` must give one number per example, shape \(2,\), got \(\)",
        ),
    ],
)
def test_errors(change, error, message):
    options: dict[str, Any] = {
        "objective": lambda x: x.sum(1),
        "x": jnp.ones((2, 3)),
        "radius": 0.1,
        "norm": 2,
        "num_steps": 1,
        "step_size": 0.1,
        "key": jax.random.key(0),
    }
    with pytest.raises(error, match=f"^projected_gradient_ascent: {message}"):
        projected_gradient_ascent(**{**options, **change})
