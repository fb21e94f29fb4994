"""dot_product_attention: values and all gradients against the dense oracle."""

import pathlib

import jax
import numpy as np
import pytest

from softlib import masks
from softlib.testing import assert_close
from tests.attention.problems import (
    Shape,
    attended,
    cotangents,
    mask,
    oracle,
    problem,
    with_gradients,
)
from tests.compiled import f32
from tests.host import jnp
from tests.pairwise import name as case_name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
MASKS = ("none", "causal", "window", "late", "radial", "segments", "lengths", "array")
SHAPES = {
    "small": Shape(),
    "16": Shape(21, 27, 16, 16, 4, 2),
    "64": Shape(64, 64, 64, 64, 2, 2),
    "80": Shape(35, 31, 80, 16, 3, 1),
    "128": Shape(17, 33, 128, 3, 4, 2),
    "256": Shape(48, 29, 256, 256, 2, 1),
}
WIDE = {
    "mask": tuple(name for name in MASKS if name != "causal"),  # `late` is causal too
    "normalizer": ("softmax", "softplus", "stablemax"),
    "bias": (None, "bnts-", "bs", "ns-", "t"),
    "shape": ("16", "64", "80", "128", "256"),
    "blocks": ((8, 16), (16, 8), (None, None)),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "scale": (None, 0.3, "traced"),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "at_once": ("all", "one"),
}
# What a program is made of; the wide list adds values that change numbers in it.
OPTIONS = WIDE | {
    "mask": ("window", "late", "segments", "lengths", "array"),
    "bias": (None, "bnts-", "ns-", "t"),
    "shape": ("16", "80", "256"),
}


def valid(case):
    return not (case.get("sinks") and case.get("normalizer", "softmax") != "softmax")


def check(case, **more):
    case = dict(case)
    dtype, shape = case.pop("dtype"), SHAPES[case.pop("shape")]
    own = {name: case.pop(name) for name in ("bias", "sinks")}
    scale = case.pop("scale")
    arrays = problem(shape, dtype, scale=scale, **own)
    numbers = {"scale": scale} if isinstance(scale, float) else {}
    given = mask(case.pop("mask"), shape)
    case["block_query"], case["block_key"] = case.pop("blocks")
    g = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, *g, given.options, **case, **numbers, **more
    )
    shared = {name: case[name] for name in ("normalizer", "softcap")}
    expected = oracle(
        arrays,
        allowed=given.allowed,
        g_out=g[0],
        g_lse=g[1],
        **shared,
        **numbers,
    )
    wide = "float64" if dtype == "float64" else "float32"
    length = max(shape.T, shape.S, shape.H) * shape.N
    assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.dtype(wide))
    assert_close(out, expected.out, dtype=dtype, length=length)
    assert_close(lse, expected.lse, dtype=wide, length=length)
    assert gradients.keys() == arrays.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype
        # Of the scale, and of a bias that is shared, a sum over pairs.
        terms = length * shape.S if name in ("scale", "bias") else length
        assert_close(gradient, expected.gradients[name], dtype=dtype, length=terms)


@pytest.mark.parametrize("case", pairwise(OPTIONS, valid), ids=case_name)
def test_matches_oracle(case, monkeypatch):
    matches_oracle(case, monkeypatch)


# Without the promise that a run takes all cases of such a list.
@pytest.mark.parametrize(
    "case", [dict(c) for c in pairwise(WIDE, valid)], ids=case_name
)
def test_matches_oracle_under_more_masks_biases_and_shapes(case, monkeypatch):
    matches_oracle(case, monkeypatch)


def matches_oracle(case, monkeypatch):
    case = dict(case)
    if case.pop("at_once") == "one":  # of batch entries and heads, as if they were many
        monkeypatch.setattr("softlib.attention._engine.batch_heads.SCORES", 1)
        monkeypatch.setattr("softlib.attention._engine.batch_heads.MASKED", 0)
    with jax.enable_x64(case["dtype"] == "float64"):
        check(case)


REFERENCE = OPTIONS | {
    "mask": ("late", "segments", "lengths", "array"),
    "shape": ("small",),
    "blocks": ((None, None),),
    "dtype": ("float64", "bfloat16"),
    "bias": (None, "bnts-", "s"),
    "scale": (None, "traced"),
}


