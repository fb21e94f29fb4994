"""How often a draft is right, against the tokens that it was counted on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from study import intervals

from softlib import estimation
from softlib.decoding import NGramDraft

from . import texts
from .options import Options


def measured(
    counted: list[np.ndarray], written: list[list[int]], begins: int, options: Options
) -> dict[str, Any]:
    """The share of tokens that a draft of one token has right, and lines through it.

    Args:
        counted: Addresses to count, which each seed puts into another order.
        written: Prompts of one length with what the model wrote greedily.
        begins: Where that begins.
        options: Of the run.
    """
    contexts, lengths, wanted = _places(np.array(written), begins, options)
    found: dict[str, Any] = {}
    for order in options.orders:
        shares = np.array(
            [
                [
                    _share(text[:size], order, contexts, lengths, wanted)
                    for size in options.counted
                ]
                for text in (texts.shuffled(counted, s) for s in range(options.seeds))
            ]
        )
        sizes = jnp.array(options.counted, float)
        fits = [estimation.fit_log_linear(sizes, jnp.asarray(row)) for row in shares]
        of_fits = lambda name, fits=fits: intervals.of_seeds(
            np.array([getattr(fit, name) for fit in fits])
        )
        found[str(order)] = {
            "shares": [intervals.of_seeds(column) for column in shares.T],
            **{name: of_fits(name) for name in ("slope", "intercept", "r_squared")},
        }
    return found


def _places(written: np.ndarray, begins: int, options: Options) -> Any:
    """The last tokens before each token that the model wrote, and that token."""
    width = max(options.orders)
    at = np.arange(begins, written.shape[1])[:, None] + np.arange(-width, 0)
    contexts = written[:, at].reshape(-1, width)
    return contexts, np.full(len(contexts), width), written[:, begins:].ravel()


def _share(
    text: np.ndarray, order: int, contexts: Any, lengths: Any, wanted: np.ndarray
) -> float:
    draft = NGramDraft.fit(text, order=order, draft_length=1, shortest=0)
    proposed = _proposed(draft, jnp.asarray(contexts), jnp.asarray(lengths))
    return float((np.asarray(proposed) == wanted).mean())


@jax.jit
def _proposed(draft: NGramDraft, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return draft.propose(None, tokens, lengths, ()).tokens[:, 0]
