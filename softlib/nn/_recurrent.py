"""Layers of linear systems with varying parameters, for Flax NNX.

Each projects its inputs to the arguments of one function of `softlib.recurrent` and the
result back. `initial_state=` and `return_state=True` are those of that function, so
that a layer continues a sequence, or decodes it token by token with T = 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.recurrent import (
    LinearAttentionState,
    RecurrentResult,
    gated_linear_attention,
    linear_attention,
    normalized_attention,
    quasi_lstm,
    selective_scan,
)

from ._head_sizes import head_sizes

# Steps of a state-space model start log-uniformly in this range, per channel or head.
STEP_RANGE = (1e-3, 0.1)
RATE_RANGE = (1.0, 16.0)  # of the scalar rates of a head


class LinearAttention(nnx.Module):
    r"""A layer of `softlib.recurrent.linear_attention`.

    Args:
        features: Size of the last axis of inputs and outputs.
        num_heads: Number of query heads.
        num_key_heads: Number of key heads, a divisor of `num_heads`; None is as many.
        head_features: Size of a query and of a key; None is `features` / `num_heads`.
            The state of a head has as many rows, or what the feature map makes of it.
        value_features: Size of a value; None is `features` / `num_heads`.
        feature_map: As in `softlib.recurrent.linear_attention`.
        normalizer: Static, "sum" or "none".
        scale: Multiplies the queries; None is one over the root of their size.
        chunk_size: As in `softlib.recurrent.linear_attention`.
        use_bias: Whether the projections have a bias.
        dtype: Dtype of the projections; None follows inputs and parameters.
        param_dtype: Dtype of the parameters.
        kernel_init: Initialiser of the projections.
        rngs: Key source.

    Example:
        >>> layer = softlib.nn.LinearAttention(8, 2, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 5, 8))
        >>> part = layer(x[:, :4], return_state=True)
        >>> last = layer(x[:, 4:], initial_state=part.state)
        >>> print(bool(jnp.allclose(last, layer(x)[:, 4:], atol=1e-5)))
        True
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        head_features: int | None = None,
        value_features: int | None = None,
        feature_map: str | Callable[[Array], Array] = "elu1",
        normalizer: Literal["sum", "none"] = "sum",
        scale: float | None = None,
        chunk_size: int | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        self.feature_map = feature_map
        self.normalizer = normalizer
        self.chunk_size = chunk_size
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        sizes = (num_key_heads, head_features, value_features)
        self.heads = _Heads(
            "LinearAttention", linear, features, num_heads, *sizes, scale
        )

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch T D"],
        *,
        is_causal: bool = True,
        mask: Bool[Array, "*batch T"] | None = None,
        initial_state: LinearAttentionState | None = None,
        return_state: bool = False,
    ) -> Float[Array, "*batch T D"] | RecurrentResult:
        """Returns the outputs, with the state if asked for.

        Args:
            inputs: A sequence.
            is_causal, mask, initial_state: As in `softlib.recurrent.linear_attention`.
            return_state: As in `softlib.recurrent.linear_attention`.
        """
        found = linear_attention(
            *self.heads(inputs),
            feature_map=self.feature_map,
            normalizer=self.normalizer,
            is_causal=is_causal,
            mask=mask,
            chunk_size=self.chunk_size,
            initial_state=initial_state,
            return_state=True,
        )
        return _returned(found, self.heads.out, return_state)


