"""A small network under an output layer, and a training step for either head."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import softlib
from softlib import LinearLogits, losses

from .options import Options

type Network = dict[str, Array]
type State = tuple[Network, Any, Any]  # network, memory of its optimiser, head
type Step = Callable[[State, Array, Array], tuple[State, Array]]

WIDTH = 256


def network(words: int, options: Options) -> Network:
    keys = jax.random.split(jax.random.key(options.seed), 3)
    draw = lambda key, rows, columns: (
        jax.random.normal(key, (rows, columns)) / rows**0.5
    )
    seen = options.context * options.word_features
    table = jax.random.normal(keys[0], (words, options.word_features))
    return {
        "words": table,
        "in": draw(keys[1], seen, WIDTH),
        "out": draw(keys[2], WIDTH, options.features),
    }


def hidden_of(network: Network, context: Array) -> Array:
    """(batch, features), of length sqrt(features) each."""
    seen = network["words"][context].reshape(len(context), -1)
    hidden = jax.nn.gelu(seen @ network["in"]) @ network["out"]
    square = jnp.mean(hidden * hidden, axis=-1, keepdims=True)
    return hidden / jnp.sqrt(square + 1e-6)


def weight(classes: int, options: Options) -> Array:
    """The first head: logits of standard deviation 1 for either loss."""
    key = jax.random.key(options.seed + 1)
    shape = (classes, options.features)
    return jax.random.normal(key, shape) / options.features**0.5


def optimizer(options: Options) -> optax.GradientTransformation:
    return optax.adam(options.rate)


def z_step(b: float, options: Options) -> Step:
    """SGD of a head in factors, Adam below it: no array grows with the classes."""
    below = optimizer(options)

    def step(state, context, labels):
        network, memory, head = state
        hidden, pull = jax.vjp(lambda net: hidden_of(net, context), network)
        found = head.sgd_step(
            hidden,
            labels,
            lambda s: s.z_loss(a=options.sharpness, b=b).mean(),
            learning_rate=options.z_rate,
        )
        (gradient,) = pull(found.hidden_cotangents)
        updates, memory = below.update(gradient, memory)
        network = optax.apply_updates(network, updates)
        return (network, memory, found.state), found.loss

    return step


def entropy_step(options: Options) -> Step:
    """The same with the cross-entropy of a stored head, streamed over the classes."""
    below = optimizer(options)

    def step(state, context, labels):
        network, memory, head = state

        def loss(network, head):
            logits = LinearLogits(hidden_of(network, context), head)
            return losses.softmax_cross_entropy(logits, labels).mean()

        value, (gradient, of_head) = jax.value_and_grad(loss, (0, 1))(network, head)
        updates, memory = below.update(gradient, memory)
        network = optax.apply_updates(network, updates)
        return (network, memory, head - options.entropy_rate * of_head), value

    return step


def many(step: Step) -> Callable[[State, Array, Array], tuple[State, Array]]:
    """A step for each leading entry of the batches; the state is updated in place."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, contexts, labels):
        return jax.lax.scan(
            lambda state, batch: step(state, *batch), state, (contexts, labels)
        )

    return run


rebase = jax.jit(losses.FactoredSphericalState.rebase, donate_argnums=0)


@jax.jit
def ranks(network: Network, head: Any, context: Array, labels: Array) -> Array:
    """How many classes come before the right one; the order is that of the logits."""
    hidden = hidden_of(network, context)
    in_factors = isinstance(head, losses.FactoredSphericalState)
    logits = head.logits(hidden) if in_factors else LinearLogits(hidden, head)
    return softlib.logits.label_rank(logits, labels)
