"""Dispatch of tokens to the experts that they selected: sorted, or in slots."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib.typing import Precision

from ._grouped_product import grouped_product


class ExpertRows(NamedTuple):
    """The experts of the rows that `dropless_experts` hands to them.

    Attributes:
        sizes: Rows of each expert, int32; the rows of expert 0 come first.
        experts: The expert of each row, int32; E for the rows after the last expert,
            which belong to none.
    """

    sizes: Int[Array, " E"]
    experts: Int[Array, " rows"]

    def linear(
        self,
        rows: Float[Array, "rows D"],
        weight: Float[Array, "E D F"],
        bias: Float[Array, "E F"] | None = None,
        *,
        precision: Precision = None,
    ) -> Float[Array, "rows F"]:
        """Every row times the weight of its expert, plus its bias.

        Args:
            rows: As `dropless_experts` hands them over, or a function of them row by
                row.
            weight: One matrix per expert.
            bias: One vector per expert.
            precision: Of the products.

        Returns:
            float32 (float64 for float64); 0 for rows that belong to no expert.
        """
        wide = accumulator_dtype(rows, weight)
        y = grouped_product(rows, weight, self.sizes, precision=precision, dtype=wide)
        if bias is not None:
            y = y + bias.astype(wide).at[self.experts].get(mode="fill", fill_value=0)
        # What a ragged product and its transpose hold there depends on the platform.
        return jnp.where((self.experts < len(self.sizes))[:, None], y, 0)


@array_arguments
def dropless_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    expert_indices: Integer[Array, "T K"],
    experts: Callable[[Array, ExpertRows], Array],
    *,
    num_experts: int,
) -> Float[Array, "T F"]:
    r"""Sum of the selected experts' outputs by their weights; no token is dropped.

    $y_t = \sum_k w_{tk} \, f_{e_{tk}}(x_t)$. The tokens are sorted by expert, once for
    each of their K experts, so that an expert gets consecutive rows, however many.

    Args:
        x: Tokens.
        weights: Of the selected experts.
        expert_indices: In [0, E), or -1 for none: its weight does not matter. An expert
            that is named twice by a token counts twice.
        experts: Called once, with the sorted rows (T * K, D) and `ExpertRows`, whose
            `linear` multiplies each row by the weight of its expert; returns one row
            for each. Rows after the last expert are 0 and their results are not used.
        num_experts: Static; E.

    Returns:
        One row per token in the dtype of what `experts` returns, summed in float32 at
        least. 0 for a token without experts. An index outside of [-1, E) makes its
        token NaN.

    Raises:
        TypeError: `x` or `weights` is not floating, `expert_indices` no integers, or
            `num_experts` no Python int.
        ValueError: Shapes do not fit together, or `experts` returns another number of
            rows.

    Derivatives: those of `experts`; with respect to `x` and `weights`.
        `jax.vmap` of `ExpertRows.linear` takes one entry after the other: give all
        tokens at once instead.
    Cost: a sort of T K integers; T K rows of D and of F features are stored, and
        what `experts` stores. `ExpertRows.linear` is a product of T K rows; where XLA
        has no ragged one, on a CPU, of blocks of at most 128 rows of one expert, the
        last of each expert filled up.
    Source: "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", for tokens
        that are sorted and never dropped.

    Example:
        >>> x, weights = jnp.ones((2, 1)), jnp.ones((2, 1))
        >>> scales = jnp.array([[[3.0]], [[5.0]]])
        >>> experts = lambda rows, groups: groups.linear(rows, scales)
        >>> call = softlib.nn.dropless_experts
        >>> print(call(x, weights, jnp.array([[1], [0]]), experts, num_experts=2)[:, 0])
        [5. 3.]
    """
    function = "dropless_experts"
    _require_selection(function, x, weights, expert_indices, num_experts)
    tokens, k = expert_indices.shape
    owner = _owner(expert_indices.reshape(-1), num_experts)
    order, place, sizes = _sorted_by_expert(owner, num_experts)
    owner = owner[order]
    owned = owner < num_experts
    rows = x.at[order // max(k, 1)].get(mode="promise_in_bounds")
    rows = jnp.where(owned[:, None], rows, 0)
    y = experts(rows, ExpertRows(sizes, owner))
    if y.ndim != 2 or y.shape[0] != tokens * k:
        raise ValueError(
            f"{function}: `experts` must return {tokens * k} rows, got shape {y.shape}."
        )
    y = jnp.where(owned[:, None], y, 0)
    y = y.at[place].get(mode="promise_in_bounds", unique_indices=True)
    return _combined(
        y.reshape(tokens, k, y.shape[-1]), weights, expert_indices, num_experts
    )


@array_arguments
def capacity_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    expert_indices: Integer[Array, "T K"],
    slots: Integer[Array, "T K"],
    experts: Callable[[Array], Array],
    *,
    num_experts: int,
    capacity: int,
) -> Float[Array, "T F"]:
    r"""Sum of the experts' outputs by their weights, for tokens that found a slot.

    As `dropless_experts`, but every expert has `capacity` slots: all products are dense
    and of one shape, also where experts are divided over devices. A selection without a
    slot adds nothing, and the other weights of its token stay as they are.

    Args:
        x: Tokens.
        weights: Of the selected experts.
        expert_indices: In [0, E), or -1 for none.
        slots: As `capacity_dispatch` assigns them: below `capacity`, or -1 for what is
            dropped; no two of an expert the same.
        experts: Called once, with the slots (E, capacity, D); returns (E, capacity, F).
            Free slots are 0 and their results are not used.
        num_experts: Static; E.
        capacity: Static; slots of each expert.

    Returns:
        One row per token in the dtype of what `experts` returns, summed in float32 at
        least. 0 for a token without slots. An index outside of [-1, E) makes its token
        NaN.

    Raises:
        TypeError: An array has the wrong kind of dtype, or a size is no Python int.
        ValueError: Shapes do not fit together, or `experts` returns other slots.

    Derivatives: those of `experts`; with respect to `x` and `weights`. What was dropped
        has the derivative 0.
    Cost: E * `capacity` rows of D and of F features are stored,
        T K rows of F features, and what `experts` stores.
    Source: "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
        Efficient Sparsity"; slots are filled by gathers, not by products with one-hot
        vectors.

    Example:
        >>> x, chosen = jnp.ones((3, 1)), jnp.array([[0], [0], [1]])
        >>> slots = softlib.nn.capacity_dispatch(chosen, 2, 1)
        >>> args = (x, x, chosen, slots, lambda filled: 2 * filled)
        >>> y = softlib.nn.capacity_experts(*args, num_experts=2, capacity=1)
        >>> print(y[:, 0])
        [2. 0. 2.]
    """
    function = "capacity_experts"
    _require_selection(function, x, weights, expert_indices, num_experts)
    checks.require_positive_integer(function, "capacity", capacity)
    checks.require_integer(function, slots=slots)
    why = "that of `expert_indices`"
    checks.require_shape(function, "slots", slots, expert_indices.shape, why)
    tokens, k = expert_indices.shape
    size = num_experts * capacity
    owner = _owner(expert_indices, num_experts)
    held = (owner < num_experts) & (slots >= 0) & (slots < capacity)
    place = jnp.where(held, owner * capacity + slots, size)
    token = jnp.arange(tokens * k) // max(k, 1)
    # The token of each slot; `tokens`, which is none, where it is free.
    holder = jnp.full(size, tokens).at[place.reshape(-1)].set(token, mode="drop")
    filled = jnp.zeros((size, x.shape[-1]), x.dtype)
    if tokens:  # there is no gather from nothing
        filled = x.at[holder].get(mode="fill", fill_value=0)
    y = experts(filled.reshape(num_experts, capacity, x.shape[-1]))
    if y.ndim != 3 or y.shape[:2] != (num_experts, capacity):
        raise ValueError(
            f"{function}: `experts` must return {num_experts} x {capacity} slots, "
            f"got shape {y.shape}."
        )
    y = y.reshape(size, y.shape[-1]).at[place].get(mode="fill", fill_value=0)
    return _combined(y, weights, expert_indices, num_experts)


@array_arguments
def capacity_dispatch(
    expert_indices: Integer[Array, "T K"],
    num_experts: int,
    capacity: int,
    *,
    priority: Float[Array, " T"] | None = None,
) -> Int[Array, "T K"]:
    """The slot of each selection among those of its expert, -1 if all were taken.

    First choices of all tokens come before second choices, and so on; within a choice
    tokens come in their order, or by priority. A token may so lose its place to later
    ones, of other sequences too: the dispatch is not causal.

    Args:
        expert_indices: In [0, E), the best expert of each token first; -1, or any other
            index outside, selects none and takes no slot.
        num_experts: Static; E.
        capacity: Static; slots of each expert.
        priority: The tokens with larger values come first, of equal ones the one with
            the lower index; NaN comes last. None is the order of the tokens. The
            probability of the first choice makes it batch-prioritised routing.

    Returns:
        Slots in [0, capacity), int32; -1 for what is dropped or selects none.

    Raises:
        TypeError: `expert_indices` holds no integers, `priority` is not floating, or a
            size is no Python int.
        ValueError: `priority` has another number of tokens, or a size is below 1.

    Derivatives: none; slots are integers.
    Cost: a sort of T K integers, no array of T x E.
    Source: "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
        Efficient Sparsity"; priorities from "Scaling Vision with Sparse Mixture of
        Experts".

    Example:
        >>> chosen = jnp.array([[0, 1], [0, 1], [1, 0]])
        >>> print(softlib.nn.capacity_dispatch(chosen, 2, 2).tolist())
        [[0, 1], [1, -1], [0, -1]]
    """
    function = "capacity_dispatch"
    checks.require_integer(function, expert_indices=expert_indices)
    checks.require_positive_integer(function, "num_experts", num_experts)
    checks.require_positive_integer(function, "capacity", capacity)
    tokens, k = expert_indices.shape
    by_priority = None
    if priority is not None:
        checks.require_floating(function, priority=priority)
        why = "one number per token"
        checks.require_shape(function, "priority", priority, (tokens,), why)
        by_priority = jnp.argsort(-priority, stable=True)
        expert_indices = expert_indices[by_priority]
    owner = _owner(expert_indices.T.reshape(-1), num_experts)  # choice by choice
    _, place, sizes = _sorted_by_expert(owner, num_experts)
    first = jnp.cumsum(sizes) - sizes
    slot = place - first.at[owner].get(mode="fill", fill_value=0)
    kept = (owner < num_experts) & (slot < capacity)
    slot = jnp.where(kept, slot, -1).reshape(k, tokens).T
    if by_priority is not None:
        slot = jnp.zeros_like(slot).at[by_priority].set(slot, unique_indices=True)
    return slot


def expert_capacity(tokens: int, num_experts: int, k: int, factor: float) -> int:
    """Slots of an expert: `factor` times its fair share, no more than there are tokens.

    The product is rounded first, so that 1.1 * 10 is 11 and not 12.
    """
    fair = round(factor * tokens * k / num_experts, 6)
    return max(1, min(math.ceil(fair), tokens))


def dense_gates(
    weights: Float[Array, "*batch K"],
    expert_indices: Integer[Array, "*batch K"],
    num_experts: int,
) -> Float[Array, "*batch E"]:
    """The weight of every expert, 0 where it is not selected."""
    chosen = labels_in_range(expert_indices, num_experts)
    chosen = jax.nn.one_hot(chosen, num_experts, dtype=bool)
    return jnp.where(chosen, weights[..., None], 0).sum(-2)


def _owner(expert_indices: Array, num_experts: int) -> Array:
    """The expert, int32; E for none."""
    owner = labels_in_range(expert_indices, num_experts)
    return jnp.where(owner < 0, num_experts, owner)


def _sorted_by_expert(owner: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """(which entry has each place, the place of each entry, entries of each expert).

    Stable; entries without an expert come last and are not counted.
    """
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    every = jnp.arange(len(owner), dtype=jnp.int32)
    place = jnp.zeros_like(order).at[order].set(every, unique_indices=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[owner].add(1, mode="drop")
    return order, place, sizes


def _combined(
    y: Array, weights: Array, expert_indices: Array, num_experts: int
) -> Array:
    """The sum over K, 0 for what has no expert."""
    owned = expert_indices != -1
    wide = accumulator_dtype(y, weights)
    known = (expert_indices >= -1) & (expert_indices < num_experts)
    weights = jnp.where(owned, weights.astype(wide), 0)
    weights = jnp.where(known, weights, jnp.nan)
    return (y.astype(wide) * weights[..., None]).sum(1).astype(y.dtype)


def _require_selection(
    function: str, x: Array, weights: Array, expert_indices: Array, num_experts: int
) -> None:
    checks.require_floating(function, x=x, weights=weights)
    checks.require_integer(function, expert_indices=expert_indices)
    checks.require_positive_integer(function, "num_experts", num_experts)
    checks.require_rank(function, "x", x, 2, "(T, D)")
    if expert_indices.ndim != 2 or expert_indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"{function}: `expert_indices` must have shape ({x.shape[0]}, K), "
            f"got {expert_indices.shape}."
        )
    why = "that of `expert_indices`"
    checks.require_shape(function, "weights", weights, expert_indices.shape, why)
