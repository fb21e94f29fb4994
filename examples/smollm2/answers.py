"""What the model writes: prompts of unequal length, a cache, one compiled loop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from language_model.failures import Failure

from softlib import decoding

from .checkpoints import Pretrained
from .model import Cache


def chat(question: str) -> str:
    """A question in the form in which the model was taught to answer."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encoded(pretrained: Pretrained, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt; one without any is refused."""
    found = [pretrained.tokenizer.encode(prompt).ids for prompt in prompts]
    for prompt, tokens in zip(prompts, found, strict=True):
        if not tokens:
            raise Failure(f"a prompt must have at least one token, got {prompt!r}.")
    return found


def padded(
    prompts: Sequence[Sequence[int]], *, vocabulary: int, multiple: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, T), padded on the right by 0, and the length of each row.

    T is a multiple of some number, so that prompts of about one length share a program.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
        raise Failure("every prompt must have at least one token.")
    width = -(-lengths.max() // multiple) * multiple
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise Failure(f"tokens must be in [0, {vocabulary}), got {worst}.")
    return tokens, lengths


def write(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int]],
    *,
    max_length: int,
    cache_size: int,
    key: jax.Array | None = None,
    processors: tuple[Any, ...] = (),
    stop: tuple[int, ...] | None = None,
    on_token: Callable[[Any, Any], None] | None = None,
) -> decoding.Generated:
    """Continues token ids; greedily without a key.

    Args:
        pretrained: Model and the tokens that end an answer.
        prompts: One sequence of token ids each, of any lengths.
        max_length: The longest answer.
        cache_size: Places for the tokens of a prompt and its answer.
        key: Of `jax.random`.
        processors: As in `softlib.decoding.generate`.
        stop: In the place of the tokenizer's; () for answers of equal length.
        on_token: As in `softlib.decoding.generate`.
    """
    vocabulary = pretrained.model.config.vocabulary_size
    tokens, lengths = padded(prompts, vocabulary=vocabulary)
    if lengths.max() + max_length > cache_size:
        raise Failure(
            f"a prompt of {lengths.max()} tokens and an answer of {max_length} do not "
            f"fit a cache of {cache_size}."
        )
    graph, state = nnx.split(pretrained.model)
    return _written(
        graph,
        max_length,
        max(cache_size, tokens.shape[1]),
        processors,
        pretrained.stop if stop is None else stop,
        on_token,
        state,
        tokens,
        lengths,
        key,
    )


@functools.partial(jax.jit, static_argnums=range(6))
def _written(
    graph,
    max_length,
    cache_size,
    processors,
    stop,
    on_token,
    state,
    tokens,
    lengths,
    key,
):
    model = nnx.merge(graph, state)

    def step(token: jax.Array, cache: Cache) -> tuple[Any, Cache]:
        read = model.extend(token[:, None], cache)
        return read.logits[:, 0], read.cache

    read = model.prefill(tokens, lengths, size=cache_size)
    return decoding.generate(
        step,
        read.cache,
        read.logits[:, 0],
        key=key,
        max_length=max_length,
        stop=stop,
        processors=processors,
        on_token=on_token,
    )


def texts(pretrained: Pretrained, generated: decoding.Generated) -> list[str]:
    """The text of each answer, without what ended it."""
    rows = zip(np.asarray(generated.tokens), np.asarray(generated.lengths), strict=True)
    return [pretrained.tokenizer.decode(row[:length]) for row, length in rows]
