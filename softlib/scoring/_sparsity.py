"""Activation sparsity of feed-forward layers at a given loss of quality."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar


@array_arguments
def tail_truncation_error(
    activations: Float[Array, "*batch F"],
    down_kernel: Float[Array, "F D"],
    *,
    threshold: Scalar,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Relative error of a layer's output if neurons of small contributions are cut.

    $$\mathrm{CETT}(\tau) = \mathrm{mean}_n
        \frac{\lVert \sum_{i: u_{ni} < \tau} a_{ni} w_i \rVert}
        {\lVert \sum_i a_{ni} w_i \rVert}, \qquad
        u_{ni} = |a_{ni}|\, \lVert w_i \rVert$$

    (cumulative error of tail truncation), for activations $a$ of the F neurons and the
    rows $w_i$ of the kernel that takes them to the output.

    Args:
        activations: Of a gated layer the product of gate and value.
        down_kernel: One row of output weights per neuron.
        threshold: $\tau \geq 0$; a number or a scalar array.
        where: True for the tokens that count; broadcasts to the batch. Others may hold
            anything.

    Returns:
        A number, 0 if nothing is cut and about 1 if all is; float32 (float64 if an
        argument is float64). A token whose output is 0 counts with error 0; without
        tokens it is 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `threshold` is negative.

    Derivatives: forward and reverse, with respect to activations and kernel; the
        selection, and so the threshold, has none.
    Cost: two products of N F D, for N tokens.
    Source: "Sparsing Law: Towards Large Language Models with Greater Activation
        Sparsity".

    Example:
        >>> activations, kernel = jnp.array([[3.0, 4.0]]), jnp.eye(2)
        >>> error = softlib.scoring.tail_truncation_error
        >>> print(error(activations, kernel, threshold=3.5).round(3))
        0.6
    """
    function = "tail_truncation_error"
    layer = _Layer.of(function, activations, down_kernel, where)
    checks.require_scalar(function, "threshold", threshold, 0, math.inf)
    return layer.error(jnp.asarray(threshold, layer.contributions.dtype))


