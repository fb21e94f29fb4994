"""Greedy answers, token by token and through a draft; the lines that use softlib."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from smollm2.checkpoints import Pretrained
from smollm2.model import Cache, Llama, Read

from softlib import decoding
from softlib.decoding import Draft, Generated, SpeculativeSequences


class Prompt(NamedTuple):
    """A prompt that was read: its tokens (1, T), how many are real, what was said."""

    tokens: jax.Array
    lengths: jax.Array
    read: Read


class Decoders(NamedTuple):
    """Compiled functions of a prompt; all that is timed."""

    read: Callable[[Any, Any], Prompt]
    plain: Callable[[Prompt], Generated]
    drafted: Callable[[Prompt, Draft], SpeculativeSequences]
    extend: Callable[[Any, Cache], jax.Array]


def decoders(pretrained: Pretrained, *, answer: int, room: int) -> Decoders:
    """Decoders of answers of equal length, so that both do the same work.

    Args:
        pretrained: The model.
        answer: Tokens of an answer.
        room: Places of the cache: for a prompt, an answer and a draft.
    """
    graph, weights = nnx.split(pretrained.model)
    options: dict[str, Any] = {"key": None, "max_length": answer}
    bound = functools.partial(functools.partial, weights=weights)

    def several(model: Llama, tokens: Any, cache: Cache) -> Any:
        read = model.extend(tokens, cache)
        return read.logits, read.cache

    @jax.jit
    def read(tokens: Any, lengths: Any, *, weights: Any) -> Prompt:
        found = nnx.merge(graph, weights).prefill(tokens, lengths, size=room)
        return Prompt(tokens, lengths, found)

    @jax.jit
    def plain(prompt: Prompt, *, weights: Any) -> Generated:
        model = nnx.merge(graph, weights)

        def step(token: Any, cache: Cache) -> Any:
            logits, cache = several(model, token[:, None], cache)
            return logits[:, 0], cache

        said = prompt.read
        return decoding.generate(step, said.cache, said.logits[:, 0], **options)

    @jax.jit
    def drafted(prompt: Prompt, draft: Draft, *, weights: Any) -> SpeculativeSequences:
        said = prompt.read
        return decoding.speculative_generate(
            functools.partial(several, nnx.merge(graph, weights)),
            said.cache,
            said.logits[:, 0],
            draft=draft,
            forget=forget,
            prompt=prompt.tokens,
            prompt_lengths=prompt.lengths,
            **options,
        )

    @jax.jit
    def extend(tokens: Any, cache: Cache, *, weights: Any) -> jax.Array:
        logits, _ = several(nnx.merge(graph, weights), tokens, cache)
        return jnp.argmax(logits.materialize(), -1)

    return Decoders(*map(bound, (read, plain, drafted, extend)))


def forget(cache: Cache, counts: jax.Array) -> Cache:
    """The cache without its last tokens: what lies behind a length is not read."""
    return cache._replace(lengths=cache.lengths - counts)
