r"""Contrastive losses with a temperature per example, and their state over batches."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib._ids import labels_in_range
from softlib.typing import PerRow, Scalar


class ContrastiveLosses(NamedTuple):
    """Losses of pairs in both directions, one per pair.

    Attributes:
        row: Each row's item among the columns.
        column: Each column's item among the rows.
    """

    row: Float[Array, " B"]
    column: Float[Array, " B"]


@array_arguments
def robust_contrastive_loss(
    similarity: Float[Array, "B B"],
    *,
    row_temperature: PerRow,
    column_temperature: PerRow,
    rho: Scalar,
    where: Bool[Array, " B"] | None = None,
) -> ContrastiveLosses:
    r"""Robust contrastive losses of pairs, in both directions.

    With the similarities $s$ of B pairs (images by row, texts by column),

    $$L_i = \tau_i \log \frac{1}{B - 1} \sum_{j \neq i} e^{(s_{ij} - s_{ii}) / \tau_i}
        + \rho\, \tau_i,$$

    and the same of the transpose with its own temperatures. Unlike in
    `robust_softmax_cross_entropy` the matching pair is not among the negatives. The
    gradient in $\tau$ is $\rho$ minus the divergence of the negatives' weights from
    uniform ones, so that an example with concentrated weights gets a larger
    temperature.

    Args:
        similarity: Similarity of every row's item with every column's; matching pairs
            are on the diagonal.
        row_temperature: $\tau > 0$ per row, a number, a scalar or (B,); differentiable.
        column_temperature: $\tau > 0$ per column, of the same kinds.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        where: True for the pairs that count; the others are no negatives either, and
            their losses and gradients are 0, whatever the arrays hold.

    Returns:
        The losses of the rows and of the columns, float32 (float64 if an argument is
        float64). 0 for a pair without negatives.

    Raises:
        TypeError: An array has the wrong kind of dtype.  ValueError: Shapes do not fit
            together, or `rho` is negative.

    Derivatives: forward and reverse, any order.
    Cost: a few passes over `similarity`; two softmaxes of its size are kept.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO", which uses $\rho$ of 6 to 8 and $\tau$ in [0.005, 0.05] for cosines.

    Example:
        >>> similarity = jnp.array([[0.9, 0.1], [0.5, 0.8]])
        >>> loss = softlib.losses.robust_contrastive_loss
        >>> found = loss(
        ...     similarity, row_temperature=0.1, column_temperature=0.2, rho=1.0
        ... )
        >>> print(found.row.round(2) + 1, found.column.round(2) + 1)
        [0.3 0.8] [0.8 0.5]
    """
    function = "robust_contrastive_loss"
    similarity = jnp.asarray(similarity)
    checks.require_floating(function, similarity=similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"{function}: `similarity` must have shape (B, B), got {similarity.shape}."
        )
    checks.require_scalar(function, "rho", rho, 0, math.inf)
    pairs = similarity.shape[0]
    keep = jnp.ones(pairs, bool) if where is None else jnp.asarray(where)
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, (pairs,), "one per pair")
    temperatures = [
        _per_item(function, name, value, pairs, similarity)
        for name, value in (
            ("row_temperature", row_temperature),
            ("column_temperature", column_temperature),
        )
    ]
    negatives = keep[:, None] & keep[None, :] & ~jnp.eye(pairs, dtype=bool)
    used = negatives | (jnp.eye(pairs, dtype=bool) & keep[:, None])
    s = jnp.where(used, similarity, 0).astype(accumulator_dtype(similarity))

    def direction(s: Array, tau: Array) -> Array:
        s, tau, own_rho = promoted(s, tau, rho)
        count = negatives.sum(-1, dtype=s.dtype)
        some = count > 0
        tau = jnp.where(some, tau, 1)
        h = (s - jnp.diagonal(s)[:, None]) / tau[:, None]
        # A row without negatives keeps one entry; its loss is dropped below.
        h = jnp.where(negatives | ~some[:, None], h, -jnp.inf)
        mean = jax.nn.logsumexp(h, axis=-1) - jnp.log(jnp.maximum(count, 1))
        return jnp.where(some, tau * (mean + own_rho), 0)

    row, column = temperatures
    return ContrastiveLosses(direction(s, row), direction(s.T, column))


class GlobalContrastiveState(NamedTuple):
    r"""Running means over the data set's negatives, one per example.

    Start from `GlobalContrastiveState(jnp.full(examples, -jnp.inf))`.

    Attributes:
        log_mean: $\log s_i$ of the moving average of $\mathrm{mean}_j\, e^{h_{ij} /
            \tau_i}$; -inf for an example that was not seen yet.

    Derivatives: none; it is updated, not trained.
    Cost: a number per example of the data set.

    Example:
        >>> state = softlib.losses.GlobalContrastiveState(jnp.full(3, -jnp.inf))
        >>> print(state.log_mean)
        [-inf -inf -inf]
    """

    log_mean: Float[Array, " examples"]

    @array_arguments
    def update(
        self,
        ids: Integer[Array, " B"],
        h: Float[Array, "B K"],
        *,
        temperature: PerRow,
        gamma: Scalar,
        where: Bool[Array, "B K"] | None = None,
    ) -> "GlobalContrastiveUpdate":
        r"""Moves the running mean of each example's negatives by those of a batch.

        $$s_i \leftarrow (1 - \gamma)\, s_i + \gamma\, \mathrm{mean}_j\, e^{h_{ij} /
          \tau_i}$$

        With the mean of one batch the gradient of its logarithm would be biased, the
        more the smaller the batch; with the mean over all batches it is not. When an
        example is first seen, its mean is that of the batch. Means are stored as
        logarithms, so that nothing overflows.

        Args:
            ids: Indices of the batch's examples in the state, each once. Outside, the
                example's numbers are NaN and the state does not change.
            h: $s_{ij} - s_{ii}$ of the K negatives of each example.
            temperature: $\tau > 0$, a number, a scalar or (B,).
            gamma: Weight of the new value, in [0, 1]; a number or a traced scalar.
            where: True for the negatives that count. An example without any keeps its
                entry and has weights 0.

        Returns:
            `GlobalContrastiveUpdate`, float32 (float64 if an argument is float64).

        Raises:
            TypeError: An array has the wrong kind of dtype.
            ValueError: Shapes do not fit together, or `gamma` is out of range.

        Derivatives: 0 in everything; the results are coefficients of a gradient.
        Cost: one pass over `h` and a scatter of B numbers.
        Source: "Provable Stochastic Optimization for Global Contrastive Learning: Small
            Batch Does Not Harm Performance"; as "To Cool or not to Cool? Temperature
            Network Meets Large Foundation Models via DRO" uses it, with a mean instead
            of a sum and a logarithm instead of a running maximum.

        Example:
            >>> state = softlib.losses.GlobalContrastiveState(jnp.zeros(2))
            >>> h = jnp.log(jnp.array([[3.0]]))
            >>> new = state.update(jnp.array([0]), h, temperature=1.0, gamma=0.5)
            >>> print(jnp.exp(new.state.log_mean).round(3))
            [2. 1.]
        """
        function = "GlobalContrastiveState.update"
        ids, h, before = jnp.asarray(ids), jnp.asarray(h), jnp.asarray(self.log_mean)
        checks.require_integer(function, ids=ids)
        checks.require_floating(function, h=h, state=before)
        if h.ndim != 2 or ids.shape != h.shape[:1]:
            raise ValueError(
                f"{function}: `h` must have shape (B, K) with `ids` of shape (B,), got "
                f"{h.shape} and {ids.shape}."
            )
        checks.require_scalar(function, "gamma", gamma, 0, 1)
        keep = jnp.ones(h.shape, bool) if where is None else jnp.asarray(where)
        checks.require_boolean(function, where=keep)
        checks.require_shape(function, "where", keep, h.shape, "the shape of `h`")
        tau = _per_item(function, "temperature", temperature, len(ids), h)
        before, h, tau = lax.stop_gradient((before, h, tau))
        dtype = accumulator_dtype(before, h)
        scaled = jnp.where(keep, h, 0).astype(dtype) / tau[:, None]

        ids = labels_in_range(ids, before.shape[0])
        known = ids >= 0
        old = before.astype(dtype)[jnp.where(known, ids, 0)]
        count = keep.sum(-1, dtype=dtype)
        some = count > 0
        total = jax.nn.logsumexp(
            jnp.where(keep | ~some[:, None], scaled, -jnp.inf), axis=-1
        )
        own = total - jnp.log(jnp.maximum(count, 1))
        gamma = lax.stop_gradient(jnp.asarray(gamma, dtype))
        mixed = jnp.logaddexp(old + jnp.log1p(-gamma), own + jnp.log(gamma))
        new = jnp.where(old == -jnp.inf, own, mixed)
        new = jnp.where(some, new, old)
        target = jnp.where(known, ids, before.shape[0])
        log_mean = before.at[target].set(new.astype(before.dtype), mode="drop")
        weights = jnp.exp(scaled - jnp.where(some, new, 0)[:, None])
        weights = jnp.where(keep, weights / jnp.maximum(count, 1)[:, None], 0)
        return GlobalContrastiveUpdate(
            GlobalContrastiveState(log_mean),
            jnp.where(known, new, jnp.nan),
            jnp.where(known[:, None], weights, jnp.nan),
        )


class GlobalContrastiveUpdate(NamedTuple):
    r"""Weights and running means of a batch, normalised over the data set.

    Attributes:
        state: The state with the examples of the batch brought up to date.
        log_mean: $\log s_i$ of the examples of the batch, after the update.
        weights: $w_{ij} = e^{h_{ij} / \tau_i} / (K s_i)$ for K negatives. The gradient
            of the loss is that of $\sum_j w_{ij} h_{ij}$ with $w$ held fixed; in
            $\tau_i$ it is $\log s_i + \rho - \sum_j w_{ij} h_{ij} / \tau_i$.

    Derivatives: none; they are coefficients of gradients.
    Cost: numbers of the size of the batch.

    Example:
        >>> state = softlib.losses.GlobalContrastiveState(jnp.full(3, -jnp.inf))
        >>> h = jnp.array([[0.0, -0.1]])
        >>> found = state.update(jnp.array([1]), h, temperature=0.1, gamma=0.9)
        >>> print((100 * found.weights).round())
        [[73. 27.]]
    """

    state: GlobalContrastiveState
    log_mean: Float[Array, " B"]
    weights: Float[Array, "B K"]


def _per_item(
    function: str, name: str, value: ArrayLike, count: int, like: Array
) -> Array:
    if isinstance(value, int | float):
        checks.require_positive_number(function, name, value)
        value = jnp.asarray(value, accumulator_dtype(like))
    value = jnp.asarray(value)
    checks.require_floating(function, **{name: value})
    why = "a scalar, or one per example"
    checks.require_shape_in(function, name, value, ((), (count,)), why)
    dtype = accumulator_dtype(like, value)
    return jnp.broadcast_to(value.astype(dtype), (count,))