@array_arguments
def truncation_threshold(
    activations: Float[Array, "*batch F"],
    down_kernel: Float[Array, "F D"],
    *,
    error: Scalar,
    num_steps: int = 30,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""The threshold at which the truncation of a layer's neurons reaches an error.

    Bisection of $\tau$ between 0 and the greatest contribution. The error rises with
    the threshold for the most part, but not always, as contributions of neurons may
    cancel: what is found is one place where it comes to exceed `error`. At the
    threshold itself it does not. Take the same error for all layers of a model.

    Args:
        activations: As those of `tail_truncation_error`.
        down_kernel: One row of output weights per neuron.
        error: The greatest error allowed, in $[0, 1]$; a number or a scalar array.
        num_steps: Static number of bisections; each halves the interval. 30 are about
            as exact as float32.
        where: True for the tokens that count; broadcasts to the batch.

    Returns:
        The threshold, float32 (float64 if an argument is float64); exactly 0 for an
        error of 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or `num_steps` is no Python
            int.
        ValueError: Shapes do not fit together, or a number is out of range.

    Derivatives: none; a constant to differentiation.
    Cost: `num_steps` products of N F D, for N tokens.
    Source: "Sparsing Law: Towards Large Language Models with Greater Activation
        Sparsity". Deviation: bisection of real numbers instead of a search in a grid up
        to the 99 % quantile, in which large errors are out of reach.

    Example:
        >>> activations, kernel = jnp.array([[3.0, 4.0]]), jnp.eye(2)
        >>> threshold = softlib.scoring.truncation_threshold
        >>> print(threshold(activations, kernel, error=0.7).round(3))
        4.0
    """
    function = "truncation_threshold"
    layer = _Layer.of(function, activations, down_kernel, where)
    checks.require_scalar(function, "error", error, 0, 1)
    checks.require_positive_integer(function, "num_steps", num_steps)
    allowed = jnp.asarray(error, layer.contributions.dtype)
    return _bisected(num_steps, *lax.stop_gradient((layer, allowed)))


@array_arguments
def truncate_activations(
    activations: Float[Array, "*batch F"],
    down_kernel: Float[Array, "F D"],
    *,
    threshold: Scalar,
) -> Float[Array, "*batch F"]:
    r"""The activations with 0 for neurons whose contribution is below a threshold.

    Args:
        activations: As those of `tail_truncation_error`.
        down_kernel: One row of output weights per neuron.
        threshold: $\tau \geq 0$; a number or a scalar array. 0 cuts nothing.

    Returns:
        Activations in their dtype.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `threshold` is negative.

    Derivatives: forward and reverse, 1 for the neurons that are kept; the selection has
        none.
    Cost: one pass over activations and kernel.
    Source: "Sparsing Law: Towards Large Language Models with Greater Activation
        Sparsity".

    Example:
        >>> activations, kernel = jnp.array([[3.0, 4.0]]), jnp.eye(2)
        >>> truncate = softlib.scoring.truncate_activations
        >>> print(truncate(activations, kernel, threshold=3.5))
        [[0. 4.]]
    """
    function = "truncate_activations"
    return jnp.where(
        _active(function, activations, down_kernel, threshold), activations, 0
    )


@array_arguments
def activation_ratio(
    activations: Float[Array, "*batch F"],
    down_kernel: Float[Array, "F D"],
    *,
    threshold: Scalar,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Share of the neurons whose contribution reaches a threshold, per token.

    The sparsity of the layer is 1 less its mean.

    Args:
        activations: As those of `tail_truncation_error`.
        down_kernel: One row of output weights per neuron.
        threshold: $\tau \geq 0$; a number or a scalar array. At 0 all are active.
        where: True for the tokens that count; broadcasts to the batch. Others may hold
            anything.

    Returns:
        A share per token, float32 (float64 if an argument is float64); 0 where `where`
        is False.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `threshold` is negative.

    Derivatives: none, it is a count.
    Cost: one pass over activations and kernel.
    Source: "Sparsing Law: Towards Large Language Models with Greater Activation
        Sparsity".

    Example:
        >>> activations, kernel = jnp.array([[3.0, 4.0]]), jnp.eye(2)
        >>> print(softlib.scoring.activation_ratio(activations, kernel, threshold=3.5))
        [0.5]
    """
    function = "activation_ratio"
    active = _active(function, activations, down_kernel, threshold)
    batch, neurons = active.shape[:-1], active.shape[-1]
    where = checks.checked_where(function, where, batch, "the batch shape")
    dtype = accumulator_dtype(activations, down_kernel)
    share = active.sum(-1).astype(dtype) / max(neurons, 1)
    return jnp.where(where, share, 0)


class PerplexitySparsity(NamedTuple):
    """The truncation error of layers that costs a given increase of perplexity.

    Attributes:
        error: The greatest error found for which the perplexity is within the limit:
            the `error` of `truncation_threshold`.
        perplexity_ratio: Perplexity at this error over that of the dense model.

    Derivatives: none.
    Cost: two numbers.

    Example:
        >>> found = softlib.scoring.perplexity_sparsity(lambda error: 2 + error**2)
        >>> print(found.perplexity_ratio.round(3))
        1.01
    """

    error: Float[Array, ""]
    perplexity_ratio: Float[Array, ""]


@array_arguments
def perplexity_sparsity(
    loss: Callable[[Float[Array, ""]], ArrayLike],
    *,
    percent: float = 1.0,
    num_steps: int = 12,
) -> PerplexitySparsity:
    r"""The truncation error at which perplexity is p % above that of the dense model.

    Bisection of the error in $[0, 1]$, so that activation ratios of models are compared
    at equal quality (PPL-p%). With the error of the result, threshold each layer by
    `truncation_threshold` and count by `activation_ratio`.

    Args:
        loss: Takes an error, a scalar array, and returns the mean loss per token in
            nats of the model whose layers are truncated to it; that of 0 is the dense
            model. It is called `num_steps` + 1 times, in a loop of Python: it may go
            over a data set, and should compile its own programs.
        percent: Static $p > 0$.
        num_steps: Static number of bisections.

    Returns:
        `PerplexitySparsity`, in the dtype of the loss. The error is found to
        $2^{-n}$ after n bisections, an error of 1 too.

    Raises:
        TypeError: `percent` is no Python number, or `num_steps` no Python int.
        ValueError: One of them is not positive, or `loss` returns no scalar.

    Derivatives: none; constants to differentiation.
    Cost: `num_steps` + 1 evaluations of `loss`.
    Source: "Sparsing Law: Towards Large Language Models with Greater Activation
        Sparsity".

    Example:
        >>> found = softlib.scoring.perplexity_sparsity(lambda error: 2 + error**2)
        >>> print(found.error.round(3))
        0.1
    """
    function = "perplexity_sparsity"
    checks.require_positive_number(function, "percent", percent)
    checks.require_positive_integer(function, "num_steps", num_steps)

    def of(error: Array) -> Array:
        found = lax.stop_gradient(jnp.asarray(loss(error)))
        if found.shape != ():
            raise ValueError(
                f"{function}: `loss` must return a scalar, got shape {found.shape}."
            )
        return found.astype(accumulator_dtype(found))

    zero = jnp.zeros((), jnp.float32)
    dense = of(zero)
    low, high = zero, jnp.ones_like(zero)
    best = dense
    for _ in range(num_steps):
        middle = (low + high) / 2
        found = of(middle)
        fits = found - dense <= math.log1p(percent / 100)
        low, high = jnp.where(fits, middle, low), jnp.where(fits, high, middle)
        best = jnp.where(fits, found, best)
    return PerplexitySparsity(low, jnp.exp(best - dense))


# -------------------------------------------------------------------------------- layer
class _Layer(NamedTuple):
    """Activations that count, with what does not depend on the threshold; a pytree."""

    activations: Float[Array, "tokens F"]
    kernel: Float[Array, "F D"]
    contributions: Float[Array, "tokens F"]
    where: Bool[Array, " tokens"]

    @classmethod
    def of(
        cls, function: str, activations: Array, kernel: Array, where: Array | None
    ) -> "_Layer":
        _check(function, activations, kernel)
        batch, neurons = activations.shape[:-1], activations.shape[-1]
        where = checks.checked_where(function, where, batch, "the batch shape")
        dtype = accumulator_dtype(activations, kernel)
        a = jnp.where(where[..., None], activations, 0)
        a, kernel = a.reshape(-1, neurons).astype(dtype), kernel.astype(dtype)
        return cls(a, kernel, _contributions(a, kernel), where.reshape(-1))

    def error(self, threshold: Float[Array, ""]) -> Float[Array, ""]:
        tail = jnp.where(self.contributions < threshold, self.activations, 0)
        whole, cut = self._output(self.activations), self._output(tail)
        zero = whole == 0
        ratios = jnp.where(zero, 0, cut / jnp.where(zero, 1, whole))
        count = jnp.maximum(self.where.sum(), 1).astype(ratios.dtype)
        return jnp.where(self.where, ratios, 0).sum() / count

    def _output(self, activations: Array) -> Float[Array, " tokens"]:
        """The length of each token's output."""
        y = jnp.matmul(activations, self.kernel, precision=lax.Precision.HIGHEST)
        return _length(y)


@compiled_once(0)
def _bisected(
    num_steps: int, layer: _Layer, allowed: Float[Array, ""]
) -> Float[Array, ""]:
    """The greatest threshold found that keeps the error; 0 for an error of 0."""

    def halved(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) / 2
        fits = layer.error(middle) <= allowed
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    high = layer.contributions.max(initial=0)
    all_fit = layer.error(high) <= allowed
    low, _ = lax.fori_loop(0, num_steps, halved, (jnp.zeros_like(high), high))
    return jnp.where(allowed > 0, jnp.where(all_fit, high, low), 0)


def _check(function: str, activations: Array, kernel: Array) -> None:
    checks.require_floating(function, activations=activations, down_kernel=kernel)
    checks.require_rank(function, "activations", activations, 1, "(..., F)")
    neurons = activations.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != neurons:
        raise ValueError(
            f"{function}: `down_kernel` must have shape ({neurons}, D), one row per "
            f"neuron, got {kernel.shape}."
        )


def _active(
    function: str, activations: Array, kernel: Array, threshold: Scalar
) -> Array:
    _check(function, activations, kernel)
    checks.require_scalar(function, "threshold", threshold, 0, math.inf)
    dtype = accumulator_dtype(activations, kernel)
    found = _contributions(activations.astype(dtype), kernel.astype(dtype))
    return ~(found < jnp.asarray(threshold, dtype))


def _contributions(activations: Array, kernel: Array) -> Array:
    lengths = _length(lax.stop_gradient(kernel))
    sizes = jnp.abs(lax.stop_gradient(activations))
    return sizes * lengths.reshape(*(1,) * (sizes.ndim - 1), -1)


def _length(y: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Euclidean length, whose derivative at 0 is 0."""
    squares = (y * y).sum(-1)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))
