"""Sparsemax and entmax 1.5, and how many entries a sparse map keeps."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from softlib._array_arguments import array_arguments
from softlib._entmax_rows import Solution, power_map

from ._entries import Axis, Entries


@array_arguments
def sparsemax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The distribution nearest to the scores: $\arg\min_p |p - x|^2$ on the simplex.

    $p_i = \max(0, x_i - \tau)$ with one $\tau$ per row such that $\sum_i p_i = 1$.
    Scores more than 1 below the largest get exactly 0, and often many more do; where
    softmax is smooth everywhere this map is piecewise linear.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order. The Jacobian is
        $\mathrm{diag}(s) - s s^\top / \sum s$ with $s$ the indicator of the support; an
        entry that is 0 has none, at the boundary of the support too.
    Cost: one pass over `x` per step of Newton's iteration, 3 to 12 in practice and at
        most 64 in float32; the result is kept for the backward pass.
    Source: "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
        Classification". The threshold is found by Newton's iteration, not by sorting;
        each step adds what the sum over the support is off, so that no running sums
        cancel.

    Example:
        >>> print(softlib.softmax.sparsemax(jnp.array([1.5, 1.0, 0.25, -jnp.inf])))
        [0.75 0.25 0.   0.  ]
    """
    entries = Entries.of("sparsemax", x, axis, where)
    return of_rows(entries, power_map(1, entries.rows(entries.scores)))


@array_arguments
def entmax15(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Entmax with $\alpha = 1.5$: between softmax and sparsemax, with a smooth edge.

    $p_i = \max(0, x_i / 2 - \tau)^2$ with one $\tau$ per row such that
    $\sum_i p_i = 1$. Scores more than 2 below the largest get exactly 0.

    Args:
        x, axis, where: As in `sparsemax`.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError, ValueError: As `sparsemax`.

    Derivatives: forward and reverse mode, any order where no entry is at the edge of
        the support. The Jacobian is $\mathrm{diag}(s) - s s^\top / \sum s$ with
        $s = \sqrt p$, continuous everywhere.
    Cost: as `sparsemax`.
    Source: "Sparse Sequence-to-Sequence Models", with Newton's iteration for the
        sorting.

    Example:
        >>> print(softlib.softmax.entmax15(jnp.array([2.0, 2.0, -0.5])))
        [0.5 0.5 0. ]
    """
    entries = Entries.of("entmax15", x, axis, where)
    return of_rows(entries, power_map(2, entries.rows(entries.scores)))


@array_arguments
def support_size(
    probs: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Int[Array, "..."]:
    r"""Number of entries of a row that are not 0.

    What a sparse map keeps, $|\{i : p_i \neq 0\}|$.

    Args:
        probs: Of any map.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `probs`.

    Returns:
        int32, in the shape of `probs` without `axis`. NaN counts as not 0.

    Raises:
        TypeError: `probs` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `probs`, or `where` does not broadcast.

    Derivatives: none; the result is an integer.
    Cost: one pass over `probs`.

    Example:
        >>> probs = softlib.softmax.sparsemax(jnp.array([1.5, 1.0, 0.25]))
        >>> print(softlib.softmax.support_size(probs))
        2
    """
    entries = Entries.of("support_size", probs, axis, where, "probs")
    counts = probs != 0
    if entries.where is not None:
        counts = counts & entries.where
    return counts.sum(entries.axes, dtype=jnp.int32)


def of_rows(entries: Entries, solution: Solution) -> Array:
    return entries.result(entries.unrows(solution.p))
