"""The calls that a draft saves, of texts that the model has written already.

Greedy decoding through a draft gives the same text whatever the draft, so that its loop
runs on the written text in the place of the model.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softlib import decoding
from softlib.decoding import Draft


class Calls(NamedTuple):
    """Of each text: calls of the model after the first token, drafted and kept tokens.

    Attributes:
        steps: Calls.
        drafted: Tokens that were proposed in all of them.
        accepted: Those that stayed.
    """

    steps: Any
    drafted: Any
    accepted: Any


def calls(
    prompts: list[list[int]], written: np.ndarray, draft: Draft, vocabulary: int
) -> Calls:
    """Of prompts and what the model wrote after them, (N, L)."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    arrays = tokens, lengths, written.astype(np.int32)
    # One at a time: a batch goes on until its slowest text has ended.
    found = [
        _calls(draft, vocabulary, *(array[i : i + 1] for array in arrays))
        for i in range(len(tokens))
    ]
    return Calls(*map(np.concatenate, zip(*jax.device_get(found), strict=True)))


@functools.partial(jax.jit, static_argnums=1)
def _calls(
    draft: Draft,
    vocabulary: int,
    prompt: jax.Array,
    lengths: jax.Array,
    written: jax.Array,
) -> Calls:
    count = written.shape[1]

    def step(tokens: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits that choose what was written; of each text the state is a place."""
        after = read[:, None] + jnp.arange(1, tokens.shape[1] + 1)[None]
        following = jnp.take_along_axis(written, jnp.minimum(after, count - 1), 1)
        return jax.nn.one_hot(following, vocabulary), read + tokens.shape[1]

    found = decoding.speculative_generate(
        step,
        jnp.zeros(len(written), jnp.int32),
        jax.nn.one_hot(written[:, 0], vocabulary),
        draft=draft,
        forget=lambda read, counts: read - counts,
        key=None,
        max_length=count,
        prompt=prompt,
        prompt_lengths=lengths,
    )
    return Calls(found.num_steps[None], found.num_drafted, found.num_accepted)
