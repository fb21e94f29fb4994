"""The flow of one position with three symbols, whose simplex is a triangle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softlib.decoding import (
    exponential_temperature,
    gumbel_flow_velocity,
    gumbel_softmax_interpolant,
)
from softlib.softmax import concrete_log_prob, softmax

PRIOR = (0.5, 0.3, 0.2)
BETA = 2.0
STEPS = 60
TIMES = (0.0, 0.5, 0.8, 1.0)
STRENGTH = 1.5


class Toy(NamedTuple):
    """Points of the triangle.

    Attributes:
        clouds: (times, points, 3): what training sees of the first symbol.
        free: (steps + 1, paths, 3): from noise along the flow.
        guided: The same, towards the last symbol.
    """

    clouds: np.ndarray
    free: np.ndarray
    guided: np.ndarray


def draw(seed: int, points: int = 300, paths: int = 24) -> Toy:
    @jax.jit
    def create(key: Array) -> tuple[Array, Array, Array]:
        cloud_key, path_key = jax.random.split(key)
        symbol = jnp.tile(jnp.eye(3)[0], (points, 1))
        noise = jax.random.gumbel(cloud_key, symbol.shape)
        at = lambda t: gumbel_softmax_interpolant(None, symbol, t, noise=noise)
        start = softmax(jax.random.gumbel(path_key, (paths, 3)) / (BETA * 10))
        free, guided = jax.vmap(follow, (None, 0))(start, jnp.array([0.0, STRENGTH]))
        return jax.vmap(at)(jnp.array(TIMES)), free, guided

    return Toy(*map(np.asarray, create(jax.random.key(seed))))


def follow(start: Array, strength: Array) -> Array:
    """The flow towards the exact posterior, guided by the chance of the last symbol."""
    wanted = jnp.eye(3)[2][None]

    def step(x: Array, t: Array) -> tuple[Array, Array]:
        p = posterior(x, t)
        upward = p * (wanted - p[:, 2:])
        velocity = gumbel_flow_velocity(x, p, t) + strength * upward
        x = jnp.maximum(x + velocity / STEPS, 0)
        x = x / x.sum(-1, keepdims=True)
        return x, x

    _, path = lax.scan(step, start, jnp.arange(STEPS) / STEPS)
    return jnp.concatenate([start[None], path])


def posterior(x: Array, t: Array) -> Array:
    """The chance of each symbol at a point."""
    log_x = jnp.log(jnp.maximum(x, 1e-30))
    tau = BETA * exponential_temperature(t)
    density = lambda e: concrete_log_prob(
        log_x, jnp.broadcast_to(BETA * e, x.shape), temperature=tau
    )
    evidence = jax.vmap(density, out_axes=-1)(jnp.eye(3))
    return softmax(evidence + jnp.log(jnp.array(PRIOR))[None])
