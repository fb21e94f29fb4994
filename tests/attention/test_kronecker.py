"""kronecker_attention: values and all gradients against the dense oracle, and laws."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import attention, masks
from softlib.testing import assert_close
from tests.attention.tensor_problems import (
    PerAxis,
    Shape,
    assert_gradients,
    attend,
    attended,
    cotangents,
    mask,
    oracle,
    problem,
    with_gradients,
)
from tests.host import jnp
from tests.pairwise import name as case_name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
MASKS = (
    "none",
    "causal",
    "windows",
    "radial",
    "late",
    "joint",
    "between",
    "several",
    "segments",
    "padding",
)
SHAPES = {
    "2": Shape(S=(13,)),
    "3": Shape(),
    "4": Shape(T=5, S=(5, 3, 6)),
    "long": Shape(T=19, S=(9, 17), H=16, E=8),
    "ones": Shape(T=3, S=(1, 5), H=1, E=1),
}
OPTIONS = {
    "mask": ("windows", "late", "several", "segments"),
    "shape": ("3", "4"),
    "blocks": ((8, (4, 8)), (None, (None, None))),
    "dtype": ("float64", "bfloat16"),
    "scale": (None, "traced"),
    "heads": ((4, 2), (2, 2)),
    "at_once": ("all", "one"),
}


def check(case, **more):
    case = dict(case)
    dtype, shape = case.pop("dtype"), SHAPES[case.pop("shape")]
    N, K = case.pop("heads")
    shape = shape._replace(N=N, K=K)
    block_query, block_keys = case.pop("blocks")
    if block_keys[0] is None:
        block_keys = None
    else:
        block_keys = tuple(block_keys[t % 2] for t in range(len(shape.S)))
    scale = case.pop("scale")
    arrays = problem(shape, dtype, scale=scale)
    numbers = {"scale": scale} if isinstance(scale, float) else {}
    given = mask(case.pop("mask"), shape)
    assert not case
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays,
        g_out,
        g_lse,
        given.options,
        block_query=block_query,
        block_keys=block_keys,
        **numbers,
        **more,
    )
    expected = oracle(
        arrays, allowed=given.allowed, g_out=g_out, g_lse=g_lse, **numbers
    )
    wide = "float64" if dtype == "float64" else "float32"
    assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.dtype(wide))
    tuples = int(np.prod(shape.S))
    assert_close(out, expected.out, dtype=dtype, length=tuples)
    assert_close(lse, expected.lse, dtype=wide, length=tuples)
    assert_gradients(
        gradients, expected.gradients, arrays, dtype=dtype, length=shape.terms
    )


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=case_name)
def test_matches_oracle(case, monkeypatch):
    case = dict(case)
    if case.pop("at_once") == "one":  # of batch entries and heads, as if they were many
        monkeypatch.setattr("softlib.attention._engine.batch_heads.SCORES", 1)
    with jax.enable_x64(case["dtype"] == "float64"):
        check(case)


REFERENCE = OPTIONS | {
    "mask": ("late", "several", "segments"),
    "shape": ("3", "4"),
    "blocks": ((None, (None, None)),),
    "scale": (None, "traced"),
    "heads": ((4, 2),),
}
del REFERENCE["at_once"]


@pytest.mark.parametrize("case", pairwise(REFERENCE), ids=case_name)
def test_reference_matches_oracle(case):
    with jax.enable_x64(case["dtype"] == "float64"):
        check(case, implementation="reference")


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(8, (4, 8)), (5, (3, 2)), (None, (None, None))])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_at_every_order(name, shape, blocks):
    case = {"mask": name, "shape": shape, "blocks": blocks, "heads": (4, 2)}
    check(case | {"dtype": "float32", "scale": "traced"})


LENGTHS = [
    (1, (1, 1), "none"),
    (9, (1, 17), "windows"),
    (7, (8, 9), "between"),
    (16, (16, 15), "causal"),
    (1, (13, 11), "padding"),
    (17, (5, 5), "radial"),
]


@pytest.mark.parametrize(("T", "S", "name"), LENGTHS)
def test_lengths_around_the_sizes_of_blocks(T, S, name):
    shape = Shape(T, S, N=2, K=1)
    arrays, given = problem(shape), mask(name, shape)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, given.options, block_query=8, block_keys=(8, 8)
    )
    expected = oracle(arrays, allowed=given.allowed, g_out=g_out, g_lse=g_lse)
    tuples = int(np.prod(S))
    assert_close(out, expected.out, dtype="float32", length=tuples)
    assert_close(lse, expected.lse, dtype="float32", length=tuples)
    assert_gradients(
        gradients, expected.gradients, arrays, dtype="float32", length=shape.terms
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "windows", "between"])
@pytest.mark.parametrize("length", [2, 7, 8, 15, 16, 17, 23, 25, 31, 33])
def test_odd_lengths(length, name):
    shape = Shape(length, (length, length), N=2, K=1, B=1)
    arrays, given = problem(shape), mask(name, shape)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, given.options, block_query=8, block_keys=(4, 16)
    )
    expected = oracle(arrays, allowed=given.allowed, g_out=g_out, g_lse=g_lse)
    assert_close(out, expected.out, dtype="float32", length=length**2)
    assert_close(lse, expected.lse, dtype="float32", length=length**2)
    assert_gradients(
        gradients, expected.gradients, arrays, dtype="float32", length=shape.terms
    )


EMPTY = [
    ({"T": 0}, "xla"),
    ({"B": 0}, "xla"),
    ({"S": (0, 5)}, "xla"),
    ({"S": (5, 0)}, "xla"),
    ({"E": 0}, "xla"),
    ({"H": 0}, "xla"),
    ({"B": 0}, "reference"),
    ({"S": (5, 0)}, "reference"),
    ({"E": 0}, "reference"),
    ({"H": 0}, "reference"),
]


@pytest.mark.parametrize(("empty", "implementation"), EMPTY, ids=str)
def test_no_queries_no_keys_no_sequences_no_features(empty, implementation):
    shape = Shape(T=3, S=(4, 5))._replace(**empty)
    # The scale of no features at all would be 1 / 0.
    scale = "traced" if shape.H else None
    arrays = problem(shape, scale=scale)
    arrays |= {} if shape.H else {"scale": np.ones((), np.float32)}
    given = mask("causal", shape)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, given.options, implementation=implementation
    )
    expected = oracle(arrays, allowed=given.allowed, g_out=g_out, g_lse=g_lse)
    assert_close(out, expected.out, dtype="float32", length=20)
    assert_close(lse, expected.lse, dtype="float32", length=20)
    assert_gradients(gradients, expected.gradients, arrays, dtype="float32", length=240)


# ------------------------------------------------------------ a second program's values
BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])


@pytest.mark.parametrize(
    ("name", "scale", "implementation"),
    [("d", None, "xla"), ("sqrt", 0.5, "xla"), ("sqrt", 0.5, "reference")],
)
def test_matches_independent_vectors(name, scale, implementation):
    data = np.load(DATA / "kronecker_attention_case0.npz")
    pair = lambda letter: tuple(data[f"in_{letter}{t}"] for t in (1, 2))
    arrays = {
        "query": data["in_q"],
        "keys": pair("k"),
        "values": pair("v"),
    }
    # A segment that no key of the second axis has empties one row.
    alone = np.int32(np.arange(12) == data["in_masked_row"])
    ids = masks.Segments(*map(jax.device_put, (alone, 0 * alone)))
    first, second = (masks.Window(int(data[w]) - 1, 0) for w in ("in_w1", "in_w2"))
    given = PerAxis(first, second & ids)
    numbers = {} if scale is None else {"scale": scale}
    (out, lse), gradients = with_gradients(
        arrays,
        data["in_dout"],
        np.zeros((1, 12, 4)),
        {"mask": given},
        block_query=8,
        block_keys=(4, 8),
        implementation=implementation,
        **numbers,
    )
    stored = {
        "query": data[f"out_{name}_dq"],
        "keys": tuple(data[f"out_{name}_dk{t}"] for t in (1, 2)),
        "values": tuple(data[f"out_{name}_dv{t}"] for t in (1, 2)),
    }
    assert_close(out, data[f"out_{name}_out"], dtype="float32", length=18)
    transposed = np.moveaxis(data[f"out_{name}_lse"], 1, 2)
    assert_close(lse, transposed, dtype="float32", length=18)
    assert_gradients(gradients, stored, arrays, dtype="float32", length=144)


@BOTH
def test_matches_independent_vectors_of_order_4(implementation):
    data = np.load(DATA / "kronecker_attention_case0.npz")
    with jax.enable_x64(True):
        one = lambda a: a[:, None, :]  # a head, no batch axis
        arrays = {
            "query": one(data["in_o4_q"]),
            "keys": tuple(map(one, data["in_o4_k"])),
            "values": tuple(map(one, data["in_o4_v"])),
        }
        (out, lse), gradients = with_gradients(
            arrays,
            one(data["in_o4_dout"]),
            np.zeros((6, 1)),
            block_query=4,
            block_keys=(2, 3, 4),
            implementation=implementation,
        )
        close = functools.partial(assert_close, dtype="float64", length=125)
        close(out[:, 0], data["out_o4_out"])
        close(lse[:, 0], data["out_o4_lse"])
        close(gradients["query"][:, 0], data["out_o4_dq"])
        for name, letter in (("keys", "k"), ("values", "v")):
            close(np.stack(gradients[name])[:, :, 0], data["out_o4_d" + letter])


# ------------------------------------------------------------------------------ batches
def test_batch_axes_may_be_none_or_several():
    shape = Shape(B=6)
    arrays = problem(shape)
    random = np.random.default_rng(4)
    ids = np.sort(random.integers(0, 3, (6, 9)), -1)
    put = jax.device_put
    given = PerAxis(
        masks.Padding(key=put(np.array([7, 1, 4, 0, 5, 2]))),
        masks.Segments(put(np.concatenate([ids, ids[:, :2]], 1)), put(ids)),
        joint=no_diagonal,
    )
    flat = attended(arrays, {"mask": given}, block_query=8, block_keys=(4, 8))
    fold = lambda a: a.reshape(2, 3, *a.shape[1:])
    # A mask value has at most one batch axis, over all batch entries.
    several = attended(
        jax.tree.map(fold, arrays), {"mask": given}, block_query=8, block_keys=(4, 8)
    )
    one = attended(
        jax.tree.map(lambda a: a[1], arrays),
        {"mask": jax.tree.map(lambda a: put(np.asarray(a)[1]), given)},
        block_query=8,
        block_keys=(4, 8),
    )
    for all_, two, single in zip(flat, several, one, strict=True):
        np.testing.assert_array_equal(fold(all_), two)
        assert_close(all_[1], single, dtype="float32", length=63)


def no_diagonal(query, one, two):
    return (one != two) | (query == one)


# --------------------------------------------------------------------------------- laws
FEW = settings(max_examples=8)
seeds = st.integers(0, 2**32 - 1)
LAW = Shape(T=9, S=(7, 6), N=2, K=1, B=1)


@functools.cache
def compiled(*reaches):
    """(out, lse) under a window per axis, or under nothing."""
    given = PerAxis(*(masks.Window(*reach) for reach in reaches)) if reaches else None

    @jax.jit
    def call(arrays):
        sizes = (4,) * len(arrays["keys"])
        return attend(
            **arrays, mask=given, return_lse=True, block_query=4, block_keys=sizes
        )

    return lambda arrays: jax.device_get(call(arrays))


def same(one, two, length=42, c=4.0):
    for x, y in zip(one, two, strict=True):
        assert_close(x, y, dtype="float32", length=length, c=c)


@FEW
@given(seed=seeds)
def test_axes_may_be_swapped_together_with_their_masks(seed):
    arrays = problem(LAW, seed=seed)
    swapped = arrays | {name: arrays[name][::-1] for name in ("keys", "values")}
    left, right = (3, 1), (None, 0)
    same(compiled(left, right)(arrays), compiled(right, left)(swapped))


@FEW
@given(seed=seeds)
def test_the_order_of_the_keys_of_an_axis_is_arbitrary(seed):
    arrays = problem(LAW, seed=seed)
    order = np.random.default_rng(seed).permutation(6)
    moved = arrays | {
        name: (arrays[name][0], arrays[name][1][:, order])
        for name in ("keys", "values")
    }
    same(compiled()(arrays), compiled()(moved))


@FEW
@given(seed=seeds)
def test_values_of_1_give_1_where_a_tuple_attends_and_0_elsewhere(seed):
    arrays = problem(LAW, seed=seed)
    arrays["values"] = jax.tree.map(np.ones_like, arrays["values"])
    out, lse = compiled((3, 1), (0, 0))(arrays)
    empty = np.asarray(lse) == -np.inf
    # Queries 6, 7 and 8 have no key of their own on the second axis.
    np.testing.assert_array_equal(empty[0, :, 0], np.arange(9) >= 6)
    wanted = np.broadcast_to(~empty[..., None], out.shape).astype(float)
    assert_close(out, wanted, dtype="float32", length=42)


@FEW
@given(seed=seeds)
def test_an_axis_of_one_key_folds_into_the_queries_and_the_values(seed):
    """<q, k1, k2> is the product of q * k1 with k2: a factor of its own."""
    arrays = problem(LAW._replace(S=(1, 6)), seed=seed)
    (k1, k2), (v1, v2) = arrays["keys"], arrays["values"]
    wide = lambda a: np.repeat(a, 2, axis=2)
    out, lse = compiled()(arrays)
    query = arrays["query"] * wide(k1)
    folded, folded_lse = compiled()({"query": query, "keys": (k2,), "values": (v2,)})
    same((out, lse), (folded * wide(v1), folded_lse))


@FEW
@given(seed=seeds)
def test_a_key_repeated_along_an_axis_counts_as_often(seed):
    """Equal keys: their mean value, and the log of their number in the lse."""
    arrays = problem(LAW, seed=seed)
    k1, k2 = arrays["keys"]
    same_keys = np.broadcast_to(k2[:, :1], k2.shape)
    out, lse = compiled()(arrays | {"keys": (k1, same_keys)})
    v1, v2 = arrays["values"]
    once, once_lse = compiled()(
        {
            "query": arrays["query"],
            "keys": (k1, k2[:, :1]),
            "values": (v1, v2.mean(1, keepdims=True)),
        }
    )
    same((out, lse), (once, once_lse + np.log(6)))


@FEW
@given(seed=seeds)
def test_keys_of_zero_give_the_product_of_the_mean_values(seed):
    arrays = problem(LAW, seed=seed)
    k1, k2 = arrays["keys"]
    out, lse = compiled()(arrays | {"keys": (k1, np.zeros_like(k2))})
    v1, v2 = arrays["values"]
    mean = v1.mean(1, keepdims=True) * v2.mean(1, keepdims=True)
    wanted = np.broadcast_to(mean, out.shape)
    same((out, lse), (wanted, np.full_like(lse, np.log(42))))


@FEW
@given(seed=seeds)
def test_two_sets_of_tuples_merge_by_their_log_sums(seed):
    arrays = problem(LAW, seed=seed)
    whole = compiled()(arrays)
    cut = np.random.default_rng(seed).integers(1, 7)
    halves = []
    for ends in ((0, cut), (cut, 7)):
        rows = (np.arange(7) >= ends[0]) & (np.arange(7) < ends[1])
        ids = masks.Segments(*map(jax.device_put, (np.zeros(9, int), 1 - rows)))
        halves.append(under_segments(arrays, ids))
    total = np.logaddexp(halves[0][1], halves[1][1])
    merged = sum(np.exp(lse - total)[..., None] * out for out, lse in halves)
    same((merged, total), whole)


@jax.jit
def under_segments(arrays, ids):
    return attend(**arrays, mask=PerAxis(ids, None), return_lse=True)


@pytest.mark.parametrize(
    "name", ["segments", pytest.param("windows", marks=pytest.mark.slow)]
)
def test_one_key_axis_is_attention_at_scale_1_over_h(name):
    shape = Shape(T=13, S=(17,))
    arrays = problem(shape)
    given = mask(name, shape)
    g_out, g_lse = cotangents(arrays)
    results, gradients = with_gradients(
        arrays, g_out, g_lse, given.options, block_query=8, block_keys=(8,)
    )
    plain: Any = {"query": arrays["query"]}
    plain |= {"key": arrays["keys"][0], "value": arrays["values"][0]}
    value = given.options.get("mask")
    value = value.axes[0] if isinstance(value, PerAxis) else value

    @jax.jit
    def call(plain, value):
        function = lambda plain: attention.dot_product_attention(
            **plain, mask=value, scale=1 / 4, return_lse=True
        )
        results, pull = jax.vjp(function, plain)
        given = (jnp.asarray(g, jnp.float32) for g in (g_out, g_lse))
        return results, pull(type(results)(*given))[0]

    expected, wanted = call(plain, value)
    same(results, expected, length=17)
    wanted = {
        "query": wanted["query"],
        "keys": (wanted["key"],),
        "values": (wanted["value"],),
    }
    assert_gradients(gradients, wanted, arrays, dtype="float32", length=52)
