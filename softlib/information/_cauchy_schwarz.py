r"""Cauchy-Schwarz divergence of samples, mutual information, information bottleneck.

All are scalars of a whole set of samples: an estimate from a kernel density has no
value per sample.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib.typing import Scalar

from ._kernel_rows import (
    Axis,
    Weights,
    axes_of,
    check_row_chunk,
    checked_points,
    log_kernel_row,
    mean_log,
    over_rows,
    select,
    weights_of,
)


@array_arguments
def cauchy_schwarz_divergence(
    samples_p: Float[Array, "N D"],
    samples_q: Float[Array, "M D"],
    *,
    bandwidth: Scalar,
    weights_p: Float[Array, " N"] | None = None,
    weights_q: Float[Array, " M"] | None = None,
    where_p: Bool[Array, " N"] | None = None,
    where_q: Bool[Array, " M"] | None = None,
    row_chunk: int | None = None,
) -> Float[Array, ""]:
    r"""Cauchy-Schwarz divergence of two distributions, from samples, in nats.

    $$D(p; q) = \log \int p^2 + \log \int q^2 - 2 \log \int p q \geq 0$$

    for the kernel densities of the samples: with
    $k(a, b) = e^{-\lVert a - b \rVert^2 / 2 \sigma^2}$ the integrals are means of $k$
    over pairs. It is 0 for equal distributions only and, unlike a Kullback-Leibler
    divergence, symmetric and finite whatever the supports.

    Args:
        samples_p: Points; numbers are points of one axis, `x[:, None]`.
        samples_q: Points of the same space, as many as one likes.
        bandwidth: $\sigma > 0$, a number or a traced scalar; `median_bandwidth` is a
            good start. Far below the distances every kernel matrix is an identity, and
            the gradient vanishes.
        weights_p: Non-negative weights of the first samples; they are normalised. None
            weighs all the same.
        weights_q: The same of the second.
        where_p: True for the first samples that count, others may hold anything.
        where_q: The same of the second.
        row_chunk: Static number of rows of a kernel matrix that exist at a time; None
            for all.

    Returns:
        A scalar, float32 (float64 if a sample is float64), at least 0 up to rounding; 0
        where no sample of either counts.

    Raises:
        TypeError: An argument is not of a floating (`where`: boolean) dtype.
        ValueError: A shape does not fit, there is no sample, or the bandwidth is no
            positive scalar.

    Derivatives: forward and reverse, of any order, in samples, weights and bandwidth.
    Cost: $O((N + M)^2 D)$ time; memory for three kernel matrices or, with `row_chunk`,
        for so many of their rows, which the backward pass computes again.
    Source: "Cauchy-Schwarz Divergence Information Bottleneck for Regression", whose
        public code takes logarithms to base 2.

    Example:
        >>> p, q = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [2.0]])
        >>> divergence = softlib.information.cauchy_schwarz_divergence
        >>> print(divergence(p, q, bandwidth=1.0).round(4))
        0.2798
    """
    function = "cauchy_schwarz_divergence"
    p, q = checked_points(function, samples_p=samples_p, samples_q=samples_q)
    checks.require_shape(
        function, "samples_q", q, (q.shape[0], p.shape[1]), "the axes of `samples_p`"
    )
    checks.require_positive_scalars(function, bandwidth=bandwidth)
    check_row_chunk(function, row_chunk)
    dtype = accumulator_dtype(p, q)
    of_p = weights_of(function, p.shape[0], weights_p, where_p, dtype, "_p")
    of_q = weights_of(function, q.shape[0], weights_q, where_q, dtype, "_q")
    p, q = select(of_p, p), select(of_q, q)
    axis_p, axis_q = axes_of(of_p, bandwidth, p, q)

    def within(axis: Axis, weights: Weights) -> Array:
        rows = over_rows(_log_density, (weights, axis), (axis,), row_chunk)
        return mean_log(weights, rows)

    across = over_rows(_log_density_of_others, (of_q, axis_q), (axis_p,), row_chunk)
    found = within(axis_p, of_p) + within(axis_q, of_q) - 2 * mean_log(of_p, across)
    return jnp.where(of_p.empty | of_q.empty, 0, found)


@array_arguments
def cauchy_schwarz_mutual_information(
    x: Float[Array, "N Dx"],
    t: Float[Array, "N Dt"],
    *,
    bandwidth_x: Scalar,
    bandwidth_t: Scalar,
    normalized: bool = False,
    weights: Float[Array, " N"] | None = None,
    where: Bool[Array, " N"] | None = None,
    row_chunk: int | None = None,
) -> Float[Array, ""]:
    r"""Cauchy-Schwarz mutual information of paired samples, in nats.

    The divergence of the joint density from the product of its marginals,
    $I(x; t) = D(p(x, t); p(x) p(t))$. With kernel matrices $K$ of `x`, $L$ of `t` and
    means over samples,

    $$I = \log \overline{K L} + \log \overline K \; \overline L
        - 2 \log \overline{K_{i \cdot} L_{i \cdot}} .$$

    It is 0 for independent variables (in the limit of many samples), and $\log N$ where
    the bandwidths are so small that the kernels of different samples vanish; there the
    gradient vanishes too.

    Args:
        x: Points of the first variable; numbers are points of one axis, `x[:, None]`.
        t: Points of the second, row by row with the first.
        bandwidth_x: $\sigma$ of the first, positive; a number or a traced scalar.
        bandwidth_t: $\sigma$ of the second.
        normalized: Static; whether to divide by $\sqrt{I(x; x) I(t; t)}$, which gives 1
            for `t` = `x` (and may exceed 1). It is 0 where a variable is constant.
        weights: Non-negative weights of the samples, normalised here. None weighs all
            the same.
        where: True for the samples that count; others may hold anything.
        row_chunk: Static number of rows of a kernel matrix that exist at a time; None
            for all.

    Returns:
        A scalar, float32 (float64 if a sample is float64), at least 0 up to rounding; 0
        where at most one sample counts.

    Raises:
        TypeError: An argument is not of a floating (`where`: boolean) dtype.
        ValueError: A shape does not fit, there is no sample, or a bandwidth is no
            positive scalar.

    Derivatives: forward and reverse, of any order, in samples, weights and bandwidths.
    Cost: $O(N^2 (D_x + D_t))$ time; memory for two kernel matrices or, with
        `row_chunk`, for so many of their rows, which the backward pass computes again.
        The estimate is not a mean over parts of a batch: data-parallel training gathers
        the batch first.
    Source: "Cauchy-Schwarz Divergence Information Bottleneck for Regression"; natural
        logarithms, and a normalisation that is finite for a constant variable.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0]])
        >>> information = softlib.information.cauchy_schwarz_mutual_information
        >>> sigma = {"bandwidth_x": 1.0, "bandwidth_t": 1.0}
        >>> print(information(x, x**2, **sigma).round(4))
        0.5693
    """
    return _mutual_information(
        "cauchy_schwarz_mutual_information",
        x,
        t,
        bandwidth_x=bandwidth_x,
        bandwidth_t=bandwidth_t,
        normalized=normalized,
        weights=weights,
        where=where,
        row_chunk=row_chunk,
    )


@array_arguments
def conditional_cauchy_schwarz_divergence(
    x: Float[Array, "N Dx"],
    y: Float[Array, "N Dy"],
    y_hat: Float[Array, "N Dy"],
    *,
    bandwidth_x: Scalar,
    bandwidth_y: Scalar,
    symmetric: bool = False,
    weights: Float[Array, " N"] | None = None,
    where: Bool[Array, " N"] | None = None,
    row_chunk: int | None = None,
) -> Float[Array, ""]:
    r"""Cauchy-Schwarz divergence of two conditional distributions, in nats.

    $D(p(y \mid x); p(\hat y \mid x))$, whose integrals
    $\mathrm{E}[p(x, y) / p(x)^2]$ become, with kernel matrices $K$ of `x` and $L$ of
    `y`, `y_hat` or both, and row sums $r_j = \sum_i K_{ji}$,

    $$\sum_{ji} \frac{K_{ji} L_{ji}}{r_j^2}
      \qquad\text{or, with } \texttt{symmetric}, \qquad
      \sum_{ji} \frac{K_{ji} L_{ji}}{r_j r_i} .$$

    As a loss of regression it compares a prediction with the targets of inputs nearby,
    without an assumption about the noise. It is 0 for `y_hat` = `y`. Far from the
    targets, in units of the bandwidth, it grows like the squared distance.

    The first form is the paper's. It is not symmetric in $i$ and $j$, so that the
    Cauchy-Schwarz inequality does not hold: `y_hat` = `y` is no stationary point,
    lower, negative values exist, and with bandwidths as wide as the data gradient
    descent finds them instead of the targets. **Train with `symmetric=True`**, which is
    at least 0; `cs_information_bottleneck_loss` does.

    Args:
        x: Points that are conditioned on.
        y: Targets; numbers are points of one axis, `y[:, None]`.
        y_hat: Predictions, of the same shape.
        bandwidth_x: $\sigma$ of `x`, positive; a number or a traced scalar.
        bandwidth_y: $\sigma$ of `y` and `y_hat`.
        symmetric: Static; False divides, as the paper does, by the square of the
            density at one point of a pair, True by the densities at both.
        weights: Non-negative weights of the samples, normalised here. None weighs all
            the same.
        where: True for the samples that count; others may hold anything.
        row_chunk: Static number of rows of a kernel matrix that exist at a time; None
            for all.

    Returns:
        A scalar, float32 (float64 if a sample is float64); 0 where no sample counts.
        Without `symmetric` it can be negative.

    Raises:
        TypeError: An argument is not of a floating (`where`: boolean) dtype.
        ValueError: A shape does not fit, there is no sample, or a bandwidth is no
            positive scalar.

    Derivatives: forward and reverse, of any order, in samples, weights and bandwidths.
    Cost: $O(N^2 (D_x + D_y))$ time; memory for four kernel matrices or, with
        `row_chunk`, for so many of their rows, which the backward pass computes again.
    Source: "Cauchy-Schwarz Divergence Information Bottleneck for Regression". The
        public code divides by $\sum_i K_{ji}^2$, which is not the estimate that the
        integrals give, and takes logarithms to base 2.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> divergence = softlib.information.conditional_cauchy_schwarz_divergence
        >>> sigma = {"bandwidth_x": 1.0, "bandwidth_y": 1.0}
        >>> print(divergence(x, x, x + 0.5, symmetric=True, **sigma).round(4))
        0.1639
    """
    return _conditional_divergence(
        "conditional_cauchy_schwarz_divergence",
        x,
        y,
        y_hat,
        bandwidth_x=bandwidth_x,
        bandwidth_y=bandwidth_y,
        symmetric=symmetric,
        weights=weights,
        where=where,
        row_chunk=row_chunk,
    )


@array_arguments
def cs_information_bottleneck_loss(
    x: Float[Array, "N Dx"],
    y: Float[Array, "N Dy"],
    y_hat: Float[Array, "N Dy"],
    t: Float[Array, "N Dt"],
    *,
    beta: Scalar,
    bandwidth_x: Scalar,
    bandwidth_y: Scalar,
    bandwidth_t: Scalar,
    symmetric: bool = True,
    normalized: bool = False,
    weights: Float[Array, " N"] | None = None,
    where: Bool[Array, " N"] | None = None,
    row_chunk: int | None = None,
) -> Float[Array, ""]:
    r"""Information bottleneck of regression by Cauchy-Schwarz divergences, in nats.

    $$D(p(y \mid x); p(\hat y \mid x)) + \beta\, I(x; t)$$

    for an encoder $x \to t$ and a decoder $t \to \hat y$: predict well from a
    representation that knows little about the input. Both terms are estimated from the
    batch as it is, without a variational bound, a noise model or a second network; `t`
    may be deterministic. A scalar of the whole batch, not a mean over samples.

    Args:
        x: Inputs.
        y: Targets; numbers are points of one axis, `y[:, None]`.
        y_hat: Predictions, of the same shape.
        t: Representations.
        beta: $\beta \geq 0$, the price of a nat; a number or a traced scalar.
        bandwidth_x: $\sigma$ of the inputs, positive; a number or a traced scalar.
        bandwidth_y: $\sigma$ of targets and predictions.
        bandwidth_t: $\sigma$ of the representations. Without a bound on their scale
            (a fixed bandwidth, or a normalised layer) an encoder may shrink $t$ instead
            of forgetting; with `median_bandwidth` of $t$ the information does not see
            the scale.
        symmetric: Static; False is the paper's estimate of the first term, which is not
            least at `y_hat` = `y`; see `conditional_cauchy_schwarz_divergence`.
        normalized: Static; whether the information is divided by
            $\sqrt{I(x; x) I(t; t)}$.
        weights: Non-negative weights of the samples, normalised here. None weighs all
            the same.
        where: True for the samples that count; others may hold anything.
        row_chunk: Static number of rows of a kernel matrix that exist at a time; None
            for all.

    Returns:
        A scalar, float32 (float64 if a sample is float64); 0 where no sample counts.

    Raises:
        TypeError: An argument is not of a floating (`where`: boolean) dtype.
        ValueError: A shape does not fit, there is no sample, a bandwidth is no positive
            scalar, or `beta` is negative.

    Derivatives: forward and reverse, of any order.
    Cost: that of `conditional_cauchy_schwarz_divergence` and
        `cauchy_schwarz_mutual_information`.
    Source: "Cauchy-Schwarz Divergence Information Bottleneck for Regression"; its
        public code minimises the normalised information with all bandwidths 1. The
        first term is symmetric here, which it is not in the paper.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0]])
        >>> sigma = {"bandwidth_x": 1.0, "bandwidth_y": 1.0, "bandwidth_t": 1.0}
        >>> loss = softlib.information.cs_information_bottleneck_loss
        >>> print(loss(x, x, x + 0.5, x / 2, beta=0.1, **sigma).round(4))
        0.1718
    """
    function = "cs_information_bottleneck_loss"
    checks.require_scalar(function, "beta", beta, 0, math.inf)
    shared = {"weights": weights, "where": where, "row_chunk": row_chunk}
    error = _conditional_divergence(
        function,
        x,
        y,
        y_hat,
        bandwidth_x=bandwidth_x,
        bandwidth_y=bandwidth_y,
        symmetric=symmetric,
        **shared,
    )
    information = _mutual_information(
        function,
        x,
        t,
        bandwidth_x=bandwidth_x,
        bandwidth_t=bandwidth_t,
        normalized=normalized,
        **shared,
    )
    error, information, beta = promoted(error, information, beta)
    return error + beta * information


@array_arguments
def median_bandwidth(
    x: Float[Array, "N D"], *, where: Bool[Array, " N"] | None = None
) -> Float[Array, ""]:
    r"""Bandwidth of a Gaussian kernel from the median distance of pairs of samples.

    $\sigma = \sqrt{m / 2}$ with the median $m$ of $\lVert x_i - x_j \rVert^2$ over
    $i < j$: the kernel of an average pair is $e^{-1}$, neither 0 nor 1.

    Args:
        x: Points; numbers are points of one axis, `x[:, None]`.
        where: True for the samples that count; others may hold anything.

    Returns:
        A scalar, float32 (float64 for float64 points). 1 where the median is 0 or there
        is no pair: of equal points every bandwidth says the same.

    Raises:
        TypeError: `x` is not floating, or `where` not boolean.  ValueError: A shape
            does not fit, or there is no sample.

    Derivatives: 0; a bandwidth that follows the points would change what they are
        compared by.
    Cost: $O(N^2 D)$ time, $O(N^2)$ memory, and a sort of all pairs.
    Source: "Cauchy-Schwarz Divergence Information Bottleneck for Regression", whose
        public code takes ten times the median of the squares for $\sigma$ itself.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [3.0]])
        >>> print(softlib.information.median_bandwidth(x).round(4))
        1.4142
    """
    function = "median_bandwidth"
    (x,) = checked_points(function, x=x)
    dtype = accumulator_dtype(x)
    found = weights_of(function, x.shape[0], None, where, dtype)
    x = lax.stop_gradient(select(found, x))
    (axis,) = axes_of(found, 1, x)
    squared = over_rows(_squared_distances, axis, (axis,), None)
    pairs = found.keep[:, None] & found.keep[None, :]
    pairs = jnp.where(jnp.tri(x.shape[0], k=-1, dtype=bool), pairs, False)
    ordered = jnp.sort(jnp.where(pairs, squared, jnp.inf), axis=None)
    count = pairs.sum(dtype=jnp.int32)
    low, high = ordered[jnp.maximum(count - 1, 0) // 2], ordered[count // 2]
    median = jnp.where(count == 0, 0, (low + high) / 2)
    # A NaN in a sample that counts is kept; the sort has put it last.
    median = jnp.where(jnp.isnan(squared).any(), jnp.nan, median)
    return jnp.where(median == 0, 1, jnp.sqrt(median / 2))


def _conditional_divergence(
    function: str,
    x: Array,
    y: Array,
    y_hat: Array,
    *,
    bandwidth_x: Scalar,
    bandwidth_y: Scalar,
    symmetric: bool,
    weights: Array | None,
    where: Array | None,
    row_chunk: int | None,
) -> Float[Array, ""]:
    x, y, y_hat = checked_points(function, x=x, y=y, y_hat=y_hat)
    _require_pairs(function, x, y=y)
    checks.require_shape(function, "y_hat", y_hat, y.shape, "the shape of `y`")
    checks.require_positive_scalars(
        function, bandwidth_x=bandwidth_x, bandwidth_y=bandwidth_y
    )
    check_row_chunk(function, row_chunk)
    dtype = accumulator_dtype(x, y, y_hat)
    found = weights_of(function, x.shape[0], weights, where, dtype)
    x, y, y_hat = (select(found, array) for array in (x, y, y_hat))
    (axis_x,) = axes_of(found, bandwidth_x, x)
    axis_y, axis_y_hat = axes_of(found, bandwidth_y, y, y_hat)

    density = over_rows(_log_density, (found, axis_x), (axis_x,), row_chunk)
    axes = axis_x, axis_y, axis_y_hat
    of_others = density if symmetric else None
    common = found, of_others, axes
    rows = over_rows(_conditional_products, common, (density, *axes), row_chunk)
    of_y, of_y_hat, of_both = [mean_log(found, integral) for integral in rows]
    return jnp.where(found.empty, 0, of_y + of_y_hat - 2 * of_both)


def _mutual_information(
    function: str,
    x: Array,
    t: Array,
    *,
    bandwidth_x: Scalar,
    bandwidth_t: Scalar,
    normalized: bool,
    weights: Array | None,
    where: Array | None,
    row_chunk: int | None,
) -> Float[Array, ""]:
    x, t = checked_points(function, x=x, t=t)
    _require_pairs(function, x, t=t)
    checks.require_positive_scalars(
        function, bandwidth_x=bandwidth_x, bandwidth_t=bandwidth_t
    )
    check_row_chunk(function, row_chunk)
    found = weights_of(function, x.shape[0], weights, where, accumulator_dtype(x, t))
    x, t = select(found, x), select(found, t)
    (axis_x,), (axis_t,) = (
        axes_of(found, bandwidth_x, x),
        axes_of(found, bandwidth_t, t),
    )
    return _information(found, axis_x, axis_t, normalized, row_chunk)


# ------------------------------------------------- of one row and all others, by index
def _log_density(common: tuple[Weights, Axis], i: Array, own: Axis) -> Array:
    weights, axis = common
    return mean_log(weights, log_kernel_row(own, axis, i))


def _log_density_of_others(common: tuple[Weights, Axis], _: Array, own: Axis) -> Array:
    weights, axis = common
    return mean_log(weights, log_kernel_row(own, axis, None))


def _squared_distances(axis: Axis, i: Array, own: Axis) -> Array:
    return -2 * log_kernel_row(own, axis, i)


def _conditional_products(
    common: tuple[Weights, Array | None, tuple[Axis, Axis, Axis]],
    i: Array,
    own: Array,
    own_x: Axis,
    own_y: Axis,
    own_y_hat: Axis,
) -> list[Array]:
    weights, density, (axis_x, axis_y, axis_y_hat) = common
    k = log_kernel_row(own_x, axis_x, i) - own
    k = k - (own if density is None else density)
    kernels = (
        log_kernel_row(own_y, axis_y, i),
        log_kernel_row(own_y_hat, axis_y_hat, i),
        log_kernel_row(own_y_hat, axis_y, None),
    )
    return [mean_log(weights, k + l) for l in kernels]


def _products(
    common: tuple[Weights, Axis, Axis], i: Array, own_x: Axis, own_t: Axis
) -> list[Array]:
    weights, x, t = common
    k, l = log_kernel_row(own_x, x, i), log_kernel_row(own_t, t, i)
    return [mean_log(weights, values) for values in (k, l, k + l)]


def _products_and_squares(
    common: tuple[Weights, Axis, Axis], i: Array, own_x: Axis, own_t: Axis
) -> list[Array]:
    weights, x, t = common
    k, l = log_kernel_row(own_x, x, i), log_kernel_row(own_t, t, i)
    return [mean_log(weights, values) for values in (k, l, k + l, 2 * k, 2 * l)]


def _information(
    weights: Weights, x: Axis, t: Axis, normalized: bool, row_chunk: int | None
) -> Float[Array, ""]:
    row = _products_and_squares if normalized else _products
    of_x, of_t, *joint = over_rows(row, (weights, x, t), (x, t), row_chunk)

    def information(joint: Array, one: Array, two: Array) -> Array:
        marginals = mean_log(weights, one) + mean_log(weights, two)
        return mean_log(weights, joint) + marginals - 2 * mean_log(weights, one + two)

    found = information(joint[0], of_x, of_t)
    if normalized:
        own = information(joint[1], of_x, of_x), information(joint[2], of_t, of_t)
        # For a constant variable it is rounding noise of either sign.
        varies = jnp.minimum(*own) > 16 * jnp.finfo(found.dtype).eps
        scale = jnp.sqrt(jnp.where(varies, own[0] * own[1], 1))
        found = jnp.where(varies, found / scale, 0)
    return jnp.where(weights.empty, 0, found)


def _require_pairs(function: str, x: Array, **others: Array) -> None:
    for name, array in others.items():
        shape = (x.shape[0], array.shape[1])
        checks.require_shape(function, name, array, shape, "as many rows as `x`")
