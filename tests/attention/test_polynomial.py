"""Kronecker attention by monomials: the polynomial of every score, without scores."""

import functools
import pathlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from softlib.attention._kronecker_polynomial import kronecker_attention_polynomial
from softlib.attention._polynomial import monomials
from softlib.attention._polynomial.exp_polynomial import (
    exp_polynomial,
    exp_polynomial_error,
)
from softlib.testing import assert_close, check_transformations
from tests import pairwise
from tests.attention.problems import planted
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import polynomial_attention as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
RTOL = 1e-2


@pytest.fixture
def many_blocks(monkeypatch):
    """Chunks of 4 monomials, blocks of 4 tokens."""
    monkeypatch.setattr(monomials, "CHUNK", 4)
    monkeypatch.setattr(monomials, "TILE", 1)
    monkeypatch.setattr(monomials, "LEAST_BLOCK", 4)


def problem(
    order=2,
    *,
    batch=(1,),
    length=5,
    key_lengths=None,
    heads=(2, 2),
    width=3,
    bound=1.0,
    dtype=jnp.float32,
    seed=0,
) -> Any:
    """Uniform entries of scores within the bound, for the scale 1 / H."""
    random = np.random.default_rng(seed)
    n, k = heads
    largest = bound ** (1 / (order + 1))
    draw = lambda top, *shape: random.uniform(-top, top, shape).astype(dtype)
    lengths = key_lengths or (length,) * order
    return (
        draw(largest, *batch, length, n, width),
        tuple(draw(largest, *batch, s, k, width) for s in lengths),
        tuple(draw(1, *batch, s, k, 2) for s in lengths),
    )


def program(**options):
    """The function under these options, compiled, with results of NumPy."""
    call = jax.jit(functools.partial(kronecker_attention_polynomial, **options))
    return lambda *arrays: jax.device_get(call(*arrays))


def with_batch_axis(tree):
    flat = lambda x: np.asarray(x, np.float64).reshape(-1, *x.shape[-3:])
    return jax.tree.map(flat, tree)


def exact_attention(query, keys, values, **options):
    arrays = with_batch_axis((query, keys, values))
    return oracle.attention(*arrays, function=oracle.exp, **options)


CASES = pairwise.pairwise(
    {
        "order": (2, 1, 3),
        "heads": ((4, 2), (2, 2), (3, 1)),
        "basis": ("chebyshev", "taylor"),
        "given": ("rtol", "degree", "both"),
        "lengths": ("equal", "unequal", "causal"),
        "batch": ((), (1, 2)),
    }
)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_matches_oracle(case):
    order, given, lengths = case["order"], case["given"], case["lengths"]
    degree = {1: 5, 2: 4, 3: 3}[order]
    options = {
        "rtol": {"logit_bound": 1.0, "rtol": 0.03},
        "degree": {"degree": degree},
        "both": {"logit_bound": 1.5, "degree": degree},
    }[given]
    with jax.enable_x64():
        arrays = problem(
            order,
            batch=case["batch"],
            length=9,
            key_lengths=(10, 3, 6)[:order] if lengths == "unequal" else None,
            heads=case["heads"],
            dtype=jnp.float64,
        )
        is_causal = lengths == "causal"
        call = program(
            basis=case["basis"], is_causal=is_causal, return_bound=True, **options
        )
        out, bound = call(*arrays)
    if given == "rtol":
        degree = len(exp_polynomial(1.0, 0.03, basis=case["basis"])) - 1
    function = oracle.polynomial(case["basis"], degree, options.get("logit_bound"))
    bounds = bound.reshape(-1, *bound.shape[-2:])
    expected = oracle.attention(
        *with_batch_axis(arrays), function=function, is_causal=is_causal, bound=bounds
    )
    assert_close(out, expected.reshape(out.shape), dtype=jnp.float64, length=1000, c=8)


