"""Losses that keep the router of a mixture of experts balanced and its logits small."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib._masked_mean import masked_mean
from softlib.softmax import logsumexp
from softlib.typing import AxisName


@array_arguments
def load_balancing_loss(
    router_probs: Float[Array, "*batch E"],
    expert_indices: Integer[Array, "*batch K"],
    *,
    where: Bool[Array, "..."] | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""$E \sum_e f_e P_e$: least where all experts are used alike.

    $f_e$ is the share of tokens that selected expert $e$ in any of their K slots, $P_e$
    the mean of its probability. With all experts alike the loss is K, not 1; with every
    token on one expert, and K = 1, it is E. A usual weight is 0.01.

    Args:
        router_probs: The softmax over all experts, before any selection.
        expert_indices: The selected experts. -1 selects none, as `top_k_gating` has it;
            an expert named twice by a token counts once.
        where: True for the tokens that count, False for padding; broadcasts to the
            batch shape. Other tokens may hold anything, NaN included.
        axis: Static; the axes of the batch that are averaged over, None for all. The
            other axes index groups, each with its own loss.
        axis_name: Static; mapped axes over which the tokens are divided. Both means are
            taken over all of their tokens, so that the loss is that of the whole batch.

    Returns:
        One loss per group, float32 (float64 for float64). 0 for a group without tokens.
        An index outside of [-1, E) makes its group NaN.

    Raises:
        TypeError: `router_probs` is not floating, `expert_indices` no integers, or
            `where` is not boolean.
        ValueError: Shapes do not fit together, or `axis` is no axis of the batch.

    Derivatives: forward and reverse mode with respect to `router_probs`, in which it is
        linear; the counts $f$ have none.
    Cost: one pass over E booleans per slot of a token, and one over `router_probs`.
    Source: "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
        Efficient Sparsity", there with K = 1.

    Example:
        >>> loss = softlib.losses.load_balancing_loss
        >>> print(loss(jnp.array([[0.75, 0.25], [0.25, 0.75]]), jnp.array([[0], [1]])))
        1.0
        >>> print(loss(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0], [0]])))
        2.0
    """
    function = "load_balancing_loss"
    checks.require_floating(function, router_probs=router_probs)
    checks.require_integer(function, expert_indices=expert_indices)
    checks.require_rank(function, "router_probs", router_probs, 1, "(..., E)")
    batch, experts = router_probs.shape[:-1], router_probs.shape[-1]
    if expert_indices.shape[:-1] != batch or expert_indices.ndim != router_probs.ndim:
        raise ValueError(
            f"{function}: `expert_indices` must have shape {(*batch, 'K')}, "
            f"got {expert_indices.shape}."
        )
    axes = _token_axes(function, axis, len(batch))
    counts = _over_experts(function, where, batch)
    selected = labels_in_range(expert_indices, experts)
    chosen = jax.nn.one_hot(selected, experts, dtype=bool).any(-2)
    bad = selected < 0
    if jnp.issubdtype(expert_indices.dtype, jnp.signedinteger):
        bad = bad & (expert_indices != -1)  # an unsigned -1 is the largest number
    bad = bad.any(-1)[..., None]
    fractions = jnp.where(bad, jnp.nan, chosen.astype(accumulator_dtype(router_probs)))
    mean = lambda y: masked_mean(y, counts, axis=axes, axis_name=axis_name)
    return experts * (mean(fractions) * mean(router_probs)).sum(-1)


@array_arguments
def router_z_loss(
    logits: Float[Array, "*batch E"], *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "*batch"]:
    r"""$(\log \sum_e e^{v_e})^2$ of each token: keeps the logits of a router small.

    Large logits lose digits in narrow dtypes, and their softmax has no slope left. A
    usual weight is 0.001.

    Args:
        logits: Logits of the router; -inf for an expert that a token cannot have.
        where: True for the tokens that count; broadcasts to the batch shape. Elsewhere
            the loss is 0 with gradient 0, whatever `logits` holds.

    Returns:
        One loss per token, float32 (float64 for float64); 0 for a token without
        experts. `softlib.masked_mean` reduces it, over mapped axes too.

    Raises:
        TypeError: `logits` is not floating, or `where` is not boolean.
        ValueError: `logits` have no axis of experts, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order.
    Cost: one pass over `logits`.
    Source: "ST-MoE: Designing Stable and Transferable Sparse Expert Models".

    Example:
        >>> logits = jnp.array([[0.0], [3.0], [jnp.nan]])
        >>> where = jnp.array([True, True, False])
        >>> print(softlib.losses.router_z_loss(logits, where=where))
        [0. 9. 0.]
    """
    function = "router_z_loss"
    checks.require_floating(function, logits=logits)
    checks.require_rank(function, "logits", logits, 1, "(..., E)")
    counts = _over_experts(function, where, logits.shape[:-1])
    found = logsumexp(logits.astype(accumulator_dtype(logits)), where=counts)
    return jnp.where(found == -jnp.inf, 0, found) ** 2


