"""Networks that predict a softmax temperature per row, for Flax NNX."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

# A row shorter than this has no direction.
SHORTEST = 1e-12


class TempNet(nnx.Module):
    r"""A temperature per row from what a language model knows about it.

    With $x$ of length 1, $u = W_2\, \sigma(W_1 x + b_1) + b_2$ of M features,

    $$w = \mathrm{softmax}(u / e^{\phi}), \qquad
      v = \sum_m a_m \left(w_m - \tfrac{1}{M}\right) u_m + c, \qquad
      \tau = \tau_{\min} + (\tau_{\max} - \tau_{\min})\, \sigma(v) .$$

    The pooling has the form of the best temperature, which depends on how far a softmax
    is from uniform. Train it by `robust_softmax_cross_entropy`, together with
    the model (whose output it should see under `jax.lax.stop_gradient`) or afterwards
    on a frozen one; sample from `softmax(z / tau)`.

    Args:
        dim: Size of the last axis of the input: hidden features or, for a small
            vocabulary, logits.
        hidden: M; both inner layers have this size.
        temperature_min: $\tau_{\min} > 0$; static.
        temperature_max: Static, larger.
        dropout_rate: Of the features after $\sigma$, while training.
        param_dtype: Dtype of the parameters.
        kernel_init: Initialiser of $W_1$ and $W_2$.
        rngs: Key source; also of the dropout.

    Raises:
        ValueError: The temperatures are not positive or not in order.
        TypeError: They are no Python numbers.

    Attributes:
        inner: The layer $W_1, b_1$.
        outer: The layer $W_2, b_2$.
        log_sharpness: $\phi$, starts at 0.
        pooling: $a$, starts at 1.
        offset: $c$, starts at 0.

    Derivatives: in everything; a row of zeros has no direction, and gradient 0.
    Cost: two products of M features per row.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO", whose language models feed it logits. Hidden features keep the memory
        of a large vocabulary out of it.

    Example:
        >>> network = softlib.nn.TempNet(
        ...     8, 16, temperature_min=0.5, temperature_max=5.0, rngs=nnx.Rngs(0)
        ... )
        >>> tau = network(jnp.ones((2, 3, 8)))
        >>> print(tau.shape, bool((tau > 0.5).all() & (tau < 5).all()))
        (2, 3) True
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 256,
        *,
        temperature_min: float,
        temperature_max: float,
        dropout_rate: float = 0.0,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        self.range = _checked_range("TempNet", temperature_min, temperature_max)
        options = {"param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        self.inner = nnx.Linear(dim, hidden, **options)
        self.outer = nnx.Linear(hidden, hidden, **options)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.log_sharpness = nnx.Param(jnp.zeros((), param_dtype))
        self.pooling = nnx.Param(jnp.ones(hidden, param_dtype))
        self.offset = nnx.Param(jnp.zeros((), param_dtype))

    @array_arguments
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """Returns the temperatures, float32 (float64 if the input is float64).

        Args:
            x: Features or logits; only the direction of a row matters. What a model is
                trained through should not be trained through this too: pass
                `jax.lax.stop_gradient(x)`.
        """
        u = self.outer(self.dropout(jax.nn.sigmoid(self.inner(_direction(x)))))
        return _temperature(
            self.range, u, u, self.log_sharpness, self.pooling, self.offset
        )


class PrototypeTempNet(nnx.Module):
    r"""A temperature per example from its likeness to learned prototypes.

    For contrastive learning, with the features of an image or a text: $u = \sigma(W x +
    b)$, its products $q_m = \langle u, P_m / \lVert P_m \rVert \rangle$ with M
    prototypes, and the pooling of `TempNet` of $\sigma(q)$ by $\mathrm{softmax}(q /
    e^{\phi})$.

    Args:
        dim: Size of the last axis of the input.
        hidden: Size of $u$ and of a prototype.
        num_prototypes: M.
        temperature_min: $\tau_{\min} > 0$; static.
        temperature_max: Static, larger.
        dropout_rate: Of $u$, while training.
        param_dtype: Dtype of the parameters.
        kernel_init: Initialiser of $W$.
        prototype_init: Initialiser of $P$.
        rngs: Key source; also of the dropout.

    Raises:
        ValueError: The temperatures are not positive or not in order.
        TypeError: They are no Python numbers.

    Attributes:
        inner: The layer $W, b$.
        prototypes: $P$, one row each.
        log_sharpness: $\phi$, starts at $\log 0.01$.
        pooling: $a$, starts at 1.
        offset: $c$, starts at 0.

    Derivatives: in everything.
    Cost: products of `hidden` and of M features per row.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO".

    Example:
        >>> network = softlib.nn.PrototypeTempNet(
        ...     8, 4, 16, temperature_min=0.01, temperature_max=0.1, rngs=nnx.Rngs(0)
        ... )
        >>> print(network(jnp.ones((5, 8))).shape)
        (5,)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_prototypes: int,
        *,
        temperature_min: float,
        temperature_max: float,
        dropout_rate: float = 0.0,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        prototype_init: Initializer = initializers.normal(1.0),
        rngs: nnx.Rngs,
    ):
        self.range = _checked_range(
            "PrototypeTempNet", temperature_min, temperature_max
        )
        self.inner = nnx.Linear(
            dim, hidden, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.prototypes = nnx.Param(
            prototype_init(rngs.params(), (num_prototypes, hidden), param_dtype)
        )
        self.log_sharpness = nnx.Param(jnp.full((), math.log(0.01), param_dtype))
        self.pooling = nnx.Param(jnp.ones(num_prototypes, param_dtype))
        self.offset = nnx.Param(jnp.zeros((), param_dtype))

    @array_arguments
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """Returns the temperatures, float32 (float64 if the input is float64).

        Args:
            x: Features, usually of length 1; see `TempNet` for what is trained.
        """
        u = self.dropout(jax.nn.sigmoid(self.inner(_wide(x))))
        likeness = u @ _direction(self.prototypes[...]).T
        return _temperature(
            self.range,
            likeness,
            jax.nn.sigmoid(likeness),
            self.log_sharpness,
            self.pooling,
            self.offset,
        )


def _wide(x: Array) -> Array:
    return x.astype(accumulator_dtype(x))


def _direction(x: Array) -> Array:
    x = _wide(x)
    squared = (x**2).sum(-1, keepdims=True)
    some = squared > SHORTEST**2
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, squared, 1)), 0)


def _temperature(
    ends: tuple[float, float],
    u: Array,
    pooled: Array,
    log_sharpness: nnx.Param,
    pooling: nnx.Param,
    offset: nnx.Param,
) -> Float[Array, "*batch"]:
    """The pooling of both networks: weights from `u`, of what is `pooled`."""
    w = jax.nn.softmax(u / jnp.exp(log_sharpness[...]), axis=-1)
    centred = (w - 1 / u.shape[-1]) * pooled
    v = centred @ pooling[...] + offset[...]
    low, high = ends
    return low + (high - low) * jax.nn.sigmoid(v)


def _checked_range(
    function: str, temperature_min: float, temperature_max: float
) -> tuple[float, float]:
    checks.require_positive_number(function, "temperature_min", temperature_min)
    checks.require_positive_number(function, "temperature_max", temperature_max)
    if temperature_max <= temperature_min:
        raise ValueError(
            f"{function}: `temperature_max` must be above `temperature_min` "
            f"({temperature_min}), got {temperature_max}."
        )
    return float(temperature_min), float(temperature_max)
