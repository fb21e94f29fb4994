"""Softmax, its logarithm and the logarithm of its sum."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks, _dispatch
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._sharding import per_shard
from softlib.typing import Implementations, PerRow

from ._entries import Axis, Entries
from ._row_blocks import LOGSUMEXP, SOFTMAX, Options, Rows, row_max, softmax_of


@array_arguments
def softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    temperature: PerRow = 1.0,
    implementation: Implementations = None,
) -> Float[Array, "*shape"]:
    r"""$e^{x_i / \tau} / \sum_j e^{x_j / \tau}$ over the entries of a row that count.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.
        temperature: $\tau > 0$: a number (static), or an array with a value per row,
            that is in the shape of `x` without `axis`, or one that broadcasts to it;
            traced and differentiable. As it falls to 0 the result tends to the largest
            entries, as it grows to the uniform distribution.
        implementation: Static; see `softlib.explain`. `in_place` takes some rows at a
            time and overwrites them: faster on a CPU for an array beyond its caches
            that `jax.jit` donates, slower for one that it does not.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` does not broadcast, or the
            temperature is a number that is not positive.
        NotImplementedError: No implementation that was named can run.

    Derivatives: forward and reverse mode, any order, with respect to `x` and
        `temperature`; from the result, so that entries that do not count get 0.
    Cost: three passes over `x`; the result is kept for the backward pass.

    Example:
        >>> print(softlib.softmax.softmax(jnp.array([0.0, 0.0, -jnp.inf])))
        [0.5 0.5 0. ]
    """
    entries = Entries.of("softmax", x, axis, where)
    if isinstance(temperature, int | float) and temperature == 1:
        z = entries.given_scores(x)
    else:
        z = tempered("softmax", entries, temperature)
    options = Options(entries.axes, entries.dtype)
    call = functools.partial(_softmax, options, implementation)
    return per_shard(call, functools.partial(_by_rows, options), lambda spec: spec, z)


@array_arguments
def log_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    temperature: PerRow = 1.0,
) -> Float[Array, "*shape"]:
    r"""$x_i / \tau - \log \sum_j e^{x_j / \tau}$: log-probabilities, in nats.

    Args:
        x, axis, where, temperature: As in `softmax`.

    Returns:
        In the dtype of `x`; -inf where an entry does not count.

    Raises:
        TypeError, ValueError: As `softmax`.

    Derivatives: forward and reverse mode, any order; entries that do not count get 0
        and give none.
    Cost: as `softmax`; the result is kept for the backward pass.

    Example:
        >>> print(softlib.softmax.log_softmax(jnp.array([0.0, -jnp.inf])))
        [  0. -inf]
    """
    entries = Entries.of("log_softmax", x, axis, where)
    z = tempered("log_softmax", entries, temperature)
    return entries.result(_log_softmax(entries.axes, z))


@array_arguments
def logsumexp(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    keepdims: bool = False,
    implementation: Implementations = None,
) -> Float[Array, "*rows"]:
    r"""$\log \sum_i e^{x_i}$ over the entries of a row that count, in nats.

    Args:
        x: Scores. -inf never counts; NaN makes its row NaN, +inf makes it +inf.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `x`.
        keepdims: Static; whether `axis` stays, with length 1.
        implementation: Static; see `softlib.explain`.

    Returns:
        In the dtype of `x`; -inf for a row without an entry that counts.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.
        NotImplementedError: No implementation that was named can run.

    Derivatives: forward and reverse mode, any order: the softmax, 0 in a row without an
        entry that counts.
    Cost: on a CPU an array beyond its caches is read once, some rows at a time;
        elsewhere as XLA does it. `x` and the result are kept for the backward pass.

    Example:
        >>> print(softlib.softmax.logsumexp(jnp.array([-jnp.inf, -jnp.inf])))
        -inf
    """
    entries = Entries.of("logsumexp", x, axis, where)
    options = Options(entries.axes, entries.x.dtype)
    call = functools.partial(_logsumexp, options, implementation)
    found = per_shard(
        call,
        functools.partial(_by_rows, options),
        functools.partial(_without_rows, options),
        entries.given_scores(x),
    )
    if keepdims:
        found = jnp.expand_dims(found, entries.axes)
    return entries.result(found)


def tempered(function: str, entries: Entries, temperature: PerRow) -> Array:
    """The scores divided by the temperature, -inf for entries that do not count."""
    if isinstance(temperature, int | float):
        checks.require_positive_number(function, "temperature", temperature)
        return entries.scores if temperature == 1 else entries.scores / temperature
    temperature = entries.beside(entries.per_row(function, "temperature", temperature))
    # Selected again: a score of -inf has no derivative by the temperature.
    scores = entries.scores
    absent = scores == -jnp.inf
    z = jnp.where(absent, 0, scores) / temperature
    return jnp.where(absent, -jnp.inf, z)


def _by_rows(options: Options, spec: PartitionSpec) -> tuple[PartitionSpec]:
    """The spec without mesh axes at the axes of a row."""
    kept = (None if i in options.axes else axis for i, axis in enumerate(spec))
    return (PartitionSpec(*kept),)


def _without_rows(options: Options, spec: PartitionSpec) -> PartitionSpec:
    """The spec of an array with one value per row."""
    kept = (axis for i, axis in enumerate(spec) if i not in options.axes)
    return PartitionSpec(*kept)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _softmax(options: Options, names: Implementations, z: Array) -> Array:
    return _dispatch.run(SOFTMAX, names, options, Rows(z))


@_softmax.defjvp
def _(options, names, primals, tangents):
    (z,), (dz,) = primals, tangents
    axes, dtype = options
    # For derivatives the probabilities are not rounded to the dtype of the result.
    y = _softmax(Options(axes, accumulator_dtype(z)), names, z)
    dz = jnp.where(z == -jnp.inf, 0, dz.astype(y.dtype))
    dy = y * (dz - (y * dz).sum(axes, keepdims=True))
    return y.astype(dtype), dy.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_softmax(axes: tuple[int, ...], z: Array) -> Array:
    # Subtracts the maximum first: beside a large one log(sum) would lose its digits.
    shifted = z - row_max(axes, z)
    total = jnp.exp(shifted).sum(axes, keepdims=True)
    return shifted - jnp.log(jnp.where(total == 0, 1, total))


@_log_softmax.defjvp
def _(axes, primals, tangents):
    (z,), (dz,) = primals, tangents
    log = _log_softmax(axes, z)
    dz = jnp.where(z == -jnp.inf, 0, dz)
    change = dz - (jnp.exp(log) * dz).sum(axes, keepdims=True)
    return log, jnp.where(z == -jnp.inf, 0, change)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _logsumexp(options: Options, names: Implementations, z: Array) -> Array:
    return _dispatch.run(LOGSUMEXP, names, options, Rows(z))


@_logsumexp.defjvp
def _(options, names, primals, tangents):
    (z,), (dz,) = primals, tangents
    axes, dtype = options
    # Not exp(z - lse): every weight would have the rounding error of a large lse.
    p = softmax_of(axes, z.astype(dtype))
    dz = jnp.where(z == -jnp.inf, 0, dz.astype(dtype))
    return _logsumexp(options, names, z), (p * dz).sum(axes)