class _PlainAttention(nnx.Module):
    """Heads of linear attention without a feature map, and parameters of its own."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        head_features: int | None = None,
        value_features: int | None = None,
        scale: float | None = None,
        chunk_size: int | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        self.chunk_size = chunk_size
        own: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": kernel_init,
            "rngs": rngs,
        }
        linear = functools.partial(nnx.LinearGeneral, use_bias=use_bias, **own)
        sizes = (num_key_heads, head_features, value_features)
        name = type(self).__name__
        self.heads = _Heads(name, linear, features, num_heads, *sizes, scale)
        linear = functools.partial(nnx.Linear, features, **own)
        self._begin(linear, num_heads, num_key_heads or num_heads, rngs)

    def _begin(
        self, linear: Callable[..., Any], num_heads: int, key_heads: int, rngs: nnx.Rngs
    ) -> None:
        """Makes the further parameters; `linear` maps tokens to as many numbers."""
        raise NotImplementedError


class NormalizedAttention(_PlainAttention):
    r"""A layer of `softlib.recurrent.normalized_attention`.

    The logarithm of the normaliser is a linear function of the token, one per head.

    Args:
        features, num_heads, num_key_heads: As in `LinearAttention`.
        head_features, value_features, scale, chunk_size: As in `LinearAttention`.
        use_bias: Whether the projections have a bias; the normaliser always has one.
        dtype, param_dtype, kernel_init, rngs: As in `LinearAttention`.

    Example:
        >>> layer = softlib.nn.NormalizedAttention(8, 2, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.ones((1, 5, 8))).shape)
        (1, 5, 8)
    """

    def _begin(self, linear, num_heads, key_heads, rngs):
        self.log_normalizer = linear(num_heads)

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch T D"],
        *,
        is_causal: bool = True,
        mask: Bool[Array, "*batch T"] | None = None,
        initial_state: LinearAttentionState | None = None,
        return_state: bool = False,
    ) -> Float[Array, "*batch T D"] | RecurrentResult:
        """Returns the outputs, with the state if asked for.

        Args:
            inputs: A sequence.
            is_causal, mask, initial_state: As in `softlib.recurrent.linear_attention`.
            return_state: As in `softlib.recurrent.linear_attention`.
        """
        found = normalized_attention(
            *self.heads(inputs),
            self.log_normalizer(inputs),
            is_causal=is_causal,
            mask=mask,
            chunk_size=self.chunk_size,
            initial_state=initial_state,
            return_state=True,
        )
        return _returned(found, self.heads.out, return_state)


class GatedLinearAttention(_PlainAttention):
    r"""A layer of `softlib.recurrent.gated_linear_attention`, gated as in Mamba-2.

    Per key head a step $\Delta_i = \mathrm{softplus}(w \cdot u_i + b)$ and a learned
    rate $a > 0$: the decay is $e^{-\Delta_i a}$ and the value is multiplied by
    $\Delta_i$, so that a token which is passed over is not forgotten for either.

    Args:
        features, num_heads, num_key_heads: As in `LinearAttention`.
        head_features, value_features, scale, chunk_size: As in `LinearAttention`.
        use_bias: Whether the projections have a bias; the step always has one.
        dtype, param_dtype, kernel_init, rngs: As in `LinearAttention`.

    Example:
        >>> layer = softlib.nn.GatedLinearAttention(8, 2, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.ones((1, 5, 8))).shape)
        (1, 5, 8)
    """

    def _begin(self, linear, num_heads, key_heads, rngs):
        self.step = linear(key_heads, bias_init=_step_bias)
        dtype = self.step.param_dtype
        rates = jax.random.uniform(rngs.params(), (key_heads,), dtype, *RATE_RANGE)
        self.log_rate = nnx.Param(jnp.log(rates))

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch T D"],
        *,
        mask: Bool[Array, "*batch T"] | None = None,
        initial_state: LinearAttentionState | None = None,
        return_state: bool = False,
    ) -> Float[Array, "*batch T D"] | RecurrentResult:
        """Returns the outputs, with the state if asked for.

        Args:
            inputs: A sequence.
            mask, initial_state: As in `softlib.recurrent.linear_attention`.
            return_state: As in `softlib.recurrent.linear_attention`.
        """
        query, key, value = self.heads(inputs)
        step = _softplus(self.step(inputs))
        rate = jnp.exp(self.log_rate[...]).astype(step.dtype)
        found = gated_linear_attention(
            query,
            key,
            value * step[..., None],
            -step * jnp.broadcast_to(rate, step.shape),
            mask=mask,
            chunk_size=self.chunk_size,
            initial_state=initial_state,
            return_state=True,
        )
        return _returned(found, self.heads.out, return_state)


class SelectiveScan(nnx.Module):
    r"""A layer of `softlib.recurrent.selective_scan`: the core of Mamba (S6).

    Steps, B and C are linear functions of the token, the steps of low rank and through
    a softplus; the rates are learned, from 1, 2, ... in every channel on. The
    convolution in front and the gate behind it are separate layers.

    Args:
        features: Number of channels, the last axis of inputs and outputs.
        num_states: Number of states per channel.
        step_rank: Rank of the map from the token to its steps; None is a sixteenth of
            `features`, rounded up.
        chunk_size: As in `softlib.recurrent.selective_scan`.
        dtype, param_dtype, kernel_init, rngs: As in `LinearAttention`.

    Example:
        >>> layer = softlib.nn.SelectiveScan(8, num_states=4, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.ones((1, 5, 8))).shape)
        (1, 5, 8)
    """

    def __init__(
        self,
        features: int,
        *,
        num_states: int = 16,
        step_rank: int | None = None,
        chunk_size: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        self.num_states = num_states
        self.chunk_size = chunk_size
        rank = math.ceil(features / 16) if step_rank is None else step_rank
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.maps = linear(features, rank + 2 * num_states, use_bias=False)
        self.step = linear(rank, features, bias_init=_step_bias)
        rates = jnp.log(jnp.arange(1, num_states + 1, dtype=param_dtype))
        self.log_rates = nnx.Param(jnp.broadcast_to(rates, (features, num_states)))
        self.skip = nnx.Param(jnp.ones(features, param_dtype))

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch T D"],
        *,
        initial_state: Float[Array, "*batch D F"] | None = None,
        return_state: bool = False,
    ) -> Float[Array, "*batch T D"] | RecurrentResult:
        """Returns the outputs, with the state if asked for.

        Args:
            inputs: A sequence.
            initial_state, return_state: As in `softlib.recurrent.selective_scan`.
        """
        maps = self.maps(inputs)
        low, B, C = jnp.split(maps, [-2 * self.num_states, -self.num_states], axis=-1)
        return selective_scan(
            inputs,
            _softplus(self.step(low)),
            jnp.exp(self.log_rates[...]),
            B,
            C,
            self.skip[...],
            chunk_size=self.chunk_size,
            initial_state=initial_state,
            return_state=return_state,
        )


class QuasiLSTM(nnx.Module):
    r"""A layer of `softlib.recurrent.quasi_lstm`, a recurrent network without loops.

    Args:
        features: Size of the last axis of inputs and outputs.
        hidden_features: Number of states; None is `features`.
        reversed_gate: Static; True gives the forget gate the form of a selective
            state-space model, $\sigma(-f)^\alpha$ with one learned $\alpha > 0$, which
            starts at 1 (as its logarithm, where the paper's code clips it at 0).
        method, chunk_size: As in `softlib.recurrent.linear_recurrence`.
        dtype, param_dtype, kernel_init, rngs: As in `LinearAttention`.

    Example:
        >>> layer = softlib.nn.QuasiLSTM(8, reversed_gate=True, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.ones((1, 5, 8))).shape)
        (1, 5, 8)
    """

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int | None = None,
        reversed_gate: bool = False,
        method: Literal["associative", "chunked", "sequential"] = "associative",
        chunk_size: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        self.method: Literal["associative", "chunked", "sequential"] = method
        self.chunk_size = chunk_size
        hidden = features if hidden_features is None else hidden_features
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.gates = linear(features, 4 * hidden)
        self.out = linear(hidden, features, use_bias=False)
        self.log_alpha = (
            nnx.Param(jnp.zeros((), param_dtype)) if reversed_gate else None
        )

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch T D"],
        *,
        initial_state: Float[Array, "*batch hidden"] | None = None,
        return_state: bool = False,
    ) -> Float[Array, "*batch T D"] | RecurrentResult:
        """Returns the outputs, with the state if asked for.

        Args:
            inputs: A sequence.
            initial_state, return_state: As in `softlib.recurrent.quasi_lstm`.
        """
        found = quasi_lstm(
            *jnp.split(self.gates(inputs), 4, axis=-1),
            alpha=None if self.log_alpha is None else jnp.exp(self.log_alpha[...]),
            method=self.method,
            chunk_size=self.chunk_size,
            initial_state=initial_state,
            return_state=True,
        )
        return _returned(found, self.out, return_state)


class _Heads(nnx.Module):
    """Projections to queries, keys and values, and from the heads back."""

    def __init__(
        self,
        name: str,
        linear: Callable[..., Any],
        features: int,
        num_heads: int,
        num_key_heads: int | None,
        head_features: int | None,
        value_features: int | None,
        scale: float | None,
    ):
        key_heads = num_heads if num_key_heads is None else num_key_heads
        size, width = head_sizes(
            name, features, num_heads, key_heads, head_features, value_features
        )
        self.scale = size**-0.5 if scale is None else scale
        self.query = linear(features, (num_heads, size))
        self.key = linear(features, (key_heads, size))
        self.value = linear(features, (key_heads, width))
        self.out = linear((num_heads, width), features, axis=(-2, -1))

    def __call__(self, inputs: Array) -> tuple[Array, Array, Array]:
        query = self.query(inputs)
        return self.scale * query, self.key(inputs), self.value(inputs)


def _returned(found, project, return_state: bool) -> Array | RecurrentResult:
    """The result of a function with its output projected back."""
    output = project(found.output)
    return RecurrentResult(output, found.state) if return_state else output


def _softplus(logits: Array) -> Array:
    """Softplus in float32 or wider: a step of 1e-3 has few digits in a narrow dtype."""
    return jax.nn.softplus(logits.astype(accumulator_dtype(logits)))


def _step_bias(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    """Biases whose softplus is log-uniform in the range of steps."""
    low, high = (math.log(step) for step in STEP_RANGE)
    steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return jnp.log(jnp.expm1(steps)).astype(dtype)
