r"""Cross-entropy robust against reweighted classes, and the temperature it asks for.

A row of logits $z$ with label $y$ is judged by the worst distribution $p$ over classes
near the uniform one; the dual variable of "near" is a temperature per row.
"""

import dataclasses
import functools
import math
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._bracketed_root import decreasing_root
from softlib._compiled_once import compiled_once
from softlib._dtypes import cast, promoted
from softlib._sharding import in_auto_mode
from softlib.logits._compose import log_probability
from softlib.logits._labelled_rows import prepare
from softlib.logits._options import UncooledHeadOptions, UncooledLogitsOptions
from softlib.logits._sources import GivenLogits, LinearHead, Source
from softlib.typing import PerRow, Scalar


@array_arguments
def linear_robust_softmax_cross_entropy(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    temperature: PerRow,
    *,
    rho: Scalar,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[UncooledHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Robust cross-entropy of a linear head, in nats per row, without its logits.

    $$L = \tau\, \mathrm{CE}(z / \tau, y) + (\rho - \log V)\, \tau
        = \tau \log \frac{1}{V} \sum_j e^{(z_j - z_y) / \tau} + \rho\, \tau$$

    For the best $\tau \geq \tau_0$ this is, up to the constant $\rho \tau_0$, the worst
    mean of $z_j - z_y$ over distributions of classes whose KL divergence from the
    uniform one is at most $\rho$, minus $\tau_0$ times that divergence. The gradient in
    the logits is $w - e_y$ with $w = \mathrm{softmax}(z / \tau)$, without a factor
    $1 / \tau$; that in $\tau$ is $\rho - \mathrm{KL}(w \,\|\, u)$: a row flatter than
    $\rho$ asks for a smaller temperature, a peaked one for a larger. $L$ is convex in
    $\tau$, and at its minimum the divergence is $\rho$. $\rho = \log V$ and $\tau = 1$
    make it cross-entropy.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs +inf, without gradient.
        temperature: $\tau > 0$; a number or an array that is a scalar or one value per
            row, differentiable. Divides the logits after bias and softcap.
            `softlib.nn.TempNet` predicts it, `linear_optimal_temperature` finds the
            best.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `hidden`, `labels` and
            `temperature` hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `class_where`, `vocab_axis`,
            `vocab_chunk`, `token_chunk`, `gradient_filter_eps`, `axis_name`,
            `precision` and `implementation`, as in `linear_softmax_cross_entropy`. With
            `class_where`, $V$ is the number of classes that exist.

    Returns:
        The loss per row, float32 (float64 if an argument is float64); it may be
        negative. A row without classes has loss 0 and gradient 0; one whose logits are
        all -inf costs +inf, with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`, and in `temperature` and `rho`.
    Cost: as `linear_softmax_cross_entropy`; a temperature that is differentiated adds
        two tiles of scratch where `linear_row_statistics` says so.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> robust = softlib.losses.linear_robust_softmax_cross_entropy
        >>> print(robust(hidden, weight, jnp.array([0, 1]), 0.5, rho=0.1).round(4))
        [-0.3795 -0.4813]
    """
    function = "linear_robust_softmax_cross_entropy"
    source = LinearHead.of(function, hidden, weight, temperature=temperature, **options)
    return _robust(source, labels, rho, where)


@array_arguments
def robust_softmax_cross_entropy(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    temperature: PerRow,
    *,
    rho: Scalar,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[UncooledLogitsOptions],
) -> Float[Array, "*batch"]:
    r"""Robust cross-entropy of logits, in nats per row.

    The loss of `linear_robust_softmax_cross_entropy` from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids in $[0, V)$, with the exceptions described in
            `linear_robust_softmax_cross_entropy`.
        temperature: $\tau > 0$; a number or an array that is a scalar or one value per
            row, differentiable.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever the other arrays hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `class_where` and
            `implementation`, as in `softmax_cross_entropy`.

    Returns:
        The loss per row, float32 (float64 if an argument is float64); it may be
        negative. A row without classes has loss 0 and gradient 0; one whose logits are
        all -inf costs +inf, with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_robust_softmax_cross_entropy`.
    Cost: one pass over `logits` forward, one backward that writes their gradient.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO".

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> robust = softlib.losses.robust_softmax_cross_entropy
        >>> print(robust(logits, labels, jnp.array([1.0, 0.5]), rho=0.5).round(4))
        [-0.0662  0.25  ]
    """
    function = "robust_softmax_cross_entropy"
    source = GivenLogits.of(function, logits, temperature=temperature, **options)
    return _robust(source, labels, rho, where)


@array_arguments
def linear_optimal_temperature(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    *,
    rho: Scalar,
    temperature_min: Scalar,
    temperature_max: Scalar,
    num_steps: int = 12,
    **options: Unpack[UncooledHeadOptions],
) -> Float[Array, "*batch"]:
    r"""The temperature that minimises the robust loss of a linear head, without logits.

    The root of $\mathrm{KL}(\mathrm{softmax}(z / \tau) \,\|\, u) = \rho$, which falls
    with $\tau$, or the end of $[\tau_{\min}, \tau_{\max}]$ next to it: $\tau_{\min}$
    for a row that is flat even there, $\tau_{\max}$ for one that is peaked even there.
    It does not depend on the label.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        temperature_min: The least temperature, positive; a number or a traced scalar.
        temperature_max: The largest.
        num_steps: Static number of passes over the vocabulary beside the two ends.
            Convergence is faster than linear: 12 leave nothing to gain in float32 in a
            range of a factor 10,000.
        **options: `bias`, `logit_scale`, `logit_softcap`, `class_where`, `vocab_axis`,
            `vocab_chunk`, `token_chunk`, `axis_name`, `precision` and `implementation`,
            as in `linear_softmax_cross_entropy`.

    Returns:
        One temperature per row, float32 (float64 if an argument is float64); NaN for a
        row with a NaN, the least for one without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown or
            `temperature`, which is what is looked for.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run, or a second
            derivative is asked for.

    Derivatives: first, reverse mode, by the implicit function theorem: with
        $x = z / \tau$ and $w$ its softmax, $\partial \tau / \partial z_j = w_j (x_j -
        \mathrm{E}_w x) / \mathrm{Var}_w x$ and $\partial \tau / \partial \rho = -\tau /
        \mathrm{Var}_w x$; at an end of the range that of the end. A second one would
        differentiate the variance, which is itself read off a backward pass, and hence
        keep every tile, O(N V): then `linear_logits` and `optimal_temperature`, of any
        order, ask for no more.
    Cost: `num_steps` + 3 forward passes of `linear_row_statistics`; with a derivative
        two backward passes.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO", which learns a network instead.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> best = softlib.losses.linear_optimal_temperature
        >>> sizes = {"temperature_min": 0.1, "temperature_max": 10.0}
        >>> print((100 * best(hidden, weight, rho=0.5, **sizes)).round())
        [45. 91.]
    """
    function = "linear_optimal_temperature"
    _check_search(function, rho, temperature_min, temperature_max, num_steps, options)
    source = LinearHead.of(function, hidden, weight, **options)
    low, high = (
        jnp.broadcast_to(jnp.asarray(end, source.dtype), source.batch)
        for end in (temperature_min, temperature_max)
    )

    fixed = lax.stop_gradient(jnp.asarray(rho, source.dtype))
    ends = lax.stop_gradient((jnp.log(low), jnp.log(high)))
    log_tau, slope = _root(lax.stop_gradient(source), fixed, *ends, num_steps)
    inside = (ends[0] < log_tau) & (log_tau < ends[1])
    # KL is the variance of the logits near a flat row; no root has a slope of 0.
    inside = inside & (slope < -jnp.finfo(slope.dtype).tiny)
    (rho,) = cast(source.dtype, rho)
    found = _implicit(log_tau, _excess(source, rho, log_tau), slope, inside)
    low, high = (end + jnp.zeros_like(log_tau) for end in (low, high))  # divided alike
    found = jnp.clip(jnp.exp(found), lax.stop_gradient(low), lax.stop_gradient(high))
    found = jnp.where(log_tau <= ends[0], low, found)
    return jnp.where(log_tau >= ends[1], high, found)


@compiled_once(4)
def _root(
    source: LinearHead, rho: Array, first: Array, last: Array, num_steps: int
) -> tuple[Array, Array]:
    """The logarithms of the temperatures, and the slopes of the excess there."""
    excess = functools.partial(_excess, source, rho)
    log_tau = decreasing_root(excess, first, last, num_steps)
    return log_tau, jax.grad(lambda log_tau: excess(log_tau).sum())(log_tau)


def _excess(source: LinearHead, rho: Scalar, log_tau: Array) -> Array:
    """KL from the uniform distribution, minus rho."""
    modifiers = source.modifiers._replace(temperature=jnp.exp(log_tau))
    cooled = dataclasses.replace(source, modifiers=modifiers)
    found = cooled.statistics(("lse", "mean_logit"))
    assert found.lse is not None
    assert found.mean_logit is not None
    divergence = _log_classes(source) - (found.lse - found.mean_logit)
    return jnp.where(found.lse == -jnp.inf, 0, divergence) - rho


@array_arguments
def optimal_temperature(
    logits: Float[Array, "*batch V"],
    *,
    rho: Scalar,
    temperature_min: Scalar,
    temperature_max: Scalar,
    num_steps: int = 20,
    **options: Unpack[UncooledLogitsOptions],
) -> Float[Array, "*batch"]:
    r"""The temperature per row of logits that minimises the robust loss.

    That of `linear_optimal_temperature` from logits that exist. For pairs of a
    contrastive loss pass the similarities and `class_where=~jnp.eye(B, dtype=bool)`.

    Args:
        logits: Unnormalised log-probabilities.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        temperature_min: The least temperature, positive; a number or a traced scalar.
        temperature_max: The largest.
        num_steps: Static number of evaluations beside the two ends.
        **options: `bias`, `logit_scale`, `logit_softcap` and `class_where`, as in
            `softmax_cross_entropy`.

    Returns:
        One temperature per row, float32 (float64 if an argument is float64); NaN for a
        row with a NaN, the least for one without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown,
            `temperature`, which is what is looked for, or `implementation`.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: any order, forward and reverse, by the implicit function theorem; see
        `linear_optimal_temperature`.
    Cost: `num_steps` + 2 softmaxes; what is kept for the backward pass is one.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO", which learns a network instead.

    Example:
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
        >>> sizes = {"temperature_min": 0.1, "temperature_max": 10.0}
        >>> best = softlib.losses.optimal_temperature
        >>> print((100 * best(logits, rho=0.5, **sizes)).round())
        [ 91. 182.]
    """
    function = "optimal_temperature"
    _check_search(function, rho, temperature_min, temperature_max, num_steps, options)
    if "implementation" in options:
        raise TypeError(
            f"{function}: `implementation` must not be given, there is one, "
            f"got {options['implementation']!r}."
        )
    source = GivenLogits.of(function, logits, **options)
    z = source.final_logits()
    scalars = (rho, temperature_min, temperature_max)

    def solve(z: Array, *scalars: Array) -> Array:
        return _temperature_of(z, *scalars, num_steps)

    of_rows = lambda spec: PartitionSpec(*spec[: z.ndim - 1])
    return in_auto_mode(solve, of_rows, z, *(jnp.asarray(s, z.dtype) for s in scalars))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
@compiled_once(4)
def _temperature_of(
    z: Array, rho: Array, low: Array, high: Array, num_steps: int
) -> Array:
    # A maximum of 0 keeps z / tau finite for a small tau.
    top = z.max(-1, keepdims=True)
    z = z - jnp.where(jnp.isfinite(top), top, 0)
    log_classes = jnp.log(jnp.maximum((z != -jnp.inf).sum(-1), 1).astype(z.dtype))

    def excess(log_tau: Array) -> Array:
        _, x, mean, _ = _moments(z, jnp.exp(log_tau))
        log_sum = jax.nn.logsumexp(x, axis=-1)
        divergence = log_classes - (log_sum - mean)
        return jnp.where(log_sum == -jnp.inf, 0, divergence) - rho

    batch = z.shape[:-1]
    first, last = (jnp.broadcast_to(jnp.log(end), batch) for end in (low, high))
    log_tau = decreasing_root(excess, first, last, num_steps)
    # exp(log(x)) is not x: the ends are exact.
    tau = jnp.clip(jnp.exp(log_tau), low, high)
    tau = jnp.where(log_tau <= jnp.log(low), low, tau)
    return jnp.where(log_tau >= jnp.log(high), high, tau)


@_temperature_of.defjvp
def _temperature_jvp(num_steps, primals, tangents):
    z, rho, low, high = primals
    dz, drho, dlow, dhigh = tangents
    tau = _temperature_of(z, rho, low, high, num_steps)
    w, x, mean, finite = _moments(z, tau)
    deviation = jnp.where(finite, x - mean[..., None], 0)
    variance = (w * deviation**2).sum(-1)
    inside = (low < tau) & (tau < high) & (variance > jnp.finfo(z.dtype).tiny)
    change = (w * deviation * jnp.where(finite, dz, 0)).sum(-1) - tau * drho
    dtau = change / jnp.where(inside, variance, 1)
    at_end = jnp.where(tau <= low, dlow, jnp.where(tau >= high, dhigh, 0))
    return tau, jnp.where(inside, dtau, at_end)


def _moments(z: Array, tau: Array) -> tuple[Array, Array, Array, Array]:
    """Softmax, scaled logits, their mean under it, and which entries are there."""
    finite = z != -jnp.inf  # NaN counts, and makes its row NaN
    x = jnp.where(finite, z / tau[..., None], -jnp.inf)
    w = jnp.where(finite.any(-1, keepdims=True), jax.nn.softmax(x), 0)
    w = jnp.where(finite, w, 0)
    return w, x, (w * jnp.where(finite, x, 0)).sum(-1), finite


@jax.custom_vjp
def _implicit(log_tau: Array, excess: Array, slope: Array, inside: Array) -> Array:
    """`log_tau` with the slope of the root: minus that of excess over `slope`."""
    return log_tau


def _implicit_forward(log_tau, excess, slope, inside):
    return log_tau, (excess, slope, inside)


def _implicit_backward(residuals, cotangent):
    excess, slope, inside = residuals
    slope = _once(jnp.where(inside, slope, 1), excess)
    return None, jnp.where(inside, -cotangent / slope, 0), None, None


_implicit.defvjp(_implicit_forward, _implicit_backward)


@jax.custom_jvp
def _once(slope: Array, excess: Array) -> Array:
    """The slope, as long as nobody differentiates what it depends on."""
    return slope


@_once.defjvp
def _once_jvp(primals, tangents):
    raise NotImplementedError(
        "linear_optimal_temperature: a second derivative must be taken of "
        "`optimal_temperature` of the logits, it would need them all here, got one of "
        "a linear head."
    )


def _robust(
    source: Source, labels: Array, rho: Scalar, where: Array | None
) -> Float[Array, "*batch"]:
    checks.require_scalar(source.function, "rho", rho, 0, math.inf)
    names = ("lse", "label_logits")
    rows = prepare(source, names, labels, where, distributions=False)
    cost = 0 - log_probability(rows)
    tau = source.modifiers.temperature
    assert tau is not None
    tau = jnp.broadcast_to(tau.astype(source.dtype), source.batch)
    cost, tau, rho = promoted(cost, rows.counted(tau, 1), rho)
    finite = jnp.isfinite(cost)
    loss = tau * (jnp.where(finite, cost, 0) + rho - _log_classes(source))
    # An infinite cost, and NaN of a bad label, have no slope; without classes it is 0.
    loss = jnp.where(finite & ~rows.massless, loss, lax.stop_gradient(cost))
    return rows.counted(loss)


def _log_classes(source: Source) -> Array:
    return jnp.log(jnp.maximum(jnp.asarray(source.count_classes(), source.dtype), 1))


def _check_search(
    function: str,
    rho: Scalar,
    temperature_min: Scalar,
    temperature_max: Scalar,
    num_steps: int,
    options: UncooledLogitsOptions,
) -> None:
    checks.require_scalar(function, "rho", rho, 0, math.inf)
    ends = {"temperature_min": temperature_min, "temperature_max": temperature_max}
    for name, end in ends.items():
        if isinstance(end, int | float):
            checks.require_positive_number(function, name, end)
        checks.require_scalar(function, name, end, 0, math.inf)
    static = all(isinstance(end, int | float) for end in ends.values())
    if static and temperature_min > temperature_max:
        raise ValueError(
            f"{function}: `temperature_max` must be at least `temperature_min` "
            f"({temperature_min}), got {temperature_max}."
        )
    checks.require_positive_integer(function, "num_steps", num_steps)
    if "temperature" in options:
        raise TypeError(
            f"{function}: `temperature` must not be given, it is what is looked for, "
            f"got {options['temperature']!r}."
        )
