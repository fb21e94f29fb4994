"""Tuning of quantized weights: codes move on a subset, the rest by gradients."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.quantize import QuantizedArray, assign_codes
from softlib.typing import Scalar


class PVState(NamedTuple):
    """The state of `pv_tuning`.

    Attributes:
        codes: Of the optimizer of the decoded weights, or None.
        parameters: Of the optimizer of scales, zeros and codebooks, or None.
        buffer: What the last reference was beyond the decoded weights, or None.

    Derivatives: none are meant.
    Cost: that of the optimizers' states, and of `buffer` one array of the decoded size.

    Example:
        >>> weight = softlib.quantize.quantize_groups(jnp.eye(4), group_size=4)
        >>> tuning = softlib.optim.pv_tuning(None, optax.sgd(0.1))
        >>> print(tuning.init(weight).codes)
        None
    """

    codes: Any
    parameters: Any
    buffer: PyTree | None


class PVTuning(NamedTuple):
    """A pair of functions, as an `optax.GradientTransformation`, of quantized weights.

    Attributes:
        init: Makes the state from a pytree of `QuantizedArray`.
        update: Maps (gradients, state, weights) to (new weights, new state); the
            gradients are those of the decoded weights, in a pytree like the weights.

    Example:
        >>> tuning = softlib.optim.pv_tuning(optax.sgd(1.0), None, max_fraction=0.1)
        >>> weight = softlib.quantize.quantize_groups(jnp.eye(4), group_size=4)
        >>> weight, state = tuning.update(jnp.eye(4), tuning.init(weight), weight)
        >>> print(weight.decode().diagonal().round(2))
        [0. 0. 1. 1.]
    """

    init: Callable[[PyTree], PVState]
    update: Callable[[PyTree, PVState, PyTree], tuple[PyTree, PVState]]


@array_arguments
def pv_code_update(
    weight: QuantizedArray,
    reference: Float[Array, "*batch size"],
    *,
    max_fraction: float = 1.0,
    trust_ratio: Scalar | None = None,
    where: Bool[Array, "*batch n"] | None = None,
) -> QuantizedArray:
    r"""Moves the codes that are farthest from a reference, and no others.

    With $G$ codes, each for a vector of weights, the $\lceil \mathrm{max\_fraction}
    \cdot G \rceil$ codes with the largest $|r_g - w_g|$ are replaced by those nearest
    to the reference $r_g$. For a step of descent $r = w - \eta \nabla L(w)$: on a small
    subset a loss is smoother than as a whole, so that $\eta$ can be so large that codes
    change, while a step of all that is small enough to descend leaves every code where
    it is.

    Args:
        weight: With a codebook or on a grid, where each weight has a code.
        reference: The array that the decoded weight should be near.
        max_fraction: Static share in (0, 1] of the codes that may change; at least one
            may.
        trust_ratio: Bound of the change of the decoded weight relative to its norm; the
            codes farthest from the reference come first, and from the first that
            exceeds it on none changes. None sets no bound.
        where: True for the codes that may change; one per code.

    Returns:
        The weight with new codes, the lowest one on ties; scale, zero and codebook are
        as they were. A vector whose reference is not finite keeps its code.

    Raises:
        TypeError: `weight` is no `QuantizedArray`, or an argument has the wrong kind.
        ValueError: A shape does not fit, or a number is out of range.

    Derivatives: none: codes jump.
    Cost: one product of the chosen vectors with the codebook, and the choice of the
        largest of G numbers.
    Source: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression".

    Example:
        >>> codebook = jnp.array([[0.0], [1.0], [2.0]])
        >>> codes = jnp.array([[0, 0, 0]])
        >>> weight = softlib.quantize.QuantizedArray(codes, bits=2, codebook=codebook)
        >>> reference = jnp.array([[0.9, 1.8, 0.6]])
        >>> new = softlib.optim.pv_code_update(weight, reference, max_fraction=0.4)
        >>> print(new.codes)
        [[1 2 0]]
    """
    function = "pv_code_update"
    _require_quantized(function, weight)
    checks.require_floating(function, reference=reference)
    shape, why = weight.shape, "that of `weight`"
    checks.require_shape(function, "reference", reference, shape, why)
    _require_fraction(function, max_fraction)
    if trust_ratio is not None:
        checks.require_positive_scalars(function, trust_ratio=trust_ratio)
    codes = weight.codes
    checks.require_boolean(function, where=where)
    checks.require_shape(function, "where", where, codes.shape, "one per code")

    dtype = accumulator_dtype(weight.dtype, reference)
    width = weight.size // codes.shape[-1]
    vectors = lambda array: array.astype(dtype).reshape(-1, width)
    wanted, old = vectors(reference), vectors(weight.decode())
    off = wanted - old
    if weight.where is not None:
        off = jnp.where(weight.where.reshape(-1, width), off, 0)
    distance = jnp.square(off).sum(-1)
    may = jnp.isfinite(distance)
    if where is not None:
        may = may & where.reshape(-1)
    count = max(1, math.ceil(max_fraction * codes.size))
    found, chosen = lax.top_k(jnp.where(may, distance, -1), count)
    flat = codes.reshape(-1)
    new = _nearest(weight, wanted, chosen, width)
    new = jnp.where(found >= 0, new, flat[chosen])
    if trust_ratio is not None:
        # Chosen codes are in the order of falling distance.
        after = weight.with_codes(flat.at[chosen].set(new).reshape(codes.shape))
        change = jnp.square(vectors(after.decode()) - old).sum(-1)[chosen]
        most = jnp.square(jnp.asarray(trust_ratio, dtype)) * jnp.square(old).sum()
        new = jnp.where(jnp.cumsum(change) <= most, new, flat[chosen])
    return weight.with_codes(flat.at[chosen].set(new).reshape(codes.shape))


@array_arguments
def pv_tuning(
    codes: optax.GradientTransformation | None,
    parameters: optax.GradientTransformation | None,
    *,
    max_fraction: float = 1.0,
    trust_ratio: Scalar | None = None,
    delta_decay: float = 1.0,
) -> PVTuning:
    r"""Tunes quantized weights by steps of codes (P) and of continuous numbers (V).

    One update takes the gradients $g$ of the decoded weights $w$. The V step hands them
    down to scales, zeros and codebooks, the gradient of a code being the sum over its
    vectors, and lets `parameters` move these. The P step lets `codes` make an update
    $u$ of $g$, and `pv_code_update` moves the codes to the reference $w + b + u$ on a
    subset.

    The buffer $b$ is 0 with `delta_decay` 1, where what a step did not reach is
    forgotten. With 0 it is all of it, so that with `max_fraction` 1 the reference is a
    float weight that is trained by the straight-through rule. Between the two it is the
    share $1 - \mathrm{delta\_decay}$.

    Args:
        codes: An optimizer of the decoded weights, such as `optax.adam`; None leaves
            the codes alone (V steps only).
        parameters: An optimizer of `QuantizedArray.parameters`; None leaves them alone.
        max_fraction, trust_ratio: As in `pv_code_update`, for each weight.
        delta_decay: Static, from 0 to 1.

    Returns:
        `init` and `update`. `update` returns the new weights, not a change of them:
        codes cannot be added.

    Raises:
        TypeError: A static argument is of the wrong kind; in `init` and `update`, a
            leaf of the weights is no `QuantizedArray`.
        ValueError: A number is out of range, or both optimizers are None.

    Derivatives: none: codes jump.
    Cost: per update one decoding of each weight and its transpose, the optimizers, and
        `pv_code_update`; the optimizer of the codes has a state of the decoded size.
    Source: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression".
        There a step of codes is one of a subset; here the subset is the vectors with
        the largest update, as in the authors' code.

    Example:
        >>> wanted = jnp.array([[0.0, 1.0, 2.0, 3.0]])
        >>> weight = softlib.quantize.quantize_groups(jnp.ones((1, 4)), group_size=4)
        >>> tuning = softlib.optim.pv_tuning(optax.sgd(1.0), optax.sgd(0.01))
        >>> gradient = weight.decode() - wanted
        >>> weight, state = tuning.update(gradient, tuning.init(weight), weight)
        >>> print(weight.codes)
        [[0 0 1 2]]
    """
    function = "pv_tuning"
    if codes is None and parameters is None:
        raise ValueError(f"{function}: `codes` or `parameters` must be an optimizer.")
    _require_fraction(function, max_fraction)
    if trust_ratio is not None:
        checks.require_positive_scalars(function, trust_ratio=trust_ratio)
    checks.require_number(function, "delta_decay", delta_decay)
    checks.require_scalar(function, "delta_decay", delta_decay, 0, 1)
    keeps = codes is not None and delta_decay < 1

    def init(weights: PyTree) -> PVState:
        decoded = _decoded(weights)
        return PVState(
            None if codes is None else codes.init(decoded),
            None if parameters is None else parameters.init(_parameters(weights)),
            jax.tree.map(jnp.zeros_like, decoded) if keeps else None,
        )

    def update(
        gradients: PyTree, state: PVState, weights: PyTree
    ) -> tuple[PyTree, PVState]:
        before = weights
        if parameters is not None:
            old = _parameters(weights)
            handed_down = _over(_of_parameters, weights, gradients)
            change, own = parameters.update(handed_down, state.parameters, old)
            new: Any = optax.apply_updates(old, change)
            weights = _over(
                lambda weight, parts: weight.with_parameters(parts), weights, new
            )
            state = state._replace(parameters=own)
        if codes is None:
            return weights, state
        change, own = codes.update(gradients, state.codes, _decoded(before))
        state = state._replace(codes=own)
        if keeps:
            change = jax.tree.map(jnp.add, change, state.buffer)
        reference = jax.tree.map(jnp.add, _decoded(weights), change)
        options = {"max_fraction": max_fraction, "trust_ratio": trust_ratio}
        moved = functools.partial(pv_code_update, **options)
        weights = _over(moved, weights, reference)
        if keeps:
            left = lambda reference, reached: (1 - delta_decay) * (reference - reached)
            buffer = jax.tree.map(left, reference, _decoded(weights))
            state = state._replace(buffer=buffer)
        return weights, state

    return PVTuning(init, update)


def _over(function: Callable[..., Any], weights: PyTree, *rest: PyTree) -> PyTree:
    """The tree of results for each quantized weight."""

    def of(weight: Any, *others: Any) -> Any:
        _require_quantized("pv_tuning", weight)
        return function(weight, *others)

    return jax.tree.map(of, weights, *rest, is_leaf=_is_quantized)


def _decoded(weights: PyTree) -> PyTree:
    return _over(lambda weight: weight.decode(), weights)


def _parameters(weights: PyTree) -> PyTree:
    return _over(lambda weight: weight.parameters, weights)


def _of_parameters(weight: QuantizedArray, gradient: Array) -> Any:
    """The gradient of scale, zero and codebook, from that of the decoded weight."""
    decode = lambda parameters: weight.with_parameters(parameters).decode()
    _, pull = jax.vjp(decode, weight.parameters)
    return pull(gradient.astype(weight.dtype))[0]


def _nearest(weight: QuantizedArray, wanted: Array, chosen: Array, width: int) -> Array:
    """The codes that are nearest to the chosen vectors."""
    vectors = wanted[chosen]
    groups = None
    if weight.scale is not None:
        per_group = weight.size // weight.scale.shape[-1]
        groups = chosen * width // per_group
        scale = weight.scale.reshape(-1)[groups][:, None].astype(wanted.dtype)
        if weight.zero is not None:
            zero = weight.zero.reshape(-1)[groups][:, None].astype(wanted.dtype)
            vectors = vectors - zero
        # A scale of 0 decodes to the same whatever the code.
        vectors = vectors / jnp.where(scale == 0, 1, scale)
    if weight.codebook is not None:
        return assign_codes(vectors, weight.codebook.astype(wanted.dtype))
    lowest = 2 ** (weight.bits - 1) if weight.zero is None else 0
    steps = jnp.round(jnp.where(jnp.isfinite(vectors), vectors, 0)[:, 0]) + lowest
    return jnp.clip(steps, 0, 2**weight.bits - 1).astype(jnp.int32)


def _is_quantized(value: Any) -> bool:
    return isinstance(value, QuantizedArray)


def _require_quantized(function: str, weight: Any) -> None:
    what = "a softlib.quantize.QuantizedArray"
    checks.require_instance(function, "weight", weight, QuantizedArray, what)


def _require_fraction(function: str, max_fraction: object) -> None:
    checks.require_positive_number(function, "max_fraction", max_fraction)
    assert isinstance(max_fraction, int | float)
    if max_fraction > 1:
        raise ValueError(
            f"{function}: `max_fraction` must be at most 1, got {max_fraction}."
        )
