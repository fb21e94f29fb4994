"""Filters of a sampler: oracle, ties, what is always kept, composition, errors."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from softlib import softmax as library
from tests.compiled import computed, f32
from tests.host import jnp
from tests.oracles import gates as oracle

top_k_logits = computed(library.top_k_logits)
top_p_logits = computed(library.top_p_logits)
min_p_logits = computed(library.min_p_logits)
FILTERS = {
    "top_k": lambda x, k, **options: top_k_logits(x, k=k, **options),
    "top_p": lambda x, p, **options: top_p_logits(x, p=p, **options),
    "min_p": lambda x, p, **options: min_p_logits(x, p=p, **options),
}
INF, NAN = jnp.inf, jnp.nan
softmax = computed(library.softmax)
STATIC = {"top_k": (1, 3, 20), "top_p": (0.0, 0.3, 0.9, 1.0), "min_p": (0.0, 0.2, 1.0)}


def problem(dtype, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 8)).round(1) * 2
    x[1] = 0.5
    x[2, ::2] = -np.inf
    x[3] = -np.inf
    x[4, 3:] = x[4, 0]
    where = rng.random((6, 8)) < 0.8
    x[5, ~where[5]] = np.nan
    return np.asarray(x, jnp.dtype(dtype)), where


@functools.partial(jax.jit, static_argnames=("kind", "value"))
def static(x, where, *, kind, value):
    return FILTERS[kind](x, value, where=where)


@functools.partial(jax.jit, static_argnames="kind")
def traced(x, where, value, *, kind):
    return FILTERS[kind](x, value, where=where)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", FILTERS)
def test_matches_oracle_for_static_and_traced_values(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, where = problem(dtype)
        for value in STATIC[kind] if dtype == "float32" else ():
            result = static(x, where, kind=kind, value=value)
            assert result.dtype == dtype
            # What is kept is kept to the bit.
            np.testing.assert_array_equal(
                np.asarray(result, float), oracle.filtered(x, kind, value, where)
            )
        value = np.asarray([STATIC[kind][i % 3] for i in range(6)])
        expected = oracle.filtered(x, kind, value, where)
        result = traced(x, where, value, kind=kind)
        assert result.dtype == dtype
        np.testing.assert_array_equal(np.asarray(result, float), expected)


def test_ties_at_the_cut():
    x = np.log(np.full(5, 0.2, np.float32))
    kept = lambda y: np.flatnonzero(y > -INF).tolist()
    assert kept(top_k_logits(x, k=2)) == [0, 1]
    assert kept(top_k_logits(x, k=jnp.int32(2))) == [0, 1]
    assert kept(top_p_logits(x, p=0.3)) == [0, 1]
    assert kept(min_p_logits(x, p=1.0)) == [0, 1, 2, 3, 4]
    assert kept(top_k_logits(f32([-0.0, 0.0, -0.0]), k=1)) == [0]


@pytest.mark.parametrize(
    ("kind", "none", "all_"),
    [("top_k", -1, 99), ("top_p", -0.5, 1.5), ("min_p", 1.5, -0.5)],
)
def test_one_entry_is_kept_and_nothing_is_filtered_at_the_ends(kind, none, all_):
    x = f32([[0.0, 3, 1], [1.0, 1, 1], [-INF, 2, -INF]])
    values = lambda v: np.full(3, v, "int32" if kind == "top_k" else "float32")
    least = np.asarray(traced(x, None, values(none), kind=kind))
    assert ((least > -INF).sum(-1) >= 1).all()
    assert least[0].tolist() == [-INF, 3, -INF]
    np.testing.assert_array_equal(traced(x, None, values(all_), kind=kind), x)


@pytest.mark.parametrize("kind", FILTERS)
def test_nan_and_inf_make_their_row_nan_and_no_other(kind):
    x = f32([[NAN, 1.0], [INF, 1.0], [2.0, 1.0]])
    result = np.asarray(static(x, None, kind=kind, value=1))
    assert np.isnan(result[:2]).all()
    assert result[2, 0] == 2
    if kind != "top_k":
        result = traced(x[2:], None, f32([NAN]), kind=kind)
        assert np.isnan(result).all()


def test_filters_compose_as_samplers_renormalise():
    rng = np.random.default_rng(3)
    logits = f32(rng.normal(size=(4, 30)) * 2)
    x = logits / f32(0.6)
    x = min_p_logits(top_p_logits(top_k_logits(x, k=10), p=0.95), p=0.02)
    for row, p in enumerate(softmax(logits / f32(0.6)).astype(float)):
        order = np.argsort(-p, kind="stable")
        p[order[10:]] = 0
        p /= p.sum()
        before = np.cumsum([0, *p[order]])[:-1]
        p[order[before >= 0.95]] = 0
        p /= p.sum()
        p[p < 0.02 * p.max()] = 0
        p /= p.sum()
        np.testing.assert_allclose(softmax(x)[row], p, atol=1e-6)


@pytest.mark.parametrize("kind", FILTERS)
def test_gradient_is_one_where_kept_and_vmap_is_a_loop(kind):
    x, _ = problem("float32")
    x = x[:3]
    value = np.asarray([STATIC[kind][1]] * 3)
    call = lambda x, value: FILTERS[kind](x, value)
    mapped = np.asarray(jax.jit(jax.vmap(call))(x, value))
    np.testing.assert_array_equal(mapped, traced(x, None, value, kind=kind))
    total = lambda x: jnp.where(jnp.isfinite(y := call(x, value)), y, 0).sum()
    slopes = jax.jit(jax.grad(total))(x)
    np.testing.assert_array_equal(slopes, mapped > -INF)


def test_axes_and_empty_shapes():
    x = np.asarray(np.random.default_rng(4).normal(size=(2, 3, 4)), np.float32)
    for kind, filter_ in FILTERS.items():
        value = STATIC[kind][1]
        flat = filter_(x.reshape(-1), value).reshape(x.shape)
        np.testing.assert_array_equal(filter_(x, value, axis=None), flat)
        moved = np.moveaxis(filter_(np.moveaxis(x, 1, -1), value), -1, 1)
        np.testing.assert_array_equal(filter_(x, value, axis=1), moved)
        for shape in ((0, 3), (2, 0)):
            assert filter_(np.zeros(shape, "f4"), value).shape == shape


@hypothesis.given(st.integers(0, 10_000), st.floats(0, 1))
@hypothesis.settings(max_examples=25)
def test_kept_probability_reaches_p_and_would_not_with_one_entry_less(seed, p):
    x = np.asarray(np.random.default_rng(seed).normal(size=(1, 16)) * 2, np.float32)
    kept = np.asarray(traced(x, None, f32([p]), kind="top_p")) > -INF
    probs = np.sort(softmax(x).astype(float)[kept])[::-1]
    assert probs.sum() >= p - 1e-6
    assert probs[:-1].sum() < p + 1e-6 or len(probs) == 1


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("kind", "value", "error", "message"),
    [
        ("top_k", 0, ValueError, "`k` must be at least 1, got 0"),
        ("top_k", 1.5, TypeError, "`k` must be an int or an integer array"),
        ("top_k", jnp.ones(3, int), ValueError, "`k` must broadcast"),
        ("top_p", 1.5, ValueError, r"`p` must be in \[0, 1\], got 1.5"),
        ("min_p", jnp.ones(2, int), TypeError, "`p` must have a floating dtype"),
        ("min_p", jnp.ones(3), ValueError, "`p` must broadcast"),
    ],
)
def test_errors(kind, value, error, message):
    with pytest.raises(error, match=f"{kind}_logits: {message}"):
        FILTERS[kind](jnp.zeros((2, 4)), value)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: library.top_p_logits(x, p=0.9),
        lambda x: library.top_k_logits(x, k=50),
        lambda x: library.top_k_logits(x, k=jnp.array([50])),
        lambda x: library.top_k_softmax(x, k=50),
        lambda x: library.soft_top_k(x, k=50),
    ],
    ids=["top_p", "top_k", "traced top_k", "top_k_softmax", "soft_top_k"],
)
def test_nothing_is_sorted(function):
    x = jax.ShapeDtypeStruct((4, 4096), jnp.float32)
    text = jax.jit(function).lower(x).compile().as_text()
    assert text is not None
    assert " sort(" not in text


@pytest.mark.parametrize("k", [1, 2, 3, 200])
@pytest.mark.parametrize("traced", [False, True])
def test_zeros_of_either_sign_are_equal(k, traced):
    x = f32([-0.0, 0.0, -1.0, 0.0, -0.0])
    number = np.array(k) if traced else k
    kept = top_k_logits(x, k=number) > -np.inf
    order = np.array([0, 1, 3, 4, 2])  # by value, then by index
    expected = np.isin(np.arange(5), order[:k])
    np.testing.assert_array_equal(kept, expected)


def test_nan_anywhere_in_a_long_row_is_found():
    """Finds NaN of either sign beside -inf: a maximum or a sum may pass over one."""
    rows = np.full((12, 1000), -np.inf, np.float32)
    rows[::2] = np.random.default_rng(0).normal(size=(6, 1000))
    for row in range(0, 12, 3):
        rows[row, 977 * row % 1000] = -np.nan if row % 2 else np.nan
    kept = top_k_logits(rows, k=3)
    bad = np.isnan(kept).all(-1)
    np.testing.assert_array_equal(bad, np.arange(12) % 3 == 0)
