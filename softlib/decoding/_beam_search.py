"""The likeliest sequences of a model, found by a search of limited width."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from softlib import _checks as checks, logits as logits_
from softlib._array_arguments import array_arguments
from softlib.logits import Logits

from ._generate import Step, batch_and_vocabulary, checked_stop, formed_logits
from ._processors import LogitsFunction, Processor, advanced, applied, started


class Beams(NamedTuple):
    """The best sequences that `beam_search` found, the best first.

    Attributes:
        tokens: Their tokens, -1 behind the end.
        lengths: Number of tokens, a stop token included; 0 where fewer sequences were
            found than asked for.
        log_probs: Logarithm of the probability of each sequence; -inf where none.
        scores: log_probs / lengths ** length_penalty, by which they are ordered.
    """

    tokens: Int[Array, "B W L"]
    lengths: Int[Array, "B W"]
    log_probs: Float[Array, "B W"]
    scores: Float[Array, "B W"]


class _Loop(NamedTuple):
    """Live sequences, the best that have ended, and the states of the live ones."""

    count: Array
    live: Beams
    ended: Beams
    states: Any


@array_arguments
def beam_search(
    step: Step,
    state: Any,
    logits: Logits,
    *,
    num_beams: int,
    max_length: int,
    stop: Sequence[int] = (),
    length_penalty: float = 0.0,
    processors: Sequence[LogitsFunction | Processor] = (),
    state_axes: Any = 0,
) -> Beams:
    r"""Searches for the likeliest sequences, `num_beams` of them at a time.

    In each step every live sequence is continued by its likeliest tokens, and of all
    continuations the `num_beams` likeliest stay. A continuation by a stop token that is
    among the best `num_beams` has ended. The search stops when no live sequence can
    become better than the worst of the `num_beams` best ended ones. With one beam it is
    the greedy search. Without processors only the best tokens of each sequence are
    formed, not its logits.

    Args:
        step: As in `generate`, on B x `num_beams` sequences, those of one row of the
            batch next to each other.
        state: A pytree, after the prompt, of B sequences.
        logits: Of the first tokens, (B, V), an array or a value.
        num_beams: Static width of the search, W, and number of sequences returned.
        max_length: Static, at least 1; longer sequences are cut off.
        stop: Static ids of tokens that end a sequence.
        length_penalty: Static exponent: sequences that have ended compete by
            $\log p / n^\alpha$ with $n$ tokens. 0 is the probability itself, which
            prefers short ones; 1 the mean per token.
        processors: As in `generate`.
        state_axes: The axis of sequences in the arrays of `state`: an int, or a pytree
            prefix of ints as `in_axes` of `jax.vmap`.

    Returns:
        `Beams`.

    Raises:
        TypeError: A size is no Python int, or a processor is no function.
        ValueError: A size is below 1, `stop` holds no token of the vocabulary, the
            logits are not (B, V), V is too small for so many beams, or an array of
            `state` has no axis of B sequences.

    Derivatives: none are meant.
    Cost: one call of `step` per token on B W sequences, and a copy of their state.
    Source: beam search as in common use; "Google's Neural Machine Translation System"
        normalises by another function of the length.

    Example:
        >>> table = jnp.log(jnp.array([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]))
        >>> step = lambda tokens, state: (table[tokens + 1], state)
        >>> found = softlib.decoding.beam_search(
        ...     step, (), table[:1], num_beams=2, max_length=2)
        >>> print(found.tokens[0])
        [[1 1]
         [0 0]]
    """
    function = "beam_search"
    checks.require_positive_integer(function, "num_beams", num_beams)
    checks.require_positive_integer(function, "max_length", max_length)
    batch, vocabulary = batch_and_vocabulary(function, logits)
    stops = checked_stop(function, stop, vocabulary)
    if num_beams > vocabulary:
        raise ValueError(
            f"{function}: `num_beams` must be at most the number of tokens, "
            f"{vocabulary}, got {num_beams}."
        )
    # So many continuations of each sequence hold `num_beams` that do not end.
    width = min(num_beams + stops.size, vocabulary)
    processors = tuple(processors)
    reordered = _reordering(function, state, state_axes, batch)
    candidates = lambda given, kept: _best_tokens(given, processors, kept, width)

    def body(loop: _Loop) -> _Loop:
        last = loop.live.tokens.reshape(batch * num_beams, max_length)[
            :, loop.count - 1
        ]
        state, kept = loop.states
        found, state = step(jnp.maximum(last, 0), state)
        tokens, log_probs = (
            array.reshape(batch, num_beams, width) for array in candidates(found, kept)
        )
        return grown(loop, tokens, log_probs, (state, kept))

    def grown(loop: _Loop, tokens: Array, log_probs: Array, states: Any) -> _Loop:
        """The loop with every live sequence continued by one token."""
        total = loop.live.log_probs[:, :, None] + log_probs
        beams = total.shape[1]
        order = min(num_beams + stops.size * beams, beams * width)
        best, at = lax.top_k(total.reshape(batch, -1), order)
        parents, chosen = (
            at // width,
            jnp.take_along_axis(tokens.reshape(batch, -1), at, 1),
        )
        ends = jnp.isin(chosen, stops)
        grown = jnp.take_along_axis(loop.live.tokens, parents[:, :, None], 1)
        grown = grown.at[:, :, loop.count].set(chosen)
        new = _ranked(grown, best, loop.count + 1, length_penalty)
        # Ends that are not among the best of all continuations are dropped.
        counts = ends & (jnp.arange(order) < num_beams)[None]
        ended = _best(_joined(loop.ended, _only(new, counts)), num_beams, "scores")
        places = _best_places(jnp.where(ends, -jnp.inf, best), num_beams)
        live = _taken(_only(new, ~ends), places)
        parents = jnp.take_along_axis(parents, places, 1)
        flat = (parents + beams * jnp.arange(batch)[:, None]).reshape(-1)
        state, kept = states
        kept = jax.tree.map(lambda array: array[flat], kept)
        kept = advanced(
            processors, kept, jnp.maximum(live.tokens, 0)[:, :, loop.count].reshape(-1)
        )
        return _Loop(loop.count + 1, live, ended, (reordered(state, flat), kept))

    kept = started(function, processors, batch, vocabulary)
    tokens, log_probs = (x[:, None] for x in candidates(logits, kept))
    dtype = log_probs.dtype
    one = _empty(batch, 1, max_length, dtype)._replace(
        log_probs=jnp.zeros((batch, 1), dtype)
    )
    none = _empty(batch, num_beams, max_length, dtype)
    first = _Loop(jnp.zeros((), jnp.int32), one, none, (state, kept))
    loop = grown(first, tokens, log_probs, first.states)

    def goes_on(loop: _Loop) -> Array:
        # The best that a live sequence may still become: log_probs only fall.
        longest = max_length if length_penalty > 0 else loop.count + 1
        hope = _scored(loop.live.log_probs.max(1), longest, length_penalty)
        return (loop.count < max_length) & (hope > loop.ended.scores.min(1)).any()

    loop = lax.while_loop(goes_on, body, loop)
    return _best(_joined(loop.ended, loop.live), num_beams, "scores")


def _best_tokens(
    logits: Logits,
    processors: tuple[LogitsFunction | Processor, ...],
    states: tuple[Any, ...],
    count: int,
) -> tuple[Array, Array]:
    """The likeliest tokens of each row and their log-probabilities, -inf for none."""
    if processors:
        logits = applied(processors, states, formed_logits(logits))
    found = logits_.top_k(logits, k=count)
    lse = logits_.logsumexp(logits)[:, None]
    # A row of -inf has no token, instead of NaN; a NaN has none either.
    log_probs = jnp.where(found.logits > -jnp.inf, found.logits - lse, -jnp.inf)
    return jnp.maximum(found.classes, 0), log_probs


def _reordering(function: str, state: Any, axes: Any, batch: int) -> Any:
    """A function that takes sequences of a state by their indices."""
    arrays = jax.tree.map(jnp.asarray, state)
    places = jax.tree.broadcast(axes, arrays)
    for array, axis in zip(
        jax.tree.leaves(arrays), jax.tree.leaves(places), strict=True
    ):
        if not -array.ndim <= axis < array.ndim or array.shape[axis] != batch:
            raise ValueError(
                f"{function}: `state` must have {batch} sequences on axis {axis} of "
                f"each array (`state_axes`), got {array.shape}."
            )
    take = lambda array, axis, at: jnp.take(array, at, axis=axis)
    return lambda state, at: jax.tree.map(lambda x, a: take(x, a, at), state, places)


def _empty(batch: int, beams: int, length: int, dtype: Any) -> Beams:
    worst = jnp.full((batch, beams), -jnp.inf, dtype)
    tokens = jnp.full((batch, beams, length), -1, jnp.int32)
    return Beams(tokens, jnp.zeros((batch, beams), jnp.int32), worst, worst)


def _ranked(tokens: Array, log_probs: Array, count: Array, penalty: float) -> Beams:
    lengths = jnp.broadcast_to(count, log_probs.shape).astype(jnp.int32)
    return Beams(tokens, lengths, log_probs, _scored(log_probs, count, penalty))


def _scored(log_probs: Array, count: Any, penalty: float) -> Array:
    return log_probs / jnp.asarray(count, log_probs.dtype) ** penalty


def _only(beams: Beams, where: Array) -> Beams:
    """The beams with nothing in the place of the others."""
    kept = where & (beams.log_probs > -jnp.inf)
    worst = lambda x: jnp.where(kept, x, -jnp.inf)
    return Beams(
        jnp.where(kept[:, :, None], beams.tokens, -1),
        jnp.where(kept, beams.lengths, 0),
        worst(beams.log_probs),
        worst(beams.scores),
    )


def _joined(first: Beams, second: Beams) -> Beams:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def _best(beams: Beams, count: int, by: str) -> Beams:
    return _taken(beams, _best_places(getattr(beams, by), count))


def _best_places(values: Array, count: int) -> Array:
    return lax.top_k(values, count)[1]


def _taken(beams: Beams, places: Array) -> Beams:
    take = lambda x: jnp.take_along_axis(
        x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1
    )
    return jax.tree.map(take, beams)