def test_independent_vectors():
    data = np.load(DATA / "kronecker_attention_case0.npz")
    with jax.enable_x64():
        get = lambda *names: tuple(
            data[f"in_poly_{n}"][:, None].astype(float) for n in names
        )
        arrays = (*get("q"), get("k1", "k2"), get("v1", "v2"))
        bound, rtol = (data[f"in_poly_{name}"].item() for name in ("R", "eps"))
        close = functools.partial(assert_close, dtype=jnp.float64, length=16)
        for is_causal, name in ((False, "taylor"), (True, "taylor_causal")):
            call = program(
                logit_bound=bound, rtol=rtol, basis="taylor", is_causal=is_causal
            )
            close(call(*arrays)[:, 0], data[f"out_poly_{name}"])
        call = program(logit_bound=bound, rtol=rtol)
        error = call(*arrays)[:, 0] - data["out_poly_exact"]
    found = exp_polynomial(bound, rtol, basis="taylor")
    np.testing.assert_allclose(found, data["out_poly_taylor_coef"], rtol=1e-12)
    assert abs(error).max() < 1e-6


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(dtype, is_causal):
    with jax.enable_x64(dtype == "float64"):
        arrays = problem(dtype=jnp.dtype(dtype))
        out, bound = program(degree=3, is_causal=is_causal, return_bound=True)(*arrays)
        assert out.dtype == jnp.dtype(dtype)
        assert bound.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    function = oracle.polynomial("chebyshev", 3)
    expected = oracle.attention(
        *with_batch_axis(arrays),
        function=function,
        is_causal=is_causal,
        bound=bound,
    )
    assert_close(out, expected, dtype=dtype, length=25)


def test_narrow_queries_do_not_narrow_the_sums():
    query, keys, values = problem()
    call = program(degree=3)
    out = call(query.astype(jnp.bfloat16), keys, values)
    assert out.dtype == jnp.bfloat16
    wide = call(query.astype(jnp.bfloat16).astype(jnp.float32), keys, values)
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))


def test_many_monomials():
    # Rank 4845 in 76 chunks.
    arrays = problem(width=16, heads=(2, 1))
    out = program(logit_bound=1.0)(*arrays)
    function = oracle.polynomial("chebyshev", 4, 1.0)
    expected = oracle.attention(*with_batch_axis(arrays), function=function)
    assert_close(out, expected, dtype=jnp.float32, length=4845)


@pytest.mark.parametrize(
    ("bound", "worst", "uniform"),
    [(1.0, 4e-7, 2e-7), (3.4, 2e-5, 8e-7), (5.0, 4e-4, 3e-6)],
)
def test_rounding_is_as_documented(bound, worst, uniform):
    call = program(logit_bound=bound)
    degree = len(exp_polynomial(bound, RTOL)) - 1
    arrays = problem(1, batch=(100,), length=3, heads=(1, 1), bound=bound)
    near = lambda x: f32(np.sqrt(bound) * (1 - 0.01 * abs(x) / np.sqrt(bound)))
    at_the_end = (-near(arrays[0]), (near(arrays[1][0]),), arrays[2])
    for case, documented in ((arrays, uniform), (at_the_end, worst)):
        function = oracle.polynomial("chebyshev", degree, bound)
        expected = oracle.attention(*with_batch_axis(case), function=function)
        # Twice, because other machines sum in other orders.
        assert np.abs(call(*case) - expected).max() < 2 * documented


def test_degree_0_is_the_mean():
    call = program(degree=0)
    for width in (3, 0):
        arrays = problem(1, width=width)
        out = call(*arrays)
        expected = arrays[2][0].mean(1, keepdims=True)
        np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), atol=1e-6)


def test_axes_may_be_swapped():
    query, (k1, k2), (v1, v2) = problem(key_lengths=(4, 7))
    call = program(logit_bound=1.0)
    swapped = call(query, (k2, k1), (v2, v1))
    np.testing.assert_allclose(call(query, (k1, k2), (v1, v2)), swapped, atol=1e-6)