@array_arguments
def importance_loss(
    gates: Float[Array, "*batch E"],
    *,
    where: Bool[Array, "..."] | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Squared coefficient of variation of the experts' total gates.

    $\mathrm{CV}^2_e\left(\sum_t g_{te}\right)$: 0 where all experts have the same total
    weight, $E - 1$ where one has all of it. With the `load` of
    `softlib.softmax.noisy_top_k_gating` for the gates it is the load loss of noisy
    top-k gating.

    Args:
        gates: Weights of the experts, not negative, 0 for those not selected.
        where: True for the tokens that count; broadcasts to the batch shape.
        axis: Static; the axes of the batch that are summed over, None for all.
        axis_name: Static; mapped axes over which the tokens are divided: the sums are
            over all of their tokens.

    Returns:
        One loss per group of tokens, float32 (float64 for float64). 0 without tokens.

    Raises:
        TypeError: `gates` is not floating, or `where` is not boolean.
        ValueError: `where` does not broadcast, or `axis` is no axis of the batch.

    Derivatives: forward and reverse mode, any order.
    Cost: one pass over `gates`.
    Source: "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
        Layer".

    Example:
        >>> gates = jnp.array([[1.0, 0.0], [0.5, 0.5]])
        >>> print(softlib.losses.importance_loss(gates))
        0.25
    """
    function = "importance_loss"
    checks.require_floating(function, gates=gates)
    checks.require_rank(function, "gates", gates, 1, "(..., E)")
    axes = _token_axes(function, axis, gates.ndim - 1)
    counts = _over_experts(function, where, gates.shape[:-1])
    gates = gates.astype(accumulator_dtype(gates))
    total = (gates if counts is None else jnp.where(counts, gates, 0)).sum(axes)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return cv_squared(total)


@array_arguments
def cv_squared(
    x: Float[Array, "*shape"],
    axis: int | tuple[int, ...] | None = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Squared coefficient of variation: the variance over the squared mean.

    The variance is that of the population, $\frac{1}{n}\sum_i (x_i - \mu)^2$; with
    $n - 1$ it would be larger by $n / (n - 1)$.

    It is the formula of `importance_loss`, and becomes a loss of whatever is to be even
    across experts, such as a load.

    Args:
        x: Numbers of one sign.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        One value per row, float32 (float64 for float64). 0 for a row of zeros or
        without entries; inf for one whose mean is 0 and whose entries are not.

    Raises:
        TypeError: `x` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order; 0 where the mean is 0.
    Cost: two passes over `x`.
    Source: "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
        Layer".

    Example:
        >>> print(softlib.losses.cv_squared(jnp.array([1.0, 3.0])))
        0.25
    """
    function = "cv_squared"
    checks.require_floating(function, x=x)
    checks.require_axes(function, "axis", axis, x.ndim)
    if where is not None:
        checks.require_boolean(function, where=where)
        why = "the shape of `x`"
        checks.require_broadcastable(function, "where", where, x.shape, why)
        where = where.reshape((1,) * (x.ndim - where.ndim) + where.shape)
    axes = tuple(range(x.ndim)) if axis is None else axis
    axes = (axes,) if isinstance(axes, int) else axes
    x = x.astype(accumulator_dtype(x))
    counts = jnp.ones((1,) * x.ndim, bool) if where is None else where
    x = jnp.where(counts, x, 0)
    mean = jnp.expand_dims(masked_mean(x, counts, axis=axes), axes)
    flat = mean == 0
    # Divided before it is squared: the squares may overflow.
    relative = jnp.where(counts, x - mean, 0) / jnp.where(flat, 1, mean)
    found = masked_mean(relative**2, counts, axis=axes)
    varies = jnp.where((x != 0).any(axes), jnp.inf, 0)
    return jnp.where(flat.reshape(found.shape), varies, found)


def _token_axes(
    function: str, axis: int | tuple[int, ...] | None, rank: int
) -> tuple[int, ...]:
    """Axes of the batch, counted from the front because experts come last."""
    checks.require_axes(function, "axis", axis, rank)
    every = range(rank) if axis is None else axis
    every = (every,) if isinstance(every, int) else every
    return tuple(each % rank for each in every)


def _over_experts(
    function: str, where: Array | None, batch: tuple[int, ...]
) -> Array | None:
    """`where` reshaped to broadcast to (*batch, E)."""
    if where is None:
        return None
    checks.require_boolean(function, where=where)
    why = "the batch shape"
    checks.require_broadcastable(function, "where", where, batch, why)
    return where.reshape((1,) * (len(batch) - where.ndim) + (*where.shape, 1))
