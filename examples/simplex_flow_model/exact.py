"""The best denoiser there is: Bayes' rule over all sites, instead of a network.

What its samples lack is due to the flow; what those of the network lack beyond that, to
learning. Only a distribution as small as this one can be treated so.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softlib.decoding import (
    exponential_temperature,
    gumbel_flow_loss,
    gumbel_softmax_interpolant,
)
from softlib.softmax import concrete_log_prob, softmax

from .options import Options
from .sites import LETTERS, Sites


def denoiser(sites: Sites, options: Options) -> Callable[[Array, Array], Array]:
    """Logits of each letter given a point, as `model.Denoiser` estimates them."""
    hot = jnp.eye(len(LETTERS))[sites.tokens].reshape(len(sites.tokens), -1)
    prior = jnp.asarray(np.log(sites.share), jnp.float32)

    def said(x: Array, t: Array) -> Array:
        tau = exponential_temperature(t, tau_max=options.tau_max, decay=options.decay)
        log_x = jnp.log(jnp.maximum(x, 1e-30))

        def log_density(letter: Array) -> Array:
            """Of each point if the clean letter is this one, (B, 9)."""
            logits = jnp.broadcast_to(options.beta * letter, x.shape)
            return concrete_log_prob(log_x, logits, temperature=options.beta * tau)

        evidence = jax.vmap(log_density, out_axes=-1)(jnp.eye(len(LETTERS)))
        evidence = evidence.reshape(len(x), -1)
        posterior = softmax(jnp.dot(evidence, hot.T) + prior[None])
        return jnp.log(jnp.dot(posterior, hot).reshape(x.shape) + 1e-9)

    return said


def loss(
    denoiser: Callable[[Array, Array], Array],
    batch: tuple[np.ndarray, np.ndarray, np.ndarray],
    options: Options,
) -> float:
    """Nats of a letter, the least that any denoiser can reach on this batch."""
    tokens, times, noise = map(jnp.asarray, batch)

    @jax.jit
    def of_part(tokens: Array, times: Array, noise: Array) -> Array:
        x = gumbel_softmax_interpolant(
            None,
            jax.nn.one_hot(tokens, len(LETTERS)),
            times[:, None],
            noise=noise,
            tau_max=options.tau_max,
            decay=options.decay,
            beta=options.beta,
        )
        return gumbel_flow_loss(denoiser(x, times[:, None]), tokens).mean()

    part = 1024
    parts = [slice(i, i + part) for i in range(0, len(tokens), part)]
    return float(np.mean([of_part(tokens[s], times[s], noise[s]) for s in parts]))
