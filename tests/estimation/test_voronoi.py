"""Voronoi loss and gauge: vectors, powers of shared cells, unchanged densities."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib.estimation import (
    ExpertGate,
    GaussianExperts,
    gauge_fixed_experts,
    voronoi_cells,
    voronoi_loss,
)
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import gaussian_experts as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
OPTIONS = ("top_k", "over_specified", "orders")
loss_of: Any = jax.jit(voronoi_loss, static_argnames=OPTIONS)


def random_experts(seed, count, dtype="float32", features=2):
    rng = np.random.default_rng(seed)
    shapes = ((count, features), (count,), (count, features), (count,))
    fields = [rng.normal(size=shape) for shape in shapes]
    fields += [rng.uniform(0.5, 1.5, count), np.asarray(0.7)]
    return GaussianExperts(*(jnp.asarray(each, dtype) for each in fields))


def near(true, copies, size=0.2, seed=5):
    """Each true expert as often as said, moved a little."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(copies)), copies)

    def move(field):
        taken = np.asarray(field)[index]
        noise = rng.normal(size=taken.shape) * size
        return jnp.asarray(taken + noise, field.dtype)

    return GaussianExperts(*map(move, true[:5]))


def test_vectors():
    with np.load(DATA / "topk_moe_gating_case0.npz") as data:
        vectors = {key: data[key] for key in data}
    with jax.enable_x64(True):
        names = ("in_beta1", "in_beta0", "in_a", "in_b", "in_sigma")
        fitted = GaussianExperts(*(jnp.asarray(vectors[name]) for name in names))
        moved = zip(fitted[:5], (0.05, 0.1, -0.02, 0.03, 0.01), strict=True)
        true = GaussianExperts(*(field[:4] + by for field, by in moved))
        loss = loss_of(fitted, true, top_k=2)
        np.testing.assert_allclose(loss, vectors["out_voronoi_d1"], rtol=1e-13)


@pytest.mark.parametrize("copies", [(2, 1, 0), (3, 0, 2)])
@pytest.mark.parametrize(("top_k", "over_specified"), [(None, True), (1, False)])
def test_loss_against_the_oracle(copies, top_k, over_specified):
    true = random_experts(0, 3)
    fitted = near(true, copies)
    powers = {2: 4, 3: 6} if over_specified else None
    expected, cells = oracle.voronoi_loss(fitted, true, top_k or 3, powers)
    found = loss_of(fitted, true, top_k=top_k, over_specified=over_specified)
    assert found.dtype == jnp.float32
    assert_close(found, expected, dtype="float32", length=10)
    np.testing.assert_array_equal(jax.jit(voronoi_cells)(fitted, true), cells)


def taken(experts, index):
    return GaussianExperts(*(jnp.asarray(np.asarray(a)[index]) for a in experts[:5]))


@pytest.mark.parametrize("over_specified", [False, True])
def test_loss_is_zero_for_the_same_mixture_and_does_not_see_an_order(over_specified):
    true = random_experts(1, 3)
    loss = functools.partial(loss_of, over_specified=over_specified)
    assert loss(taken(true, [0, 1, 2]), true) == 0
    fitted = near(true, (1, 1, 1))
    turned = taken(fitted, [2, 0, 1])
    assert_close(loss(turned, true), loss(fitted, true), dtype="float32", length=10)


def test_loss_of_an_expert_that_is_there_several_times():
    true = random_experts(1, 3)
    twice = taken(true, [0, 0, 1, 2])  # each with half of the weight
    halves = np.asarray(twice.gate_bias) - np.log([2, 2, 1, 1])
    twice = twice._replace(gate_bias=jnp.asarray(halves, jnp.float32))
    assert_close(loss_of(twice, true, over_specified=True), 0, dtype="f4", length=4)
    four = near(true, (4, 1, 1), 0)
    assert jnp.isnan(loss_of(four, true, over_specified=True))
    assert jnp.isfinite(loss_of(four, true, over_specified=True, orders=(4, 6, 8)))


def test_gradient_where_parameters_are_equal_and_where_not():
    true = random_experts(2, 2)
    gradient = jax.jit(jax.grad(voronoi_loss))(true, true)
    assert all(not jnp.isnan(each).any() for each in gradient)
    assert not gradient.mean_weight.any()
    with jax.enable_x64(True):
        wide = random_experts(2, 2, "float64")
        fitted = near(wide, (2, 1))
        of_bias = lambda b: voronoi_loss(
            fitted._replace(mean_bias=b), wide, over_specified=True
        )
        point = (fitted.mean_bias,)
        check_grads(jax.jit(of_bias), point, order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.parametrize(
    "gate",
    [
        ExpertGate(),
        ExpertGate(bias_scaled_by_temperature=False),
        ExpertGate(top_k=2, bias_in="selection", bias_scaled_by_temperature=False),
        ExpertGate(top_k=2, bias_in="both", activation=jnp.tanh),
    ],
    ids=lambda gate: f"{gate.top_k}-{gate.bias_in}",
)
def test_gauge_changes_no_density(gate):
    experts = random_experts(3, 4)
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(20, 2)), jnp.float32)
    y = jnp.asarray(rng.normal(size=20), jnp.float32)
    fixed = gauge_fixed_experts(experts, gate, reference=1)
    density = jax.jit(lambda experts: experts.log_prob(x, y, gate))
    before, after = density(experts), density(fixed)
    assert_close(after, before, dtype="float32", length=4, c=16)
    assert fixed.gate_bias[1] == 0
    if gate.activation is None:
        assert not fixed.gate_weight[1].any()
        assert fixed.temperature == 1
    else:
        np.testing.assert_array_equal(fixed.gate_weight, experts.gate_weight)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: voronoi_loss(random_experts(0, 3), random_experts(0, 3), top_k=4),
            ValueError,
            "`top_k` must be at most the number of true experts, 3, got 4",
        ),
        (
            lambda: voronoi_cells(
                random_experts(0, 3), random_experts(0, 3, features=1)
            ),
            ValueError,
            r"`gate_weight` must have shape \(3, 1\)",
        ),
        (
            lambda: voronoi_loss(random_experts(0, 3), random_experts(0, 3), orders=()),
            ValueError,
            "`orders` must hold positive numbers",
        ),
        (
            lambda: gauge_fixed_experts(random_experts(0, 3), reference=3),
            ValueError,
            "`reference` must be an index of 3 experts, got 3",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
