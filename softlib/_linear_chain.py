"""Scores of the label sequences of a linear chain, and their sum over all of them.

A chain gives a sequence of labels y the score

    start[y_1] + sum_t emissions[t, y_t] + sum_t transitions[y_(t-1), y_t] + end[y_T],

where t runs over the steps that count: the others are as if they were not there.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from . import _checks as checks
from ._compiled_once import compiled_once
from ._dtypes import accumulator_dtype
from ._ids import labels_in_range
from ._log_domain import log_sum
from ._sharding import match_varying

type Method = Literal["sequential", "associative"]
METHODS = ("sequential", "associative")


class Chain(NamedTuple):
    """The numbers of a chain in one dtype; what all sequences share has axes of size 1.

    Attributes:
        emissions: 0 in steps that do not count.
        transitions: [from, to].
        start: Of the first label.
        end: Of the last one.
        counts: True for the steps that count.
    """

    emissions: Float[Array, "*batch T K"]
    transitions: Float[Array, "*ones K K"]
    start: Float[Array, "*ones K"]
    end: Float[Array, "*ones K"]
    counts: Bool[Array, "*batch T"]


def checked_chain(
    function: str,
    emissions: Array,
    transitions: Array,
    start: Array | None,
    end: Array | None,
    where: Array | None,
) -> Chain:
    """The chain of the arguments of a public function, which its errors name."""
    checks.require_floating(
        function, emissions=emissions, transitions=transitions, start=start, end=end
    )
    checks.require_rank(function, "emissions", emissions, 2, "(steps, labels)")
    *batch, steps, labels = emissions.shape
    if not labels:
        raise ValueError(
            f"{function}: `emissions` must have at least one label (its last axis), "
            f"got shape {emissions.shape}."
        )
    why = "from a label to a label, both those of the last axis of `emissions`"
    checks.require_shape(function, "transitions", transitions, (labels, labels), why)
    why = "one per label, the last axis of `emissions`"
    checks.require_shape(function, "start", start, (labels,), why)
    checks.require_shape(function, "end", end, (labels,), why)
    why = "the steps of `emissions`"
    counts = checks.checked_where(function, where, (*batch, steps), why)

    dtype = accumulator_dtype(emissions, transitions, start, end)
    none = jnp.zeros(labels, dtype)
    shared = (
        transitions,
        none if start is None else start,
        none if end is None else end,
    )
    ones = (1,) * len(batch)
    moves, first, last = (
        each.astype(dtype).reshape(*ones, *each.shape) for each in shared
    )
    kept = jnp.where(counts[..., None], emissions.astype(dtype), 0)
    return match_varying(Chain(kept, moves, first, last, counts))


def is_first_step(counts: Bool[Array, "*batch T"]) -> Bool[Array, "*batch T"]:
    return counts & (jnp.cumsum(counts, axis=-1) == 1)


class LabelledChain(NamedTuple):
    """The score that a chain gives to a sequence of labels.

    Attributes:
        scores: What each step adds to the score; -inf for what is forbidden.
        outside: Whether a label of a step that counts is no id of a label.
    """

    scores: Float[Array, "*batch T"]
    outside: Bool[Array, "*batch"]


@compiled_once()
def labelled(chain: Chain, labels: Integer[Array, "*batch T"]) -> LabelledChain:
    """The score of a sequence of labels, step by step; its sum is that of the chain.

    Entries are selected by products with one-hot rows, of which the transpose is no
    scatter; what is -inf is not in them, since they would make NaN of it.
    """
    emissions, transitions, start, end, counts = chain
    size = emissions.shape[-1]
    ids = labels_in_range(labels, size)
    outside = (counts & (ids < 0)).any(-1)
    ids = jnp.where(counts, jnp.maximum(ids, 0), 0)
    if not counts.shape[-1]:
        return LabelledChain(jnp.zeros(counts.shape, emissions.dtype), outside)

    place = lax.broadcasted_iota(jnp.int32, counts.shape, counts.ndim - 1)
    place = jnp.where(counts, place, -1)
    latest = lax.cummax(place, axis=place.ndim - 1)
    before = jnp.concatenate([jnp.full_like(latest[..., :1], -1), latest[..., :-1]], -1)
    previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), -1)
    is_first = counts & (before < 0)
    is_last = counts & (place == latest[..., -1:])

    is_label = jax.nn.one_hot(ids, size, dtype=bool)
    is_previous = jax.nn.one_hot(previous, size, dtype=bool)
    chosen = lambda scores: jnp.where(is_label, scores, 0).sum(-1)
    is_forbidden = transitions == -jnp.inf
    from_previous = lambda table: jnp.einsum(
        "...tk,kj->...tj",
        is_previous.astype(table.dtype),
        table.reshape(size, size),
        precision="highest",
    )
    rows = from_previous(jnp.where(is_forbidden, 0, transitions))
    forbidden = chosen(from_previous(is_forbidden.astype(rows.dtype))) > 0
    come = jnp.where(forbidden, -jnp.inf, chosen(rows))
    come = jnp.where(is_first, chosen(start[..., None, :]), come)
    scores = chosen(emissions) + come
    scores += jnp.where(is_last, chosen(end[..., None, :]), 0)
    return LabelledChain(jnp.where(counts, scores, 0), outside)


def log_normalizer(chain: Chain, method: Method) -> Float[Array, "*batch"]:
    """Log of the sum over all sequences of e to their score; 0 without a step."""
    if not chain.counts.shape[-1]:
        return jnp.zeros(chain.counts.shape[:-1], chain.emissions.dtype)
    last = _step_by_step(chain) if method == "sequential" else _as_a_tree(chain)
    return jnp.where(chain.counts.any(-1), log_sum(last + chain.end), 0)


@compiled_once()
def _step_by_step(chain: Chain) -> Float[Array, "*batch K"]:
    """Log-sums over the sequences that end in each label, before `end`."""
    into = jnp.swapaxes(chain.transitions, -1, -2)

    # Recomputed in the backward pass, or K numbers a step would become K^2.
    @jax.checkpoint
    def step(alpha: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        emission, counts, is_first = now
        come = log_sum(alpha[..., None, :] + into)
        come = jnp.where(is_first[..., None], chain.start, come) + emission
        return jnp.where(counts[..., None], come, alpha), None

    over_time = in_time_order(chain)
    return lax.scan(step, jnp.zeros_like(chain.emissions[..., 0, :]), over_time)[0]


def in_time_order(chain: Chain) -> tuple[Array, Array, Array]:
    """Emissions, what counts, and the first step, with time in front."""
    emissions = jnp.moveaxis(chain.emissions, -2, 0)
    flags = (chain.counts, is_first_step(chain.counts))
    counts, is_first = (jnp.moveaxis(flag, -1, 0) for flag in flags)
    return emissions, counts, is_first


def step_matrices(chain: Chain) -> Float[Array, "*batch T K K"]:
    """The scores that a step adds on the way from each label to each.

    A step that does not count is the identity of a sum in the log domain. The first one
    that does forgets where it comes from, and all that come before it keep label 0 at
    0: row 0 of the product of all is what sequences that end in each label have.
    """
    size = chain.emissions.shape[-1]
    is_first = is_first_step(chain.counts)[..., None, None]
    start, transitions = chain.start[..., None, None, :], chain.transitions
    moves = jnp.where(is_first, start, transitions[..., None, :, :])
    moves += chain.emissions[..., None, :]
    stay = jnp.where(jnp.eye(size, dtype=bool), 0, -jnp.inf).astype(moves.dtype)
    stay = stay.reshape((1,) * (moves.ndim - 2) + stay.shape)
    return jnp.where(chain.counts[..., None, None], moves, stay)


@compiled_once()
def _as_a_tree(chain: Chain) -> Float[Array, "*batch K"]:
    @jax.checkpoint
    def then(first: Array, second: Array) -> Array:
        second = jnp.swapaxes(second, -1, -2)
        return log_sum(first[..., :, None, :] + second[..., None, :, :])

    parts = jnp.moveaxis(step_matrices(chain), -3, 0)
    while len(parts) > 1:
        pairs = then(parts[: len(parts) // 2 * 2 : 2], parts[1::2])
        odd = parts[len(parts) // 2 * 2 :]
        parts = jnp.concatenate([pairs, odd])
    return parts[0][..., 0, :]


def best_sequence(chain: Chain, method: Method) -> Int[Array, "*batch T"]:
    """The labels of the highest score, 0 in steps that do not count."""
    if not chain.counts.shape[-1]:
        return jnp.zeros(chain.counts.shape, jnp.int32)
    find = _best_step_by_step if method == "sequential" else _best_as_a_tree
    return jnp.where(chain.counts, find(chain), 0)


def _best_before(alpha: Array, into: Array) -> tuple[Array, Array]:
    """(the best score of a way to each label, the label before); the first of ties."""
    ways = alpha[..., None, :] + into
    return ways.max(-1), jnp.argmax(ways, -1).astype(jnp.int32)


@compiled_once()
def _best_step_by_step(chain: Chain) -> Int[Array, "*batch T"]:
    into = jnp.swapaxes(chain.transitions, -1, -2)
    begin = jnp.zeros_like(chain.emissions[..., 0, :])
    every = lax.broadcasted_iota(jnp.int32, begin.shape, begin.ndim - 1)

    def step(alpha: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        emission, counts, is_first = now
        come, before = _best_before(alpha, into)
        come = jnp.where(is_first[..., None], chain.start, come) + emission
        # The labels before the first step are of no interest.
        before = jnp.where(counts[..., None], before, every)
        return jnp.where(counts[..., None], come, alpha), before

    def back(label: Array, before: Array) -> tuple[Array, Array]:
        came = jnp.take_along_axis(before, label[..., None], -1)[..., 0]
        return came, label

    last, before = lax.scan(step, begin, in_time_order(chain))
    label = jnp.argmax(last + chain.end, -1).astype(jnp.int32)
    tags = lax.scan(back, label, before, reverse=True)[1]
    return jnp.moveaxis(tags, 0, -1)


@compiled_once()
def _best_as_a_tree(chain: Chain) -> Int[Array, "*batch T"]:
    def then(first: Array, second: Array) -> Array:
        second = jnp.swapaxes(second, -1, -2)
        return (first[..., :, None, :] + second[..., None, :, :]).max(-1)

    def through(later: Array, earlier: Array) -> Array:
        """The label before both, for each label after them."""
        return jnp.take_along_axis(earlier, later, -1)

    matrices = jnp.moveaxis(step_matrices(chain), -3, 0)
    alphas = lax.associative_scan(then, matrices)[..., 0, :]
    _, before = _best_before(alphas[:-1], jnp.swapaxes(chain.transitions, -1, -2)[None])
    every = lax.broadcasted_iota(jnp.int32, before.shape, before.ndim - 1)
    counts = jnp.moveaxis(chain.counts, -1, 0)[1:, ..., None]
    before = jnp.where(counts, before, every)
    label = jnp.argmax(alphas[-1] + chain.end, -1).astype(jnp.int32)[..., None]
    ways = lax.associative_scan(through, before, reverse=True)
    came = jnp.take_along_axis(ways, jnp.broadcast_to(label, (*ways.shape[:-1], 1)), -1)
    return jnp.moveaxis(jnp.concatenate([came, label[None]])[..., 0], 0, -1)
