"""Streaming logsumexp relative to the running maximum."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from softlib._finite import at_least_finite, finite

from ._plain_sum import mean_of, per_row


class RunningMaxState(NamedTuple):
    r"""Partial sums of $e^{z}$, relative to the largest score seen so far.

    Attributes:
        max: $m = \max_j z_j$, one per row; -inf while nothing has been seen, and after
            a block of scores that are all -inf the least finite number.
        sum: $s = \sum_j e^{z_j - m}$, 0 while nothing has been seen.
        weighted: A pytree of $\sum_j e^{z_j - m} x_j$, or None; leaves start with the
            row axes.
    """

    max: Float[Array, "*rows"]
    sum: Float[Array, "*rows"]
    weighted: Any = None


@dataclasses.dataclass(frozen=True)
class RunningMax:
    r"""Logsumexp of scores that arrive in blocks, by the running maximum.

    States form a commutative monoid under `merge` (up to rounding), with `init` as its
    neutral element: blocks may come in any order and partial states from other chunks,
    threads or devices may be combined. Besides $\sum e^z$ a state can carry sums
    weighted by $e^z$ (for a mean of values, of the scores themselves, ...).

    Scores of -inf count as absent. A score of NaN or +inf makes its row NaN.

    Derivatives: forward and reverse mode, any order, of `finalize` and `mean`; the
    `max` of a state is a constant to differentiation, because it cancels in both.
    Cost: `update` reads the block twice (maximum, sum); a state holds two numbers per
    row and the weighted sums.
    Source: the online normaliser used throughout the literature on streaming softmax;
    "The Two-Pass Softmax Algorithm" calls the three-pass form its baseline.

    Example:
        >>> accumulator = softlib.numerics.RunningMax()
        >>> state = accumulator.init((2,))
        >>> for block in (jnp.zeros((2, 3)), jnp.zeros((2, 5))):
        ...     state = accumulator.update(state, block)
        >>> print(jnp.exp(accumulator.finalize(state)))
        [8. 8.]
    """

    def init(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike = jnp.float32,
        *,
        weighted: Any = None,
    ) -> RunningMaxState:
        """The state that has seen nothing.

        Args:
            shape: Static shape of the rows.
            dtype: Static dtype of the sums, float32 or wider.
            weighted: Pytree of zeros that start the weighted sums; None for none.
        """
        return RunningMaxState(
            jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), weighted
        )

    def update(
        self,
        state: RunningMaxState,
        block: Float[Array, "..."],
        *,
        axis: int | tuple[int, ...] = -1,
        weigh: Callable[[Float[Array, "..."]], Any] | None = None,
    ) -> RunningMaxState:
        """Adds a block of scores: more axes than the rows, reduced here.

        Args:
            state: What has been seen.
            block: Scores; -inf for entries that do not count.
            axis: Static; the axis or axes of `block` that are reduced.
            weigh: Maps `exp(block - max)` to the block's weighted sums, a pytree like
                `state.weighted`. None if the state carries none.
        """
        # The maximum cancels in every result, so it is a constant to differentiation.
        # Finite, so that an empty row needs no `where`, which would be another kernel.
        top = at_least_finite(lax.stop_gradient(block).max(axis))
        top = jnp.maximum(state.max, top)
        exponentials = jnp.exp(block - jnp.expand_dims(top, axis))
        added = RunningMaxState(
            top,
            exponentials.sum(axis),
            None if weigh is None else weigh(exponentials),
        )
        return _add(_rescale(state, top), added)

    def merge(self, a: RunningMaxState, b: RunningMaxState) -> RunningMaxState:
        """Combines two states over disjoint sets of scores."""
        top = jnp.maximum(a.max, b.max)
        return _add(_rescale(a, top), _rescale(b, top))

    def finalize(self, state: RunningMaxState) -> Float[Array, "*rows"]:
        """The logsumexp in nats; -inf for a row without any score above -inf."""
        # sum >= 1 in a row that saw a score, because the maximum itself adds exp(0).
        empty = state.sum == 0
        lse = finite(state.max) + jnp.log(jnp.where(empty, 1, state.sum))
        return jnp.where(empty, -jnp.inf, lse)

    def mean(self, state: RunningMaxState) -> Any:
        r"""$\sum_j p_j x_j$ with $p$ the softmax of the scores; 0 for an empty row."""
        return mean_of(state.sum, state.weighted)


def _rescale(state: RunningMaxState, top: Array) -> RunningMaxState:
    # -inf - (-inf) is NaN: an empty state is rescaled by exp(-inf - 0) = 0.
    factor = jnp.exp(state.max - finite(top))
    weighted = jax.tree.map(lambda leaf: leaf * per_row(factor, leaf), state.weighted)
    return RunningMaxState(top, state.sum * factor, weighted)


def _add(a: RunningMaxState, b: RunningMaxState) -> RunningMaxState:
    weighted = jax.tree.map(jnp.add, a.weighted, b.weighted)
    return RunningMaxState(a.max, a.sum + b.sum, weighted)
