"""Langevin dynamics: the law at rest, gradient descent, errors."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from softlib import optim
from tests.host import jnp


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_law_at_rest_of_a_quadratic(temperature):
    """Of x <- (1 - a) x + sqrt(2 a T) e it is normal, with variance T / (1 - a / 2)."""
    rate = 0.2
    step = optim.sgld(rate, key=jax.random.key(0), temperature=temperature)

    def body(carry: Any, _: Any) -> Any:
        x, state = carry
        updates, state = step.update(x, state)
        return (optax.apply_updates(x, updates), state), None

    start = jnp.zeros(20_000)
    run = jax.jit(lambda x: jax.lax.scan(body, (x, step.init(x)), None, 60)[0][0])
    found = np.asarray(run(start), np.float64)
    variance = temperature / (1 - rate / 2)
    error = variance * np.sqrt(2 / found.size)
    assert abs(found.var() - variance) < 4 * error
    assert abs(found.mean()) < 4 * np.sqrt(variance / found.size)


def test_nothing_is_drawn_at_temperature_zero_and_arrays_are_rates():
    rate: Any = jnp.float32(0.5)
    step = optim.sgld(rate, key=jax.random.key(0), temperature=0.0)
    gradient = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([4.0])}
    updates, _ = step.update(gradient, step.init(gradient))
    jax.tree.map(
        lambda u, g: np.testing.assert_array_equal(u, -0.5 * g), *(updates, gradient)
    )


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"^sgld: `learning_rate` must be positive"):
        optim.sgld(0.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"^sgld: `temperature` must be >= 0, got -1"):
        optim.sgld(0.1, key=jax.random.key(0), temperature=-1.0)
