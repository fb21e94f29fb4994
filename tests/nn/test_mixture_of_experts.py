"""The mixture-of-experts layer: dispatch, gates, padding, reports, dtypes, errors."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

from softlib.nn._expert_dispatch import (
    capacity_dispatch,
    capacity_experts,
    dropless_experts,
    expert_capacity,
)
from softlib.nn._mixture_of_experts import (
    MixtureOfExperts,
    RouterReport,
    SelectionBias,
)
from softlib.testing import assert_close
from tests.compiled import losses, softmax
from tests.host import jnp
from tests.oracles import gates as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
D, F, E, T = 6, 7, 5, 11
NAN = jnp.nan


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def made(experts=E, **options) -> Any:
    """A layer whose parameters are all drawn, biases and noise included."""
    make = lambda: MixtureOfExperts(D, F, experts, **options, rngs=nnx.Rngs(0))
    # NumPy draws, because the initialisers would be compiled shape by shape.
    layer, rng = nnx.eval_shape(make), np.random.default_rng(7)
    drawn = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
    nnx.update(layer, jax.tree.map(drawn, nnx.state(layer)))
    return layer


@nnx.jit
def call(layer, x, where=None, **options):
    return layer(x, where=where, **options)


def wide(x):
    return np.asarray(x, np.float64)


def logits_of(layer, x):
    return wide(x) @ wide(layer.router[...])


def networks(layer, x):
    """Every expert on every token, (T, E, D); SiLU and gated."""
    linear = lambda x, weight, bias: (
        np.einsum(
            "t...d,edf->tef" if x.ndim == 2 else "ted,edf->tef", x, wide(weight[...])
        )
        + (0 if bias is None else wide(bias[...]))
    )
    hidden = linear(wide(x), layer.expert_in, layer.expert_in_bias)
    gate = hidden
    if layer.expert_gate is not None:
        gate = linear(wide(x), layer.expert_gate, layer.expert_gate_bias)
    active = gate / (1 + np.exp(-gate))
    hidden = active * hidden if layer.expert_gate is not None else active
    return linear(hidden, layer.expert_out, layer.expert_out_bias)


def expected_of(layer, x, gates):
    return (np.asarray(gates)[..., None] * networks(layer, x)).sum(1)


# ------------------------------------------------------------------------- dispatch
def test_slots_of_the_vectors():
    with np.load(DATA / "topk_moe_gating_case0.npz") as data:
        indices = jnp.asarray(data["out_expert_index"].astype("int32"))
        slots = capacity_dispatch(indices, 5, int(data["in_capacity"]))
        np.testing.assert_array_equal(slots, data["out_dispatch_slot"])


@pytest.mark.parametrize("capacity", [1, 3])
def test_slots_are_given_choice_by_choice_in_the_order_of_priority(capacity):
    rng = np.random.default_rng(capacity)
    indices = np.stack([rng.permutation(4)[:3] for _ in range(9)])
    indices[rng.random(indices.shape) < 0.2] = -1
    priority = rng.integers(0, 4, 9).astype("float32")
    priority[0] = np.nan
    order = sorted(range(9), key=lambda t: (np.isnan(priority[t]), -priority[t], t))
    for given, tokens in ((None, range(9)), (jnp.asarray(priority), order)):
        expected, used = np.full(indices.shape, -1), np.zeros(4, int)
        for choice in range(3):
            for t in tokens:
                e = indices[t, choice]
                if e >= 0 and used[e] < capacity:
                    expected[t, choice] = used[e]
                    used[e] += 1
        found = capacity_dispatch(
            jnp.asarray(indices, "int32"), 4, capacity, priority=given
        )
        np.testing.assert_array_equal(found, expected)


def test_capacity_is_the_fair_share_rounded_up():
    assert expert_capacity(10, 1, 1, 1.1) == 10  # no more than there are tokens
    assert expert_capacity(10, 5, 2, 1.1) == 5
    assert expert_capacity(100, 10, 1, 1.1) == 11  # 11.000000000000002
    assert expert_capacity(3, 64, 1, 1.0) == 1


def test_own_experts_in_both_ways():
    x, weights = draw(T, 2), jnp.abs(draw(T, 2, seed=1))
    indices = jnp.asarray(np.random.default_rng(2).integers(-1, 3, (T, 2)), "int32")
    scales = jnp.array([2.0, 3, 5, jnp.nan])  # of the rows that no expert has

    @jax.jit
    def both(x, weights, indices):
        one = dropless_experts(
            x,
            weights,
            indices,
            lambda rows, groups: rows * scales[groups.experts][:, None],
            num_experts=3,
        )
        slots = capacity_dispatch(indices, 3, 2 * T)
        two = capacity_experts(
            x,
            weights,
            indices,
            slots,
            lambda filled: filled * scales[:3, None, None],
            num_experts=3,
            capacity=2 * T,
        )
        return one, two

    chosen = np.where(indices < 0, 0, np.asarray(scales)[np.asarray(indices)])
    expected = (wide(weights) * chosen).sum(1)[:, None] * wide(x)
    for found in both(x, weights, indices):
        assert_close(found, expected, dtype=found.dtype, length=2)
    for found in both(x, weights, indices.at[4, 1].set(3)):
        assert jnp.isnan(found).all(-1).tolist() == [t == 4 for t in range(T)]


# ---------------------------------------------------------------------------- gates
def top_k(bias_in=None, renormalize=True):
    def gates(layer, x):
        bias = None if bias_in is None else wide(layer.router_bias[...])
        found, _ = oracle.top_k(
            logits_of(layer, x), layer.k, bias, bias_in or "weights", renormalize
        )
        return found

    return gates


def plain(layer, x):
    z = (np.tanh(logits_of(layer, x)) + wide(layer.router_bias[...])) / 0.5
    return np.array([oracle.softmax(row) for row in z])


def cut(layer, x):
    """At least 0.2 or the largest, at most k of them."""
    found = plain(layer, x)
    for row in found:
        order = np.argsort(-row)
        row[order[layer.k :]] = 0
        row[[e for e in order[1:] if row[e] < 0.2]] = 0
    return found / found.sum(-1, keepdims=True)


SPARSE: Any = {"gate": "dense_to_sparse", "gate_activation": jnp.tanh}
CASES: dict[str, Any] = {
    "weights": ({"router_bias": "weights", "use_bias": True}, top_k("weights")),
    "both": (
        {"router_bias": "both", "dispatch": "capacity", "use_bias": True, "k": 3},
        top_k("both"),
    ),
    "selection": (
        {"router_bias": "selection", "renormalize": False, "gated": False, "k": 1},
        top_k("selection", False),
    ),
    "temperature": ({**SPARSE, "dispatch": "dense"}, plain),
    "cut": ({**SPARSE, "threshold": 0.2, "k": 3}, cut),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_is_the_sum_over_all_experts_by_gates(name):
    options, gates = CASES[name]
    layer, x = made(**options, capacity_factor=E), draw(T, D)
    where = jnp.arange(T) % 4 != 3
    kept = jnp.where(where[:, None], x, 0)
    padded = jnp.where(where[:, None], x, NAN)
    tempered = {"temperature": jnp.float32(0.5)} if "gate" in options else {}
    y, report = call(layer, padded, where, **tempered)
    expected = np.where(where[:, None], expected_of(layer, kept, gates(layer, kept)), 0)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert report.dropped_fraction == 0


def test_dispatches_agree_in_values_and_gradients():
    x, where = draw(2, 6, D), jnp.arange(6) < 5
    options = {"router_bias": "both", "use_bias": True}
    layers = [
        made(**options, dispatch=each, capacity_factor=E)
        for each in ("dropless", "capacity", "dense")
    ]

    @nnx.jit
    def run(layer, x):
        def loss(layer, x):
            y, report = layer(x, where=where)
            total = (y**3).sum() + report.load_balancing_loss + report.router_z_loss
            return total + report.importance_loss, (y, report)

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    first, *others = [run(layer, x) for layer in layers]
    for path, leaf in nnx.to_flat_state(first[0][0]):
        assert jnp.isfinite(leaf[...]).all(), path
        assert jnp.abs(leaf[...]).max() > 0, path
    assert not first[0][1][:, 5].any()  # padding
    for other in others:
        for one, two in zip(
            jax.tree.leaves(first), jax.tree.leaves(other), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_what_finds_no_slot_is_0_without_gradient():
    layer = made(k=1, dispatch="capacity", capacity_factor=0.5)
    prioritized = made(k=1, dispatch="capacity", capacity_factor=0.5, prioritized=True)
    x = draw(T, D)

    @nnx.jit
    def run(layer, x):
        def total(x):
            y, report = layer(x)
            return (y**2).sum(), (y, report)

        return jax.grad(total, has_aux=True)(x)

    capacity = 2  # ceil(0.5 * 11 / 5)
    logits = logits_of(layer, x)
    chosen = logits.argmax(-1)
    probs = np.array([oracle.softmax(row) for row in logits]).max(-1)
    for each, order in ((layer, range(T)), (prioritized, np.argsort(-probs))):
        slope, (y, report) = run(each, x)
        kept = [
            t for e in range(E) for t in [t for t in order if chosen[t] == e][:capacity]
        ]
        served = np.isin(np.arange(T), kept)
        assert served.sum() < T
        np.testing.assert_array_equal((y != 0).any(-1), served)
        np.testing.assert_array_equal((slope != 0).any(-1), served)
        np.testing.assert_allclose(
            report.dropped_fraction, 1 - served.mean(), rtol=1e-6
        )
        load = np.bincount(chosen, minlength=E) / T
        np.testing.assert_allclose(report.expert_load, load, rtol=1e-6)


# --------------------------------------------------------------------------- report
def test_report_is_that_of_the_losses_and_does_not_see_padding():
    layer, x = made(capacity_factor=0.7, dispatch="capacity"), draw(3, 4, D)
    where = jnp.arange(12).reshape(3, 4) % 3 != 1
    y, report = call(layer, jnp.where(where[..., None], x, NAN), where)
    kept = x[where]

    @jax.jit
    def by_hand(logits):
        weights, indices = softmax.top_k_gating(logits, k=2)
        gates = (jax.nn.one_hot(indices, E) * weights[..., None]).sum(-2)
        load = jax.nn.one_hot(indices, E).sum(-2)
        return RouterReport(
            losses.load_balancing_loss(softmax.softmax(logits), indices),
            losses.router_z_loss(logits).mean(),
            losses.importance_loss(gates),
            losses.importance_loss(load),
            load.sum(0) / load.sum(),
            # ceil(0.7 * 12 * 2 / 5) slots: 12 counts padding, which takes none
            (capacity_dispatch(indices, E, 4) < 0).mean(),
        )

    expected = by_hand(jnp.asarray(logits_of(layer, kept), jnp.float32))
    assert report.dropped_fraction > 0
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(
            getattr(report, name), value, rtol=1e-5, err_msg=name
        )
    assert not y[~where].any()
    nobody = call(layer, jnp.full_like(x, NAN), jnp.zeros((3, 4), bool))
    for leaf in jax.tree.leaves(nobody):
        assert not leaf.any()


def test_shards_report_what_all_tokens_do():
    whole, shards = made(), made(axis_name="shards")
    x, where = draw(4, 3, D), jnp.arange(12).reshape(4, 3) < 7
    graph, state = nnx.split(shards)
    mesh = jax.make_mesh((4,), ("shards",), (AxisType.Auto,), devices=jax.devices()[:4])

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(P(), P("shards"), P("shards")),
        out_specs=(P("shards"), P()),
    )
    def divided(state, x, where):
        return tuple(nnx.merge(graph, state)(x, where=where))

    y, reports = divided(state, x, where)
    expected, report = call(whole, x, where)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for shard, value in zip(reports, report, strict=True):
        np.testing.assert_allclose(shard, value, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------- noise, jitter, temperature
def test_noise_and_jitter_are_drawn_with_a_key_only():
    layer = made(gate="noisy_top_k", router_bias="both", dispatch="dense")
    x, key = draw(T, D), jax.random.key(1)
    silent, first = call(layer, x), call(layer, x, key=key)
    again, second = call(layer, x, key=key), call(layer, x, key=jax.random.key(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != second[0]).any()
    assert (first[0] != silent[0]).any()
    logits = logits_of(layer, x) + wide(layer.router_bias[...])
    gates, _ = oracle.top_k(logits, 2)
    np.testing.assert_allclose(silent[0], expected_of(layer, x, gates), atol=1e-5)

    logits, noise = (
        jnp.asarray(a, jnp.float32) for a in (logits, wide(x) @ wide(layer.noise[...]))
    )

    @jax.jit
    def load_loss(key):
        return losses.importance_loss(
            softmax.noisy_top_k_gating(key, logits, noise, k=2).load
        )

    load = load_loss(jax.random.split(key)[1])
    np.testing.assert_allclose(first[1].load_loss, load, rtol=1e-4)
    np.testing.assert_allclose(first[1].router_z_loss, silent[1].router_z_loss)


def test_jitter_changes_what_the_router_sees_and_nothing_else():
    layer, x = made(1, k=1, jitter=0.5, dispatch="dense"), draw(T, D)
    y, report = call(layer, x)
    jittered, other = call(layer, x, key=jax.random.key(0))
    np.testing.assert_array_equal(y, jittered)
    assert report.router_z_loss != other.router_z_loss


def test_temperature_goes_from_all_experts_to_one():
    layer, x = made(gate="dense_to_sparse", dispatch="dense"), draw(T, D)

    @nnx.jit
    def run(layer, x, temperature):
        def total(temperature):
            y, report = layer(x, temperature=temperature)
            return (y**2).sum(), (y, report)

        return jax.grad(total, has_aux=True)(temperature)

    ends = jnp.where(jnp.arange(T) < 5, 1e6, 1e-6)  # a value per token
    slope, (y, _) = run(layer, x, ends)
    each = networks(layer, x)
    best = (logits_of(layer, x) + wide(layer.router_bias[...])).argmax(-1)
    np.testing.assert_allclose(y[:5], each[:5].mean(1), atol=1e-4)
    np.testing.assert_allclose(y[5:], each[np.arange(5, T), best[5:]], atol=1e-4)
    assert jnp.isfinite(slope).all()
    slope, _ = run(layer, x, jnp.ones(T))
    assert slope.all()


# -------------------------------------------------------------------- flax and dtypes
def test_bias_of_the_selection_is_no_parameter_and_balances():
    layer = made(router_bias="selection", k=1, dispatch="dense")
    layer.router[...] = layer.router[...].at[:, 0].set(0)
    layer.router_bias[...] = jnp.zeros(E).at[0].set(1.0)
    x = draw(64, D)
    parameters = nnx.state(layer, nnx.Param)
    assert "router_bias" not in parameters
    assert nnx.state(layer, SelectionBias)["router_bias"].shape == (E,)

    @nnx.jit
    def step(layer, x):
        _, report = layer(x)
        layer.balance(report.expert_load, 0.05)
        return report.expert_load

    before = step(layer, x)
    lacking = np.sign(1 / E - np.asarray(before))
    moved = np.array([1.0, 0, 0, 0, 0]) + np.float32(0.05) * lacking
    np.testing.assert_allclose(layer.router_bias[...], moved, atol=1e-6)
    for _ in range(60):
        after = step(layer, x)
    assert after.max() - after.min() < 0.5 * (before.max() - before.min())


def test_experts_in_bfloat16_and_the_router_in_float32():
    narrow, exact = made(dtype=jnp.bfloat16), made()
    x = draw(T, D).astype(jnp.bfloat16)
    y, report = call(narrow, x)
    expected, other = call(exact, x)
    assert y.dtype == jnp.bfloat16
    assert expected.dtype == jnp.float32
    assert {leaf.dtype for leaf in report} == {jnp.dtype("float32")}
    for one, two in zip(report, other, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(wide(y), expected, atol=0.05)
    stored = jax.tree.leaves(
        nnx.eval_shape(lambda: nnx.state(made(param_dtype=jnp.bfloat16)))
    )
    assert sorted(str(leaf.dtype) for leaf in stored) == ["bfloat16"] * 3 + ["float32"]


def test_state_comes_back_and_starts_with_experts_of_their_own():
    layer = MixtureOfExperts(D, F, 3, gate="noisy_top_k", rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    assert {path[0] for path, _ in nnx.to_flat_state(state)} == {
        *("router", "noise", "expert_in", "expert_gate", "expert_out"),
    }
    again = nnx.merge(graph, state)
    x = draw(T, D)
    np.testing.assert_array_equal(call(layer, x)[0], call(again, x)[0])
    kernels = layer.expert_in[...]
    assert (kernels[0] != kernels[1]).all()
    # lecun_normal of one matrix, not of the stack
    assert 0.5 < float(kernels.std() * D**0.5) < 1.5


@pytest.mark.parametrize(
    "dispatch", ["dropless", pytest.param("capacity", marks=pytest.mark.slow)]
)
def test_no_tokens_and_one_without_axes(dispatch):
    layer = made(dispatch=dispatch)
    y, report = call(layer, jnp.zeros((0, D)))
    assert y.shape == (0, D)
    assert all(not leaf.any() for leaf in report)
    y, _ = jax.eval_shape(layer, draw(D))
    assert y.shape == (D,)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, r"`k` must be at most `num_experts` \(5\), got 6"),
        ({"k": 0}, "`k` must be at least 1"),
        ({"gate": "soft"}, "`gate` must be one of 'top_k', .* got 'soft'"),
        ({"dispatch": "x"}, "`dispatch` must be one of 'dropless'"),
        ({"capacity_factor": 0}, "`capacity_factor` must be positive"),
        ({"jitter": 2}, r"`jitter` must be in \[0, 1\], got 2"),
        (
            {"gate": "noisy_top_k", "router_bias": "weights"},
            "`router_bias` must be one of None, 'both' with the gate 'noisy_top_k', "
            "got 'weights'",
        ),
        ({"threshold": 0.1}, "`threshold` must be None with the gate 'top_k', got 0.1"),
        (
            {"gate": "dense_to_sparse", "threshold": 1.5},
            r"`threshold` must be in \[0, 1\]",
        ),
        ({"gate_activation": jnp.tanh}, "`gate_activation` must be None with the gate"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=f"MixtureOfExperts: {message}"):
        MixtureOfExperts(D, F, E, **options, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("untyped")
def test_arguments_that_do_not_fit():
    layer, x = made(), draw(T, D)
    with pytest.raises(ValueError, match=r"`temperature` must be 1 with .* got 2"):
        layer(x, temperature=2.0)
    with pytest.raises(ValueError, match=r"`inputs` must have shape \(11, 6\)"):
        layer(x[:, :5])
    with pytest.raises(ValueError, match=r"`where` must broadcast to shape \(11,\)"):
        layer(x, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r'balance: `router_bias` must be "selection"'):
        layer.balance(jnp.ones(E), 0.1)
    indices, none = jnp.zeros((T, 2), int), lambda rows, *_: rows[:1]
    with pytest.raises(ValueError, match="dropless_experts: `experts` must return 22"):
        dropless_experts(x, jnp.ones((T, 2)), indices, none, num_experts=E)
    with pytest.raises(ValueError, match="`experts` must return 5 x 4 slots"):
        capacity_experts(
            x, jnp.ones((T, 2)), indices, indices, none, num_experts=E, capacity=4
        )
    with pytest.raises(ValueError, match=r"`expert_indices` must have shape \(11, K\)"):
        dropless_experts(x, jnp.ones((2, 2)), indices[:2], none, num_experts=E)
    with pytest.raises(ValueError, match=r"`priority` must have shape \(11,\)"):
        capacity_dispatch(indices, E, 4, priority=jnp.ones(3))
