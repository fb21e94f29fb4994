"""A position of a text: mixtures of its next tokens, and what the model makes of them.

The lines that use softlib.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from smollm2.model import Cache, Llama

from softlib import decoding, losses
from softlib.decoding import ConceptTokens

from .options import Options

VARIANTS = ("concept", "gumbel", "shuffled", "random")


class Settings(NamedTuple):
    """The options that decide a mixture."""

    tokens: int
    temperature: float
    top_k: int
    top_p: float
    noise_temperature: float

    @classmethod
    def of(cls, options: Options, vocabulary: int) -> "Settings":
        top_k = min(options.top_k, vocabulary)
        return cls(
            options.tokens,
            options.temperature,
            top_k,
            options.top_p,
            options.noise_temperature,
        )

    def cut(self, logits: Any) -> ConceptTokens:
        return decoding.concept_tokens(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_tokens=self.tokens,
        )


class Followed(NamedTuple):
    """Comparisons of the next law after each mixture; one entry per variant.

    Attributes:
        nearest: Whether of the laws after its single tokens that of the heaviest is the
            nearest.
        same_best: Whether the likeliest next token is that after the heaviest token.
        heaviest: Jensen-Shannon divergence from the law after the heaviest token.
        second: That from the law after the second heaviest.
        blend: That from the mean of the laws after single tokens, by their weights.
        weight: Weight of the heaviest token.
        count: Number of tokens.
    """

    nearest: Any
    same_best: Any
    heaviest: Any
    second: Any
    blend: Any
    weight: Any
    count: Any


@functools.partial(jax.jit, static_argnums=(0, 2))
def read(graph: Any, state: Any, settings: Settings, tokens: jax.Array) -> Any:
    """The cache of a text, and the mixture of next tokens at each of its places."""
    model: Llama = nnx.merge(graph, state)
    length = tokens.shape[0]
    cache = model.prefill(tokens[None], jnp.array([length]), size=length + 1).cache
    return cache, settings.cut(model(tokens[None])[0])


@functools.partial(jax.jit, static_argnums=(0, 2))
def follow(
    graph: Any,
    state: Any,
    settings: Settings,
    cache: Cache,
    concept: ConceptTokens,
    place: jax.Array,
    key: jax.Array,
) -> Followed:
    """Feeds mixtures and their single tokens after one place of a text."""
    model: Llama = nnx.merge(graph, state)
    mixtures = drawn(key, concept, settings, model.config.vocabulary_size)
    table = model.embedding.embedding[...]
    mixed = decoding.concept_embedding(*mixtures, table)
    # Own tokens, in the order of the concept, then random ones.
    single = jnp.concatenate([mixtures.tokens[0], mixtures.tokens[-1]])
    inputs = jnp.concatenate([mixed, table[jnp.maximum(single, 0)]])
    count = len(inputs)
    rows = lambda array: jnp.broadcast_to(
        array, (array.shape[0], count, *array.shape[2:])
    )
    at = Cache(rows(cache.key), rows(cache.value), jnp.full(count, place + 1))
    logits = model.extend_by(inputs[:, None], at).logits.materialize()[:, 0]
    after_mixed, after_single = jnp.split(logits, [len(VARIANTS)])
    own, random = jnp.split(after_single, 2)
    compare = functools.partial(_compared, mixtures.tokens[0], own)
    ours = jax.vmap(compare)(
        *(jax.tree.map(lambda x: x[:-1], part) for part in (mixtures, after_mixed))
    )
    last = jax.tree.map(lambda x: x[-1], (mixtures, after_mixed))
    other = _compared(mixtures.tokens[-1], random, *last)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), ours, other)


def drawn(
    key: jax.Array, concept: ConceptTokens, settings: Settings, vocabulary: int
) -> ConceptTokens:
    """The mixtures of `VARIANTS`, the first as it is."""
    noise, other = jax.random.split(key)
    gumbel = decoding.gumbel_concept_tokens(
        noise, *concept, temperature=settings.noise_temperature
    )
    # The same weights, the greatest for the token that had the least.
    weights, tokens = concept
    there = tokens >= 0
    turned = jnp.where(there, (jnp.arange(tokens.size) - 1) % there.sum(), 0)
    shuffled = ConceptTokens(weights, jnp.where(there, tokens[turned], -1))
    others = jax.random.randint(other, tokens.shape, 0, vocabulary)
    random = ConceptTokens(weights, jnp.where(there, others, -1))
    return jax.tree.map(lambda *x: jnp.stack(x), concept, gumbel, shuffled, random)


def _compared(
    tokens: jax.Array, single: jax.Array, mixture: ConceptTokens, mixed: jax.Array
) -> Followed:
    """One mixture against the laws after `tokens`, (m, V)."""
    weights = jnp.where(
        (tokens[:, None] == mixture.tokens[None]) & (tokens >= 0)[:, None],
        mixture.weights[None],
        0,
    ).sum(1)
    far = losses.softmax_jensen_shannon_divergence(
        jnp.broadcast_to(mixed, single.shape), single
    )
    far = jnp.where(tokens >= 0, far, jnp.inf)
    order = jnp.argsort(-weights)
    log_blend = jnp.log(weights @ jax.nn.softmax(single))
    return Followed(
        jnp.argmin(far) == order[0],
        jnp.argmax(mixed) == jnp.argmax(single[order[0]]),
        far[order[0]],
        far[order[1]],
        losses.softmax_jensen_shannon_divergence(mixed, log_blend),
        weights[order[0]],
        (weights > 0).sum(),
    )
