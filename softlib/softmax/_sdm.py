"""Softmax that depends on the distance of its input to the training data (SDM)."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments

from ._entries import Axis, Entries
from ._softmax import softmax


@array_arguments
def sdm(
    x: Float[Array, "*shape"],
    similarity: ArrayLike,
    distance: ArrayLike,
    *,
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax to a base that grows with similarity, of logits scaled by distance.

    $$\frac{(2 + q)^{d z_i}}{\sum_j (2 + q)^{d z_j}} =
    \operatorname{softmax}(d \log(2 + q)\, z)_i$$

    The logits are the magnitude; how many of the nearest training points were predicted
    rightly and alike, $q$, and how near the nearest is compared with calibration
    points, $d$, say how far to trust it. At $d = 0$, out of distribution, the result is
    uniform; $d = 1$ with $q = e - 2$ is softmax. See
    `softlib.numerics.similarity_depth` and `softlib.numerics.distance_quantile` for $q$
    and $d$.

    Args:
        x: Logits $z$. -inf never counts; NaN or +inf make their row NaN.
        similarity: $q \geq 0$, a count: a number or a value per row, integer or
            floating.
        distance: $d \geq 0$, a quantile in $[0, 1]$: a number or a value per row.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count. A row
        without an entry that counts is 0; one with a negative or NaN `similarity` or
        `distance` is NaN.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or an argument does not broadcast.

    Derivatives: forward and reverse mode, any order, with respect to `x`. `similarity`
        and `distance` are statistics: their derivative is 0.
    Cost: as softmax.
    Source: "Similarity-Distance-Magnitude Universal Verification".

    Example:
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> distance = jnp.array([1.0, 0.0])
        >>> print(softlib.softmax.sdm(x, jnp.array([1, 1]), distance).round(2))
        [[0.75 0.25]
         [0.5  0.5 ]]
    """
    entries, z, log_base = _scaled("sdm", x, similarity, distance, axis, where)
    return entries.result(softmax(z * log_base, entries.axes))


@array_arguments
def log_sdm(
    x: Float[Array, "*shape"],
    similarity: ArrayLike,
    distance: ArrayLike,
    *,
    axis: Axis = -1,
    base: Literal["natural", "similarity"] = "natural",
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `sdm`, exact where that rounds to 0.

    Args:
        x, similarity, distance, axis, where: As in `sdm`.
        base: Static; of the logarithm: "natural", or "similarity" for $2 + q$, in which
            the loss of the paper is.

    Returns:
        In the dtype of `x`; -inf where an entry does not count.

    Raises:
        TypeError: As `sdm`.
        ValueError: As `sdm`, or `base` is unknown.

    Derivatives: as `sdm`; in the base $2 + q$ the derivative of a row is $d$ times that
        of log-softmax at the scaled logits, whatever $q$.
    Cost: as log-softmax.
    Source: "Similarity-Distance-Magnitude Universal Verification", whose code takes the
        logarithm of the rounded probability and a small constant.

    Example:
        >>> x = jnp.array([1000.0, 0.0])
        >>> print(softlib.softmax.log_sdm(x, 0, 0.5, base="similarity"))
        [   0. -500.]
    """
    function = "log_sdm"
    checks.require_one_of(function, "base", base, ("natural", "similarity"))
    entries, z, log_base = _scaled(function, x, similarity, distance, axis, where)
    counts = entries.scores != -jnp.inf
    z = jnp.where(counts, z, 0)
    # The largest of z is 0.
    total = jnp.where(counts, jnp.exp(z * log_base), 0)
    total = total.sum(entries.axes, keepdims=True)
    log_total = jnp.log(jnp.where(total == 0, 1, total))
    if base == "similarity":
        log_p = z - log_total / log_base
    else:
        log_p = z * log_base - log_total
    return entries.result(jnp.where(counts, log_p, -jnp.inf))


def _scaled(
    function: str,
    x: Array,
    similarity: ArrayLike,
    distance: ArrayLike,
    axis: Axis,
    where: Array | None,
) -> tuple[Entries, Array, Array]:
    """The logits times `d`, relative to the largest, and `log(2 + q)`."""
    entries = Entries.of(function, x, axis, where)

    def statistic(name: str, value: ArrayLike) -> Array:
        # Counts may be integers.
        value = entries.per_row(function, name, jnp.asarray(value, entries.x.dtype))
        value = jnp.where(value >= 0, value, jnp.nan)
        return lax.stop_gradient(entries.beside(value))

    q, d = statistic("similarity", similarity), statistic("distance", distance)
    log_base = jnp.log(2 + q)
    scores = entries.scores
    counts = scores != -jnp.inf
    scores = jnp.where(counts, scores, 0)
    top = jnp.where(counts, scores, -jnp.inf)
    top = top.max(entries.axes, keepdims=True, initial=-jnp.inf)
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    return (
        entries,
        jnp.where(counts, (scores - top) * d, -jnp.inf),
        log_base,
    )
