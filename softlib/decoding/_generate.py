"""Drawing sequences from a model, token by token, in one compiled loop."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks, logits as logits_
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.logits import Logits

from ._processors import LogitsFunction, Processor, advanced, applied, started

type Step = Callable[[Array, Any], tuple[Logits, Any]]


class Generated(NamedTuple):
    """Sequences that `generate` drew.

    Attributes:
        tokens: Their tokens, -1 behind the end.
        log_probs: Logarithm of the probability with which each token was drawn, after
            the processors; of the likeliest token where they are taken. 0 behind the
            end.
        lengths: Number of tokens, a stop token included.
        dead: True for a sequence that ended because no token was allowed.
        state: What the last call of the step returned.
    """

    tokens: Int[Array, "B L"]
    log_probs: Float[Array, "B L"]
    lengths: Int[Array, " B"]
    dead: Bool[Array, " B"]
    state: Any


class Drawn(NamedTuple):
    """One token of each sequence; -1 where none is allowed."""

    tokens: Array
    log_probs: Array


class _Loop(NamedTuple):
    count: Array
    last: Array
    ended: Array
    generated: Generated
    states: tuple[Any, ...]


@array_arguments
def generate(
    step: Step,
    state: Any,
    logits: Logits,
    *,
    key: Array | None,
    max_length: int,
    stop: Sequence[int] = (),
    processors: Sequence[LogitsFunction | Processor] = (),
    on_token: Callable[[Any, Any], None] | None = None,
) -> Generated:
    r"""Draws a sequence of tokens for each row of a batch.

    The loop carries the caller's state (a cache of keys and values, a recurrent state),
    the tokens and the states of processors. It ends when every sequence has ended, or
    after `max_length` tokens. Without processors a token is drawn from the logits as a
    value, so that a large vocabulary is sampled without its logits.

    Args:
        step: Maps tokens (B,) and the state to the logits of the next tokens, (B, V),
            and the next state, of the same shapes. Sequences that have ended are still
            among the tokens, with token 0: their results are not used.
        state: A pytree, after the prompt.
        logits: Of the first tokens: (B, V), an array or a value such as
            `softlib.LinearLogits`.
        key: Of `jax.random`; None takes the likeliest token each time (greedy).
        max_length: Static, at least 1; the longest sequence.
        stop: Static ids of tokens that end a sequence.
        processors: Functions from logits (B, V) to logits, or `Processor`s that
            remember, applied in their order to the formed logits in float32 (float64
            if they are).
        on_token: Called on the host with the tokens (B,) of each step and the number
            of the step, for progress or streaming; -1 for sequences that have ended.

    Returns:
        `Generated`.

    Raises:
        TypeError: `max_length` is no Python int, or a processor is no function.
        ValueError: `max_length` is below 1, `stop` holds no token of the vocabulary, or
            the logits are not (B, V).

    Derivatives: none are meant; reverse mode is not defined through the loop.
    Cost: one call of `step` per token but the first, on the whole batch.
    Source: softlib's own; processors and their order as in common use.

    Example:
        >>> counting = lambda tokens, state: (
        ...     10.0 * jax.nn.one_hot((tokens + 1) % 5, 5), state)
        >>> first = 10.0 * jax.nn.one_hot(jnp.array([0, 2]), 5)
        >>> found = softlib.decoding.generate(
        ...     counting, (), first, key=None, max_length=4, stop=(3,))
        >>> print(found.tokens, found.lengths)
        [[ 0  1  2  3]
         [ 2  3 -1 -1]] [4 2]
    """
    function = "generate"
    checks.require_positive_integer(function, "max_length", max_length)
    batch, vocabulary = batch_and_vocabulary(function, logits)
    stops = checked_stop(function, stop, vocabulary)
    processors = tuple(processors)
    states = started(function, processors, batch, vocabulary)
    keys = None if key is None else jax.random.split(key, max_length)

    key_of = lambda count: None if keys is None else keys[count]

    def recorded(loop: _Loop, drawn: Drawn) -> _Loop:
        """The loop with one more token of each sequence that has not ended."""
        dead = ~loop.ended & (drawn.tokens < 0)
        alive = ~loop.ended & ~dead
        tokens = jnp.where(alive, drawn.tokens, -1)
        found = loop.generated
        found = found._replace(
            tokens=found.tokens.at[:, loop.count].set(tokens),
            log_probs=found.log_probs.at[:, loop.count].set(
                jnp.where(alive, drawn.log_probs, 0)
            ),
            lengths=found.lengths + alive.astype(jnp.int32),
            dead=found.dead | dead,
        )
        if on_token is not None:
            jax.debug.callback(on_token, tokens, loop.count, ordered=True)
        last = jnp.where(alive, tokens, 0)
        ended = loop.ended | dead | jnp.isin(last, stops) & alive
        next_states = jax.tree.map(
            lambda old, new: jnp.where(_like(alive, new), new, old),
            loop.states,
            advanced(processors, loop.states, last),
        )
        return _Loop(loop.count + 1, last, ended, found, next_states)

    def body(loop: _Loop) -> _Loop:
        logits, state = step(loop.last, loop.generated.state)
        drawn = draw(logits, processors, loop.states, key_of(loop.count))
        loop = loop._replace(generated=loop.generated._replace(state=state))
        return recorded(loop, drawn)

    first = draw(logits, processors, states, key_of(0))
    nothing = Generated(
        jnp.full((batch, max_length), -1, jnp.int32),
        jnp.zeros((batch, max_length), first.log_probs.dtype),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jax.tree.map(jnp.asarray, state),
    )
    none = jnp.zeros(batch, jnp.int32)
    start = _Loop(jnp.zeros((), jnp.int32), none, none > 0, nothing, states)
    goes_on = lambda loop: (loop.count < max_length) & ~loop.ended.all()
    return lax.while_loop(goes_on, body, recorded(start, first)).generated


def batch_and_vocabulary(function: str, logits: Logits) -> tuple[int, int]:
    """The sizes of logits (B, V)."""
    shape = jnp.shape(logits) if not hasattr(logits, "shape") else logits.shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(
            f"{function}: `logits` must be (B, V), one row per sequence, got {shape}."
        )
    return shape[0], shape[1]


def checked_stop(function: str, stop: Sequence[int], vocabulary: int) -> Array:
    """The stop tokens as an array."""
    for token in stop:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{function}: `stop` must hold Python ints, got {token!r}.")
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{function}: `stop` must hold tokens in [0, {vocabulary}), got "
                f"{token}."
            )
    return jnp.asarray(tuple(stop), jnp.int32)


def formed_logits(logits: Logits) -> Float[Array, "*batch V"]:
    """The logits as an array in float32 or float64."""
    formed = logits.materialize() if hasattr(logits, "materialize") else logits
    formed = jnp.asarray(formed)
    return formed.astype(accumulator_dtype(formed))


def draw(
    logits: Logits,
    processors: tuple[LogitsFunction | Processor, ...],
    states: tuple[Any, ...],
    key: Array | None,
) -> Drawn:
    """One token of each row of logits (B, V), after all processors."""
    if processors:
        logits = applied(processors, states, formed_logits(logits))
    if key is None:
        found = logits_.row_statistics(
            logits, statistics=("lse", "max_logit", "argmax")
        )
        assert found.max_logit is not None
        assert found.argmax is not None
        assert found.lse is not None
        allowed = found.max_logit > -jnp.inf
        tokens = jnp.where(allowed, found.argmax, -1)
        # Not NaN where nothing is allowed.
        log_probs = jnp.where(allowed, found.max_logit - found.lse, 0)
        return Drawn(tokens.astype(jnp.int32), log_probs)
    tokens = logits_.sample(key, logits)
    log_probs = logits_.token_log_probs(
        logits, jnp.maximum(tokens, 0), where=tokens >= 0
    )
    return Drawn(tokens, log_probs)


def _like(rows: Array, array: Array) -> Array:
    """One boolean per row, with the axes of an array behind it."""
    return rows.reshape(-1, *(1,) * (array.ndim - 1))
