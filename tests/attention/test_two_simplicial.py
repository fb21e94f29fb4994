"""two_simplicial_attention: windows, biases, the oracle, independent vectors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib import attention, masks
from softlib.testing import assert_close
from tests.attention.tensor_problems import (
    Between,
    PerAxis,
    Shape,
    assert_gradients,
    attended,
    cotangents,
    grid,
    oracle,
    problem,
)
from tests.host import jnp
from tests.oracles import masks as pairs
from tests.pairwise import name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
simplicial: Any = attention.two_simplicial_attention
SHAPE = Shape(T=13, S=(13, 13))


def call_with(**options):
    """Of arrays and traced options, both by name."""

    def call(arrays, traced):
        return simplicial(
            arrays["query"],
            *arrays["keys"],
            *arrays["values"],
            **traced,
            return_lse=True,
            **options,
        )

    return call


def run(arrays, traced=None, **options):
    """(out, lse), compiled."""
    return jax.device_get(jax.jit(call_with(**options))(arrays, traced or {}))


def with_gradients(arrays, g_out, g_lse, traced=None, **options):
    @jax.jit
    def run(arrays, traced, g_out, g_lse):
        call = call_with(**options)
        results, pull = jax.vjp(lambda arrays: call(arrays, traced), arrays)
        given = (g_out, g_lse)
        cast = (g.astype(r.dtype) for g, r in zip(given, results, strict=True))
        (gradients,) = pull(type(results)(*cast))
        return results, gradients

    return jax.device_get(run(arrays, traced or {}, g_out, g_lse))


def windowed(shape, window1, window2):
    """Pairs (j, k) with i - w1 < j <= i and i - w2 < k <= i."""
    within = lambda width: lambda q, k: q - width < k <= q
    return grid(shape, [within(window1), within(window2)])


def expected(arrays, windows, biases=(0.0, 0.0), **options):
    """The oracle, with the biases added to the arrays."""
    (k1, k2), (v1, v2) = arrays["keys"], arrays["values"]
    wide = lambda a: np.asarray(a, np.float64)
    biased = {
        "query": arrays["query"],
        "keys": (k1, wide(k2) + biases[0]),
        "values": (v1, wide(v2) + biases[1]),
    }
    T, S, H = (
        arrays["query"].shape[1],
        tuple(k.shape[1] for k in (k1, k2)),
        k1.shape[-1],
    )
    allowed = windowed(Shape(T, S), *windows)
    return oracle(biased, allowed=allowed, **({"scale": H**-0.5} | options))


CASES = pairwise(
    {
        "windows": ((5, 2), (1, 5), (40, 13)),
        "biases": ((0.0, 0.0), (0.25, 1.0)),
        "dtype": ("float64", "bfloat16"),
        "heads": ((4, 2), (2, 2)),
        "scale": (None, 0.3),
    }
)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle(case):
    dtype, windows, biases = (case[k] for k in ("dtype", "windows", "biases"))
    with jax.enable_x64(dtype == "float64"):
        arrays = problem(SHAPE._replace(N=case["heads"][0], K=case["heads"][1]), dtype)
        g_out, g_lse = cotangents(arrays)
        numbers = {} if case["scale"] is None else {"scale": case["scale"]}
        (out, lse), gradients = with_gradients(
            arrays,
            g_out,
            g_lse,
            window1=windows[0],
            window2=windows[1],
            key2_bias=biases[0],
            value2_bias=biases[1],
            **numbers,
        )
        wanted = expected(arrays, windows, biases, g_out=g_out, g_lse=g_lse, **numbers)
        wide = "float64" if dtype == "float64" else "float32"
        assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.dtype(wide))
        assert_close(out, wanted.out, dtype=dtype, length=169)
        assert_close(lse, wanted.lse, dtype=wide, length=169)
        assert_gradients(
            gradients, wanted.gradients, arrays, dtype=dtype, length=SHAPE.terms
        )


def test_is_kronecker_attention_under_two_windows():
    arrays = problem(SHAPE)
    found = run(arrays, window1=6, window2=3, implementation="reference")
    given = PerAxis(masks.Window(5, 0), masks.Window(2, 0))
    wanted = attended(arrays, {"mask": given}, scale=0.5)
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two, dtype="float32", length=18)


def test_matches_independent_vectors():
    """But for the one row that the vectors empty."""
    data = np.load(DATA / "kronecker_attention_case0.npz")
    both = lambda letter: tuple(data[f"in_{letter}{t}"] for t in (1, 2))
    arrays = {
        "query": data["in_q"],
        "keys": both("k"),
        "values": both("v"),
    }
    row = int(data["in_masked_row"])
    g_out = data["in_dout"].copy()
    g_out[:, row] = 0  # its keys have the gradients of the other rows alone, then
    (out, lse), gradients = with_gradients(
        arrays,
        g_out,
        np.zeros((1, 12, 4)),
        window1=int(data["in_w1"]),
        window2=int(data["in_w2"]),
    )
    others = np.arange(12) != row
    close = functools.partial(assert_close, dtype="float32", length=144)
    close(out[:, others], data["out_sqrt_out"][:, others])
    close(lse[:, others], np.moveaxis(data["out_sqrt_lse"], 1, 2)[:, others])
    stored = {
        "query": data["out_sqrt_dq"],
        "keys": tuple(data[f"out_sqrt_dk{t}"] for t in (1, 2)),
        "values": tuple(data[f"out_sqrt_dv{t}"] for t in (1, 2)),
    }
    assert_gradients(gradients, stored, arrays, dtype="float32", length=144)


def test_windows_hold_the_query_itself_and_count_keys():
    """Windows of 1 leave the diagonal; of 2, one key before it, too."""
    arrays = problem(SHAPE._replace(N=2, K=2))
    (v1, v2), (k1, k2) = arrays["values"], arrays["keys"]
    out, lse = run(arrays, window1=1, window2=1)
    assert_close(out, v1 * v2, dtype="float32", length=1)
    wanted = (arrays["query"] * k1 * k2).sum(-1) / 2
    assert_close(lse, wanted, dtype="float32", length=4)
    out, lse = run(arrays, window1=2, window2=1, scale=0.0)
    before = np.concatenate([v1[:, :1], v1[:, :-1]], 1)
    assert_close(out, (v1 + before) / 2 * v2, dtype="float32", length=2)
    assert (lse[:, 0] == 0).all()
    counts = np.full((2, 12, 2), np.log(2))
    assert_close(lse[:, 1:], counts, dtype="float32", length=2)


def test_every_query_sees_itself_so_that_no_row_is_empty():
    _, lse = run(problem(SHAPE), window1=1, window2=2)
    assert np.isfinite(lse).all()


def test_without_the_second_key_and_value_it_is_attention():
    """Public kernels initialise so: K2 + 1/d and V2 + 1 of zeros; scale d**-1.5."""
    arrays = problem(SHAPE)
    (k1, k2), (v1, v2) = arrays["keys"], arrays["values"]
    arrays |= {"keys": (k1, np.zeros_like(k2)), "values": (v1, np.zeros_like(v2))}
    out, lse = run(arrays, window1=7, window2=4, key2_bias=1 / 4, value2_bias=1.0)
    plain, plain_lse = jax.jit(
        lambda *arrays: attention.dot_product_attention(
            *arrays, scale=4**-1.5, mask=masks.Window(6, 0), return_lse=True
        )
    )(arrays["query"], k1, v1)
    assert_close(out, plain, dtype="float32", length=28)
    seen = np.minimum(np.arange(13) + 1, 4).reshape(1, 13, 1)
    assert_close(lse, np.asarray(plain_lse) + np.log(seen), dtype="float32", length=28)


def test_biases_are_added_before_use_without_rounding():
    """To bfloat16 keys in the dtype of the sums: 1/64 is lost beside 4."""
    arrays = problem(SHAPE._replace(N=2, K=1), "bfloat16")
    k1, k2 = arrays["keys"]
    arrays["keys"] = (k1, (4 + k2 / 64).astype("bfloat16"))
    biases = {"key2_bias": 1 / 256, "value2_bias": 1 / 256}
    out, lse = run(arrays, window1=5, window2=5, **biases)
    wanted = expected(arrays, (5, 5), (1 / 256, 1 / 256))
    assert_close(lse, wanted.lse, dtype="float32", length=25)
    assert_close(out, wanted.out, dtype="bfloat16", length=1)


def test_scale_and_biases_may_be_traced_and_have_a_derivative():
    arrays = problem(SHAPE)
    g_out, g_lse = cotangents(arrays)
    call = call_with(window1=5, window2=3)
    numbers = {"scale": 0.4, "key2_bias": 0.25, "value2_bias": 1.0}

    def total(traced):
        out, lse = call(arrays, traced)
        return (g_out * out).sum() + (g_lse * lse).sum()

    slopes = jax.jit(jax.grad(total))(jax.tree.map(np.float32, numbers))
    wanted = expected(
        arrays, (5, 3), (0.25, 1.0), scale=0.4, g_out=g_out, g_lse=g_lse
    ).gradients
    slopes_wanted = {
        "scale": wanted["scale"],
        "key2_bias": wanted["keys"][1].sum(),
        "value2_bias": wanted["values"][1].sum(),
    }
    for argument, slope in slopes.items():
        wanted = slopes_wanted[argument]
        assert_close(slope, wanted, dtype="float32", length=20_000)


def test_batch_axes_may_be_none_or_several():
    arrays = problem(SHAPE._replace(B=4, N=2, K=1))
    windows = {"window1": 5, "window2": 3}
    fold = lambda a: a.reshape(2, 2, *a.shape[1:])
    flat = run(arrays, **windows)
    several = run(jax.tree.map(fold, arrays), **windows)
    one = run(jax.tree.map(lambda a: a[1], arrays), **windows)
    for all_, two, single in zip(flat, several, one, strict=True):
        np.testing.assert_array_equal(fold(all_), two)
        assert_close(all_[1], single, dtype="float32", length=15)


def test_the_log_sum_comes_on_request():
    arrays = problem(SHAPE._replace(N=2, K=1))
    flat = (arrays["query"], *arrays["keys"], *arrays["values"])
    out = jax.jit(functools.partial(simplicial, window1=5, window2=3))(*flat)
    both = run(arrays, window1=5, window2=3)
    np.testing.assert_array_equal(out, both[0])


def test_scratch_is_linear_in_the_length():
    """What a token adds is a few times its arguments; a byte per pair is more."""
    struct = jax.ShapeDtypeStruct

    def temporary(n):
        def total(*arrays):
            return simplicial(*arrays, window1=64, window2=16).sum()

        arrays = [struct((1, n, heads, 16), jnp.float32) for heads in (2, 1, 1, 1, 1)]
        compiled = jax.jit(jax.grad(total, range(5))).lower(*arrays).compile()
        found = compiled.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    small, middle, large = map(temporary, (1024, 2048, 4096))
    per_token = 4 * 16 * 6
    assert middle - small < 1024 * 4 * per_token
    assert large - middle < 2048 * 4 * per_token


def test_causal_windows_are_given_by_masks_that_relate_the_keys_too():
    """What two_simplicial_attention does not do, kronecker_attention does: k <= j."""
    shape = SHAPE._replace(N=2, K=1, B=1)
    arrays = problem(shape)
    within = masks.Window(4, 0), masks.Window(2, 0)
    given = PerAxis(*within, joint=Between(1, 2, masks.Causal()))
    definitions = [pairs.window(4, 0), pairs.window(2, 0)]
    allowed = grid(shape, definitions, lambda i, j, k: k <= j)
    out, lse = attended(arrays, {"mask": given}, block_query=8, block_keys=(4, 4))
    wanted = oracle(arrays, allowed=allowed)
    assert_close(out, wanted.out, dtype="float32", length=15)
    assert_close(lse, wanted.lse, dtype="float32", length=15)