def test_one_axis_is_ordinary_attention():
    query, keys, values = problem(1, heads=(4, 2), length=50, width=2, bound=3.0)
    call = program(logit_bound=2.0, scale=0.3, rtol=1e-4)
    exact = jax.jit(functools.partial(jax.nn.dot_product_attention, scale=0.3))
    error = call(query, keys, values) - exact(query, *keys, *values)
    assert np.abs(error).max() < 2e-4


# Each is compiled once: bounds are arrays here.
CERTIFIED = [
    (1, "chebyshev", 3),
    (2, "chebyshev", 6),
    (2, "taylor", 5),
    (3, "chebyshev", 2),
]


@functools.cache
def certified(basis, degree, is_causal):
    return jax.jit(
        functools.partial(
            kronecker_attention_polynomial,
            basis=basis,
            degree=degree,
            is_causal=is_causal,
            return_bound=True,
        )
    )


@pytest.mark.parametrize(
    ("order", "basis", "degree", "is_causal"),
    [*((*case, False) for case in CERTIFIED), (2, "chebyshev", 3, True)],
)
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    seed=st.integers(0, 2**31), bound=st.floats(1e-3, 4.0), corner=st.booleans()
)
def test_error_is_at_most_the_certificate(
    order, basis, degree, is_causal, seed, bound, corner
):
    with jax.enable_x64():
        arrays = problem(order, bound=bound, dtype=jnp.float64, seed=seed)
        if corner:  # scores at both ends of the interval
            top = bound ** (1 / (order + 1))
            at_end = lambda x: top * np.sign(x)
            arrays = jax.tree.map(at_end, arrays[:2]) + arrays[2:]
        found = certified(basis, degree, is_causal)(*arrays)
        out, bounds = map(np.asarray, found)
        exact = exact_attention(*arrays, is_causal=is_causal)
    assert bounds.max() <= bound * (1 + 1e-12)
    largest = np.prod([np.abs(value).max() for value in arrays[2]])
    for place in np.ndindex(bounds.shape):
        of_row = float(bounds[place])
        epsilon = exp_polynomial_error(of_row, degree, basis=basis) if of_row else 0
        if epsilon < 1:
            error = abs(out[place] - exact[place]).max()
            assert error <= 2 * epsilon / (1 - epsilon) * largest + 1e-11


@functools.cache
def bounds_alone(is_causal, scale):
    call = functools.partial(
        kronecker_attention_polynomial,
        degree=0,
        is_causal=is_causal,
        scale=scale,
        return_bound=True,
    )
    return jax.jit(lambda *arrays: call(*arrays)[1])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0, 2, 20, -20]),
    scale=st.sampled_from([1.0, -0.3]),
)
def test_no_score_exceeds_the_bound(order, is_causal, seed, spread, scale):
    random = np.random.default_rng(seed)
    query, keys, values = problem(order, heads=(2, 1), seed=seed)
    # Entries of very different sizes, and zeros.
    vary = lambda x: (
        x
        * f32(10.0 ** (random.integers(-1, 2, x.shape) * spread / 2))
        * (random.uniform(size=x.shape) < 0.8)
    )
    query, keys = vary(query), tuple(map(vary, keys))
    bound = np.asarray(bounds_alone(is_causal, scale)(query, keys, values), np.float64)
    assert not np.isnan(bound).any()
    q, ks = with_batch_axis((query, keys))
    least = np.zeros_like(bound)
    for b, i, n in np.ndindex(bound.shape):
        seen = slice(0, i + 1 if is_causal else None)
        scores = abs(oracle.outer([k[b, seen, 0] for k in ks], q[b, i, n]))
        least[b, i, n] = abs(scale) * scores.max()
    assert (least <= bound * (1 + 20 * 2.0**-23) + 1e-37).all()


