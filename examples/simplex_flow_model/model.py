"""Denoiser and classifier, and the calls of the flow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from softlib.decoding import (
    FlowSample,
    exponential_temperature,
    gumbel_flow_loss,
    gumbel_softmax_interpolant,
    sample_gumbel_flow,
)

from .options import Options
from .sites import LENGTH, LETTERS

SHAPE = (LENGTH, len(LETTERS))
# Sequences that one compiled call draws.
CHUNK = 1000


class Denoiser(nnx.Module):
    """Points of the simplex (B, 9, 4) and a time to logits of the clean letters.

    It reads the temperature times the logarithm of a point: the perturbed one-hot
    itself, at the same scale at every time.
    """

    def __init__(self, options: Options, *, rngs: nnx.Rngs):
        self.tau_max, self.decay = options.tau_max, options.decay
        self.beta, width = options.beta, options.width
        size = LENGTH * len(LETTERS)
        self.embed = nnx.Linear(size + 1, width, rngs=rngs)
        self.layers = nnx.List(
            [Residual(width, rngs=rngs) for _ in range(options.layers)]
        )
        self.out = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, x: Array, t: Array) -> Array:
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype).reshape(-1, 1), (len(x), 1))
        tau = exponential_temperature(t, tau_max=self.tau_max, decay=self.decay)
        z = self.beta * tau[..., None] * jnp.log(jnp.maximum(x, 1e-30))
        z = z - z.mean(-1, keepdims=True)
        h = self.embed(jnp.concatenate([z.reshape(len(x), -1), t - 0.5], -1))
        for layer in self.layers:
            h = layer(h)
        return self.out(h).reshape(x.shape)


class Residual(nnx.Module):
    """Two layers on the normalised stream, added to it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Classifier(nnx.Module):
    """One-hot sequences (B, 9, 4) to the log-odds that a site is common."""

    def __init__(self, options: Options, *, rngs: nnx.Rngs):
        width = options.width
        self.embed = nnx.Linear(LENGTH * len(LETTERS), width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, sequences: Array) -> Array:
        flat = sequences.reshape(*sequences.shape[:-2], -1)
        return self.out(nnx.gelu(self.hidden(nnx.gelu(self.embed(flat)))))[..., 0]


def build[Model: nnx.Module](kind: type[Model], options: Options) -> Model:
    """The seed decides every weight."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> Model:
        make: Any = kind
        return make(options, rngs=nnx.Rngs(options.seed))

    return create()


def denoiser_loss(model: Denoiser, tokens: Array, times: Array, noise: Array) -> Array:
    """Nats of a letter, given a point on its path at a random time."""
    x = gumbel_softmax_interpolant(
        None,
        jax.nn.one_hot(tokens, len(LETTERS)),
        times[:, None],
        noise=noise,
        tau_max=model.tau_max,
        decay=model.decay,
        beta=model.beta,
    )
    return gumbel_flow_loss(model(x, times), tokens).mean()


def classifier_loss(model: Classifier, tokens: Array, is_common: Array) -> Array:
    logits = model(jax.nn.one_hot(tokens, len(LETTERS)))
    return optax.sigmoid_binary_cross_entropy(logits, is_common).mean()


@nnx.jit
def log_odds(model: Classifier, tokens: Array) -> Array:
    return model(jax.nn.one_hot(tokens, len(LETTERS)))


def draw(
    denoiser: Callable[[Array, Array], Array],
    count: int,
    options: Options,
    *,
    classifier: Classifier | None = None,
    strength: float = 0.0,
    space: str = "logit",
) -> np.ndarray:
    """Sequences (count, 9) from a denoiser; towards common ones with a classifier."""
    key = jax.random.key(options.seed)
    chunk = min(count, CHUNK)
    sample = _sampler(denoiser, classifier, chunk, options, space)
    keys = jax.random.split(key, -(-count // chunk))
    drawn = [sample(k, jnp.float32(strength)).tokens for k in keys]
    return np.concatenate(drawn)[:count]


@functools.lru_cache
def _sampler(
    denoiser: Callable[[Array, Array], Array],
    classifier: Classifier | None,
    chunk: int,
    options: Options,
    space: Any,
) -> Callable[[Array, Array], FlowSample]:
    # The guidance is log p(common | sequence), whose gradient fades once it is likely.
    guidance = None
    if classifier is not None:
        guidance = lambda hot: jax.nn.log_sigmoid(classifier(hot))

    @jax.jit
    def sample(key: Array, strength: Array) -> FlowSample:
        return sample_gumbel_flow(
            key,
            denoiser,
            (chunk, *SHAPE),
            num_steps=options.flow_steps,
            guidance=guidance,
            guidance_scale=strength,
            num_guidance_samples=options.guidance_samples,
            tau_max=options.tau_max,
            decay=options.decay,
            beta=options.beta,
            space=space,
        )

    return sample
