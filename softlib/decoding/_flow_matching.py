"""Gumbel-softmax flow matching: from noise on the simplex to sequences of symbols."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, cast, promoted
from softlib.losses import softmax_cross_entropy
from softlib.softmax import (
    gumbel_softmax,
    softmax,
    straight_through_one_hot,
    top_k_logits,
)
from softlib.typing import PerRow, Scalar


class FlowSample(NamedTuple):
    """A draw of `sample_gumbel_flow`.

    Attributes:
        tokens: Symbols drawn from `probs`; int32, the shape without its last axis.
        probs: What the denoiser says of each position at the end.
        state: The point of the simplex at the end, which need not be near a vertex.
    """

    tokens: Int[Array, "*positions"]
    probs: Float[Array, "*positions V"]
    state: Float[Array, "*positions V"]


@array_arguments
def exponential_temperature(
    t: PerRow, *, tau_max: Scalar = 10.0, decay: Scalar = 3.0
) -> Float[Array, "..."]:
    r"""Temperature of the flow at a time: $\tau(t) = \tau_{max} e^{-\lambda t}$.

    Args:
        t: Time, from 0 (nearly uniform) to 1.
        tau_max: Temperature at 0; positive; a number or a scalar array.
        decay: $\lambda$; positive; a number or a scalar array.

    Returns:
        In the shape of `t`; float32 (float64 if an argument is).

    Raises:
        TypeError: `tau_max` or `decay` is a number of the wrong type.
        ValueError: One of them is a number that is not positive, or no scalar.

    Derivatives: any order, with respect to all three.
    Cost: an exponential for each element.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation".

    Example:
        >>> time = jnp.array([0.0, 1.0])
        >>> print(softlib.decoding.exponential_temperature(time).round(2))
        [10.   0.5]
    """
    function = "exponential_temperature"
    checks.require_positive_scalars(function, tau_max=tau_max, decay=decay)
    t, tau_max, decay = promoted(_time(t), tau_max, decay)
    return tau_max * jnp.exp(-decay * t)


@array_arguments
def gumbel_softmax_interpolant(
    key: Array | None,
    x1: Float[Array, "*positions V"],
    t: PerRow,
    *,
    tau_max: Scalar = 10.0,
    decay: Scalar = 3.0,
    beta: Scalar = 2.0,
    noise: Float[Array, "*positions V"] | None = None,
) -> Float[Array, "*positions V"]:
    r"""A point on the path from noise to a symbol: what a denoiser is trained on.

    $$x_t = \operatorname{softmax}\bigl((x_1 + g / \beta) / \tau(t)\bigr), \qquad g_i
    \sim \operatorname{Gumbel}(0, 1),$$

    nearly uniform at $t = 0$, nearer to a vertex as $t$ grows. Its largest entry is not
    always the symbol: by the rule of Gumbel the chance is $e^\beta / (e^\beta + V - 1)$
    at all times, 0.71 for four symbols and $\beta = 2$, 0.28 for twenty.

    Args:
        key: Of `jax.random`; not read, and may be None, if `noise` is given.
        x1: Clean symbols, one-hot.
        t: Time in $[0, 1]$: a number, or an array that broadcasts to the positions (of
            (B,) times for (B, L) positions make (B, 1)).
        tau_max, decay: As in `exponential_temperature`.
        beta: Inverse size of the noise, positive; a number or a scalar array. Infinite:
            no noise.
        noise: Gumbel draws to use instead.

    Returns:
        In the dtype of `x1`; each position sums to 1. Noise is drawn in float32 or
        wider.

    Raises:
        TypeError: `x1`, `t` or `noise` is not floating, or neither `key` nor `noise` is
            given.
        ValueError: Shapes do not fit, or a number is not positive.

    Derivatives: any order, with respect to `x1`, `t`, `noise` and the scalars. That by
        `t` is `gumbel_flow_velocity` towards $x_1 + g / \beta$.
    Cost: noise in the shape of `x1` and a softmax.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation".

    Example:
        >>> path = softlib.decoding.gumbel_softmax_interpolant
        >>> x1 = jnp.array([1.0, 0.0])
        >>> print((1000 * path(None, x1, 1.0, noise=jnp.zeros(2))).round())
        [882. 118.]
    """
    function = "gumbel_softmax_interpolant"
    checks.require_floating(function, x1=x1, noise=noise)
    checks.require_rank(function, "x1", x1, 1, "(*positions, V)")
    checks.require_positive_scalars(function, tau_max=tau_max, decay=decay)
    _require_beta(function, beta)
    dtype = accumulator_dtype(x1)
    if noise is None:
        if key is None:
            raise TypeError(f"{function}: `key` or `noise` must be given, got None.")
        noise = jax.random.gumbel(key, x1.shape, dtype)
    checks.require_shape(function, "noise", noise, x1.shape, "that of `x1`")
    t = _on_positions(function, t, x1.shape[:-1], dtype)
    wide, noise = x1.astype(dtype), noise.astype(dtype)
    wide, noise, t, tau_max, decay, beta = promoted(
        wide, noise, t, tau_max, decay, beta
    )
    z = (wide + noise / beta) * (jnp.exp(decay * t) / tau_max)
    return softmax(z).astype(x1.dtype)


@array_arguments
def gumbel_flow_velocity(
    x: Float[Array, "*positions V"],
    target_probs: Float[Array, "*positions V"],
    t: PerRow,
    *,
    tau_max: Scalar = 10.0,
    decay: Scalar = 3.0,
) -> Float[Array, "*positions V"]:
    r"""Velocity of the flow on the simplex, towards symbols of given probabilities.

    $$u = \frac{\lambda}{\tau(t)} \bigl(p \odot x - x \langle p, x \rangle\bigr),$$

    the mean over symbols $k \sim p$ of the conditional fields $\frac{\lambda}{\tau} x_k
    (e_k - x)$. In the logarithm of $x$ it is the constant $\frac{\lambda}{\tau} p$, up
    to what softmax does not see. Over the whole of $[0, 1]$ an entry gains at most
    $(e^\lambda - 1) / \tau_{max}$ over the others in log-odds, 1.9 with the defaults:
    **the flow does not end at a vertex**, so take what the denoiser says there.

    Args:
        x: Points of the simplex.
        target_probs: $p$, in the shape of `x`: what a denoiser says of the clean
            symbol.
        t: Time: a number, or an array that broadcasts to the positions.
        tau_max, decay: As in `exponential_temperature`.

    Returns:
        In the dtype of `x`. The entries of a position sum to 0; an entry that is 0
        stays 0, so that vertices are fixed points.

    Raises:
        TypeError: An array is not floating.
        ValueError: Shapes do not fit, or a number is not positive.

    Derivatives: any order, with respect to all arrays.
    Cost: a few passes.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation".

    Example:
        >>> x, target = jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])
        >>> print(softlib.decoding.gumbel_flow_velocity(x, target, 0.0).round(3))
        [ 0.075 -0.075]
    """
    function = "gumbel_flow_velocity"
    checks.require_floating(function, x=x, target_probs=target_probs)
    checks.require_rank(function, "x", x, 1, "(*positions, V)")
    checks.require_shape(function, "target_probs", target_probs, x.shape, "that of `x`")
    checks.require_positive_scalars(function, tau_max=tau_max, decay=decay)
    dtype = accumulator_dtype(x)
    t = _on_positions(function, t, x.shape[:-1], dtype)
    wide, target = x.astype(dtype), target_probs.astype(dtype)
    wide, target, t, tau_max, decay = promoted(wide, target, t, tau_max, decay)
    speed = decay / tau_max * jnp.exp(decay * t)
    mean = (target * wide).sum(-1, keepdims=True)
    return (speed * wide * (target - mean)).astype(x.dtype)


@array_arguments
def gumbel_flow_loss(
    logits: Float[Array, "*positions V"],
    labels: Integer[Array, "*positions"] | Float[Array, "*positions V"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*positions"]:
    r"""The loss of a denoiser, $-\log \langle p, x_1 \rangle$, in nats per position.

    With $p$ the softmax of `logits` that the denoiser gives for
    `gumbel_softmax_interpolant` at a uniform time. For clean symbols it is
    cross-entropy; for a distribution over them it is not: what counts is the
    probability of drawing the symbol that is drawn from it.

    Args:
        logits: Of the denoiser.
        labels: Ids of the clean symbols in $[0, V)$, or floating: $x_1$, one-hot or a
            distribution. Ids outside give NaN without gradient.
        where: True for the positions that count (no padding); broadcasts to them.
            Elsewhere loss and gradient are exactly 0.

    Returns:
        The loss per position, float32 (float64 if `logits` is). A mean over these is
        `softlib.masked_mean`.

    Raises:
        TypeError: `logits` is not floating, or `where` is not boolean.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, with respect to `logits`, and to `labels` if
        these are floating.
    Cost: as cross-entropy of logits.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation".

    Example:
        >>> logits, labels = jnp.zeros((2, 4)), jnp.array([1, 3])
        >>> print(softlib.decoding.gumbel_flow_loss(logits, labels).round(4))
        [1.3863 1.3863]
    """
    function = "gumbel_flow_loss"
    checks.require_floating(function, logits=logits)
    checks.require_rank(function, "logits", logits, 1, "(*positions, V)")
    positions = logits.shape[:-1]
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_broadcastable(function, "where", where, positions, "positions")
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        checks.require_integer(function, labels=labels)
        checks.require_shape(function, "labels", labels, positions, "the positions")
        return softmax_cross_entropy(logits, labels, where=where)
    checks.require_shape(function, "labels", labels, logits.shape, "that of `logits`")
    z = logits.astype(accumulator_dtype(logits))
    if where is not None:
        where = where.reshape((1,) * (len(positions) - where.ndim) + where.shape)
        where = jnp.broadcast_to(where, positions)
        z = jnp.where(where[..., None], z, 0)
        labels = jnp.where(where[..., None], labels, 1)
    drawn = (softmax(z) * labels.astype(z.dtype)).sum(-1)
    # The logarithm of the sum loses nothing unless all of it underflows; there the
    # logits decide.
    tiny = drawn < jnp.finfo(z.dtype).tiny * 1e4
    far = jax.nn.logsumexp(z, axis=-1) - jax.nn.logsumexp(
        z, axis=-1, b=labels.astype(z.dtype)
    )
    loss = jnp.where(tiny, far, -jnp.log(jnp.where(tiny, 1, drawn)))
    return loss if where is None else jnp.where(where, loss, 0)


@array_arguments
def sample_gumbel_flow(
    key: Array,
    denoiser: Callable[[Array, Array], Array],
    shape: Sequence[int],
    *,
    num_steps: int,
    guidance: Callable[[Array], Array] | None = None,
    guidance_scale: Scalar = 0.0,
    num_guidance_samples: int = 10,
    guidance_top_k: int | None = None,
    step_temperature: Scalar | None = None,
    tau_max: Scalar = 10.0,
    decay: Scalar = 3.0,
    beta: Scalar = 2.0,
    space: Literal["logit", "simplex"] = "logit",
) -> FlowSample:
    r"""Sequences from a denoiser, optionally steered by a score of clean sequences.

    Starts at $\operatorname{softmax}(g / (\beta \tau_{max}))$, follows
    `gumbel_flow_velocity` towards what `denoiser` says in `num_steps` steps of equal
    time, and draws each position from what it says at $t = 1$.

    **The draws are not exactly distributed as the training data, not even with an exact
    denoiser**: the start carries noise without the symbol that training always saw in
    it, and the noise fades along the flow. How near they come depends on `beta` and
    `decay`; compare samples with data before trusting the defaults.

    Guidance is straight-through: in each step clean sequences $h_m$ are drawn from the
    denoiser's $p$, and the mean $g$ of the gradients of the score at them is taken for
    that at $p$. In `space="simplex"` the step is that of the paper, with
    $\gamma (p \odot g - p \langle p, g \rangle)$ added to the velocity and the result
    put back on the simplex; in `space="logit"` $\gamma g$ is added to the velocity of
    $\log x$, which stays inside by itself and acts at $x$ as the former does at $p$:
    it does not fade as the denoiser becomes certain, and needs a smaller scale.

    Args:
        key: Of `jax.random`.
        denoiser: Points of the simplex in the given shape (float32) and the time, a
            scalar, to logits in that shape.
        shape: Static; (*positions, V).
        num_steps: Static, at least 1.
        guidance: One-hot sequences in the given shape to scores of any shape, which are
            added up; larger is better. It is differentiated, and mapped over samples
            by `jax.vmap`. None: no guidance.
        guidance_scale: $\gamma$; a number or a scalar array.
        num_guidance_samples: Static; sequences drawn in each step.
        guidance_top_k: Static; draws these from the so many best symbols only.
        step_temperature: If given, each step goes towards a `gumbel_softmax` draw of
            this temperature from $p$ instead of $p$ itself, fresh in every step.
        tau_max, decay: As in `exponential_temperature`.
        beta: As in `gumbel_softmax_interpolant`; use that of training. Infinite: starts
            at the centre.
        space: Static; where steps are added. "logit" is exact for a constant $p$ and
            needs no correction; "simplex" is Euler's method, cut off at 0.

    Returns:
        `FlowSample`; `probs` and `state` are float32. Differs with `key` only.

    Raises:
        TypeError: A static option has the wrong type.
        ValueError: An option is out of range, or `denoiser` returns another shape.

    Derivatives: reverse and forward mode through the steps, as far as `denoiser` and
        `guidance` have them; `tokens` have none.
    Cost: `num_steps` + 1 calls of `denoiser`, and in each step value and gradient of
        `guidance` for `num_guidance_samples` times as many sequences; memory for one
        step.
    Source: "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
        Controllable Biological Sequence Generation". `space="logit"` and
        `step_temperature` are additions; at the end the denoiser is asked, not the
        state.

    Example:
        >>> denoiser = lambda x, t: jnp.array([[0.0, 90.0, 0.0]] * 2)
        >>> sample = softlib.decoding.sample_gumbel_flow
        >>> draw = sample(jax.random.key(0), denoiser, (2, 3), num_steps=4)
        >>> print(draw.tokens)
        [1 1]
    """
    function = "sample_gumbel_flow"
    shape = tuple(shape)
    if not shape or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(
            f"{function}: `shape` must hold sizes, the last of them V, got {shape}."
        )
    checks.require_positive_integer(function, "num_steps", num_steps)
    checks.require_positive_integer(
        function, "num_guidance_samples", num_guidance_samples
    )
    if guidance_top_k is not None:
        checks.require_positive_integer(function, "guidance_top_k", guidance_top_k)
    checks.require_one_of(function, "space", space, ("logit", "simplex"))
    checks.require_scalar(
        function, "guidance_scale", guidance_scale, -math.inf, math.inf
    )
    checks.require_positive_scalars(function, tau_max=tau_max, decay=decay)
    if step_temperature is not None:
        checks.require_positive_scalars(function, step_temperature=step_temperature)
    _require_beta(function, beta)
    dtype = jnp.float32
    tau_max, decay, beta, guidance_scale = cast(
        dtype, tau_max, decay, beta, guidance_scale
    )

    def said(x: Array, t: Array) -> Array:
        logits = denoiser(x, t)
        checks.require_shape(function, "denoiser(x, t)", logits, shape, "`shape`")
        return logits.astype(dtype)

    start_key, step_key, end_key = jax.random.split(key, 3)
    start = jax.random.gumbel(start_key, shape, dtype) / beta / tau_max

    def step(z: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        i, key = at
        noise_key, guide_key = jax.random.split(key)
        t, after = i / num_steps, (i + 1) / num_steps
        x = softmax(z) if space == "logit" else z
        logits = said(x, t)
        if step_temperature is None:
            target = softmax(logits)
        else:
            target = gumbel_softmax(noise_key, logits, temperature=step_temperature)
        if space == "logit":
            # The integral of decay / tau over the step.
            gain = (jnp.exp(decay * after) - jnp.exp(decay * t)) / tau_max
            z = z + gain * target
        else:
            velocity = gumbel_flow_velocity(x, target, t, tau_max=tau_max, decay=decay)
            z = z + velocity / num_steps
        if guidance is not None:
            probs, pull = jax.vjp(softmax, logits)
            upward = _straight_through_gradient(
                guide_key, guidance, logits, probs, num_guidance_samples, guidance_top_k
            )
            if space == "simplex":
                (upward,) = pull(upward)
            z = z + guidance_scale / num_steps * upward
        if space == "simplex":
            z = jnp.maximum(z, 0)
            total = z.sum(-1, keepdims=True)
            z = z / jnp.where(total > 0, total, 1)
        return z, None

    if space == "simplex":
        start = softmax(start)
    keys = jax.random.split(step_key, num_steps)
    z, _ = lax.scan(step, start, (jnp.arange(num_steps, dtype=dtype), keys))
    x = softmax(z) if space == "logit" else z
    logits = said(x, jnp.ones((), dtype))
    tokens = jax.random.categorical(end_key, logits).astype(jnp.int32)
    return FlowSample(tokens, softmax(logits), x)


def _straight_through_gradient(
    key: Array,
    guidance: Callable[[Array], Array],
    logits: Array,
    probs: Array,
    samples: int,
    top_k: int | None,
) -> Array:
    """The gradient of the score by `probs`, averaged over drawn sequences."""
    drawn_from = logits if top_k is None else top_k_logits(logits, k=top_k)
    index = jax.random.categorical(key, drawn_from, shape=(samples, *logits.shape[:-1]))

    def mean_score(probs: Array) -> Array:
        of_sample = lambda one: guidance(straight_through_one_hot(probs, one)).sum()
        return jax.vmap(of_sample)(index).mean()

    return jax.grad(mean_score)(probs)


def _time(t: PerRow) -> Array:
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(jnp.float32)
    return t.astype(accumulator_dtype(t))


def _on_positions(
    function: str, t: PerRow, positions: tuple[int, ...], dtype: DTypeLike
) -> Array:
    """The time `t` with as many axes as the points, the last of length 1."""
    t = _time(t)
    checks.require_broadcastable(function, "t", t, positions, "that of the positions")
    return t.reshape((1,) * (len(positions) - t.ndim) + (*t.shape, 1)).astype(dtype)


def _require_beta(function: str, beta: Scalar) -> None:
    if not (isinstance(beta, float) and beta == math.inf):
        checks.require_positive_scalars(function, beta=beta)
