"""Log-probabilities of sequences among those that an automaton accepts."""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode, match_varying
from softlib.softmax import logsumexp

from ._processors import TokenAutomaton


@array_arguments
def constrained_log_prob(
    logits: Float[Array, "*batch T V"],
    tokens: Integer[Array, "*batch T"],
    automaton: TokenAutomaton,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of tokens if each is drawn among those that are allowed.

    $$\sum_t \Bigl( z_{t, y_t} - \log \sum_{v \in A(s_t)} e^{z_{t, v}} \Bigr)$$

    with the tokens $A(s_t)$ that the automaton allows in the state after $y_{<t}$. It
    is the unconstrained log-probability less the logarithm of the mass of what is
    allowed, step by step; `generate` with the automaton as a processor draws so.

    Args:
        logits: Of each step, given the tokens before it.
        tokens: Ids in $[0, V)$.
        automaton: Its state before the first token that counts is 0.
        where: True for the tokens that count; broadcasts to their shape. The others do
            not move the automaton, and may hold anything.

    Returns:
        One number per sequence, float32 (float64 if the logits are), at most 0; -inf,
        without gradient, for a token that is not allowed or no id.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: any order, with respect to the logits.
    Cost: one pass over the logits; a look-up per token, one after the other.
    Source: constrained decoding for "Chatting with Logs: An exploratory study on
        Finetuning LLMs for LogQL".

    Example:
        >>> automaton = softlib.decoding.TokenAutomaton(jnp.array([[0, 0, -1]]))
        >>> logits, tokens = jnp.zeros((2, 3)), jnp.array([0, 1])
        >>> log_prob = softlib.decoding.constrained_log_prob(logits, tokens, automaton)
        >>> print(jnp.exp(log_prob).round(4))  # 1/2 in each step, not 1/3
        0.25
    """
    function = "constrained_log_prob"
    checks.require_floating(function, logits=logits)
    checks.require_rank(function, "logits", logits, 2, "(steps, tokens)")
    checks.require_integer(function, tokens=tokens)
    what = "a `TokenAutomaton`"
    checks.require_instance(function, "automaton", automaton, TokenAutomaton, what)
    *batch, steps, vocabulary = logits.shape
    why = "an id for each step of `logits`"
    checks.require_shape(function, "tokens", tokens, (*batch, steps), why)
    counts = checks.checked_where(function, where, tokens.shape, why)
    with checks.under_name(function, "TokenAutomaton"):
        automaton.init(1, vocabulary)
    table = jnp.asarray(automaton.transitions)

    over_rows = lambda spec: PartitionSpec(*spec[: len(batch)])
    return in_auto_mode(_log_prob, over_rows, logits, tokens, counts, table)


def _log_prob(
    logits: Array, tokens: Array, counts: Array, table: Array
) -> Float[Array, "*batch"]:
    ids = labels_in_range(tokens, logits.shape[-1])
    found = counts & (ids >= 0)
    ids = jnp.where(found, ids, 0)
    states = _states(*match_varying((table, ids, counts, found)))
    rows = table[jnp.maximum(states, 0)]
    allowed = (rows >= 0) & (states >= 0)[..., None]
    pick = lambda array: jnp.take_along_axis(array, ids[..., None], -1)[..., 0]
    right = pick(allowed) & found
    wide = logits.astype(accumulator_dtype(logits))
    own = pick(wide)
    total = logsumexp(wide, -1, where=allowed & right[..., None])
    possible = right & ((own > -jnp.inf) | jnp.isnan(own))
    log_probs = jnp.where(possible, own, 0) - jnp.where(possible, total, 0)
    none = (counts & ~possible).any(-1)
    return jnp.where(none, -jnp.inf, log_probs.sum(-1))


@compiled_once()
def _states(
    table: Array, ids: Array, counts: Array, found: Array
) -> Int[Array, "*batch T"]:
    """The state before each token; -1 after one that is not allowed."""

    def step(state: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        token, counts, found = now
        after = table[jnp.maximum(state, 0), token].astype(jnp.int32)
        after = jnp.where((state >= 0) & found, after, -1)
        return jnp.where(counts, after, state), state

    ids, counts, found = (jnp.moveaxis(each, -1, 0) for each in (ids, counts, found))
    begin = jnp.zeros_like(ids.sum(0))
    _, states = lax.scan(step, begin, (ids, counts, found))
    return jnp.moveaxis(states, 0, -1)
