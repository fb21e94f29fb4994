"""Numbers to log beside the loss, to see whether training is stuck in rounding."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._masked_mean import masked_mean


@array_arguments
def softmax_collapse_fraction(
    logits: Float[Array, "*batch V"],
    *,
    dtype: DTypeLike | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""The share of rows whose softmax has collapsed onto one class by rounding.

    That is $\sum_j e^{z_j - \max z} = 1$ exactly: every class but the largest was lost
    in the sum. If the largest is the label, a cross-entropy computed from that sum is
    0, and so is its gradient. The sum is 1 where all other logits lie
    $24 \log 2 = 16.6$ below the largest in float32, 5.5 in bfloat16, 7.6 in float16,
    36.7 in float64. `softmax_cross_entropy` of class ids does not use that sum and has
    a gradient up to a margin of 87 to 103; this is how far other code would have come.

    Args:
        logits: Unnormalised log-probabilities. A row of one class is always collapsed.
        dtype: Static; that of the sum, as narrow as float16 or bfloat16. None is the
            dtype in which this library computes losses: float32 for anything narrower.
        where: True for the rows that count; broadcasts to the batch shape.

    Returns:
        A share in [0, 1], float32 (float64 for float64 logits); 0 without rows. A row
        with a NaN, or with -inf alone, is not collapsed.

    Raises:
        TypeError: `logits` or `dtype` is not floating, or `where` is not boolean.
        ValueError: `logits` have no axis of classes, `dtype` is float64 and 64-bit
            arrays are off, or `where` does not broadcast.

    Derivatives: 0.
    Cost: two passes over `logits`.
    Source: "Grokking at the Edge of Numerical Stability".

    Example:
        >>> logits = jnp.array([[20.0, 0.0], [10.0, 0.0]])
        >>> print(softlib.metrics.softmax_collapse_fraction(logits))
        0.5
        >>> print(softlib.metrics.softmax_collapse_fraction(logits, dtype="bfloat16"))
        1.0
    """
    function = "softmax_collapse_fraction"
    logits = lax.stop_gradient(jnp.asarray(logits))
    checks.require_floating(function, logits=logits)
    checks.require_rank(function, "logits", logits, 1, "(..., V)")
    wide = accumulator_dtype(logits)
    dtype = jnp.dtype(wide if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{function}: `dtype` must be floating, got {dtype}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{function}: `dtype` must be available, got {dtype}, for which 64-bit "
            "arrays have to be on (jax.enable_x64)."
        )
    computed = accumulator_dtype(dtype)
    z = logits.astype(computed)
    top = z.max(-1, keepdims=True, initial=-jnp.inf)
    terms = jnp.exp(z - jnp.where(top == -jnp.inf, 0, top))
    total = _rounded(_rounded(terms, dtype).sum(-1), dtype)
    return _share(function, total == 1, where).astype(wide)


@array_arguments
def zero_loss_fraction(
    losses: Float[Array, "*shape"], *, where: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
    """The share of losses that are exactly 0: examples that train nothing any more.

    Args:
        losses: One for each example.
        where: True for the examples that count; broadcasts to `losses`. Without it the
            zeros of padding count as well.

    Returns:
        A share in [0, 1], float32 (float64 for float64 losses); 0 without losses.

    Raises:
        TypeError: `losses` is not floating, or `where` is not boolean.
        ValueError: `where` does not broadcast.

    Derivatives: 0.
    Cost: one pass over `losses`.
    Source: "Grokking at the Edge of Numerical Stability".

    Example:
        >>> print(softlib.metrics.zero_loss_fraction(jnp.array([0.0, 1e-30])))
        0.5
    """
    losses = jnp.asarray(losses)
    function = "zero_loss_fraction"
    checks.require_floating(function, losses=losses)
    return _share(function, losses == 0, where).astype(accumulator_dtype(losses))


@array_arguments
def naive_loss_minimization_alignment(
    grads: PyTree, params: PyTree
) -> PyTree[Float[Array, ""] | None]:
    r"""The cosine of $-g$ and $w$ for every tensor: near 1, training only scales them.

    For a network without biases whose output grows with the norm of its weights, the
    loss of data that are fitted falls by scaling the weights alone, without a change of
    any decision. The cosine near 1, and a `softmax_collapse_fraction` that grows, say
    that this is what happens; `softlib.optim.perp_grad` takes that direction away.

    Args:
        grads: Gradients of the loss, a pytree of floating arrays; None is kept as None.
        params: The weights, a pytree of the same structure.

    Returns:
        A pytree of the same structure with a number in [-1, 1] for every tensor,
        float32 (float64 for float64); 0 where gradient or weight is 0.

    Raises:
        TypeError: A leaf is not floating.
        ValueError: The structures differ, or the shapes of two leaves do.

    Derivatives: forward and reverse mode, where neither is 0.
    Cost: three passes over gradients and weights.
    Source: "Grokking at the Edge of Numerical Stability", its naive loss minimization.
        Both are scaled by their largest entry first: late in training the squares of a
        gradient are below what float32 holds.

    Example:
        >>> weight = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 1.0])}
        >>> grads = {"a": jnp.array([-6.0, -8.0]), "b": jnp.array([0.0, 1e-30])}
        >>> found = softlib.metrics.naive_loss_minimization_alignment(grads, weight)
        >>> print(found["a"].round(4), found["b"])
        1.0 -1.0
    """
    function = "naive_loss_minimization_alignment"

    def cosine(grad: Array | None, param: Array) -> Array | None:
        if grad is None:
            return None
        grad, param = jnp.asarray(grad), jnp.asarray(param)
        checks.require_floating(function, grads=grad, params=param)
        checks.require_shape(function, "grads", grad, param.shape, "that of `params`")
        dtype = accumulator_dtype(grad, param)
        g, w = _scaled(grad.astype(dtype)), _scaled(param.astype(dtype))
        # Sums of products, not jnp.vdot, which a TPU computes in bfloat16.
        norms = (g * g).sum() * (w * w).sum()
        zero = norms == 0
        found = (-g * w).sum() / jnp.sqrt(jnp.where(zero, 1, norms))
        return jnp.where(zero, 0, jnp.clip(found, -1, 1))

    return jax.tree.map(cosine, grads, params, is_leaf=lambda leaf: leaf is None)


def _share(function: str, hits: Array, where: Array | None) -> Array:
    if where is not None:
        where = jnp.asarray(where)
        checks.require_boolean(function, where=where)
        why = "the batch shape"
        checks.require_broadcastable(function, "where", where, hits.shape, why)
    return masked_mean(hits, where)


def _rounded(values: Array, dtype: DTypeLike) -> Array:
    """The values as `dtype` holds them."""
    # XLA may drop a cast to a narrow dtype and back.
    about = jnp.finfo(dtype)
    return lax.reduce_precision(values, about.nexp, about.nmant)


def _scaled(values: Array) -> Array:
    """Divided by the largest magnitude, so that no square overflows or underflows."""
    largest = lax.stop_gradient(jnp.abs(values).max(initial=0))
    return values / jnp.where(largest == 0, 1, largest)