def test_the_bound_is_the_least_of_several():
    query, (k1, k2), values = problem()
    found = bounds_alone(False, 1.0)(query, (k1, k2), values)
    q, a, b = (np.abs(np.asarray(x)).transpose(0, 2, 1, 3) for x in (query, k1, k2))
    norm = lambda x: np.sqrt((x * x).sum(-1))
    top = lambda x: x.max(-1)
    largest = lambda x: x.max(2, keepdims=True)
    several = [
        (q * largest(a) * largest(b)).sum(-1),
        norm(q) * largest(norm(a)) * largest(top(b)),
        norm(q) * largest(norm(b)) * largest(top(a)),
        top(q) * largest(norm(a)) * largest(norm(b)),
        top(q) * largest(a.sum(-1)) * largest(top(b)),
        top(q) * largest(b.sum(-1)) * largest(top(a)),
    ]
    expected = np.min(several, axis=0).transpose(0, 2, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_beyond_the_bound_are_nan_and_no_others():
    query, keys, values = problem(length=6, heads=(4, 2))
    call = program(logit_bound=1.0)
    expected = call(query, keys, values)
    for bad in (3.0, 1e30, np.inf, np.nan):
        out = call(planted(query, (0, 2, 1), bad), keys, values)
        assert np.isnan(out[0, 2, 1]).all()
        rest = planted(np.ones(out.shape[:3], bool), (0, 2, 1), False)
        np.testing.assert_array_equal(out[rest], expected[rest])
    # A key is seen by every query of its head.
    for bad in (1e3, np.nan):
        k1 = planted(keys[0], (0, 2, 1), bad)
        out = call(query, (k1, keys[1]), values)
        assert np.isnan(out[:, :, 2:]).all()
        np.testing.assert_array_equal(out[:, :, :2], expected[:, :, :2])


def test_the_bound_itself_is_within_it():
    call = program(degree=1, logit_bound=0.7)
    for width in (3, 7, 10):
        ones = np.ones((2, 1, width), np.float32)
        edge_and_beyond = f32([0.7, 0.7 * (1 + 1e-5)]).reshape(2, 1, 1)
        out = call(edge_and_beyond * ones, (ones, ones), (ones, ones))
        np.testing.assert_allclose(out[0], 1, rtol=1e-6)
        assert np.isnan(out[1]).all()


def test_bounds_without_a_digit_left_are_nan():
    query, keys, values = problem(1)
    for basis in ("chebyshev", "taylor"):
        call = program(degree=2, basis=basis, return_bound=True)
        out, bound = call(query * 1e3, keys, values)
        assert (bound > 18).all()
        assert np.isnan(out).all()


def test_rows_whose_denominator_is_not_positive_are_nan():
    # 1 + x is negative at x = -3.
    ones = np.ones((2, 1, 1), np.float32)
    query = f32([-3.0, 0.5])[:, None, None]
    out = program(degree=1, basis="taylor")(query, (ones,), (2 * ones,))
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], 2, rtol=1e-6)


def test_gradient_of_rows_that_are_nan_is_0():
    query, keys, values = problem()
    call = functools.partial(kronecker_attention_polynomial, logit_bound=1.0)

    @jax.jit
    def gradient(query, rows):
        total = lambda *arrays: jnp.where(rows[None, ..., None], call(*arrays), 0).sum()
        return jax.grad(total, argnums=(0, 1, 2))(query, keys, values)

    whole = np.ones((5, 2), bool)
    expected = gradient(query, planted(whole, (3, 0), False))
    for bad in (10.0, 1e30, np.nan):
        everywhere = gradient(planted(query, (0, 3, 0), bad), whole)
        for one, two in zip(*map(jax.tree.leaves, (everywhere, expected)), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("options", [{"degree": 3}, {"logit_bound": 1.0}])
def test_the_future_changes_no_row(options):
    query, keys, values = problem(length=9)
    call = program(is_causal=True, return_bound=True, **options)
    expected = call(query, keys, values)
    for bad in (2.0, 1e30, np.inf, np.nan):
        later = lambda x, bad=bad: planted(x, np.s_[:, 6:], bad)
        changed = later(query), (keys[0], later(keys[1])), (later(values[0]), values[1])
        found = call(*changed)
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one[:, :6], two[:, :6])
        if bad != 2:
            assert np.isnan(found[0][:, 6:]).all()


