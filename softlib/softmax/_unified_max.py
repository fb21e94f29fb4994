"""Softmax and its logarithm relative to a reference that is known beforehand."""

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._unified_range import CRITERIA, require_range
from softlib.numerics import UnifiedMax, UnifiedMaxState
from softlib.typing import PerRow

from ._entries import Axis, Entries
from ._softmax import log_softmax, softmax


class UnifiedMaxResult(NamedTuple):
    """A softmax or its logarithm, and the rows whose scores left the range.

    Attributes:
        output: What the call without `return_needs_recompute` returns.
        needs_recompute: True for rows that have left the range, in the shape of the
            argument without `axis`.
    """

    output: Float[Array, "*shape"]
    needs_recompute: Bool[Array, "..."]


# For type checkers: the return type depends on a flag.
class _Options(TypedDict, total=False):
    where: Array | None
    phi: PerRow
    valid_range: tuple[ArrayLike, ArrayLike]
    criterion: Literal["row_max", "elementwise"]
    fallback: bool


@overload
# pyrefly: ignore[inconsistent-overload]
def unified_max_softmax(
    x: Array,
    axis: Axis = -1,
    *,
    return_needs_recompute: Literal[True],
    **options: Unpack[_Options],
) -> UnifiedMaxResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def unified_max_softmax(
    x: Array,
    axis: Axis = -1,
    *,
    return_needs_recompute: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def unified_max_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    phi: PerRow = 0.0,
    valid_range: tuple[ArrayLike, ArrayLike] = (-70.0, 80.0),
    criterion: Literal["row_max", "elementwise"] = "row_max",
    fallback: bool = True,
    return_needs_recompute: bool = False,
) -> Float[Array, "*shape"] | UnifiedMaxResult:
    r"""$e^{x_i - \varphi} / \sum_j e^{x_j - \varphi}$ with $\varphi$ given, not found.

    In exact arithmetic every $\varphi$ gives the softmax. With one that is known before
    the scores are, parts of a row can be summed without knowing its maximum. The price
    is a range: a row whose largest score is not within $\varphi + (a, b)$ is computed
    again, with its maximum. Scores that are bounded by construction never are: with a
    soft cap of at most 70, or normalised queries and keys, `phi=0.0` is safe.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.
        phi: $\varphi$: a number, or an array with a value per row, that is in the shape
            of `x` without `axis`, or one that broadcasts to it; traced.
        valid_range: $(a, b)$, numbers or arrays like `phi`; see
            `softlib.numerics.UnifiedMax`.
        criterion: Static. "row_max" looks at the largest score of a row, "elementwise",
            the rule of the paper, at every one.
        fallback: Static; whether to compute rows that leave the range again. Otherwise
            they are NaN.
        return_needs_recompute: Static; returns `UnifiedMaxResult`, which says of every
            row whether it has left the range.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count. A row
        without one is 0, and does not leave the range.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `phi` does not broadcast,
            `criterion` is neither, or the range is empty.

    Derivatives: forward and reverse mode, any order, with respect to `x`; from the
        result. Zero with respect to `phi` and the range, on which it does not depend.
    Cost: two passes over `x`, and three more if any row leaves the range (`lax.cond`).
        Under `vmap` both are always made: put batches into `x` instead.
    Source: "FlashDecoding++: Faster Large Language Model Inference on GPUs". The
        default criterion is weaker than the paper's, because a score far below the
        largest has a weight that rounds to 0 in any softmax.

    Example:
        >>> x = jnp.array([[4.0, 4.0], [900.0, 900.0]])
        >>> found = softlib.softmax.unified_max_softmax(
        ...     x, phi=3.0, return_needs_recompute=True
        ... )
        >>> print(found.output, found.needs_recompute)
        [[0.5 0.5]
         [0.5 0.5]] [False  True]
    """
    entries = Entries.of("unified_max_softmax", x, axis, where)
    accumulator = _accumulator(
        "unified_max_softmax", entries, phi, valid_range, criterion
    )
    found = _evaluated(accumulator, entries, fallback, is_log=False)
    return found if return_needs_recompute else found.output


