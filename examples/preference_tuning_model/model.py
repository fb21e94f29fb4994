"""A small language model, log-probabilities of its sequences, and all the losses.

Everything is made of `softlib.logits.sequence_log_probs`. The model's logits are a
value that is never formed: tokens times vocabulary never exists.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from language_model.model import LanguageModel

import softlib
from softlib.losses import dpo_loss, gradient_ascent_loss, negative_preference_loss

from .options import Options


def build(options: Options) -> LanguageModel:
    """The seed decides every weight."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> LanguageModel:
        return LanguageModel(
            vocabulary_size=options.vocabulary_size,
            width=options.width,
            layers=options.layers,
            heads=options.heads,
            feed_forward=3 * options.width,
            rngs=nnx.Rngs(options.seed),
        )

    return create()


def copy_of(model: LanguageModel) -> LanguageModel:
    """With arrays of its own: training overwrites those that it is given."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def log_probs(model: LanguageModel, tokens: Array, where: Array | None = None) -> Array:
    """Of each sequence (n, T + 1), in nats; `where` (T,): which labels count."""
    logits = model(tokens[:, :-1])
    return softlib.logits.sequence_log_probs(logits, tokens[:, 1:], where=where)


def response_where(length: int, prompt: int) -> Array:
    """True for the labels that are of the response."""
    return jnp.arange(1, length) >= prompt


# ------------------------------------------------------------------------------- losses
def language_loss(model: LanguageModel, tokens: Array) -> Array:
    """Nats a token."""
    return -log_probs(model, tokens).mean() / (tokens.shape[1] - 1)


def preference_loss(
    model: LanguageModel,
    tokens: Array,
    reference: Array,
    rate: Array,
    *,
    prompt: int,
    beta: float,
    robust: bool,
) -> Array:
    """`dpo_loss` of pairs (n, 2, T + 1), the chosen first; `reference` is (n, 2).

    `rate` is the share of flipped pairs that the loss is told, 0 for plain DPO.
    """
    pairs, _, length = tokens.shape
    flat = tokens.reshape(2 * pairs, length)
    log_prob = log_probs(model, flat, response_where(length, prompt)).reshape(pairs, 2)
    told = {"flip_rate" if robust else "label_smoothing": rate}
    return dpo_loss(*log_prob.T, *reference.T, beta=beta, **told).mean()


def forgetting_loss(
    model: LanguageModel,
    forget: Array,
    reference: Array,
    retain: Array,
    *,
    beta: float | None,
    retains: bool,
) -> Array:
    """Nats a token: of gradient ascent (no `beta`) or NPO, and of what is retained."""
    log_prob = log_probs(model, forget)
    if beta is None:
        loss = gradient_ascent_loss(log_prob)
    else:
        loss = negative_preference_loss(log_prob, reference, beta=beta)
    total = loss.mean() / (forget.shape[1] - 1)
    return total + language_loss(model, retain) if retains else total


# --------------------------------------------------------------------------- in batches
@nnx.jit
def _sequence_log_probs(model, tokens, where):
    return log_probs(model, tokens, where)


@nnx.jit
def _token_log_probs(model, tokens, where):
    logits = model(tokens[:, :-1])
    return softlib.logits.token_log_probs(logits, tokens[:, 1:], where=where)


def _in_batches(function, model, tokens, where, batch=256) -> np.ndarray:
    parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    return np.concatenate([function(model, jnp.asarray(p), where) for p in parts])


def all_log_probs(
    model: LanguageModel, tokens: np.ndarray, where: Array | None = None
) -> np.ndarray:
    return _in_batches(_sequence_log_probs, model, tokens, where)


def all_token_log_probs(
    model: LanguageModel, tokens: np.ndarray, where: Array
) -> np.ndarray:
    return _in_batches(_token_log_probs, model, tokens, where)


def nats_per_token(model: LanguageModel, tokens: np.ndarray) -> float:
    return float(-all_log_probs(model, tokens).mean() / (tokens.shape[1] - 1))


def respond(
    model: LanguageModel, prompts: np.ndarray, response: int, key: Array, batch=512
) -> np.ndarray:
    """A response drawn for each prompt (n, P), behind it: (n, P + response)."""
    parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    keys = jax.random.split(key, len(parts))
    found = [
        _respond(model, jnp.asarray(part), key_p, response=response)
        for part, key_p in zip(parts, keys, strict=True)
    ]
    return np.concatenate(found)


@functools.partial(nnx.jit, static_argnames="response")
def _respond(model, prompts, key, *, response: int):
    start = prompts.shape[1]
    tokens = jnp.pad(prompts, ((0, 0), (0, response)))
    graph, state = nnx.split(model)

    def step(i, tokens):
        # Causal: what stands behind position i - 1 cannot change it.
        last = nnx.merge(graph, state)(tokens)[:, i - 1].materialize()
        drawn = jax.random.categorical(jax.random.fold_in(key, i), last)
        return tokens.at[:, i].set(drawn.astype(tokens.dtype))

    return jax.lax.fori_loop(start, start + response, step, tokens)