del REFERENCE["at_once"]


@pytest.mark.parametrize("case", pairwise(REFERENCE, valid), ids=case_name)
def test_reference_matches_oracle(case):
    with jax.enable_x64(case["dtype"] == "float64"):
        check(case, implementation="reference")


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", OPTIONS["normalizer"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bias", OPTIONS["bias"])
def test_every_mask_with_every_bias(name, bias, normalizer):
    check(
        {
            "mask": name,
            "bias": bias,
            "normalizer": normalizer,
            "softcap": 2.0,
            "shape": "small",
            "blocks": (8, 8),
            "dtype": "float32",
            "scale": "traced",
            "sinks": normalizer == "softmax",
        }
    )


@pytest.mark.parametrize(
    ("at_once", "bias"), [(1, "bn"), (1, "s"), (2, "nt"), (4, "b")]
)
def test_batch_entries_and_heads_are_taken_a_few_at_a_time(at_once, bias, monkeypatch):
    shape = Shape(T=13, S=11, N=6, K=2, B=4)
    # A batch head is a key head of a batch entry, here with 3 query heads.
    scores = at_once * 3 * 8 * 8
    monkeypatch.setattr("softlib.attention._engine.batch_heads.SCORES", scores)
    arrays = problem(shape, "bfloat16", bias=bias, sinks=True)
    ids = np.sort(np.random.default_rng(3).integers(0, 3, (4, 13)))
    segments = masks.Segments(*map(jax.device_put, (ids, ids[:, :11])))
    given = segments & masks.Causal(4)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, {"mask": given}, block_query=8, block_key=8
    )
    near = np.arange(11)[None, :] <= np.arange(13)[:, None] + 4
    allowed = near & (ids[:, :, None] == ids[:, None, :11])
    expected = oracle(arrays, allowed=allowed[:, None], g_out=g_out, g_lse=g_lse)
    assert_close(out, expected.out, dtype="bfloat16", length=11)
    assert_close(lse, expected.lse, dtype="float32", length=11)
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype
        assert_close(gradient, expected.gradients[name], dtype="bfloat16", length=143)


LENGTHS = [
    (1, 257, "none"),
    (257, 1, "none"),
    (127, 128, "none"),
    (129, 130, "causal"),
    (255, 3, "window"),
    (3, 255, "window"),
]


@pytest.mark.parametrize(("T", "S", "name"), LENGTHS)
def test_lengths_around_the_sizes_of_blocks(T, S, name):
    shape = Shape(T, S, N=2, K=1, B=1)
    arrays, given = problem(shape), mask(name, shape)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, given.options, block_query=32, block_key=32
    )
    expected = oracle(arrays, allowed=given.allowed, g_out=g_out, g_lse=g_lse)
    assert_close(out, expected.out, dtype="float32", length=S)
    assert_close(lse, expected.lse, dtype="float32", length=S)
    for argument, gradient in gradients.items():
        assert_close(
            gradient, expected.gradients[argument], dtype="float32", length=2 * (S + T)
        )


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 258, 8))
def test_odd_lengths(length):
    shape = Shape(length, length, N=2, K=1, B=1)
    arrays, given = problem(shape), mask("causal", shape)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, given.options, block_query=32, block_key=16
    )
    expected = oracle(arrays, allowed=given.allowed, g_out=g_out, g_lse=g_lse)
    assert_close(out, expected.out, dtype="float32", length=length)
    assert_close(lse, expected.lse, dtype="float32", length=length)
    for argument, gradient in gradients.items():
        assert_close(
            gradient, expected.gradients[argument], dtype="float32", length=4 * length
        )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("spelling", ["value", "array"])
