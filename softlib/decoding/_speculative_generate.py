"""Drawing sequences from a model that verifies what a draft proposes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._sources import source_of

from ._drafts import Draft, Drafted
from ._generate import (
    Generated,
    batch_and_vocabulary,
    checked_stop,
    draw,
    formed_logits,
)
from ._processors import LogitsFunction, Processor, advanced, applied, started
from ._speculative import agreeing, verified

type SeveralStep = Callable[[Array, Any], tuple[Logits, Any]]


class SpeculativeSequences(NamedTuple):
    """Sequences that `speculative_generate` drew, and what the draft was worth.

    Attributes:
        generated: As of `generate`; the state has read all but the last token.
        num_steps: Calls of the model after the first token.
        num_drafted: Tokens that were proposed for each sequence.
        num_accepted: How many of them stayed.
    """

    generated: Generated
    num_steps: Int[Array, ""]
    num_drafted: Int[Array, " B"]
    num_accepted: Int[Array, " B"]


class _Loop(NamedTuple):
    """`known` holds prompt and sequence, -1 behind them; `last` is not yet read."""

    known: Array
    last: Array
    ended: Array
    found: SpeculativeSequences
    draft_state: Any
    states: tuple[Any, ...]


@array_arguments
def speculative_generate(
    step: SeveralStep,
    state: Any,
    logits: Logits,
    *,
    draft: Draft,
    forget: Callable[[Any, Array], Any],
    key: Array | None,
    max_length: int,
    prompt: Integer[Array, "B T"] | None = None,
    prompt_lengths: Integer[Array, " B"] | None = None,
    stop: Sequence[int] = (),
    processors: Sequence[LogitsFunction | Processor] = (),
) -> SpeculativeSequences:
    r"""Draws the sequences of `generate` in fewer calls of the model.

    Each turn the draft proposes g tokens, the model reads them in one call, and
    `speculative_verify` decides how many stay; the model adds one. Greedy sequences are
    those of `generate`, token by token (where a call with several tokens gives the
    numbers of calls with one); drawn ones have the same law. One compiled loop.

    Args:
        step: Maps tokens (B, T) and the state to the logits behind each of them,
            (B, T, V), and the next state, for T = g + 1 and for T = 1.
        state: A pytree, after the prompt. A cache needs room for `max_length` + g
            tokens more.
        logits: Of the first tokens, (B, V), as in `generate`.
        draft: Such as `PromptLookup`, `NGramDraft` or `ModelDraft`.
        forget: Maps the state and numbers (B,) to the state without so many of its last
            tokens: for a cache with a length, the length less these numbers.
        key: Of `jax.random`; None takes the likeliest token each time (greedy).
        max_length: Static, at least 1; the longest sequence.
        prompt: Tokens that the draft may look at, padded on the right.
        prompt_lengths: Tokens of each prompt, clipped to [0, T]; None for all.
        stop: As in `generate`.
        processors: As in `generate`; of the model's logits alone. A draft with equal
            ones is accepted more often.

    Returns:
        `SpeculativeSequences`.

    Raises:
        TypeError: `draft` is no `Draft`, `forget` no function, or as in `generate`.
        ValueError: `step` or the draft return other shapes, or as in `generate`.

    Derivatives: none are meant; reverse mode is not defined through the loop.
    Cost: one call of `step` and of the draft per turn, on the whole batch, which ends
        with its slowest sequence.
    Source: "Fast Inference from Transformers via Speculative Decoding".

    Example:
        >>> step = lambda tokens, state: (9.0 * jax.nn.one_hot(1 - tokens, 2), state)
        >>> found = softlib.decoding.speculative_generate(
        ...     step, (), jnp.array([[9.0, 0.0]]), key=None, max_length=8,
        ...     draft=softlib.decoding.PromptLookup(3), forget=lambda state, _: state)
        >>> print(found.generated.tokens, found.num_steps)
        [[0 1 0 1 0 1 0 1]] 4
    """
    function = "speculative_generate"
    checks.require_positive_integer(function, "max_length", max_length)
    batch, vocabulary = batch_and_vocabulary(function, logits)
    stops = checked_stop(function, stop, vocabulary)
    if not isinstance(draft, Draft):
        raise TypeError(
            f"{function}: `draft` must be a `Draft`, got {type(draft).__name__}."
        )
    if not callable(forget):
        raise TypeError(
            f"{function}: `forget` must be a function, got {type(forget).__name__}."
        )
    known, begins = _known(function, prompt, prompt_lengths, batch, max_length)
    processors = tuple(processors)
    rows = jnp.arange(batch)

    def recorded(
        loop: _Loop, tokens: Array, log_probs: Array, count: Array
    ) -> tuple[_Loop, Array]:
        """The loop with `count` + 1 more tokens of each sequence, and how many are new.

        Fewer behind a stop token, at the greatest length, or where the last one is -1:
        no token was allowed.
        """
        found = loop.found.generated
        place = jnp.arange(tokens.shape[1])[None]
        stops_here = jnp.isin(tokens, stops)
        so_far = jnp.cumsum(stops_here, axis=1, dtype=jnp.int32)
        no_stop_before = so_far == stops_here.astype(jnp.int32)
        fits = found.lengths[:, None] + place < max_length
        meant = (place <= count[:, None]) & no_stop_before & fits & ~loop.ended[:, None]
        new = meant & (tokens >= 0)
        at = jnp.where(new, found.lengths[:, None] + place, max_length)
        put = lambda array, at, values: array.at[rows[:, None], at].set(
            values, mode="drop"
        )
        behind = jnp.where(new, begins[:, None] + at, known.shape[1])
        more = new.sum(1, dtype=jnp.int32)
        dead = (meant & ~new).any(1)
        found = found._replace(
            log_probs=put(found.log_probs, at, log_probs),
            lengths=found.lengths + more,
            dead=found.dead | dead,
        )
        ended = dead | (new & stops_here).any(1) | (found.lengths == max_length)
        last = tokens[rows, jnp.maximum(more, 1) - 1]
        loop = loop._replace(
            known=put(loop.known, behind, tokens),
            last=jnp.where(more > 0, last, loop.last),
            ended=loop.ended | ended,
            found=loop.found._replace(generated=found),
        )
        return loop, more

    def turn(loop: _Loop, drafted: Drafted, where: Array, key: Array | None) -> _Loop:
        """One call of the model, with the drafted tokens for which `where` has room."""
        size = where.shape[1]
        law = None if drafted.logits is None else drafted.logits[:, :size]
        # What was not drafted is read, too, and never stays.
        tokens = jnp.where(where, drafted.tokens[:, :size], 0)
        given = jnp.concatenate([loop.last[:, None], tokens], axis=1)
        logits, state = step(given, loop.found.generated.state)
        _check_step(function, logits, (*given.shape, vocabulary))
        logits, states = _processed(processors, loop.states, logits, given)
        source = source_of(function, logits)
        if key is None:
            accepted, log_probs = agreeing(source, tokens, where)
        else:
            accepted, log_probs = verified(key, source, law, tokens, where, None)
        count, following = accepted
        out = jnp.pad(tokens, ((0, 0), (0, 1))).at[rows, count].set(following)
        is_open = ~loop.ended
        loop, more = recorded(loop, out, log_probs, count)
        found = loop.found
        generated = found.generated._replace(state=forget(state, given.shape[1] - more))
        states = advanced(
            processors,
            jax.tree.map(lambda each: each[count, rows], states),
            jnp.maximum(following, 0),
        )
        return loop._replace(
            found=SpeculativeSequences(
                generated,
                found.num_steps + 1,
                found.num_drafted
                + jnp.where(is_open, where.sum(1, dtype=jnp.int32), 0),
                found.num_accepted + jnp.minimum(count, more),
            ),
            draft_state=draft.rewind(drafted.state, drafted.tokens.shape[1] + 1 - more),
            states=states,
        )

    def body(loop: _Loop) -> _Loop:
        keys: Any = (None, None)
        if key is not None:
            keys = jax.random.split(jax.random.fold_in(key, loop.found.num_steps + 1))
        lengths = begins + loop.found.generated.lengths
        drafted = draft.propose(keys[0], loop.known, lengths, loop.draft_state)
        _check_draft(function, drafted, batch, vocabulary)
        place = jnp.arange(drafted.tokens.shape[1])[None]
        where = (drafted.tokens >= 0) & (drafted.tokens < vocabulary)
        where = jnp.cumprod(where, axis=1, dtype=jnp.int32) > 0
        if drafted.counts is None:
            return turn(loop, drafted, where, keys[1])
        where &= (place < drafted.counts[:, None]) & ~loop.ended[:, None]
        alone = lambda loop: turn(loop, drafted, where[:, :0], keys[1])
        several = lambda loop: turn(loop, drafted, where, keys[1])
        return lax.cond(where.any(), several, alone, loop)

    states = started(function, processors, batch, vocabulary)
    first = draw(
        logits, processors, states, None if key is None else jax.random.fold_in(key, 0)
    )
    none = jnp.zeros(batch, jnp.int32)
    nothing = Generated(
        jnp.full((batch, max_length), -1, jnp.int32),
        jnp.zeros((batch, max_length), first.log_probs.dtype),
        none,
        none > 0,
        jax.tree.map(jnp.asarray, state),
    )
    loop = _Loop(
        known,
        none,
        none > 0,
        SpeculativeSequences(nothing, jnp.zeros((), jnp.int32), none, none),
        jax.tree.map(jnp.asarray, draft.init()),
        advanced(processors, states, jnp.maximum(first.tokens, 0)),
    )
    loop, _ = recorded(loop, first.tokens[:, None], first.log_probs[:, None], none)
    loop = lax.while_loop(lambda loop: ~loop.ended.all(), body, loop)
    found = loop.found.generated
    places = jnp.arange(max_length)[None]
    tokens = jnp.take_along_axis(loop.known, begins[:, None] + places, 1)
    tokens = jnp.where(places < found.lengths[:, None], tokens, -1)
    return loop.found._replace(generated=found._replace(tokens=tokens))


def _known(
    function: str,
    prompt: Array | None,
    lengths: Array | None,
    batch: int,
    max_length: int,
) -> tuple[Array, Array]:
    """The tokens that are known, with room for a sequence, and where it begins."""
    if prompt is None:
        if lengths is not None:
            raise ValueError(
                f"{function}: `prompt_lengths` must be None without `prompt`."
            )
        prompt = jnp.zeros((batch, 0), jnp.int32)
    checks.require_integer(function, prompt=prompt)
    checks.require_rank(function, "prompt", prompt, 2, "(B, T)")
    size = prompt.shape[-1]
    checks.require_shape(
        function, "prompt", prompt, (batch, size), "one row per sequence"
    )
    if lengths is None:
        lengths = jnp.full(batch, size, jnp.int32)
    checks.require_integer(function, prompt_lengths=lengths)
    checks.require_shape(
        function, "prompt_lengths", lengths, (batch,), "one per sequence"
    )
    lengths = jnp.clip(lengths, 0, size).astype(jnp.int32)
    known = jnp.where(jnp.arange(size)[None] < lengths[:, None], prompt, -1)
    room = ((0, 0), (0, max_length))
    return jnp.pad(known.astype(jnp.int32), room, constant_values=-1), lengths


def _check_step(function: str, logits: Any, wanted: tuple[int, ...]) -> None:
    shape = tuple(logits.shape if hasattr(logits, "shape") else jnp.shape(logits))
    if shape != wanted:
        raise ValueError(
            f"{function}: `step` must return logits {wanted} for tokens "
            f"{wanted[:2]}, got {shape}."
        )


def _check_draft(function: str, drafted: Drafted, batch: int, vocabulary: int) -> None:
    shape = drafted.tokens.shape
    if len(shape) != 2 or shape[0] != batch or not shape[1]:
        raise ValueError(
            f"{function}: `draft` must propose tokens (B, g) with B = {batch} and "
            f"g >= 1, got {shape}."
        )
    if drafted.logits is not None and drafted.logits.shape != (*shape, vocabulary):
        raise ValueError(
            f"{function}: `draft` must return logits {(*shape, vocabulary)}, got "
            f"{drafted.logits.shape}."
        )


def _processed(
    processors: tuple[LogitsFunction | Processor, ...],
    states: tuple[Any, ...],
    logits: Logits,
    given: Array,
) -> tuple[Logits, tuple[Any, ...]]:
    """The logits at each place, and the states that belong to it, on a leading axis.

    The states that are given have seen the first of the tokens already.
    """
    if not processors:
        return logits, ()

    def visit(states: tuple[Any, ...], at: tuple[Array, Array]) -> Any:
        row, following = at
        found = applied(processors, states, row), states
        return advanced(processors, states, following), found

    # Behind the last place nothing is known; its states are not used.
    following = jnp.roll(given, -1, 1)
    rows = jnp.moveaxis(formed_logits(logits), 1, 0)
    _, (found, kept) = lax.scan(visit, states, (rows, following.T))
    return jnp.moveaxis(found, 0, 1), kept
