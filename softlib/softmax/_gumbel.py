"""The Gumbel-softmax (Concrete) distribution: draws, hard draws and its density."""

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import PerRow

from ._dense_to_sparse import temperature_of_rows, tempered
from ._entries import Axis, Entries
from ._softmax import softmax


@array_arguments
def gumbel_softmax(
    key: Array,
    logits: Float[Array, "*shape"],
    axis: int = -1,
    *,
    temperature: PerRow = 1.0,
    hard: bool = False,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""A draw from the Gumbel-softmax distribution: nearly one-hot, differentiable.

    $$y = \operatorname{softmax}((z + g) / \tau), \qquad g_i \sim
    \operatorname{Gumbel}(0, 1) .$$

    The largest entry of $y$ is an exact draw from softmax of the logits whatever the
    temperature, which only decides how far $y$ is from that one-hot: 0 at $\tau \to 0$.
    The mean of $y$ is not softmax of the logits.

    Args:
        key: Of `jax.random`.
        logits: -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis of a row.
        temperature: $\tau > 0$: a number (static), or an array with a value per row
            (traced, differentiable). No value is too small.
        hard: Static; whether to return the one-hot of the largest entry, with the
            derivative of the soft draw (straight-through).
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        In the dtype of `logits`; the noise is float32 (float64 for float64) for
        narrower ones too. 0 where an entry does not count; a row without an entry that
        counts is 0.

    Raises:
        TypeError: `logits` or an array `temperature` is not floating, or `where` is not
            boolean.
        ValueError: `axis` is no axis, an argument does not broadcast, or the
            temperature is a number that is not positive.

    Derivatives: forward and reverse mode, any order, with respect to `logits` and
        `temperature`, with the noise held fixed; with `hard` those of the soft draw.
    Cost: noise in the shape of `logits` and a few passes.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation".

    Example:
        >>> logits = jnp.array([0.0, -jnp.inf, 0.0, 50.0])
        >>> print(softlib.softmax.gumbel_softmax(jax.random.key(0), logits, hard=True))
        [0. 0. 0. 1.]
    """
    function = "gumbel_softmax"
    entries = Entries.of(function, logits, axis, where, "logits")
    tau = temperature_of_rows(function, entries, temperature)
    noise = jax.random.gumbel(key, logits.shape, entries.x.dtype)
    scores = entries.scores + noise
    y = softmax(tempered(entries, scores, tau), entries.axes)
    if hard and logits.shape[axis]:
        # Not the argmax of y, whose entries may be equal at a high temperature.
        y = straight_through_one_hot(y, jnp.argmax(scores, axis), axis=axis)
        y = jnp.where((scores != -jnp.inf).any(axis, keepdims=True), y, 0)
    return entries.result(y)


@array_arguments
def straight_through_one_hot(
    probs: Float[Array, "*shape"],
    index: Integer[Array, "..."] | None = None,
    *,
    axis: int = -1,
) -> Float[Array, "*shape"]:
    r"""A one-hot forward, `probs` to derivatives.

    Equal to $p + \text{stop\_gradient}(\text{one\_hot} - p)$, without its rounding.

    Args:
        probs: What the derivative passes to.
        index: Where the 1 is: `probs` without `axis`. None: at the largest entry, of
            equal ones the first. Outside of the axis the row is NaN.
        axis: Static.

    Returns:
        Exactly 0 and 1, in the dtype of `probs`. Without `index` a row of zeros (of a
        map without an entry that counts) stays 0. A row with NaN is NaN.

    Raises:
        TypeError: `probs` is no floating array, or `index` no integer array.
        ValueError: `axis` is no axis of `probs`, or `index` has another shape.

    Derivatives: the identity with respect to `probs`, of first order; higher ones are
        0.
    Cost: one pass.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation".

    Example:
        >>> probs = jnp.array([0.25, 0.75])
        >>> print(softlib.softmax.straight_through_one_hot(probs))
        [0. 1.]
    """
    function = "straight_through_one_hot"
    checks.require_floating(function, probs=probs)
    checks.require_axes(function, "axis", axis, probs.ndim)
    axis %= probs.ndim
    classes = probs.shape[axis]
    bad = jnp.isnan(probs).any(axis)
    if index is None:
        empty = (probs == 0).all(axis)
        best = jnp.argmax(probs, axis) if classes else jnp.zeros(bad.shape, int)
        index = jnp.where(empty, -1, best)
    else:
        checks.require_integer(function, index=index)
        checks.require_shape(function, "index", index, bad.shape, "without `axis`")
        bad = bad | (index < 0) | (index >= classes)
    ids = jnp.arange(classes).reshape([-1] + [1] * (probs.ndim - 1 - axis))
    ids = ids.reshape([1] * axis + list(ids.shape))
    hot = (jnp.expand_dims(index, axis) == ids).astype(probs.dtype)
    return _instead(probs, jnp.where(jnp.expand_dims(bad, axis), jnp.nan, hot))


@jax.custom_jvp
def _instead(probs: Array, hot: Array) -> Array:
    """The value of `hot` with the derivative of `probs`."""
    del probs
    return hot


@_instead.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


@array_arguments
def concrete_log_prob(
    log_x: Float[Array, "*shape"],
    logits: Float[Array, "*shape"],
    *,
    temperature: PerRow,
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Log-density of `gumbel_softmax` at a point of the simplex, in nats per row.

    With $V$ entries in the row and $\log \pi$ the logits (a constant added to them
    changes nothing),

    $$\log \Gamma(V) + (V - 1) \log \tau - V \operatorname{lse}_i(\log \pi_i - \tau \log
    x_i) + \sum_i (\log \pi_i - (\tau + 1) \log x_i),$$

    a density over any $V - 1$ of the coordinates $x$.

    Args:
        log_x: The logarithm of the point, whose exponential sums to 1 over the entries
            that count: near a vertex only the logarithm is exact. It must be finite
            there; the row is NaN otherwise.
        logits: In the shape of `log_x`; -inf never counts, NaN or +inf make their row
            NaN.
        temperature: $\tau > 0$: a number (static), or an array with a value per row
            (traced, differentiable).
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        One number per row, float32 (float64 if an argument is). A row of one entry has
        the log-density 0, as has one without any.

    Raises:
        TypeError: An array argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, `axis` is no axis, or the temperature is a number
            that is not positive.

    Derivatives: forward and reverse mode, any order, with respect to `log_x`, `logits`
        and `temperature`; that by `log_x` is `concrete_score`.
    Cost: a few passes.
    Source: "The Concrete Distribution: A Continuous Relaxation of Discrete Random
        Variables".

    Example:
        >>> log_x = jnp.log(jnp.array([0.5, 0.5]))
        >>> log_prob = softlib.softmax.concrete_log_prob
        >>> density = log_prob(log_x, jnp.zeros(2), temperature=1.0)
        >>> print(jnp.exp(density).round(3))
        1.0
    """
    axes, counts, x, z, tau, bad = _concrete(
        "concrete_log_prob", log_x, logits, temperature, axis, where
    )
    number = counts.sum(axes).astype(x.dtype)
    shifted = jnp.where(counts, z - tau * x, -jnp.inf)
    top = jax.lax.stop_gradient(shifted.max(axes, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    total = jnp.where(counts, jnp.exp(jnp.where(counts, shifted - top, 0)), 0)
    total = total.sum(axes)
    log_total = jnp.log(jnp.where(total > 0, total, 1)) + top.reshape(total.shape)
    terms = jnp.where(counts, z - (tau + 1) * x, 0).sum(axes)
    tau = tau.squeeze(axes) if isinstance(tau, Array) else jnp.asarray(tau, x.dtype)
    density = gammaln(jnp.maximum(number, 1)) + (number - 1) * jnp.log(tau)
    density = density - number * log_total + terms
    density = jnp.where(number > 0, density, 0)
    return jnp.where(bad.any(axes), jnp.nan, density)


@array_arguments
def concrete_score(
    log_x: Float[Array, "*shape"],
    logits: Float[Array, "*shape"],
    *,
    temperature: PerRow,
    axis: Axis = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The gradient of `concrete_log_prob` with respect to `log_x`.

    $\tau V w_i - (\tau + 1)$ with $w = \operatorname{softmax}(\log \pi - \tau \log x)$:
    bounded, also where $x_i$ tends to 0. The gradient with respect to $x_i$, taken as
    free coordinates, is this divided by $x_i$.

    Args:
        log_x, logits, temperature, axis, where: As in `concrete_log_prob`.

    Returns:
        In the shape of `log_x`, float32 (float64 if an argument is); 0 where an entry
        does not count.

    Raises:
        TypeError, ValueError: As `concrete_log_prob`.

    Derivatives: forward and reverse mode, any order, with respect to all three arrays.
    Cost: a few passes.
    Source: "The Concrete Distribution: A Continuous Relaxation of Discrete Random
        Variables".

    Example:
        >>> log_x = jnp.log(jnp.array([0.5, 0.5]))
        >>> score = softlib.softmax.concrete_score
        >>> print(score(log_x, jnp.zeros(2), temperature=1.0))
        [-1. -1.]
    """
    axes, counts, x, z, tau, bad = _concrete(
        "concrete_score", log_x, logits, temperature, axis, where
    )
    number = counts.sum(axes, keepdims=True).astype(x.dtype)
    w = softmax(jnp.where(counts, z - tau * x, -jnp.inf), axes)
    score = jnp.where(counts, tau * number * w - (tau + 1), 0)
    return jnp.where(bad.any(axes, keepdims=True), jnp.nan, score)


def _concrete(
    function: str,
    log_x: Array,
    logits: Array,
    temperature: PerRow,
    axis: Axis,
    where: Array | None,
) -> tuple[tuple[int, ...], Array, Array, Array, float | Array, Array]:
    """(axes, where, log x, logits, temperature, bad entries); arrays 0 elsewhere."""
    checks.require_floating(function, log_x=log_x, logits=logits)
    checks.require_shape(function, "logits", logits, log_x.shape, "that of `log_x`")
    dtype = accumulator_dtype(log_x, logits)
    entries = Entries.of(function, logits.astype(dtype), axis, where, "logits")
    tau = temperature_of_rows(function, entries, temperature)
    counts = entries.scores != -jnp.inf
    x = jnp.where(counts, log_x.astype(dtype), 0)
    z = jnp.where(counts, entries.x, 0)
    bad = ~(jnp.isfinite(x) & jnp.isfinite(z))
    x, z = (jnp.where(bad, 0, y) for y in (x, z))
    return entries.axes, counts, x, z, tau, bad