def test_matches_independent_vectors(implementation, spelling):
    data = np.load(DATA / "radial_attention_case0.npz")
    arrays = {name: data["in_" + name[0]] for name in ("query", "key", "value")}
    length, row = arrays["query"].shape[1], int(data["in_masked_row"])
    if spelling == "value":
        # The row that is masked on top: a segment id that no key has.
        ids = np.zeros(length, np.int32)
        alone = np.int32(np.arange(length) == row)
        given = masks.Radial(
            int(data["in_tokens_per_frame"]), int(data["in_sink_frames"])
        ) & masks.Segments(*map(jax.device_put, (alone, ids)))
    else:
        given = np.unpackbits(data["out_mask"], axis=1, count=length).astype(bool)
        given[row] = False
        given = given[None, None]
    block = int(data["in_block"])
    g_out = data["in_dout"]
    (out, lse), gradients = with_gradients(
        arrays,
        g_out,
        np.zeros(g_out.shape[:-1]),
        {"mask": given},
        block_query=block,
        block_key=block,
        implementation=implementation,
    )
    assert_close(out, data["out_out"], dtype="float32", length=length)
    transposed = np.moveaxis(data["out_lse"], 1, 2)
    assert_close(lse, transposed, dtype="float32", length=length)
    for name, gradient in gradients.items():
        expected = data["out_d" + name[0]]
        assert_close(gradient, expected, dtype="float32", length=2 * length)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_no_queries_no_keys_no_sequences_no_features(implementation):
    for empty in ({"T": 0}, {"B": 0}, {"S": 0}, {"E": 0}, {"H": 0}):
        shape = Shape(T=3, S=4)._replace(**empty)
        arrays = problem(shape, bias="bnts", sinks=True)
        g = cotangents(arrays)
        (out, lse), gradients = with_gradients(
            arrays, *g, {"mask": masks.Causal()}, implementation=implementation
        )
        allowed = mask("causal", shape).allowed
        expected = oracle(arrays, allowed=allowed, g_out=g[0], g_lse=g[1])
        assert_close(out, expected.out, dtype="float32", length=4)
        assert_close(lse, expected.lse, dtype="float32", length=4)
        for name, gradient in gradients.items():
            assert_close(gradient, expected.gradients[name], dtype="float32", length=24)


def test_batch_axes_may_be_none_or_several():
    shape = Shape(T=9, S=9, B=6)
    arrays = problem(shape, bias="bs")
    lengths = np.array([9, 1, 4, 0, 7, 2])
    ids = np.tile(np.arange(9) // 4, (6, 1))
    traced = {
        "key_value_seq_lengths": lengths,
        "query_offset": np.array([0, 3, 1, 0, 5, 2]),
        "mask": masks.Segments(jax.device_put(ids)),
    }
    flat = attended(arrays, traced, is_causal=True)

    fold = lambda a: a.reshape(2, 3, *a.shape[1:])
    folded = {name: fold(array) for name, array in arrays.items()}
    # A mask value has at most one batch axis, over all batch entries.
    several = attended(
        folded,
        {
            "key_value_seq_lengths": fold(lengths),
            "query_offset": fold(traced["query_offset"]),
            "mask": traced["mask"],
        },
        is_causal=True,
    )
    first = {name: array[1] for name, array in arrays.items()}
    one = attended(
        first,
        {
            "key_value_seq_lengths": lengths[1],
            "query_offset": traced["query_offset"][1],
            "mask": masks.Segments(jax.device_put(ids[1])),
        },
        is_causal=True,
    )
    for all_, two, single in zip(flat, several, one, strict=True):
        np.testing.assert_array_equal(fold(all_), two)
        assert_close(all_[1], single, dtype="float32", length=9)


def test_a_bias_broadcasts_over_some_of_several_batch_axes():
    shape = Shape(T=5, S=7, B=6)
    arrays = problem(shape)
    random = np.random.default_rng(2)
    bias = f32(random.normal(size=(2, 1, 4, 1, 7)))
    fold = lambda a: a.reshape(2, 3, *a.shape[1:])
    g_out, g_lse = cotangents(arrays)
    folded = {name: fold(array) for name, array in arrays.items()} | {"bias": bias}
    (out, _), gradients = with_gradients(folded, fold(g_out), fold(g_lse))
    whole = np.broadcast_to(bias, (2, 3, 4, 1, 7)).reshape(6, 4, 1, 7)
    expected = oracle(arrays | {"bias": whole}, g_out=g_out, g_lse=g_lse)
    assert_close(out, fold(expected.out), dtype="float32", length=7)
    of_bias = fold(expected.gradients["bias"]).sum(1, keepdims=True)
    assert_close(gradients["bias"], of_bias, dtype="float32", length=15)
