"""Softmax over the K largest entries of a row: gates of a sparse mixture of experts."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._nan import nan_where
from softlib._threshold import first_of_largest, is_bad

from ._entries import Axis, Entries
from ._softmax import softmax

type BiasIn = Literal["weights", "selection", "both"]


class TopKGating(NamedTuple):
    """The selected entries of a row, best first.

    Attributes:
        weights: float32 (float64 for float64).
        indices: Where they are, int32; -1 with weight 0 where a row has too few.
    """

    weights: Float[Array, "..."]
    indices: Int[Array, "..."]


@array_arguments
def top_k_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    k: int,
    bias: Float[Array, "..."] | None = None,
    bias_in: BiasIn = "weights",
    renormalize: bool = True,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax over the $k$ largest entries of a row, 0 elsewhere.

    With a bias $b$ three gates go by this name, told apart by `bias_in`:

    - `"weights"`: selected by $x$, weights of $x + b$, as in the statistical theory of
      top-K gating;
    - `"both"`: selected by $x + b$, weights of $x + b$, as a router whose linear layer
      has a bias;
    - `"selection"`: selected by $x + b$, weights of $x$, for a bias that only balances
      the load.

    Softmax of the selected entries equals softmax of all, divided by its sum over the
    selected; without `renormalize` it is not divided, so that the weights tell how much
    of the whole the selected entries have.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        k: Static, at least 1. A row in which fewer entries count selects all of these.
        axis: Static; the axis or axes of a row, None for all.
        bias: Broadcasts to `x`; differentiable. An entry with the bias -inf gets the
            weight 0, and is never selected if the bias takes part in the selection.
        bias_in: Static; see above. Without a bias all three are the same.
        renormalize: Static; whether the weights of a row sum to 1.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Weights in the dtype of `x`, at most $k$ of a row not 0. Of equal entries those
        with the lower index are selected first, exactly $k$ in all (rows over several
        axes count in row-major order). A row without an entry that counts is 0.

    Raises:
        TypeError: `x` or `bias` is no floating array, `where` is not boolean, or `k` is
            no Python int.
        ValueError: `k` is below 1, `bias_in` is unknown, `axis` is no axis of `x`, or
            `bias` or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order, for the selection as it is: that
        of softmax over the selected entries. The weights jump where the k-th and the
        next entry are equal; there the derivative is that of the entries selected.
    Cost: one partial sort and a few passes over `x`.
    Source: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts".

    Example:
        >>> x, bias = jnp.array([2.0, 2.0, 1.0]), jnp.array([0.0, 0.0, 9.0])
        >>> print(softlib.softmax.top_k_softmax(x, k=2, bias=bias))
        [0.5 0.5 0. ]
    """
    gates = _Gates.of("top_k_softmax", x, k, axis, bias, bias_in, where)
    kept = first_of_largest(gates.selection, k)
    if renormalize:
        weights = softmax(gates.weighted(kept))
    else:
        full = softmax(gates.weighted(gates.counts))
        weights = jnp.where(kept | gates.bad, full, 0)
    return gates.entries.result(gates.entries.unrows(weights))


@array_arguments
def top_k_gating(
    x: Float[Array, "*shape"],
    axis: int = -1,
    *,
    k: int,
    bias: Float[Array, "..."] | None = None,
    bias_in: BiasIn = "weights",
    renormalize: bool = True,
    where: Bool[Array, "..."] | None = None,
) -> TopKGating:
    r"""The $k$ largest entries of a row: their weights and where they are, best first.

    `top_k_softmax` for dispatch: the weights that are not 0, with their indices.

    Args:
        x, bias, bias_in, renormalize, where: As in `top_k_softmax`.
        k: Static, from 1 to the size of `axis`.
        axis: Static; the axis of a row.

    Returns:
        Weights and indices, both in the shape of `x` with size $k$ on `axis`, in
        falling order of what selects. Of equal entries
        the one with the lower index comes first. Where a row has fewer than $k$ entries
        that count, the rest has weight 0 and index -1, which `jax.nn.one_hot` makes 0.

    Raises:
        TypeError: As `top_k_softmax`.
        ValueError: As `top_k_softmax`, or `k` is above the size of `axis`.

    Derivatives: as `top_k_softmax`; indices have none.
    Cost: one partial sort; softmax over $k$ entries if `renormalize`, else over all.
    Source: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts".

    Example:
        >>> x = jnp.array([1.0, 3.0, 3.0, -jnp.inf])
        >>> found = softlib.softmax.top_k_gating(x, k=2)
        >>> print(found.weights, found.indices)
        [0.5 0.5] [1 2]
    """
    function = "top_k_gating"
    gates = _Gates.of(function, x, k, axis, bias, bias_in, where)
    if k > x.shape[axis]:
        raise ValueError(
            f"{function}: `k` must be at most the size of `axis`, {x.shape[axis]}, "
            f"got {k}."
        )
    # top_k orders 0 before -0.
    unordered = gates.bad | (gates.selection == 0)
    selection = jnp.where(unordered, 0, gates.selection)
    best, indices = lax.top_k(lax.stop_gradient(selection), k)
    absent = best == -jnp.inf
    taken = lambda y: jnp.take_along_axis(y, indices, axis=-1)
    scores = gates.weighted(gates.counts)
    if renormalize:
        weights = softmax(taken(scores), where=~absent | gates.bad)
    else:
        weights = jnp.where(absent & ~gates.bad, 0, taken(softmax(scores)))
    indices = jnp.where(absent, -1, indices).astype(jnp.int32)
    back = lambda y: jnp.moveaxis(y, -1, axis)
    return TopKGating(back(weights), back(indices))


class _Gates:
    """Checked arguments of a top-k gate, as rows."""

    def __init__(self, entries: Entries, bias: Array | None, bias_in: BiasIn):
        scores = entries.rows(entries.scores)
        counts = scores != -jnp.inf
        biased = scores
        self.bad = is_bad(scores)
        if bias is not None:
            bias = bias.reshape((1,) * (scores.ndim - bias.ndim) + bias.shape)
            bias = jnp.where(counts, bias, 0)
            self.bad = self.bad | is_bad(bias)
            biased = scores + bias
        self.entries, self.counts = entries, counts
        selects_biased = bias_in in ("selection", "both")
        self.selection = biased if selects_biased else scores
        self._weight = scores if bias_in == "selection" else biased

    @classmethod
    def of(
        cls,
        function: str,
        x: Array,
        k: int,
        axis: Axis,
        bias: Array | None,
        bias_in: BiasIn,
        where: Array | None,
    ) -> "_Gates":
        checks.require_positive_integer(function, "k", k)
        choices = ("weights", "selection", "both")
        checks.require_one_of(function, "bias_in", bias_in, choices)
        entries = Entries.of(function, x, axis, where)
        if bias is not None:
            checks.require_floating(function, bias=bias)
            why = "the shape of `x`"
            checks.require_broadcastable(function, "bias", bias, x.shape, why)
            padded = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
            full = jnp.broadcast_to(padded, x.shape).astype(entries.x.dtype)
            bias = entries.rows(full)
        return cls(entries, bias, bias_in)

    def weighted(self, kept: Array) -> Array:
        """The logits of the weights: -inf where not kept, NaN in bad rows."""
        scores = jnp.where(kept, self._weight, -jnp.inf)
        return nan_where(self.bad, scores)
