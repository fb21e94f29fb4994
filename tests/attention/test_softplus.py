"""Softplus attention: the oracle, vectors, promises, and the headline of its paper."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib import masks
from softlib.attention import (
    block_plan,
    length_log_scale,
    softplus_attention,
    softplus_weights,
)
from softlib.testing import assert_close, check_transformations
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import softplus_attention as oracle
from tests.pairwise import name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
BLOCKS: Any = {"block_query": 8, "block_key": 8}
CASES = pairwise(
    {
        "lengths": ((21, 21), (16, 40)),
        "heads": ((1, 1), (4, 2)),
        "mask": ("causal", "window", "segments"),
        "power": (None, 2.5),  # the vectors have 3 and 15
        "normalize_qk": (True, False),
        "dtype": ("float64", "bfloat16"),
    }
)
MASKS = {
    "causal": lambda t, s: masks.Causal(s - t),
    "window": lambda t, s: masks.Window(5, 0) & ~masks.Window(1, 0),
    "segments": lambda t, s: masks.Segments(
        *(jax.device_put(np.arange(2 * n).reshape(2, n) // 5) for n in (t, s))
    ),
}


def problem(lengths=(21, 21), heads=(2, 1), features=8, dtype="float32", seed=0) -> Any:
    rng = np.random.default_rng(seed)
    (t, s), (n, k) = lengths, heads
    draw = lambda *shape: np.asarray(rng.normal(size=shape), jnp.dtype(dtype))
    shapes = ((2, t, n, features), (2, s, k, features), (2, s, k, 5), (2, t, n, 5))
    return tuple(draw(*shape) for shape in shapes)


def run(function, *arrays):
    """Its results as arrays of NumPy, by one program."""
    return jax.device_get(jax.jit(function)(*arrays))


def allowed(mask, lengths):
    dense = np.asarray(mask.materialize(*lengths))
    return dense[:, None] if dense.ndim == 3 else dense[None, None]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle(case):
    dtype, lengths = case["dtype"], case["lengths"]
    with jax.enable_x64(dtype == "float64"):
        query, key, value, cotangent = problem(lengths, case["heads"], dtype=dtype)
        mask = MASKS[case["mask"]](*lengths)
        options: Any = {k: case[k] for k in ("power", "normalize_qk")}

        def call(query, key, value, cotangent):
            attend = functools.partial(softplus_attention, mask=mask, **BLOCKS)
            out, pull = jax.vjp(functools.partial(attend, **options), query, key, value)
            return out, *pull(cotangent)

        got = run(call, query, key, value, cotangent)
        where = allowed(mask, lengths)
        expected = oracle.softplus_attention(
            query, key, value, where, cotangent, **options
        )
        # A power multiplies relative errors: of the weights by p, of slopes once more.
        power = max(1, case["power"] or 1)
        for i, (x, y) in enumerate(zip(got, expected[:4], strict=True)):
            c = 4 * power * (1 if i == 0 else 4)
            assert x.dtype == dtype
            assert_close(x, y, dtype=dtype, length=lengths[1], c=c)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("lssa", {}),
        ("p3", {"power": 3}),
        ("p15", {"power": 15}),
        ("p3_raw", {"power": 3, "normalize_qk": False}),
    ],
)
def test_vectors(case, options):
    with jax.enable_x64(), np.load(DATA / "lssar_softplus_attention_case0.npz") as data:
        arrays = [
            np.asarray(data[f"in_{n}"], np.float64) for n in ("q", "k", "v", "dout")
        ]
        length = arrays[0].shape[1]
        mask = masks.Causal() & masks.Window(int(data["in_window"]) - 1, 0)
        dense = mask.materialize(length).copy()
        dense[int(data["in_masked_row"])] = False

        def call(query, key, value, cotangent):
            attend = lambda *qkv: softplus_attention(
                *qkv, mask=dense[None, None], **BLOCKS, **options
            )
            out, pull = jax.vjp(attend, query, key, value)
            return out, *pull(cotangent)

        found = run(call, *arrays)
        # The arrays are float64 numbers, the results were stored in float32.
        for got, part in zip(found, ("out", "dq", "dk", "dv"), strict=True):
            expected = data[f"out_{case}_{part}"]
            rounding = np.abs(expected).max() * 2.0**-20
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=rounding)
        scale = run(lambda n: length_log_scale(n, 8), dense.sum(1).astype(float))
        np.testing.assert_allclose(scale, data["out_scale"], rtol=1e-6)


def test_the_weights_of_the_dense_form_are_those_of_the_stream():
    with jax.enable_x64():
        query, key, _, _ = problem((9, 9), (1, 1), dtype="float64")
        value = np.broadcast_to(np.eye(9)[None, :, None], (2, 9, 1, 9))
        mask = masks.Causal()
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
        scores = np.einsum("btnh,bsnh->bts", unit(query), unit(key))

        def both(query, key, value, scores, power):
            scale = length_log_scale(jnp.asarray(mask.row_count(9), float), 8)
            dense = softplus_weights(
                scores * scale[None, :, None],
                where=jnp.asarray(mask.materialize(9))[None],
                power=power,
            )
            return softplus_attention(query, key, value, mask=mask, power=power), dense

        for power in (None, 3):
            call = functools.partial(both, power=power)
            got, dense = run(call, query, key, value, scores)
            np.testing.assert_allclose(got[:, :, 0], dense, atol=1e-12)


@pytest.mark.parametrize("power", [None, 3])
def test_a_query_without_keys_has_output_and_gradient_zero(power):
    query, key, value, cotangent = problem()
    mask = masks.Causal(-2)  # the first two queries see nothing

    def call(query, key, value):
        attend = functools.partial(softplus_attention, mask=mask, power=power, **BLOCKS)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    out, dq, dk, dv = run(call, query, key, value)
    assert not out[:, :2].any()
    assert not dq[:, :2].any()
    assert not dk[:, -2:].any() | dv[:, -2:].any()
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


def test_a_flat_row_has_the_output_zero_and_finite_gradients():
    query, key, value, cotangent = problem()
    key = np.broadcast_to(key[:, :1], key.shape)  # one distinct key
    attend = functools.partial(softplus_attention, power=15, offset_rows=1, **BLOCKS)

    def call(query, key, value, cotangent):
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    # Rounding of the mean decides between 0 and a mean of some values; never NaN.
    found = run(call, query, key, value, cotangent)
    assert all(np.isfinite(x).all() for x in found)


def test_rows_sum_to_one_or_are_zero():
    query, key, _, _ = problem()
    ones = np.ones((2, 21, 1, 1), np.float32)
    for mask in (masks.Causal(-1), masks.Window(2, 0)):
        call = functools.partial(softplus_attention, mask=mask, power=15, **BLOCKS)
        out = run(call, query, key, ones)
        some = np.broadcast_to(mask.row_count(21)[None, :, None] > 0, (2, 21, 2))
        np.testing.assert_allclose(out[..., 0], some.astype(float), atol=1e-6)


def test_narrow_windows_and_first_tokens_keep_their_keys():
    # With one key phi equals its mean: the offset would leave nothing.
    query, key, value, _ = problem()
    attend = functools.partial(softplus_attention, mask=masks.Window(0, 0), power=15)
    got = run(attend, query, key, value)
    np.testing.assert_allclose(got, np.repeat(value, 2, 2), rtol=1e-6)


@pytest.mark.parametrize("power", [None, 15])
def test_a_decoding_step_equals_its_row(power):
    query, key, value, _ = problem()
    attend = functools.partial(softplus_attention, mask=masks.Causal(), power=power)
    whole = run(attend, query, key, value)
    decode = jax.jit(
        lambda query, at, key, value, lengths: attend(
            query, key, value, query_offset=at, key_value_seq_lengths=lengths
        )
    )
    # The cache is longer than what it holds.
    padded = [np.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=np.nan)
              for x in (key, value)]  # fmt: skip
    for at in (0, 7, 20):
        step = decode(query[:, at : at + 1], at, *padded, np.array([21, 21]))
        np.testing.assert_allclose(step, whole[:, at : at + 1], atol=2e-5)


def test_padding_is_neither_read_nor_counted():
    query, key, value, _ = problem()
    attend = functools.partial(softplus_attention, power=3)
    alone = run(attend, query[:1], key[:1, :4], value[:1, :4])
    key[:, 4:] = value[:, 4:] = np.nan
    padded = lambda *qkv: attend(*qkv[:3], key_value_seq_lengths=qkv[3])
    got = run(padded, query, key, value, np.array([4, 0]))
    np.testing.assert_allclose(got[0], alone[0], atol=1e-5)
    assert not got[1].any()


def test_statistics_are_those_of_the_rows():
    with jax.enable_x64():
        query, key, value, _ = problem((9, 9), (2, 2), dtype="float64")
        for options in ({}, {"power": 3}, {"scale": 2.0}):
            attend = functools.partial(softplus_attention, **options, **BLOCKS)
            attend = functools.partial(attend, return_statistics=True)
            found = run(attend, query, key, value)
            unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
            scale = options.get("scale", np.log(8) * np.log(9))
            s = scale * np.einsum("btnh,bsnh->btns", unit(query), unit(key))
            phi = np.logaddexp(s, 0)
            np.testing.assert_allclose(found.mean, phi.mean(-1), rtol=1e-12)
            np.testing.assert_allclose(found.max, phi.max(-1), rtol=1e-12)
            if "power" in options:
                x = np.maximum(phi - phi.mean(-1, keepdims=True), 0)
                entries = (x / x.max(-1, keepdims=True)) ** 3
            else:
                entries = phi
            np.testing.assert_allclose(found.normalizer, entries.sum(-1), rtol=1e-10)


def test_scores_far_below_zero_stay_exact():
    # softplus underflows there; in the log domain it is a softmax.
    query, key, value, _ = problem((4, 6), (1, 1))
    key = key - 300 * query[:, :1] / np.square(query[:, :1]).sum(-1, keepdims=True)
    query = np.broadcast_to(query[:, :1], query.shape)
    attend = functools.partial(softplus_attention, normalize_qk=False, scale=1.0)
    got = run(attend, query, key, value)
    scores = np.einsum("btnh,bsnh->bnts", query, key)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsne->btne", weights, value)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_plan_may_stand_for_the_mask():
    query, key, value, _ = problem()
    plan = block_plan(masks.Causal(), 21, 21, **BLOCKS)
    call = lambda mask: softplus_attention(query, key, value, mask=mask, power=3)
    of_plan, of_mask = run(call, plan), run(lambda: call(masks.Causal()))
    np.testing.assert_allclose(of_plan, of_mask, atol=1e-5)


@pytest.mark.slow  # the same engine as dot_product_attention, whose battery is not slow
@pytest.mark.parametrize("power", [None, 3])
def test_transformations(power):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    check_transformations(
        lambda q, k, v: softplus_attention(
            q, k, v, mask=masks.Causal(), power=power, **BLOCKS
        ),
        *(draw(8, 9, 2, 4), draw(8, 9, 1, 4), draw(8, 9, 1, 3)),
        rows=(0, 1, 2),
        skip={"forward_mode": "the stream has a custom_vjp"},
        length=40,
        c=64.0,
    )


@pytest.mark.parametrize("length", [64, 1024])
def test_one_aligned_key_among_random_ones(length):
    """The headline: softmax loses it as the sequence grows, re-weighting does not."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=64)
    keys = rng.normal(size=(length, 64))
    keys[length // 2] = query + 0.4 * rng.normal(size=64)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    query, keys = unit(query), unit(keys)
    query, key = (np.asarray(x[None, :, None], np.float32) for x in (query[None], keys))
    value = f32(np.arange(length) == length // 2)[None, :, None, None]

    def weights(*arrays: Any):
        value = jnp.broadcast_to(arrays[2], arrays[1].shape)
        query, key, _ = arrays
        softmax = jax.nn.dot_product_attention(query, key, value, scale=8.0)
        found = [softplus_attention(*arrays, power=p) for p in (None, 15)]
        return [out.ravel()[0] for out in (softmax, *found)]

    softmax, plain, reweighted = run(weights, query, key, value)
    assert reweighted > 0.999
    assert plain < softmax
    if length == 1024:
        assert softmax < 0.7


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"power": 0.5}, ValueError, r"`power` must be None or at least 1, got 0\.5"),
        ({"power": "15"}, TypeError, "`power` must be a Python number"),
        ({"offset_rows": 0}, ValueError, "`offset_rows` must be an int of at least 1"),
        ({"scale": jnp.ones(3)}, ValueError, "`scale` must broadcast"),
        ({"mask": "causal"}, TypeError, "`mask` must be a mask value"),
        ({"implementation": "triton"}, ValueError, "`implementation` must be None"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    query, key, value, _ = problem((5, 5))
    with pytest.raises(error, match=message):
        softplus_attention(query, key, value, **options)


@pytest.mark.parametrize("power", [None, 1, 3, 2.5])
def test_dense_weights_normalise_any_axis(power):
    logits = f32(np.random.default_rng(0).normal(size=(6, 7)))
    where = np.arange(6)[:, None] != np.arange(7)[None]

    def call(logits, where):
        return (
            softplus_weights(logits, axis=0, where=where, power=power),
            softplus_weights(logits.T, where=where.T, power=power),
            softplus_weights(logits - 300, axis=0),
            jax.nn.softmax(logits - 300, axis=0),
            softplus_weights(logits, where=jnp.zeros((6, 7), bool)),
        )

    got, rows, far, softmax, nothing = run(call, logits, where)
    np.testing.assert_allclose(got.sum(0), 1, rtol=1e-6)
    assert not got[~where].any()
    np.testing.assert_allclose(got, rows.T, rtol=1e-6)
    np.testing.assert_allclose(far, softmax, rtol=1e-5)
    assert not nothing.any()
