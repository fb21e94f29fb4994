"""A layer of experts, networks of which a router gives each token a few."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._masked_mean import masked_mean
from softlib.losses import importance_loss, load_balancing_loss, router_z_loss
from softlib.softmax import (
    dense_to_sparse_gate,
    noisy_top_k_gating,
    softmax,
    sparsify_gates,
    top_k_gating,
)
from softlib.typing import AxisName, PerRow, Precision

from ._expert_dispatch import (
    ExpertRows,
    capacity_dispatch,
    capacity_experts,
    dense_gates,
    dropless_experts,
    expert_capacity,
)

type Linear = Callable[[Array, Array, Array | None], Array]

GATES = ("top_k", "noisy_top_k", "dense_to_sparse")
DISPATCHES = ("dropless", "capacity", "dense")


class SelectionBias(nnx.Variable):
    """A bias of a router that is no parameter: no gradient reaches it, a rule moves it.

    Args:
        value: One number per expert.
        metadata: As in `nnx.Variable`.

    Example:
        >>> print(issubclass(softlib.nn.SelectionBias, nnx.Param))
        False
    """

    def __init__(self, value: Float[Array, " E"], **metadata: Any):
        super().__init__(value, **metadata)


class RouterReport(NamedTuple):
    """Statistics of the router in a call of `MixtureOfExperts`, without padding.

    Attributes:
        load_balancing_loss: `softlib.losses.load_balancing_loss`; add 0.01 of it.
        router_z_loss: Mean of `softlib.losses.router_z_loss`; add 0.001 of it.
        importance_loss: `softlib.losses.importance_loss` of the gates.
        load_loss: The same of the load of `softlib.softmax.noisy_top_k_gating`; of the
            counts, without a derivative, where no noise was drawn.
        expert_load: (E,), the share of each expert in all selections, whether dropped
            or not; sums to 1 unless there are none. No derivative.
        dropped_fraction: The share of selections that found no slot. No derivative.
    """

    load_balancing_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    importance_loss: Float[Array, ""]
    load_loss: Float[Array, ""]
    expert_load: Float[Array, " E"]
    dropped_fraction: Float[Array, ""]


class MixtureResult(NamedTuple):
    """A call of `MixtureOfExperts`.

    Attributes:
        output: Of the tokens, in the shape of the inputs.
        report: What there is to know about the router.
    """

    output: Float[Array, "*batch D"]
    report: RouterReport


class MixtureOfExperts(nnx.Module):
    r"""Each token through the few experts that a router selects for it.

    $y = \sum_{e \text{ selected}} g_e(x) \, f_e(x)$, where $g$ are the gates and $f_e$
    is a two-layer network, $W_2 \, (\sigma(W_g x) \odot W_1 x)$, or
    $W_2 \, \sigma(W_1 x)$ without gated experts. Takes the place of the two-layer
    network of a transformer block, with E times its parameters at K times its cost.

    The gates, of the router's logits $v = W_r x$:

    - `top_k`: `softlib.softmax.top_k_gating`, with one of its three biases;
    - `noisy_top_k`: `softlib.softmax.noisy_top_k_gating`;
    - `dense_to_sparse`: `softlib.softmax.dense_to_sparse_gate` with a bias, at the
      temperature of the call. With `k` or `threshold` only the largest gates are kept
      (`softlib.softmax.sparsify_gates`).

    The losses of the report are of the logits before a temperature and of their softmax
    over all experts, without noise; a bias counts in both but for "weights" and
    "selection", the softmax of `dense_to_sparse` is at the temperature.

    The way to the experts:

    - `dropless`: tokens are sorted by expert and `jax.lax.ragged_dot` multiplies them,
      on a CPU products of blocks of rows. No token is dropped and few products are
      wasted;
    - `capacity`: every expert has a number of slots, what finds none is dropped, see
      `softlib.nn.capacity_dispatch`;
    - `dense`: all tokens through all experts. E / K times the products.

    Args:
        features: Size D of the last axis of inputs and outputs.
        hidden_features: Hidden size F of an expert.
        num_experts: E.
        k: Static; experts of a token. None is 2, or all E with the gate
            `dense_to_sparse`.
        gate: Static; see above.
        router_bias: Static; None for no bias, or which of the biases of
            `softlib.softmax.top_k_softmax` the gate `top_k` has: "weights", "both" or
            "selection". The last is a `SelectionBias`, which `balance` moves;
            the others are parameters. The gate `noisy_top_k` takes "both"; the gate
            `dense_to_sparse` always has its bias, and takes None.
        renormalize: Static; whether the gates of a token sum to 1 after the selection.
        gate_activation: Static; of the logits, in the gate `dense_to_sparse` only; None
            for the identity.
        threshold: Static, in [0, 1]; gates below it are cut, in the gate
            `dense_to_sparse` only.
        jitter: Static, in [0, 1]; with a key, the inputs of the router, and of nothing
            else, are multiplied by numbers drawn from [1 - jitter, 1 + jitter].
        noise_floor: Static; as in `softlib.softmax.noisy_top_k_gating`.
        dispatch: Static; see above.
        capacity_factor: Static, positive; an expert has so many times T K / E slots,
            rounded up, for a call with T tokens, padding included.
        prioritized: Static; whether slots go to the tokens with the largest probability
            first, not to the first tokens.
        gated: Static; whether experts have the factor $\sigma(W_g x)$.
        activation: Static; $\sigma$.
        use_bias: Whether experts have biases.
        axis_name: Static; mapped axes over which the tokens are divided. The numbers of
            the report are then those of all of their tokens; slots are counted on each
            device for itself.
        dtype: Dtype of the experts; None follows inputs and parameters.
        param_dtype: Dtype of the parameters; those of the router are float32 at least.
        kernel_init: Initialiser of every expert's matrices, each with a key of its own.
        router_init: Initialiser of the router's matrix; that of the noise starts at 0.
        precision: Of the products of the experts. Those of the router are float32, not
            rounded further on accelerators, whatever the dtype.
        rngs: Key source.

    Raises:
        TypeError: A size is no Python int, or a number no Python number.
        ValueError: An option is out of range, or belongs to another gate.

    Attributes:
        router: (D, E).
        noise: (D, E), of the gate `noisy_top_k`; else None.
        router_bias: (E,), or None.
        expert_in: (E, D, F).
        expert_gate: (E, D, F), or None.
        expert_out: (E, F, D).
        expert_in_bias: (E, F), or None; so are `expert_gate_bias`, `expert_out_bias`.
        expert_gate_bias: (E, F), or None.
        expert_out_bias: (E, D), or None.

    Derivatives: reverse mode and forward mode, in parameters and inputs, for the
        selection as it is. A token that was dropped has none.
    Cost: that of `softlib.nn.dropless_experts` or `softlib.nn.capacity_experts` with
        products of $6 D F$ flop per token and expert (4 if not gated); of E per token
        with `dense`.
    Source: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts"
        and "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?"
        for the gates; "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer" for the layer.

    Example:
        >>> layer = softlib.nn.MixtureOfExperts(8, 16, 4, k=2, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 8))
        >>> y, report = layer(x, where=jnp.arange(5) < 3)
        >>> print(y.shape, report.dropped_fraction, report.expert_load.sum())
        (2, 5, 8) 0.0 1.0
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_experts: int,
        *,
        k: int | None = None,
        gate: Literal["top_k", "noisy_top_k", "dense_to_sparse"] = "top_k",
        router_bias: Literal["weights", "both", "selection"] | None = None,
        renormalize: bool = True,
        gate_activation: Callable[[Array], Array] | None = None,
        threshold: float | None = None,
        jitter: float = 0.0,
        noise_floor: float = 0.0,
        dispatch: Literal["dropless", "capacity", "dense"] = "dropless",
        capacity_factor: float = 1.25,
        prioritized: bool = False,
        gated: bool = True,
        activation: Callable[[Array], Array] = jax.nn.silu,
        use_bias: bool = False,
        axis_name: AxisName | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        router_init: Initializer = initializers.lecun_normal(),
        precision: Precision = None,
        rngs: nnx.Rngs,
    ):
        name = "MixtureOfExperts"
        for option, size in (
            ("features", features),
            ("hidden_features", hidden_features),
            ("num_experts", num_experts),
        ):
            checks.require_positive_integer(name, option, size)
        checks.require_one_of(name, "gate", gate, GATES)
        checks.require_one_of(name, "dispatch", dispatch, DISPATCHES)
        checks.require_positive_number(name, "capacity_factor", capacity_factor)
        checks.require_scalar(name, "noise_floor", noise_floor, 0, math.inf)
        checks.require_scalar(name, "jitter", jitter, 0, 1)
        if k is None:
            k = num_experts if gate == "dense_to_sparse" else min(2, num_experts)
        checks.require_positive_integer(name, "k", k)
        if k > num_experts:
            raise ValueError(
                f"{name}: `k` must be at most `num_experts` ({num_experts}), got {k}."
            )
        _require_gate_options(name, gate, router_bias, gate_activation, threshold)
        self.num_experts, self.k, self.gate = num_experts, k, gate
        self.bias_in, self.renormalize = router_bias, renormalize
        self.gate_activation, self.threshold = gate_activation, threshold
        self.jitter, self.noise_floor = float(jitter), float(noise_floor)
        self.dispatch, self.capacity_factor = dispatch, float(capacity_factor)
        self.prioritized, self.activation = prioritized, activation
        self.axis_name, self.dtype, self.precision = axis_name, dtype, precision

        wide = accumulator_dtype(param_dtype)
        shape = (features, num_experts)
        self.router = nnx.Param(router_init(rngs.params(), shape, wide))
        is_noisy = gate == "noisy_top_k"
        self.noise = nnx.Param(jnp.zeros(shape, wide)) if is_noisy else None
        kind = SelectionBias if router_bias == "selection" else nnx.Param
        has_bias = router_bias is not None or gate == "dense_to_sparse"
        self.router_bias = kind(jnp.zeros(num_experts, wide)) if has_bias else None

        def stacked(shape: tuple[int, int]) -> nnx.Param:
            keys = jax.random.split(rngs.params(), num_experts)
            one = lambda key: kernel_init(key, shape, param_dtype)
            return nnx.Param(jax.vmap(one)(keys))

        def bias(size: int) -> nnx.Param | None:
            zeros = jnp.zeros((num_experts, size), param_dtype)
            return nnx.Param(zeros) if use_bias else None

        up, down = (features, hidden_features), (hidden_features, features)
        self.expert_in, self.expert_in_bias = stacked(up), bias(hidden_features)
        self.expert_gate = stacked(up) if gated else None
        self.expert_gate_bias = bias(hidden_features) if gated else None
        self.expert_out, self.expert_out_bias = stacked(down), bias(features)

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch D"],
        *,
        where: Bool[Array, "..."] | None = None,
        temperature: PerRow = 1.0,
        key: Array | None = None,
    ) -> MixtureResult:
        """Returns the outputs, and what there is to know about the router.

        Args:
            inputs: Tokens; all of a call share the slots of the experts.
            where: True for the tokens that count, False for padding; broadcasts to the
                batch shape. Padding selects no expert and takes no slot, is in no
                number of the report, and its output is 0 with gradient 0, whatever it
                holds.
            temperature: Of the gate `dense_to_sparse`, positive: a number (static), or
                a scalar array or one with a value per token (traced, differentiable);
                see `softlib.softmax.temperature_schedule`.
            key: Of `jax.random`, for the noise of the gate and the jitter. None, as
                after training, draws neither.

        Raises:
            TypeError: `inputs` is not floating, or `where` is not boolean.
            ValueError: `inputs` has another size D, `where` does not broadcast, or a
                temperature is given to another gate.
        """
        name = "MixtureOfExperts"
        checks.require_floating(name, inputs=inputs)
        batch, features = inputs.shape[:-1], self.router.shape[0]
        shape = (*batch, features)
        checks.require_shape(name, "inputs", inputs, shape, "`features` come last")
        tokens = math.prod(batch)
        x = inputs.reshape(tokens, features)
        if where is not None:
            checks.require_boolean(name, where=where)
            why = "the batch shape"
            checks.require_broadcastable(name, "where", where, batch, why)
            where = where.reshape((1,) * (len(batch) - where.ndim) + where.shape)
            where = jnp.broadcast_to(where, batch).reshape(tokens)
            x = jnp.where(where[:, None], x, 0)
        tau = self._per_token(name, temperature, batch)

        routing = self._route(x, where, tau, key)
        y, dropped = self._through_experts(x, routing)
        report = self._report(routing, dropped, where)
        return MixtureResult(y.reshape(shape), report)

    @array_arguments
    def balance(self, expert_load: Float[Array, " E"], rate: PerRow) -> None:
        """Moves a `SelectionBias` by `rate` towards experts with less than their share.

        By the sign of the mean load minus the load, so that no loss disturbs training;
        to be called once per step.

        Args:
            expert_load: As in the report, or averaged over several.
            rate: The step, a number or a scalar array; 0.001 is usual.

        Raises:
            ValueError: The layer has no `router_bias="selection"`.
        """
        if self.bias_in != "selection" or self.router_bias is None:
            raise ValueError(
                'MixtureOfExperts.balance: `router_bias` must be "selection", '
                f"got {self.bias_in!r}."
            )
        lacking = jnp.sign(expert_load.mean() - expert_load)
        bias = self.router_bias[...]
        self.router_bias[...] = bias + (rate * lacking).astype(bias.dtype)

    def _per_token(self, name: str, temperature: PerRow, batch: tuple[int, ...]) -> Any:
        is_number = isinstance(temperature, int | float)
        if self.gate != "dense_to_sparse" and not (is_number and temperature == 1):
            raise ValueError(
                f"{name}: `temperature` must be 1 with the gate {self.gate!r}, "
                f"got {temperature if is_number else 'an array'}."
            )
        if is_number:
            return temperature
        temperature = jnp.asarray(temperature)
        why = "a number, or one value per token"
        checks.require_broadcastable(name, "temperature", temperature, batch, why)
        lead = (1,) * (len(batch) - temperature.ndim)
        spread = jnp.broadcast_to(temperature.reshape(lead + temperature.shape), batch)
        return spread.reshape(-1)

    def _route(
        self, x: Array, where: Array | None, tau: Any, key: Array | None
    ) -> "_Routing":
        x = x.astype(accumulator_dtype(x, self.router[...]))
        noise_key = None
        if key is not None:
            key, noise_key = jax.random.split(key)
            if self.jitter:
                low, high = 1 - self.jitter, 1 + self.jitter
                x = x * jax.random.uniform(key, x.shape, x.dtype, low, high)
        product = lambda weight: jnp.matmul(
            x, weight[...].astype(x.dtype), precision=lax.Precision.HIGHEST
        )
        logits = product(self.router)
        bias = None
        if self.router_bias is not None:
            bias = self.router_bias[...].astype(x.dtype)
        counts = None if where is None else where[:, None]
        if self.gate == "dense_to_sparse":
            return self._route_by_temperature(logits, bias, counts, tau)
        if self.bias_in == "both" and bias is not None:
            logits, bias = logits + bias[None], None
        probs = softmax(logits, where=counts)
        if self.noise is not None:
            found = noisy_top_k_gating(
                noise_key,
                logits,
                product(self.noise),
                k=self.k,
                noise_floor=self.noise_floor,
                renormalize=self.renormalize,
                where=counts,
            )
            return _Routing(logits, probs, *found)
        weights, indices = top_k_gating(
            logits,
            k=self.k,
            bias=bias,
            bias_in="weights" if self.bias_in is None else self.bias_in,
            renormalize=self.renormalize,
            where=counts,
        )
        return _Routing(logits, probs, weights, indices, None)

    def _route_by_temperature(
        self, scores: Array, bias: Array | None, counts: Array | None, tau: Any
    ) -> "_Routing":
        gates = dense_to_sparse_gate(
            scores,
            temperature=tau,
            bias=bias,
            activation=self.gate_activation,
            where=counts,
        )
        kept = gates
        if self.threshold is not None:
            kept = sparsify_gates(
                gates,
                threshold=self.threshold,
                top_k=self.k,
                renormalize=self.renormalize,
            )
        elif self.k < self.num_experts:
            kept = sparsify_gates(gates, top_k=self.k, renormalize=self.renormalize)
        if self.k < self.num_experts:
            _, indices = lax.top_k(lax.stop_gradient(kept), self.k)
            kept = jnp.take_along_axis(kept, indices, axis=-1)
        else:
            indices = jnp.broadcast_to(jnp.arange(self.num_experts), kept.shape)
        indices = jnp.where(kept == 0, -1, indices).astype(jnp.int32)
        logits = scores
        if self.gate_activation is not None:
            logits = self.gate_activation(scores)
        logits = logits if bias is None else logits + bias[None]
        return _Routing(logits, gates, kept, indices, None)

    def _through_experts(
        self, x: Array, routing: "_Routing"
    ) -> tuple[Array, Array | None]:
        """The outputs, and True for what found no slot (None where all do)."""
        stacks = (self.expert_in, self.expert_gate, self.expert_out)
        dtype = self.dtype
        if dtype is None:
            dtype = common_dtype(x, *(w[...] for w in stacks if w is not None))
        x, weights, indices = x.astype(dtype), routing.weights, routing.indices
        size = self.num_experts
        slots = lambda x: self._network(_batched(self.precision), x, dtype)
        if self.dispatch == "dense":
            y = slots(jnp.broadcast_to(x[None], (size, *x.shape)))
            gates = dense_gates(weights, indices, size).T[..., None]
            # An expert that is not selected may overflow.
            y = jnp.where(gates == 0, 0, y.astype(gates.dtype))
            return (gates * y).sum(0).astype(dtype), None
        if self.dispatch == "dropless":

            def sorted_rows(rows: Array, groups: ExpertRows) -> Array:
                linear = lambda x, weight, bias: groups.linear(
                    x, weight, bias, precision=self.precision
                )
                return self._network(linear, rows, dtype)

            y = dropless_experts(x, weights, indices, sorted_rows, num_experts=size)
            return y, None
        capacity = expert_capacity(len(x), size, self.k, self.capacity_factor)
        priority = None
        if self.prioritized:
            priority = lax.stop_gradient(routing.probs.max(-1))
        taken = capacity_dispatch(indices, size, capacity, priority=priority)
        y = capacity_experts(
            x, weights, indices, taken, slots, num_experts=size, capacity=capacity
        )
        return y, taken < 0

    def _network(self, linear: Linear, x: Array, dtype: Any) -> Array:
        def apply(x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
            b = None if bias is None else bias[...].astype(dtype)
            return linear(x, weight[...].astype(dtype), b)

        hidden = apply(x, self.expert_in, self.expert_in_bias)
        if self.expert_gate is None:
            hidden = self.activation(hidden)
        else:
            gate = apply(x, self.expert_gate, self.expert_gate_bias)
            hidden = self.activation(gate) * hidden
        y = apply(hidden.astype(dtype), self.expert_out, self.expert_out_bias)
        return y.astype(dtype)

    def _report(
        self, routing: "_Routing", dropped: Array | None, where: Array | None
    ) -> RouterReport:
        over: Any = {"where": where, "axis_name": self.axis_name}
        indices, size = routing.indices, self.num_experts
        chosen = indices >= 0
        gates = dense_gates(routing.weights, indices, size)
        load = routing.load
        if load is None:
            load = dense_gates(chosen.astype(gates.dtype), indices, size)
        mean = lambda y, chosen: masked_mean(
            y, chosen, axis=(0, 1), axis_name=self.axis_name
        )
        is_expert = jax.nn.one_hot(indices, size, dtype=bool)
        lost = jnp.zeros_like(chosen) if dropped is None else dropped
        return RouterReport(
            load_balancing_loss(routing.probs, indices, **over),
            masked_mean(
                router_z_loss(routing.logits, where=where),
                where,
                axis_name=self.axis_name,
            ),
            importance_loss(gates, **over),
            importance_loss(load, **over),
            mean(is_expert, chosen[..., None]),
            mean(lost, chosen),
        )


class _Routing(NamedTuple):
    """The router's results for each token; `load` only if noise was drawn."""

    logits: Float[Array, "T E"]
    probs: Float[Array, "T E"]
    weights: Float[Array, "T K"]
    indices: Int[Array, "T K"]
    load: Float[Array, "T E"] | None


def _batched(precision: Precision) -> Linear:
    """Slots (E, C, D) times one matrix per expert, plus its bias."""

    def linear(x: Array, weight: Array, bias: Array | None) -> Array:
        wide = accumulator_dtype(x, weight)
        y = jnp.einsum(
            "ecd,edf->ecf",
            x,
            weight,
            precision=precision,
            preferred_element_type=wide,
        )
        return y if bias is None else y + bias.astype(wide)[:, None]

    return linear


def _require_gate_options(
    name: str,
    gate: str,
    router_bias: str | None,
    gate_activation: Any,
    threshold: float | None,
) -> None:
    biases: dict[str, tuple[str | None, ...]] = {
        "top_k": (None, "weights", "both", "selection"),
        "noisy_top_k": (None, "both"),
        "dense_to_sparse": (None,),
    }
    if router_bias not in biases[gate]:
        known = ", ".join(repr(choice) for choice in biases[gate])
        raise ValueError(
            f"{name}: `router_bias` must be one of {known} with the gate {gate!r}, "
            f"got {router_bias!r}."
        )
    for option, value in (
        ("gate_activation", gate_activation),
        ("threshold", threshold),
    ):
        if value is not None and gate != "dense_to_sparse":
            raise ValueError(
                f"{name}: `{option}` must be None with the gate {gate!r}, "
                f"got {value!r}."
            )
    if threshold is not None:
        checks.require_scalar(name, "threshold", threshold, 0, 1)
