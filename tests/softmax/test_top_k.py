"""Top-k softmax and gating: oracle, vectors, ties, rows that lack entries, errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib import softmax as library
from softlib._threshold import first_of_largest
from softlib.testing import assert_close, check_transformations
from tests.compiled import computed, f32
from tests.host import jnp
from tests.oracles import gates as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
softmax = computed(library.softmax)
top_k_softmax = computed(library.top_k_softmax)
top_k_gating = computed(library.top_k_gating)


@computed
def both(x, bias, where, **options):
    call = functools.partial
    dense = call(top_k_softmax, bias=bias, where=where, **options)(x)
    return dense, *call(top_k_gating, bias=bias, where=where, **options)(x)


def problem(dtype, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 7)).round(1)
    x[1, [0, 3]] = -np.inf
    x[2] = 1.5
    x[3, 1:] = -np.inf
    x[4] = -np.inf
    bias = rng.normal(size=7).round(1)
    where = rng.random((6, 7)) < 0.8
    x[5, ~where[5]] = np.nan
    return *(np.asarray(a, jnp.dtype(dtype)) for a in (x, bias)), where


# k, bias_in, renormalize, where, dtype
CASES = [
    (1, "weights", True, False, "float32"),
    (2, "weights", True, True, "float64"),
    (3, "both", True, True, "bfloat16"),
    (2, "selection", True, True, "float32"),
    (2, "both", False, True, "float16"),
    (5, "selection", False, True, "float32"),
    (7, "weights", True, True, "float32"),
]


@pytest.mark.parametrize(("k", "bias_in", "renormalize", "masked", "dtype"), CASES)
def test_matches_oracle(k, bias_in, renormalize, masked, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, bias, where = problem(dtype)
        x, where = (x, where) if masked else (x[:5], None)
        options: Any = {"bias_in": bias_in, "renormalize": renormalize}
        dense, weights, indices = both(x, bias, where, k=k, **options)
        expected, chosen = oracle.top_k(x, k, bias, where=where, **options)
        assert dense.dtype == dtype
        assert weights.dtype == ("float64" if dtype == "float64" else "float32")
        assert indices.dtype == jnp.int32
        assert_close(dense, expected, dtype=dtype, length=7)
        for row, own in chosen.items():
            assert indices[row].tolist() == own + [-1] * (k - len(own))
            filled = [*expected[row][own], *[0] * (k - len(own))]
            assert_close(weights[row], filled, dtype=weights.dtype, length=7)


def test_vectors():
    with np.load(DATA / "topk_moe_gating_case0.npz") as data, jax.enable_x64():
        of = lambda name: data[name]
        x, bias, k = of("out_logits"), of("in_beta0"), int(data["in_k"])
        dense, _, indices = both(x, None, None, k=k)
        np.testing.assert_allclose(dense, data["out_gate_nobias"], rtol=1e-14)
        np.testing.assert_array_equal(indices, data["out_expert_index"])
        for bias_in, name in (
            ("weights", "out_gate_paper"),
            ("both", "out_gate_bias_in_selection"),
        ):
            dense, *_ = both(x, bias, None, k=k, bias_in=bias_in)
            np.testing.assert_allclose(dense, data[name], rtol=1e-13)
        pull = lambda x, g: jax.vjp(lambda x: top_k_softmax(x, k=k, bias=bias), x)[1](g)
        (by_x,) = jax.jit(pull)(x, of("in_cotangent"))
        np.testing.assert_allclose(by_x, data["out_gate_paper_vjp_logits"], atol=1e-14)
        tied, *_ = both(of("in_tied_logits"), None, None, k=k)
        np.testing.assert_array_equal(tied > 0, data["out_tied_mask"])


def test_exactly_k_of_tied_entries_the_lower_index_first():
    x = f32([[1, 1, 1, 1], [0.0, -0.0, 0.0, -1], [-0.0, 0.0, -0.0, 0.0]])
    dense, _, indices = both(x, None, None, k=2)
    np.testing.assert_array_equal(dense, np.array([[0.5, 0.5, 0, 0]] * 3))
    np.testing.assert_array_equal(indices, np.array([[0, 1]] * 3))


def test_k_of_one_is_one_hot_without_gradient_and_k_of_all_is_softmax():
    x = np.asarray(np.random.default_rng(1).normal(size=(3, 5)), np.float32)
    first = lambda x: top_k_softmax(x, k=1)
    np.testing.assert_array_equal(first(x), np.eye(5)[x.argmax(-1)])
    assert not np.any(jax.jit(jax.jacobian(first))(x))
    for k in (5, 9):
        np.testing.assert_array_equal(top_k_softmax(x, k=k), softmax(x))


def test_softmax_of_the_selected_is_softmax_of_all_divided_by_its_sum():
    x = np.asarray(np.random.default_rng(2).normal(size=(8, 6)), np.float32)
    part = top_k_softmax(x, k=3, renormalize=False)
    assert_close(part, np.where(part > 0, softmax(x), 0), dtype=x.dtype, length=6)
    whole = part / part.sum(-1, keepdims=True)
    assert_close(top_k_softmax(x, k=3), whole, dtype=x.dtype, length=6)


@pytest.mark.parametrize("renormalize", [True, False])
def test_nan_and_inf_make_their_row_nan_and_no_other(renormalize):
    x = f32([[1.0, NAN, 0, -1], [INF, 2, 0, 0], [3.0, 2, 1, 0]])
    dense, weights, _ = both(x, None, None, k=2, renormalize=renormalize)
    assert np.isnan(dense[:2]).all()
    assert np.isnan(weights[:2]).all()
    assert np.isfinite(dense[2]).all()
    bias = f32([0.0, NAN, 0, 0])
    dense, weights, _ = both(x[2:], bias, None, k=1, bias_in="selection")
    assert np.isnan(dense).all()
    assert np.isnan(weights).all()
    where = np.array([True, False, True, True])
    dense, *_ = both(x[2:], bias, where, k=1, bias_in="selection")
    np.testing.assert_array_equal(dense, [[1, 0, 0, 0]])


def test_entries_that_do_not_count_have_no_gradient_and_make_no_nan():
    x = f32([[NAN, 1.0, -INF, 0.5, 2], [NAN] * 5, [-INF] * 5])
    where = np.array([[False, True, True, True, True], [False] * 5, [True] * 5])
    bias = f32([NAN, 0.0, 0, -INF, 0])

    def call(x, bias, renormalize):
        options: Any = {"bias": bias, "where": where, "renormalize": renormalize}
        gates = top_k_softmax(x, k=3, **options)
        return (gates * jnp.arange(5.0)[None]).sum(), gates

    for renormalize in (True, False):
        grad = jax.jit(jax.grad(call, (0, 1), has_aux=True), static_argnums=2)
        (dx, dbias), gates = jax.device_get(grad(x, bias, renormalize))
        assert gates[0, 3] == 0  # its bias is -inf
        assert not gates[1:].any()
        assert not dx[1:].any()
        assert np.isfinite(dx).all()
        assert np.isfinite(dbias).all()
        # Two entries share the weight; each derivative is rounded by itself.
        assert dx[0, 4] != 0
        np.testing.assert_allclose(dx[0, 4], -dx[0, 1], rtol=1e-6)


def test_axes_of_a_row():
    x = np.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)), np.float32)
    moved = np.moveaxis(top_k_softmax(np.moveaxis(x, 1, -1), k=2), -1, 1)
    np.testing.assert_array_equal(top_k_softmax(x, k=2, axis=1), moved)
    flat = top_k_softmax(x.reshape(-1), k=5).reshape(x.shape)
    np.testing.assert_array_equal(top_k_softmax(x, k=5, axis=None), flat)
    np.testing.assert_array_equal(top_k_softmax(x, k=5, axis=(0, 1, 2)), flat)
    weights, indices = top_k_gating(x, k=2, axis=1)
    assert weights.shape == indices.shape == (2, 2, 4)
    taken = np.take_along_axis(top_k_softmax(x, k=2, axis=1), indices, axis=1)
    assert_close(weights, taken, dtype=x.dtype, length=3)


@pytest.mark.parametrize("shape", [(0, 3), (2, 1), (1,)])
def test_empty_batches_and_rows_of_one(shape):
    x = np.full(shape, 2.0, np.float32)
    dense, weights, indices = both(x, None, None, k=1)
    assert dense.shape == x.shape
    assert weights.shape == indices.shape == (*shape[:-1], 1)
    assert (dense == 1).all() or x.size == 0
    assert top_k_softmax(np.zeros((2, 0), np.float32), k=3).shape == (2, 0)


@pytest.mark.slow
def test_transformations():
    bias = problem("float32")[1]
    call = lambda x, bias: (
        top_k_softmax(x, k=3, bias=bias, bias_in="both"),
        top_k_gating(x, k=2, bias=bias, renormalize=False)[0],
    )
    x = np.asarray(np.random.default_rng(4).normal(size=(4, 5)), np.float32)
    check_transformations(call, x, bias[:5])


def test_array_k_has_a_value_per_row():
    x = f32([[3.0, 1, 1, 2]] * 5)
    kept = computed(first_of_largest)(x, np.array([0, 1, 2, 3, 9]))
    order = np.array([0, 3, 1, 2])
    for row, k in enumerate((0, 1, 2, 3, 4)):
        if k:
            assert np.flatnonzero(kept[row]).tolist() == sorted(order[:k].tolist())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (jnp.zeros(3, int), {"k": 1}, TypeError, "`x` must have a floating dtype"),
        (jnp.zeros(3), {"k": 0}, ValueError, "`k` must be at least 1, got 0"),
        (jnp.zeros(3), {"k": 1.0}, TypeError, "`k` must be a Python int"),
        (jnp.zeros(3), {"k": 4}, ValueError, "at most the size of `axis`, 3, got 4"),
        (jnp.zeros(3), {"k": 1, "bias_in": "x"}, ValueError, "'both', got 'x'"),
        (jnp.zeros(3), {"k": 1, "bias": jnp.zeros(2)}, ValueError, "`bias` must broad"),
        (jnp.zeros(3), {"k": 1, "where": jnp.ones(3)}, TypeError, "`where` must have"),
        (jnp.zeros(3), {"k": 1, "axis": 1}, ValueError, "`axis` must hold axes"),
    ],
)
def test_errors(x, options, error, message):
    with pytest.raises(error, match=f"top_k_gating: .*{message}"):
        top_k_gating(x, **options)
