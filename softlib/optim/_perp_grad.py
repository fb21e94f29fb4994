"""Gradients projected perpendicular to their weights."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar

type Mask = PyTree | Callable[[Any], PyTree]


@array_arguments
def perp_grad(
    *,
    rescale: bool = False,
    epsilon: Scalar = 0.0,
    mask: Mask | None = None,
    axes: int | tuple[int, ...] | None = None,
) -> optax.GradientTransformation:
    r"""Projects every gradient on what is perpendicular to its weight.

    With $w$ a weight as one long vector and $g$ its gradient,

    $$g_\perp = g - \frac{\langle w, g \rangle}{\langle w, w \rangle}\, w .$$

    A network that fits its data can lower a cross-entropy by scaling its weights alone,
    until the softmax rounds to one class and learning stops. Without that direction it
    has to change its decisions, and generalises early where it would do so late or
    never. Chain it before the optimiser, `optax.chain(perp_grad(), optax.adam(1e-2))`,
    and weight decay behind both, as `optax.adamw` has it: a decay in front is parallel
    to the weight and projected away.

    Args:
        rescale: Static; give $g_\perp$ the norm of $g$, as the paper's code does and
            the paper does not. It matters to SGD and little to Adam.
        epsilon: Added to $\langle w, w \rangle$; at least 0, a number is static, an
            array traced.
        mask: Which weights are projected: a pytree of booleans, each for a weight or a
            whole subtree, or a function of the weights that returns one. None projects
            all whose vectors have more than one element: to a single number nothing is
            perpendicular, so that it would never be trained. Biases and scales of norms
            are worth leaving out.
        axes: Static; the axes of a weight that make a vector, as `axes=0` for the
            inputs of every neuron of a kernel (inputs, outputs). They must be axes of
            every projected weight. None takes the weight as one vector.

    Returns:
        A transformation without a state (`optax.EmptyState`), whose `update` needs
        the weights. Updates keep their dtype; products and sums are in float32 or
        wider. The gradient of a weight that is 0 is unchanged. One that is parallel to
        its weight, up to a few roundings of float32, becomes exactly 0, also with
        `rescale`: rounding errors are not scaled up. Leaves that are None or
        `optax.MaskedNode` stay. Of weights that `jax.jit` divides over devices the
        products are those of the whole; inside `jax.shard_map` those of a device's own
        part.

    Raises:
        TypeError: `axes` or `rescale` is of the wrong kind; in `update`, a projected
            leaf is not floating.
        ValueError: `epsilon` is negative; in `update`, `params` is None, or `axes` are
            not axes of a weight.

    Derivatives: of the updates with respect to gradients and weights, forward and
        reverse mode, where they are not 0 and not parallel.
    Cost: a few passes over gradients and weights, no memory.
    Source: "Grokking at the Edge of Numerical Stability", its perpendicular gradient.
        Deviations: weights are scaled by their largest entry, so that squares neither
        overflow nor underflow; the projection is applied twice, which in exact
        arithmetic is once.

    Example:
        >>> transformation = softlib.optim.perp_grad()
        >>> weight, gradient = jnp.array([2.0, 0.0]), jnp.array([3.0, 1.0])
        >>> state = transformation.init(weight)
        >>> print(transformation.update(gradient, state, weight)[0])
        [0. 1.]
    """
    function = "perp_grad"
    if not isinstance(rescale, bool):
        raise TypeError(
            f"{function}: `rescale` must be a Python bool (it is static), "
            f"got {type(rescale).__name__}."
        )
    checks.require_scalar(function, "epsilon", epsilon, 0, jnp.inf)
    several = axes if isinstance(axes, tuple) else (axes,)
    if axes is not None and not all(type(axis) is int for axis in several):
        raise TypeError(
            f"{function}: `axes` must be an int, a tuple of ints or None, got {axes!r}."
        )

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                f"{function}: `params` must be the weights, got None: call "
                "`update(updates, state, params)`."
            )

        def project(gradient: Array | None, weight: Array | None) -> Array | None:
            if gradient is None or weight is None:
                return gradient
            gradient, weight = jnp.asarray(gradient), jnp.asarray(weight)
            if mask is None and weight.size <= 1:
                return gradient
            checks.require_floating(function, updates=gradient, params=weight)
            checks.require_axes(function, "axes", axes, weight.ndim)
            if mask is None and _length(weight, axes) <= 1:
                return gradient
            return _perpendicular(gradient, weight, axes, epsilon, rescale)

        if mask is None:
            return _map(project, updates, params), state
        chosen = mask(params) if callable(mask) else mask
        # A boolean may stand for a whole subtree.
        projected = jax.tree.map(
            lambda yes, gradients, weights: (
                _map(project, gradients, weights) if yes else gradients
            ),
            chosen,
            updates,
            params,
        )
        return projected, state

    return optax.GradientTransformation(init, update)


def _length(weight: Array, axes: int | tuple[int, ...] | None) -> int:
    """Number of elements of a vector."""
    every = range(weight.ndim) if axes is None else axes
    several = (every,) if isinstance(every, int) else every
    return math.prod(weight.shape[axis] for axis in several)


def _map(function: Callable[..., Any], updates: Any, params: Any) -> Any:
    return jax.tree.map(function, updates, params, is_leaf=lambda leaf: leaf is None)


def _perpendicular(
    gradient: Array,
    weight: Array,
    axes: int | tuple[int, ...] | None,
    epsilon: Scalar,
    rescale: bool,
) -> Array:
    dtype = accumulator_dtype(gradient, weight)
    # Sums of products, not jnp.vdot, which a TPU computes in bfloat16.
    dot = lambda a, b: (a * b).sum(axes, keepdims=True)
    w, largest = _scaled(weight.astype(dtype), axes)
    g, unit = _scaled(gradient.astype(dtype), axes)
    # May be infinite where the square underflows, but never 0 / 0.
    added = jnp.asarray(epsilon, dtype)
    added = jnp.where(added == 0, 0, added / (largest * largest))
    square = dot(w, w)
    square = jnp.where(square == 0, 1, square)
    found = g - dot(w, g) / (square + added) * w
    if isinstance(epsilon, int | float) and epsilon == 0:
        # Projects again: removes what rounding of a long sum left along w.
        found = found - dot(w, found) / square * w
    before, after = jnp.sqrt(dot(g, g)), jnp.sqrt(dot(found, found))
    # Only rounding errors are left, which Adam or `rescale` would blow up.
    parallel = after <= 4 * jnp.finfo(dtype).eps * before
    scale = unit
    if rescale:
        scale = scale * before / jnp.where(parallel, 1, after)
    return jnp.where(parallel, 0, found * scale).astype(gradient.dtype)


def _scaled(values: Array, axes: int | tuple[int, ...] | None) -> tuple[Array, Array]:
    """The values divided by their largest magnitude (1 if all are 0), and it."""
    largest = jnp.abs(values).max(axes, keepdims=True, initial=0)
    largest = jnp.where(largest == 0, 1, largest)
    return values / largest, largest
