"""Entmax with any alpha, and tempered softmax, which is the same map."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._entmax_rows import solution
from softlib.typing import PerRow

from ._entries import Axis, Entries
from ._sparsemax import of_rows


@array_arguments
def entmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    alpha: PerRow = 1.5,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The family from softmax to sparsemax and beyond: regularised by Tsallis entropy.

    $$p = \arg\max_p \langle p, x \rangle + H_\alpha(p), \qquad
    H_\alpha(p) = \frac{1 - \sum_i p_i^\alpha}{\alpha (\alpha - 1)},$$

    that is $p_i = \max(0, (\alpha - 1) x_i - \tau)^{1 / (\alpha - 1)}$ with one $\tau$
    per row such that $\sum_i p_i = 1$. $\alpha = 1$ is softmax, 1.5 `entmax15`, 2
    `sparsemax`. For $\alpha > 1$ scores more than $1 / (\alpha - 1)$ below the largest
    get exactly 0; for $\alpha < 1$ the tails are heavier than those of softmax.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        alpha: $\alpha > 0$: a number (static), or an array with a value per row, that
            is in the shape of `x` without `axis`, or one that broadcasts to it; traced
            and differentiable. Every value is fine, 1 and its neighbours included; an
            array's value of 0 or less makes its rows NaN. For $\alpha > 2$ the edge
            of the support is steep: a score that is off by e there changes $p$ by
            $e^{1 / (\alpha - 1)}$, rounding included.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` or an array `alpha` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `alpha` does not broadcast, or
            `alpha` is a number that is not positive.

    Derivatives: forward and reverse mode with respect to `x` and `alpha`, any order
        where no entry is at the edge of the support. With $s = p^{2 - \alpha}$ on the
        support the Jacobian is $\mathrm{diag}(s) - s s^\top / \sum s$. For
        $\alpha > 2$ it has no bound near the edge; $s$ is cut off at the fourth root of
        the largest number of the dtype.
    Cost: one pass over `x` per step of Newton's iteration, 3 to 12 in practice, with a
        logarithm and an exponential for each entry unless $1 / (\alpha - 1)$ is a
        number 1, 2, 3 or 4. With $\alpha > 2$ it takes turns with bisection, up to
        twice the bits of the dtype. The result is kept for the backward pass.
    Source: "Sparse Sequence-to-Sequence Models" and "Adaptively Sparse Transformers",
        with Newton's iteration on the logarithm of the largest probability for their
        bisection, and a derivative by $\alpha$ that is exact around 1.

    Example:
        >>> x, alpha = jnp.array([[1.0, 0.0, 0.0]] * 2), jnp.array([2.0, 4.0])
        >>> print(softlib.softmax.entmax(x, alpha=alpha))
        [[1. 0. 0.]
         [1. 0. 0.]]
    """
    entries = Entries.of("entmax", x, axis, where)
    if isinstance(alpha, int | float):
        checks.require_positive_number("entmax", "alpha", alpha)
    else:
        alpha = row_values("entmax", "alpha", entries, alpha)
    return of_rows(entries, solution(entries.rows(entries.scores), alpha))


@array_arguments
def tempered_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    t: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax with the tempered exponential: heavy tails for $t > 1$.

    $p_i = \exp_t(x_i - \lambda)$ with $\exp_t(u) = [1 + (1 - t) u]_+^{1 / (1 - t)}$ and
    one $\lambda$ per row such that $\sum_i p_i = 1$. It is `entmax` with
    $\alpha = 2 - t$ in the notation of the bi-tempered loss: $t = 1$ is softmax, 0
    sparsemax, and between 1 and 2 the probabilities fall like a power of the score,
    which tolerates outliers.

    Args:
        x, axis, where: As in `entmax`.
        t: $t < 2$: a number (static), or an array with a value per row, that is in the
            shape of `x` without `axis`, or one that broadcasts to it; traced and
            differentiable. An array's value of 2 or more makes its rows NaN.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` or an array `t` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `t` does not broadcast, or `t`
            is a number that is not below 2.

    Derivatives: as `entmax`, with respect to `x` and `t`.
    Cost: as `entmax`.
    Source: "Robust Bi-Tempered Logistic Loss Based on Bregman Divergences".

    Example:
        >>> p = softlib.softmax.tempered_softmax(jnp.array([0.25, 0.0, -1.0]), t=0.0)
        >>> print(p)
        [0.625 0.375 0.   ]
    """
    function = "tempered_softmax"
    entries = Entries.of(function, x, axis, where)
    if isinstance(t, int | float):
        checks.require_below(function, "t", t, 2)
        return of_rows(entries, solution(entries.rows(entries.scores), 2 - t))
    t = row_values(function, "t", entries, t)
    return of_rows(entries, solution(entries.rows(entries.scores), 2 - t))


def row_values(
    function: str, name: str, entries: Entries, value: ArrayLike
) -> Float[Array, "*rows"]:
    """One number per row, in the dtype of the sums."""
    value = entries.per_row(function, name, value)
    return jnp.broadcast_to(value, entries.row_shape)
