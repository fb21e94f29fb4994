"""Streaming sums of positive weights, without exponentials."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class PlainSumState(NamedTuple):
    r"""Partial sums of positive weights.

    Attributes:
        sum: $s = \sum_j w_j$, 0 while nothing has been seen; one per row.
        weighted: A pytree of $\sum_j w_j x_j$, or None; leaves start with the row axes.
    """

    sum: Float[Array, "*rows"]
    weighted: Any = None


@dataclasses.dataclass(frozen=True)
class PlainSum:
    r"""The logarithm of a sum of positive weights that arrive in blocks.

    The trivial monoid, for rows that are normalised by something else than an
    exponential (a softplus, a rational function): nothing grows like $e^z$, so no
    maximum is kept and two states merge by addition. With weights $e^z$ the results
    are those of `RunningMax` as long as no exponential leaves the dtype's range.

    Weights of 0 count as absent. Negative weights are not detected: a row whose sum is
    negative has the result NaN.

    Derivatives: forward and reverse mode, any order, of `finalize` and `mean`; 0 in a
    row without weight.
    Cost: `update` reads the block once; a state holds one number per row and the
    weighted sums.
    Source: softlib's own; the linear-domain counterpart of the accumulators for
    exponentials.

    Example:
        >>> accumulator = softlib.numerics.PlainSum()
        >>> state = accumulator.init((2,))
        >>> for block in (jnp.ones((2, 3)), jnp.ones((2, 5))):
        ...     state = accumulator.update(state, block)
        >>> print(jnp.exp(accumulator.finalize(state)).round(4))
        [8. 8.]
    """

    def init(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike = jnp.float32,
        *,
        weighted: Any = None,
    ) -> PlainSumState:
        """The state that has seen nothing.

        Args:
            shape: Static shape of the rows.
            dtype: Static dtype of the sums, float32 or wider.
            weighted: Pytree of zeros that start the weighted sums; None for none.
        """
        return PlainSumState(jnp.zeros(shape, dtype), weighted)

    def update(
        self,
        state: PlainSumState,
        block: Float[Array, "..."],
        *,
        axis: int | tuple[int, ...] = -1,
        weigh: Callable[[Float[Array, "..."]], Any] | None = None,
    ) -> PlainSumState:
        """Adds a block of weights: more axes than the rows, reduced here.

        Args:
            state: What has been seen.
            block: Positive weights; 0 for entries that do not count.
            axis: Static; the axis or axes of `block` that are reduced.
            weigh: Maps `block` to the block's weighted sums, a pytree like
                `state.weighted`. None if the state carries none.
        """
        weighted = None if weigh is None else weigh(block)
        return self.merge(state, PlainSumState(block.sum(axis), weighted))

    def merge(self, a: PlainSumState, b: PlainSumState) -> PlainSumState:
        """Combines two states over disjoint sets of weights."""
        weighted = jax.tree.map(jnp.add, a.weighted, b.weighted)
        return PlainSumState(a.sum + b.sum, weighted)

    def finalize(self, state: PlainSumState) -> Float[Array, "*rows"]:
        """The logarithm of the sum, in nats; -inf for a row without weight."""
        empty = state.sum == 0
        # Selected before the logarithm as well: 0 * inf in a derivative is NaN.
        return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, state.sum)))

    def mean(self, state: PlainSumState) -> Any:
        r"""$\sum_j w_j x_j / \sum_j w_j$; 0 for a row without weight."""
        return mean_of(state.sum, state.weighted)


def mean_of(total: Float[Array, "*rows"], weighted: Any) -> Any:
    """Weighted sums divided by the sum of the weights, 0 where that is 0."""
    total = jnp.where(total == 0, 1, total)
    return jax.tree.map(lambda leaf: leaf / per_row(total, leaf), weighted)


def per_row(row: Array, leaf: Array) -> Array:
    """Values of rows with trailing axes for broadcasting to a leaf."""
    return row.reshape(row.shape + (1,) * (leaf.ndim - row.ndim))
