"""Beam search over steps, ranked by a value function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments


class ValueGuidedBeam(NamedTuple):
    """The candidates that `value_guided_search` is left with, the best first.

    Attributes:
        states: The pytree of the caller, with the beam on its leading axis.
        values: What the value function says of each.
        finished: Which of them had ended.
    """

    states: Any
    values: Float[Array, " W"]
    finished: Bool[Array, " W"]


@array_arguments
def value_guided_search(
    key: Array,
    propose: Callable[[Array, Any], tuple[Any, Array]],
    value: Callable[[Any], Array],
    states: Any,
    *,
    num_steps: int,
    num_proposals: int,
) -> ValueGuidedBeam:
    r"""Search that extends every candidate several ways and keeps the most valuable.

    In each step every one of $W$ candidates is extended by `num_proposals` draws from
    the policy (a token, or a whole step of reasoning), and of all extensions the $W$ of
    the greatest value stay. $W = 1$ takes the best of several proposals at a time. A
    value head trained by `softlib.losses.oreo_value_loss` judges states that a
    likelihood cannot: how much reward is still to be had.

    Args:
        key: Of `jax.random`.
        propose: Maps a key and states (a pytree with $W K$ candidates on the leading
            axis) to the next states and whether each has ended. Its draws must differ
            between equal candidates, and shapes and dtypes stay.
        value: Maps such states to a number each.
        states: The first $W$ candidates, not ended; often copies of one prompt.
        num_steps: Static number of steps; a candidate that has ended earlier stays as
            it is, and competes with its value.
        num_proposals: Static $K \geq 1$, extensions of each candidate.

    Returns:
        `ValueGuidedBeam`, in descending order of value. A value of NaN counts as -inf.

    Raises:
        TypeError: `num_steps` or `num_proposals` is no Python int, or `propose` or
            `value` returns the wrong kind of dtype.
        ValueError: A number is below 1, `states` have no common leading axis, or a
            function returns another shape.

    Derivatives: none are meant.
    Cost: `num_steps` calls of `propose` and one more of `value`, on $W K$ candidates.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning", its search at
        test time.

    Example:
        >>> def propose(key, x):  # To the left or to the right.
        ...     return x + jax.random.rademacher(key, x.shape), jnp.zeros(x.shape, bool)
        >>> search = lambda value, x: value_guided_search(
        ...     jax.random.key(0), propose, value, x, num_steps=5, num_proposals=8)
        >>> print(search(lambda x: x / 5, jnp.zeros(2, int)).values)
        [1. 1.]
    """
    function = "value_guided_search"
    checks.require_positive_integer(function, "num_steps", num_steps)
    checks.require_positive_integer(function, "num_proposals", num_proposals)
    states = jax.tree.map(jnp.asarray, states)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(states)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            f"{function}: `states` must hold arrays with the same leading axis, one "
            f"candidate at least, got {sorted(sizes)}."
        )
    ((width,),) = sizes
    first_of_each = jnp.arange(width * num_proposals) % num_proposals == 0

    def judged(candidates: Any) -> Array:
        values = jnp.asarray(value(candidates))
        checks.require_floating(function, **{"value(states)": values})
        count = jax.tree.leaves(candidates)[0].shape[:1]
        checks.require_shape(function, "value(states)", values, count, "one for each")
        return jnp.where(jnp.isnan(values), -jnp.inf, values)

    def step(beam: ValueGuidedBeam, key: Array) -> tuple[ValueGuidedBeam, None]:
        spread = lambda leaf: jnp.repeat(leaf, num_proposals, axis=0)
        before, ended = jax.tree.map(spread, (beam.states, beam.finished))
        after, ends = propose(key, before)
        ends = jnp.asarray(ends)
        checks.require_boolean(function, **{"propose(key, states)[1]": ends})
        why = "one for each"
        shape = ended.shape
        checks.require_shape(function, "propose(key, states)[1]", ends, shape, why)

        def stay(old: Array, new: Array) -> Array:
            return jnp.where(ended.reshape(-1, *(1,) * (old.ndim - 1)), old, new)

        after = jax.tree.map(stay, before, after)
        # A finished state is kept once; its copies rank last. At least W candidates are
        # no copies.
        copy = ended & ~first_of_each
        values = judged(after)
        # `copy` is a key of its own: a copy must rank below a value of -inf too.
        order = jnp.lexsort((0 - values, copy))[:width]
        take = lambda leaf: leaf[order]
        return ValueGuidedBeam(*jax.tree.map(take, (after, values, ended | ends))), None

    start = ValueGuidedBeam(states, judged(states), jnp.zeros(width, bool))
    return lax.scan(step, start, jax.random.split(key, num_steps))[0]