def test_the_causal_bound_is_a_running_maximum():
    query, keys, values = problem(length=6)
    found = bounds_alone(True, 1.0)(query, keys, values)
    for i in (0, 3, 5):
        past = jax.tree.map(lambda x, i=i: x[:, : i + 1], (keys, values))
        alone = bounds_alone(False, 1.0)(query[:, i : i + 1], *past)
        np.testing.assert_allclose(found[:, i : i + 1], alone, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(4, 0), (0, 0)])
def test_an_axis_without_keys_gives_0(lengths):
    query, keys, values = problem(key_lengths=lengths)
    call = functools.partial(
        kronecker_attention_polynomial, logit_bound=1.0, return_bound=True
    )

    @jax.jit
    def run(*arrays):
        total = lambda *arrays: call(*arrays)[0].sum()
        return call(*arrays), jax.grad(total, argnums=(0, 1, 2))(*arrays)

    (out, bound), gradients = jax.device_get(run(query, keys, values))
    assert out.shape == (1, 5, 2, 2)
    assert not out.any()
    assert not bound.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_queries(is_causal):
    query, keys, values = problem(length=0)
    call = program(degree=2, is_causal=is_causal, return_bound=True)
    out, bound = call(query, keys, values)
    assert out.shape == (1, 0, 2, 2)
    assert bound.shape == (1, 0, 2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_large_keys_and_small_queries_are_moderate_scores(is_causal):
    query, (k1, k2), values = problem()
    call = program(degree=8, is_causal=is_causal)
    expected = call(query, (k1, k2), values)
    found = call(query * 2.0**-70, (k1 * 2.0**40, k2 * 2.0**30), values)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if not is_causal:  # features of different sizes
        sizes = f32([2**30, 2**-30, 1]).reshape(1, 1, 1, 3)
        found = call(query * sizes, (k1 / sizes, k2), values)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def dense(query, keys, values, scale, coefficients, is_causal):
    """Every score; differentiable."""
    axes = "jkl"[: len(keys)]
    n, k = query.shape[-2], keys[0].shape[-2]
    keys, values = (
        [jnp.repeat(x, n // k, axis=-2) for x in xs] for xs in (keys, values)
    )
    terms = ",".join(["bihc", *(f"b{a}hc" for a in axes)])
    x = scale * jnp.einsum(f"{terms}->bhi{axes}", query, *keys)
    p = jnp.polyval(jnp.asarray(coefficients[::-1]), x)
    if is_causal:
        for a in range(len(axes)):
            shape = [1] * p.ndim
            shape[2], shape[3 + a] = p.shape[2], p.shape[3 + a]
            p = p * jnp.tri(p.shape[2]).reshape(shape)
    terms = ",".join([f"bhi{axes}", *(f"b{a}he" for a in axes)])
    numerator = jnp.einsum(f"{terms}->bihe", p, *values)
    denominator = p.sum(tuple(range(3, p.ndim))).transpose(0, 2, 1)
    return numerator / denominator[..., None]


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize(
    ("order", "is_causal"), [(1, True), (2, False), (2, True), (3, False)]
)
def test_gradients_are_those_of_the_dense_polynomial(order, is_causal):
    with jax.enable_x64():
        arrays = problem(order, heads=(4, 2), dtype=jnp.float64)
        coefficients = exp_polynomial(1.5, 0.05)
        cotangent = problem(order, width=2, heads=(4, 2), dtype=jnp.float64)[0]
        call = lambda *a: kronecker_attention_polynomial(
            *a[:3], scale=a[3], logit_bound=1.5, rtol=0.05, is_causal=is_causal
        )
        plain = lambda q, ks, vs, scale: dense(
            q, ks, vs, scale, coefficients, is_causal
        )
        gradient = lambda f: jax.jit(
            jax.value_and_grad(
                lambda *a: (f(*a) * cotangent).sum(), argnums=(0, 1, 2, 3)
            )
        )(*arrays, np.float64(0.3))
        found, expected = gradient(call), gradient(plain)
    for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(one, two, dtype=jnp.float64, length=1000)


def test_the_bound_is_a_constant():
    with jax.enable_x64():
        arrays = problem(length=1, heads=(1, 1), dtype=jnp.float64)
        call = functools.partial(kronecker_attention_polynomial, return_bound=True)
        bound = program(return_bound=True, degree=0)(*arrays)[1].item()
        own = lambda *a: call(*a, degree=3)[0].sum()
        given = lambda *a: call(*a, degree=3, logit_bound=bound)[0].sum()
        gradients = [jax.jit(jax.grad(f, (0, 1)))(*arrays) for f in (own, given)]
        for one, two in zip(*map(jax.tree.leaves, gradients), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-14)
        of_bound = jax.jit(jax.grad(lambda *a: call(*a, degree=0)[1].sum()))(*arrays)
    assert not np.any(of_bound)


def temporary(n, degree, *, is_causal, gradient):
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = (
        struct(n, 1, 4),
        (struct(n, 1, 4), struct(n, 1, 4)),
        (struct(n, 1, 4), struct(n, 1, 4)),
    )
    call = lambda query, keys, values: kronecker_attention_polynomial(
        query, keys, values, degree=degree, logit_bound=1.0, is_causal=is_causal
    )
    total = lambda *arrays: call(*arrays).sum()
    function = jax.grad(total, argnums=(0, 1, 2)) if gradient else call
    found = jax.jit(function).lower(*arrays).compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


@pytest.mark.parametrize(
    ("is_causal", "gradient"),
    [
        (False, False),
        (False, True),
        (True, False),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_memory_is_linear_and_does_not_depend_on_the_rank(is_causal, gradient):
    size = functools.partial(temporary, is_causal=is_causal, gradient=gradient)
    middle, large = size(2**16, 4), size(2**17, 4)
    assert gradient or middle < 2.05 * size(2**15, 4)
    assert large < 2.05 * middle
    # The arguments are 20 numbers per token; 70 monomials of three vectors were 210.
    assert large < 4 * 2**17 * (100 if gradient else 60)
    # 495 monomials.
    assert size(2**17, 8) < 1.1 * large


def test_vmap_is_a_loop():
    query, keys, values = problem(batch=(3,))
    for is_causal in (False, True):
        call = functools.partial(
            kronecker_attention_polynomial,
            degree=3,
            is_causal=is_causal,
            return_bound=True,
        )
        found = jax.jit(jax.vmap(call))(query, keys, values)
        expected = jax.jit(call)(query, keys, values)
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize(("is_causal", "of"), [(False, jax.jacrev), (True, jax.jacfwd)])
def test_derivatives_of_second_order(is_causal, of):
    with jax.enable_x64():
        arrays = problem(length=3, heads=(1, 1), width=2, dtype=jnp.float64)
        query, keys, values = jax.device_put(arrays)
        fixed = {"logit_bound": 1.5, "rtol": 0.05}
        coefficients = exp_polynomial(1.5, 0.05)

        def total(attend):
            call = lambda q, k: attend(q, (k, keys[1]), values)
            return lambda q, k: jnp.sin(3 * call(q, k)).sum()

        found = total(
            lambda *a: kronecker_attention_polynomial(*a, is_causal=is_causal, **fixed)
        )
        plain = total(
            lambda q, ks, vs: dense(q, ks, vs, 1 / 2, coefficients, is_causal)
        )
        second = lambda f: jax.jit(of(jax.grad(f, (0, 1)), (0, 1)))(query, keys[0])
        pairs = zip(*map(jax.tree.leaves, (second(found), second(plain))), strict=True)
        for one, two in pairs:
            np.testing.assert_allclose(one, two, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_causal", "basis"), [(True, "taylor"), (False, "chebyshev")]
)
def test_transformations(is_causal, basis):
    query, keys, values = problem(batch=(8,), length=3, heads=(2, 1), width=2)
    check_transformations(
        lambda q, k1, k2, v1, v2: kronecker_attention_polynomial(
            q, (k1, k2), (v1, v2), is_causal=is_causal, degree=3, basis=basis
        ),
        *(query, *keys, *values),
        rows=range(5),
        # A Chebyshev polynomial is that of a bound, which is a constant.
        differentiable=None if basis == "taylor" else (3, 4),
        length=100,
    )


ERRORS = [
    ({"query": jnp.ones((5, 2, 3), int)}, TypeError, "`query` must have a floating"),
    ({"query": jnp.ones((5, 3))}, ValueError, "`query` must have at least 3 axes"),
    (
        {"query": jnp.ones((5, 3, 3))},
        ValueError,
        r"multiple of the heads of `keys\[0\]`, got 3 and 2",
    ),
    ({"keys": jnp.ones((5, 2, 3))}, TypeError, "`keys` must be a tuple of arrays"),
    ({"values": [1, 2]}, TypeError, "`values` must hold arrays, got int"),
    ({"keys": (), "values": ()}, ValueError, "`keys` must hold at least one array"),
    (
        {"values": (jnp.ones((5, 2, 2)),)},
        ValueError,
        "as many arrays as `keys`, 2, got",
    ),
    (
        {"keys": (jnp.ones((5, 2, 3)), jnp.ones((5, 2, 4)))},
        ValueError,
        r"`keys\[1\]` must have shape \(5, 2, 3\)",
    ),
    (
        {"keys": (jnp.ones((5, 2, 3)), jnp.ones((5, 1, 3)))},
        ValueError,
        r"`keys\[1\]` must have shape \(5, 2, 3\)",
    ),
    (
        {"values": (jnp.ones((5, 2, 2)), jnp.ones((6, 2, 2)))},
        ValueError,
        r"`values\[1\]` must have shape \(5, 2, 2\)",
    ),
    (
        {"values": (jnp.ones((5, 2, 2)), jnp.ones((5, 2, 2), int))},
        TypeError,
        r"`values\[1\]` must have a floating",
    ),
    (
        {"query": jnp.ones((4, 2, 3)), "is_causal": True},
        ValueError,
        r"`keys\[0\]` must be as long as `query` \(4\) if `is_causal`, got 5",
    ),
    ({"logit_bound": None}, ValueError, "`logit_bound` or `degree` must be given"),
    ({"logit_bound": 0.0}, ValueError, "`logit_bound` must be positive"),
    ({"logit_bound": 19.0}, ValueError, "`logit_bound` must be at most 18, .*19"),
    ({"logit_bound": 19.0, "degree": 2}, ValueError, "`logit_bound` must be at most"),
    ({"logit_bound": jnp.ones(())}, TypeError, "`logit_bound` must be a Python number"),
    ({"rtol": 1.5}, ValueError, "`rtol` must be below 1"),
    ({"rtol": 0.1, "degree": 3}, ValueError, "`rtol` must be None if `degree`"),
    ({"degree": -1}, ValueError, "`degree` must be non-negative, got -1"),
    ({"degree": 2.0}, TypeError, "`degree` must be a Python int"),
    ({"degree": 101}, ValueError, "`degree` must be at most 100, got 101"),
    (
        {
            "query": jnp.ones((5, 2, 64)),
            "keys": (jnp.ones((5, 2, 64)),) * 2,
            "degree": 5,
        },
        ValueError,
        "at most 1048576 monomials .*11238513 for degree 5 and heads of size 64",
    ),
    ({"basis": "hermite"}, ValueError, "`basis` must be one of"),
    ({"scale": jnp.ones(2)}, ValueError, "`scale` must have shape"),
    ({"scale": jnp.ones((), bool)}, TypeError, "`scale` must have a floating"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments: Any = {
        "query": jnp.ones((5, 2, 3)),
        "keys": (jnp.ones((5, 2, 3)),) * 2,
        "values": (jnp.ones((5, 2, 2)),) * 2,
        "logit_bound": 1.0,
        **change,
    }
    with pytest.raises(error, match=f"kronecker_attention_polynomial: .*{message}"):
        kronecker_attention_polynomial(**arguments)
