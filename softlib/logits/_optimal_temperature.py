r"""The temperature of a row of logits that minimises the robust cross-entropy.

It is the root of a function of the divergence from the uniform distribution, found by
passes over the vocabulary and differentiated by the implicit function theorem.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._bracketed_root import decreasing_root
from softlib._compiled_once import compiled_once
from softlib._dtypes import cast
from softlib._sharding import in_auto_mode
from softlib.typing import Scalar

from ._sources import Logits, Source, StoredLogits, source_of


@array_arguments
def optimal_temperature(
    logits: Logits,
    *,
    rho: Scalar,
    temperature_min: Scalar,
    temperature_max: Scalar,
    num_steps: int | None = None,
) -> Float[Array, "*batch"]:
    r"""The temperature that minimises the robust loss of each row.

    It is the root of $\mathrm{KL}(\mathrm{softmax}(z / \tau) \,\|\, u) = \rho$, clipped
    to $[\tau_{\min}, \tau_{\max}]$. The divergence falls with $\tau$: flat rows get
    $\tau_{\min}$, peaked rows $\tau_{\max}$. It does not depend on the label.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        temperature_min: The least temperature, positive; a number or a traced scalar.
        temperature_max: The largest temperature; a number or a traced scalar.
        num_steps: Static number of passes over the vocabulary besides the two ends;
            None: 12 for a linear head, 20 for an array. Convergence is faster than
            linear: 12 reach float32 rounding in a range of a factor 10,000.

    Returns:
        One temperature per row, float32 (float64 if an argument is float64); NaN for a
        row with a NaN, the least for one without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, an option is out of range, or the logits
            have a temperature.
        NotImplementedError: No implementation that was named can run, or a second
            derivative of a linear head is taken.

    Derivatives: by the implicit function theorem: with $x = z / \tau$ and $w$ its
        softmax, $\partial \tau / \partial z_j = w_j (x_j - \mathrm{E}_w x) /
        \mathrm{Var}_w x$ and $\partial \tau / \partial \rho = -\tau / \mathrm{Var}_w
        x$; at an end of the range that of the end. For an array in forward and reverse
        mode, any order. For a linear head the first derivative, in reverse mode: a
        second one would keep every tile, O(N V), as `materialize()` does.
    Cost: `num_steps` + 3 forward passes of `row_statistics`; with a derivative two
        backward passes.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO", which learns a network instead.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> best = softlib.logits.optimal_temperature
        >>> sizes = {"temperature_min": 0.1, "temperature_max": 10.0}
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print((100 * best(logits, rho=0.5, **sizes)).round())
        [45. 91.]
    """
    function = "optimal_temperature"
    source = source_of(function, logits)
    stored = isinstance(source, StoredLogits)
    num_steps = (20 if stored else 12) if num_steps is None else num_steps
    _check_search(source, rho, temperature_min, temperature_max, num_steps)
    if not isinstance(source, StoredLogits):
        return _of_head(source, rho, temperature_min, temperature_max, num_steps)
    if source.implementation is not None:
        raise ValueError(
            f"{function}: `implementation` of stored logits must be None, as there is "
            f"one, got {source.implementation!r}."
        )
    z = source.materialize()
    scalars = (rho, temperature_min, temperature_max)

    def solve(z: Array, *scalars: Array) -> Array:
        return _temperature_of(z, *scalars, num_steps)

    of_rows = lambda spec: PartitionSpec(*spec[: z.ndim - 1])
    return in_auto_mode(solve, of_rows, z, *(jnp.asarray(s, z.dtype) for s in scalars))


def _of_head(
    source: Source,
    rho: Scalar,
    temperature_min: Scalar,
    temperature_max: Scalar,
    num_steps: int,
) -> Float[Array, "*batch"]:
    low, high = (
        jnp.broadcast_to(jnp.asarray(end, source.dtype), source.batch_shape)
        for end in (temperature_min, temperature_max)
    )

    fixed = lax.stop_gradient(jnp.asarray(rho, source.dtype))
    ends = lax.stop_gradient((jnp.log(low), jnp.log(high)))
    log_tau, slope = _root(lax.stop_gradient(source), fixed, *ends, num_steps)
    inside = (ends[0] < log_tau) & (log_tau < ends[1])
    # Near a flat row KL is half the variance of z / tau; a slope of 0 is no root's.
    inside = inside & (slope < -jnp.finfo(slope.dtype).tiny)
    (rho,) = cast(source.dtype, rho)
    found = _implicit(log_tau, _excess(source, rho, log_tau), slope, inside)
    low, high = (end + jnp.zeros_like(log_tau) for end in (low, high))  # divided alike
    found = jnp.clip(jnp.exp(found), lax.stop_gradient(low), lax.stop_gradient(high))
    found = jnp.where(log_tau <= ends[0], low, found)
    return jnp.where(log_tau >= ends[1], high, found)


@compiled_once(4)
def _root(
    source: Source, rho: Array, first: Array, last: Array, num_steps: int
) -> tuple[Array, Array]:
    """Logarithms of the temperatures, and slopes of the excess there."""
    excess = functools.partial(_excess, source, rho)
    log_tau = decreasing_root(excess, first, last, num_steps)
    return log_tau, jax.grad(lambda log_tau: excess(log_tau).sum())(log_tau)


def _excess(source: Source, rho: Scalar, log_tau: Array) -> Array:
    """KL divergence from the uniform distribution, minus rho."""
    modifiers = source.modifiers._replace(temperature=jnp.exp(log_tau))
    divided = source.replaced(modifiers=modifiers)
    found = divided.statistics(("lse", "mean_logit"))
    assert found.lse is not None
    assert found.mean_logit is not None
    divergence = log_classes(source) - (found.lse - found.mean_logit)
    return jnp.where(found.lse == -jnp.inf, 0, divergence) - rho


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
    """Softmax, scaled logits, their mean under it, and a mask of finite logits."""
    finite = z != -jnp.inf  # NaN counts, and makes its row NaN
    x = jnp.where(finite, z / tau[..., None], -jnp.inf)
    w = jnp.where(finite.any(-1, keepdims=True), jax.nn.softmax(x), 0)
    w = jnp.where(finite, w, 0)
    return w, x, (w * jnp.where(finite, x, 0)).sum(-1), finite


@jax.custom_vjp
def _implicit(log_tau: Array, excess: Array, slope: Array, inside: Array) -> Array:
    """`log_tau` with the derivative of the root: that of excess over -`slope`."""
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
    """The slope; differentiating it raises."""
    return slope


@_once.defjvp
def _once_jvp(primals, tangents):
    raise NotImplementedError(
        "optimal_temperature: a second derivative must be taken of "
        "`optimal_temperature` of the logits, it would need them all here, got one of "
        "a linear head."
    )


def log_classes(source: Source) -> Array:
    return jnp.log(jnp.maximum(jnp.asarray(source.count_classes(), source.dtype), 1))


def _check_search(
    source: Source,
    rho: Scalar,
    temperature_min: Scalar,
    temperature_max: Scalar,
    num_steps: int,
) -> None:
    function = source.function
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
    if source.modifiers.temperature is not None:
        raise ValueError(
            f"{function}: `temperature` of the logits must be None: it is what is "
            "looked for."
        )