@overload
# pyrefly: ignore[inconsistent-overload]
def unified_max_log_softmax(
    x: Array,
    axis: Axis = -1,
    *,
    return_needs_recompute: Literal[True],
    **options: Unpack[_Options],
) -> UnifiedMaxResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def unified_max_log_softmax(
    x: Array,
    axis: Axis = -1,
    *,
    return_needs_recompute: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def unified_max_log_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    phi: PerRow = 0.0,
    valid_range: tuple[ArrayLike, ArrayLike] = (-70.0, 80.0),
    criterion: Literal["row_max", "elementwise"] = "row_max",
    fallback: bool = True,
    return_needs_recompute: bool = False,
) -> Float[Array, "*shape"] | UnifiedMaxResult:
    r"""$x_i - \varphi - \log \sum_j e^{x_j - \varphi}$ with $\varphi$ given, not found.

    The logarithm of `unified_max_softmax`, which says what $\varphi$ is good for.

    Args:
        x, axis, where, phi, valid_range, criterion: As in `unified_max_softmax`.
        fallback, return_needs_recompute: As in `unified_max_softmax`.

    Returns:
        Logarithms in nats in the dtype of `x`, -inf where an entry does not count. The
        error is about that of $\varphi$ in the dtype of the sums, if it is large.

    Raises:
        TypeError, ValueError: As `unified_max_softmax`.

    Derivatives: as `unified_max_softmax`.
    Cost: as `unified_max_softmax`.
    Source: "FlashDecoding++: Faster Large Language Model Inference on GPUs".

    Example:
        >>> x = jnp.array([4.0, -jnp.inf])
        >>> print(softlib.softmax.unified_max_log_softmax(x, phi=4.0))
        [  0. -inf]
    """
    entries = Entries.of("unified_max_log_softmax", x, axis, where)
    accumulator = _accumulator(
        "unified_max_log_softmax", entries, phi, valid_range, criterion
    )
    found = _evaluated(accumulator, entries, fallback, is_log=True)
    return found if return_needs_recompute else found.output


def _accumulator(
    function: str,
    entries: Entries,
    phi: PerRow,
    valid_range: tuple[ArrayLike, ArrayLike],
    criterion: Literal["row_max", "elementwise"],
) -> UnifiedMax:
    def per_row(name: str, value: ArrayLike) -> ArrayLike:
        if isinstance(value, int | float):
            return value
        return entries.per_row(function, name, jnp.asarray(value, entries.x.dtype))

    checks.require_one_of(function, "criterion", criterion, CRITERIA)
    require_range(function, valid_range)
    low, high = (per_row("valid_range", bound) for bound in valid_range)
    return UnifiedMax(per_row("phi", phi), (low, high), criterion)


# ------------------------------------------------------------- rows are the last axis
def _evaluated(
    accumulator: UnifiedMax, entries: Entries, fallback: bool, *, is_log: bool
) -> UnifiedMaxResult:
    given = entries.rows(entries.scores)
    # The derivative is that of the result, below: no branch is differentiated.
    z = lax.stop_gradient(given)
    state = accumulator.update(accumulator.init(z.shape[:-1], z.dtype), z)
    flag = accumulator.needs_recompute(state)
    fast = _fast(accumulator, state, z, is_log)
    if fallback:
        found = _recomputed(is_log, flag, z, fast)
    else:
        found = jnp.where(flag[..., None], jnp.nan, fast)
    derived = _log_softmax_of if is_log else _softmax_of
    output = entries.result(entries.unrows(derived(given, found)))
    return UnifiedMaxResult(output, flag)


@compiled_once(0)
def _recomputed(
    is_log: bool, flag: Bool[Array, "*rows"], z: Array, fast: Array
) -> Array:
    exact = log_softmax if is_log else softmax
    # Row by row: no row depends on whether another one has left the range.
    again = lambda z, fast: jnp.where(flag[..., None], exact(z), fast)
    return lax.cond(flag.any(), again, lambda z, fast: fast, z, fast)


def _fast(
    accumulator: UnifiedMax, state: UnifiedMaxState, z: Array, is_log: bool
) -> Array:
    phi = jnp.asarray(accumulator.phi, z.dtype)
    phi = jnp.broadcast_to(phi, z.shape[:-1])[..., None]
    total = jnp.where(state.sum == 0, 1, state.sum)[..., None]
    # Selected before and after: a reference of -inf turns an absent score into NaN.
    absent = z == -jnp.inf
    z = jnp.where(absent, 0, z - phi)
    if is_log:
        return jnp.where(absent, -jnp.inf, z - jnp.log(total))
    return jnp.where(absent, 0, jnp.exp(z) / total)


@jax.custom_jvp
def _softmax_of(z: Array, y: Array) -> Array:
    """The softmax y of z, with its derivative."""
    return y


@_softmax_of.defjvp
def _(primals, tangents):
    y, dz = _softmax_of(*primals), tangents[0]
    # Entries that do not count may have any tangent.
    dz = jnp.where(primals[0] == -jnp.inf, 0, dz)
    return y, y * (dz - (y * dz).sum(-1, keepdims=True))


@jax.custom_jvp
def _log_softmax_of(z: Array, log_y: Array) -> Array:
    """The logarithm of the softmax of z, with its derivative."""
    return log_y


@_log_softmax_of.defjvp
def _(primals, tangents):
    log_y, dz = _log_softmax_of(*primals), tangents[0]
    absent = primals[0] == -jnp.inf
    dz = jnp.where(absent, 0, dz)
    mean = (jnp.exp(log_y) * dz).sum(-1, keepdims=True)
    return log_y, jnp.where(absent, 0, dz - mean)
