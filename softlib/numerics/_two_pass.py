"""Streaming logsumexp with integer exponents instead of a maximum."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from softlib._error_free import ExtendedFloat, anchor_of, near_exp, power_of_two
from softlib._finite import finite

from ._extended import extended_log
from ._plain_sum import mean_of, per_row


class TwoPassState(NamedTuple):
    r"""Partial sums $\sum_j e^{z_j} = e^a m 2^n$.

    Attributes:
        mantissa: $m$, 0 while nothing has been seen; one per row.
        exponent: $n$, an integer in a floating dtype; -inf while nothing has been seen.
        anchor: $a$: 0, or the largest score if its exponential has more bits before
            the point than the parts of $\log 2$ can do with; -inf while nothing has
            been seen.
        weighted: A pytree of $\sum_j e^{z_j} x_j / (e^a 2^n)$, or None; leaves start
            with the row axes.
    """

    mantissa: Float[Array, "*rows"]
    exponent: Float[Array, "*rows"]
    anchor: Float[Array, "*rows"]
    weighted: Any = None


@dataclasses.dataclass(frozen=True)
class TwoPass:
    r"""Logsumexp of scores that arrive in blocks, by exponents instead of a maximum.

    Each $e^z$ is a pair, $m 2^n$ with $m$ about 1, and so is their sum; two states are
    brought to the larger exponent by an exact power of 2, and rescaling a state,
    however often, rounds nothing. The weight of a score carries the error of one
    exponential, where the difference to a maximum of the opposite sign has an error
    that grows with both. Where the largest score is beyond 32768, of either sign,
    scores are relative to it, as in `RunningMax`.

    Scores of -inf count as absent. A score of NaN or +inf makes its row NaN.

    Derivatives: forward and reverse mode, any order, of `finalize` and `mean`;
    exponents and anchors are constants to differentiation, because they cancel.
    Cost: `update` reads the block twice, as `RunningMax`, because the exponent of a sum
    is that of the largest score; about twice the arithmetic. A state holds three
    numbers per row and the weighted sums.
    Source: "The Two-Pass Softmax Algorithm". It keeps an exponent per term of the sum,
    here one per block: a kernel may do otherwise and merge the same states. The anchor
    is softlib's: without it scores beyond 45000 would be silently wrong.

    Example:
        >>> accumulator = softlib.numerics.TwoPass()
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
    ) -> TwoPassState:
        """The state that has seen nothing.

        Args:
            shape: Static shape of the rows.
            dtype: Static dtype of the sums, float32 or wider.
            weighted: Pytree of zeros that start the weighted sums; None for none.
        """
        nothing = jnp.full(shape, -jnp.inf, dtype)
        return TwoPassState(jnp.zeros(shape, dtype), nothing, nothing, weighted)

    def update(
        self,
        state: TwoPassState,
        block: Float[Array, "..."],
        *,
        axis: int | tuple[int, ...] = -1,
        weigh: Callable[[Float[Array, "..."]], Any] | None = None,
    ) -> TwoPassState:
        """Adds a block of scores: more axes than the rows, reduced here.

        Args:
            state: What has been seen.
            block: Scores; -inf for entries that do not count.
            axis: Static; the axis or axes of `block` that are reduced.
            weigh: Maps the exponentials, divided by a power of 2 and the anchor, to the
                block's weighted sums, a pytree like `state.weighted`. None if the state
                carries none.
        """
        top = lax.stop_gradient(block).max(axis)
        anchor = jnp.maximum(state.anchor, anchor_of(top))
        before = _relative_to(anchor, state)
        largest = near_exp(top - finite(anchor)).exponent
        largest = jnp.where(top == -jnp.inf, -jnp.inf, largest)
        exponent = jnp.maximum(before.exponent, largest)
        terms = near_exp(block - jnp.expand_dims(finite(anchor), axis))
        # Scores of -inf vanish also against the exponent 0 of an empty row.
        shift = terms.exponent - jnp.expand_dims(finite(exponent), axis)
        # Without it XLA recomputes them for every use, and slowly within a sum.
        exponentials = lax.optimization_barrier(terms.mantissa * power_of_two(shift))
        added = TwoPassState(
            exponentials.sum(axis),
            exponent,
            anchor,
            None if weigh is None else weigh(exponentials),
        )
        return _add(_with_exponent(exponent, before), added)

    def merge(self, a: TwoPassState, b: TwoPassState) -> TwoPassState:
        """Combines two states over disjoint sets of scores."""
        anchor = jnp.maximum(a.anchor, b.anchor)
        a, b = _relative_to(anchor, a), _relative_to(anchor, b)
        exponent = jnp.maximum(a.exponent, b.exponent)
        return _add(_with_exponent(exponent, a), _with_exponent(exponent, b))

    def finalize(self, state: TwoPassState) -> Float[Array, "*rows"]:
        """The logsumexp in nats; -inf for a row without any score above -inf."""
        total = ExtendedFloat(state.mantissa, state.exponent)
        return finite(state.anchor) + extended_log(total)

    def mean(self, state: TwoPassState) -> Any:
        r"""$\sum_j p_j x_j$ with $p$ the softmax of the scores; 0 for an empty row."""
        return mean_of(state.mantissa, state.weighted)


def _relative_to(anchor: Array, state: TwoPassState) -> TwoPassState:
    """The same state relative to an equal or larger anchor.

    The difference of two anchors is exact where it is small; where it is large, the
    smaller sum vanishes anyway.
    """
    difference = finite(state.anchor) - finite(anchor)
    empty = state.anchor == -jnp.inf
    factor = near_exp(jnp.where(empty, 0, difference))
    return TwoPassState(
        state.mantissa * factor.mantissa,
        state.exponent + factor.exponent,
        anchor,
        _times(factor.mantissa, state.weighted),
    )


def _with_exponent(exponent: Array, state: TwoPassState) -> TwoPassState:
    # An empty row keeps its zeros; -inf - (-inf) would be NaN.
    shift = finite(state.exponent) - finite(exponent)
    empty = state.exponent == -jnp.inf
    factor = jnp.where(empty, 0, power_of_two(shift))
    return TwoPassState(
        state.mantissa * factor, exponent, state.anchor, _times(factor, state.weighted)
    )


def _add(a: TwoPassState, b: TwoPassState) -> TwoPassState:
    weighted = jax.tree.map(jnp.add, a.weighted, b.weighted)
    return TwoPassState(a.mantissa + b.mantissa, a.exponent, a.anchor, weighted)


def _times(factor: Array, weighted: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * per_row(factor, leaf), weighted)
