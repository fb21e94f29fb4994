"""Streaming logsumexp relative to a reference that is known beforehand."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._unified_range import CRITERIA, RangeCriterion, require_range

from ._plain_sum import mean_of


class UnifiedMaxState(NamedTuple):
    r"""Partial sums of $e^{z - \varphi}$, and the extremes that tell if they are good.

    Attributes:
        sum: $s = \sum_j e^{z_j - \varphi}$, 0 while nothing has been seen; one per row.
        max: $\max_j z_j$, or -inf while nothing has been seen. No sum depends on it.
        min: $\min_j z_j$ over the scores that count, or +inf; None unless the criterion
            looks at every element.
        weighted: A pytree of $\sum_j e^{z_j - \varphi} x_j$, or None; leaves start with
            the row axes.
    """

    sum: Float[Array, "*rows"]
    max: Float[Array, "*rows"]
    min: Float[Array, "*rows"] | None = None
    weighted: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class UnifiedMax:
    r"""Logsumexp of scores that arrive in blocks, against a fixed reference $\varphi$.

    $$\log \sum_j e^{z_j} = \varphi + \log \sum_j e^{z_j - \varphi}$$

    for any $\varphi$. With one $\varphi$ that is known before the first score, sums are
    plain: `merge` adds, nothing is rescaled, and no part has to know another's maximum.
    The price is a range. A row is good iff $a < \max_j z_j - \varphi < b$ and its
    sums are finite; `needs_recompute` says which rows are not, and those must be
    computed again by `RunningMax`. An empty row is good.

    Scores of -inf count as absent. A score of NaN or +inf makes its row one to
    recompute, and so does a reference that is NaN or infinite.

    Args:
        phi: The reference; a number or an array that broadcasts to the rows.
        valid_range: The range $(a, b)$; numbers or arrays that broadcast to the rows.
            It is narrowed at its lower end to what the dtype of the sums can hold with
            full accuracy, $\log(2 \cdot \mathrm{tiny} / \varepsilon)$ (-70.7 in
            float32, -671.6 in float64). At the upper end sums of `S` terms overflow in
            float32 from $88.7 - \log S$ on, which is found and needs no narrower range.
        criterion: Static. "row_max" looks at the largest score of a row; "elementwise",
            the rule of the paper, wants every score in the range and so
            also recomputes rows that merely hold scores too small to matter.

    Raises:
        ValueError: `criterion` is neither, or the range is empty.

    Derivatives: forward and reverse mode, any order, of `finalize` and `mean` with
    respect to the scores; zero with respect to `phi`, because it cancels. NaN in a row
    whose sums are not finite.
    Cost: as `RunningMax`, but `merge` is additions and the maximum is no more than a
    flag: no exponential waits for it.
    Source: "FlashDecoding++: Faster Large Language Model Inference on GPUs". The
    default criterion is weaker than the paper's, because a score far below the largest
    has a weight that rounds to 0 in any softmax.

    Example:
        >>> accumulator = softlib.numerics.UnifiedMax(phi=3.0)
        >>> state = accumulator.init((2,))
        >>> block = jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 400.0]])
        >>> state = accumulator.update(state, block)
        >>> print(accumulator.finalize(state).round(4))
        [4.1698    nan]
        >>> print(accumulator.needs_recompute(state))
        [False  True]
    """

    phi: ArrayLike = 0.0
    valid_range: tuple[ArrayLike, ArrayLike] = (-70.0, 80.0)
    criterion: RangeCriterion = "row_max"

    def __post_init__(self) -> None:
        checks.require_one_of("UnifiedMax", "criterion", self.criterion, CRITERIA)
        require_range("UnifiedMax", self.valid_range)

    def init(
        self,
        shape: tuple[int, ...],
        dtype: DTypeLike = jnp.float32,
        *,
        weighted: Any = None,
    ) -> UnifiedMaxState:
        """The state that has seen nothing.

        Args:
            shape: Static shape of the rows.
            dtype: Static dtype of the sums, float32 or wider.
            weighted: Pytree of zeros that start the weighted sums; None for none.
        """
        least = None
        if self.criterion == "elementwise":
            least = jnp.full(shape, jnp.inf, dtype)
        most = jnp.full(shape, -jnp.inf, dtype)
        return UnifiedMaxState(jnp.zeros(shape, dtype), most, least, weighted)

    def update(
        self,
        state: UnifiedMaxState,
        block: Float[Array, "..."],
        *,
        axis: int | tuple[int, ...] = -1,
        weigh: Callable[[Float[Array, "..."]], Any] | None = None,
    ) -> UnifiedMaxState:
        """Adds a block of scores: more axes than the rows, reduced here.

        Args:
            state: What has been seen.
            block: Scores; -inf for entries that do not count.
            axis: Static; the axis or axes of `block` that are reduced.
            weigh: Maps `exp(block - phi)` to the block's weighted sums, a pytree like
                `state.weighted`. None if the state carries none.
        """
        absent = block == -jnp.inf
        # Selected before and after: a reference of -inf turns an absent score into NaN.
        phi = jnp.expand_dims(self._phi(state), axis)
        exponentials = jnp.where(absent, 0, jnp.exp(jnp.where(absent, 0, block - phi)))
        # The extremes only decide about flags; they are constants to differentiation.
        scores = lax.stop_gradient(block)
        least = None
        if state.min is not None:
            least = jnp.where(absent, jnp.inf, scores).min(axis)
        added = UnifiedMaxState(
            exponentials.sum(axis),
            scores.max(axis),
            least,
            None if weigh is None else weigh(exponentials),
        )
        return self.merge(state, added)

    def merge(self, a: UnifiedMaxState, b: UnifiedMaxState) -> UnifiedMaxState:
        """Combines two states over disjoint sets of scores, by addition."""
        return UnifiedMaxState(
            a.sum + b.sum,
            jnp.maximum(a.max, b.max),
            jax.tree.map(jnp.minimum, a.min, b.min),
            jax.tree.map(jnp.add, a.weighted, b.weighted),
        )

    def finalize(self, state: UnifiedMaxState) -> Float[Array, "*rows"]:
        """The logsumexp in nats; -inf for a row without any score above -inf.

        NaN where the sum has overflowed or vanished. Other rows that `needs_recompute`
        names have a value of less than full accuracy.
        """
        empty = state.max == -jnp.inf
        total = jnp.where(empty, 1, _total(state))
        return jnp.where(empty, -jnp.inf, self._phi(state) + jnp.log(total))

    def mean(self, state: UnifiedMaxState) -> Any:
        r"""$\sum_j p_j x_j$ with $p$ the softmax of the scores; 0 for an empty row.

        Where `finalize` is NaN the mean is NaN too.
        """
        return mean_of(_total(state), state.weighted)

    def needs_recompute(self, state: UnifiedMaxState) -> Bool[Array, "*rows"]:
        """True for rows that have left the valid range, or whose sums are not finite.

        Call it on the final state: the maximum of fewer scores may be below the range.
        """
        low, high = (_per_row(bound, state) for bound in self.valid_range)
        limits = jnp.finfo(state.sum.dtype)
        lowest = math.log(2 * float(limits.tiny) / float(limits.eps))
        low = jnp.maximum(low, lowest)
        phi = self._phi(state)
        # Written so that NaN needs recomputation.
        good = (state.max - phi > low) & (state.max - phi < high)
        if state.min is not None:
            good = good & (state.min - phi > low)
        # A weighted sum may overflow where the sum of the weights does not.
        for leaf in (state.sum, *jax.tree.leaves(state.weighted)):
            good = good & jnp.isfinite(leaf).all(tuple(range(good.ndim, leaf.ndim)))
        return (state.max != -jnp.inf) & ~good

    def _phi(self, state: UnifiedMaxState) -> Array:
        return _per_row(self.phi, state)


def _flatten(accumulator: UnifiedMax) -> tuple[tuple[Any, Any], RangeCriterion]:
    return (accumulator.phi, accumulator.valid_range), accumulator.criterion


def _unflatten(criterion: RangeCriterion, children: tuple[Any, Any]) -> UnifiedMax:
    # Bypasses the constructor: leaves may be specs, shapes or placeholders.
    made = object.__new__(UnifiedMax)
    for name, value in zip(("phi", "valid_range"), children, strict=True):
        object.__setattr__(made, name, value)
    object.__setattr__(made, "criterion", criterion)
    return made


jax.tree_util.register_pytree_node(UnifiedMax, _flatten, _unflatten)


def _per_row(value: ArrayLike, state: UnifiedMaxState) -> Array:
    value = lax.stop_gradient(jnp.asarray(value, state.sum.dtype))
    return jnp.broadcast_to(value, state.sum.shape)


def _total(state: UnifiedMaxState) -> Array:
    """The sum of the weights, 0 for an empty row; NaN if it overflowed or vanished."""
    empty = state.max == -jnp.inf
    lost = (state.sum == 0) | jnp.isinf(state.sum)
    return jnp.where(empty, 0, jnp.where(lost, jnp.nan, state.sum))
