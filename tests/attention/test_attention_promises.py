"""What the documentation of dot_product_attention promises, sentence by sentence."""

import dataclasses
import functools
from typing import Any

import flax.linen
import flax.nnx
import jax
import numpy as np
import pytest

import softlib
from softlib import attention, masks
from softlib.testing import assert_close
from tests.attention.problems import (
    Shape,
    attended,
    cotangents,
    mask,
    oracle,
    planted,
    problem,
    with_gradients,
)
from tests.compiled import f32
from tests.host import jnp

attend: Any = attention.dot_product_attention
BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])


# -------------------------------------------------------------------------- empty rows
@BOTH
@pytest.mark.parametrize("normalizer", ["softmax", "softplus", "stablemax"])
def test_a_query_without_keys_has_output_0_lse_minus_inf_and_gives_no_gradient(
    implementation, normalizer
):
    shape = Shape(T=20, S=20, B=1)
    arrays, given = problem(shape), mask("late", shape)
    empty = ~given.allowed[0, 0].any(1)
    unread = ~given.allowed[0, 0].any(0)
    assert empty[:10].all()
    assert unread[10:].all()
    g_out, g_lse = cotangents(arrays)
    # Also the cotangents that no optimizer should meet: the lse is -inf itself.
    g_out[:, empty], g_lse[:, empty] = 1e3, 1e3
    (out, lse), gradients = with_gradients(
        arrays,
        g_out,
        g_lse,
        given.options,
        normalizer=normalizer,
        block_query=8,
        block_key=8,
        implementation=implementation,
    )
    assert (out[:, empty] == 0).all()
    assert (lse[:, empty] == -jnp.inf).all()
    assert (gradients["query"][:, empty] == 0).all()
    assert (gradients["key"][:, unread] == 0).all()
    assert (gradients["value"][:, unread] == 0).all()
    g_out[:, empty], g_lse[:, empty] = 0, 0
    expected = oracle(
        arrays,
        allowed=given.allowed,
        normalizer=normalizer,
        g_out=g_out,
        g_lse=g_lse,
    )
    for name, gradient in gradients.items():
        assert_close(gradient, expected.gradients[name], dtype="float32", length=80)


@BOTH
def test_a_query_that_sees_only_a_sink_has_its_lse(implementation):
    arrays = problem(Shape(T=5, S=6, B=1), sinks=True)
    g_out, g_lse = cotangents(arrays)
    none = np.zeros((1, 1, 1, 1), bool)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, {"mask": none}, implementation=implementation
    )
    assert (out == 0).all()
    assert_close(lse[0, 2], arrays["sinks"], dtype="float32", length=1)
    for name in ("query", "key", "value"):
        assert (gradients[name] == 0).all()
    assert_close(gradients["sinks"], g_lse.sum((0, 1)), dtype="float32", length=5)


def test_a_row_of_scores_of_minus_inf_is_empty():
    arrays = problem(Shape(T=5, S=9, B=1), bias="bnts")
    arrays["bias"][:, 1, 3] = -np.inf
    for normalizer in ("softmax", "softplus", "stablemax"):
        out, lse = attended(arrays, normalizer=normalizer, block_key=8)
        assert (out[:, 3, 1] == 0).all()
        assert (lse[:, 3, 1] == -jnp.inf).all()
        assert np.isfinite(lse[:, :3]).all()


def _tokamax(query, key, value, mask):
    tokamax = pytest.importorskip("tokamax")
    return tokamax.dot_product_attention(
        query, key, value, mask=mask, implementation="xla"
    )


PEERS = {
    "jax.nn": lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask),
    "flax.linen": lambda q, k, v, mask: flax.linen.dot_product_attention(
        q, k, v, mask=mask
    ),
    "flax.nnx": lambda q, k, v, mask: flax.nnx.dot_product_attention(
        q, k, v, mask=mask
    ),
    "tokamax": _tokamax,
}


@pytest.mark.parametrize("peer", PEERS)
def test_peers_answer_a_query_without_keys_with_the_mean_of_all_values(peer):
    """Why this library is careful there; also the claim of the documentation."""
    arrays = problem(Shape(T=3, S=4, H=6, E=6, N=2, K=2, B=1))
    allowed = np.arange(3)[None, None, :, None] != np.ones((1, 1, 1, 4))
    call = jax.jit(PEERS[peer])
    theirs = np.asarray(call(arrays["query"], arrays["key"], arrays["value"], allowed))
    mean = arrays["value"].mean(1)
    assert_close(theirs[:, 1], mean, dtype="float32", length=4, c=16)
    ours = attended(arrays, {"mask": allowed})[0]
    assert (ours[:, 1] == 0).all()
    assert_close(ours[:, ::2], theirs[:, ::2], dtype="float32", length=6, c=16)


# ------------------------------------------------------------- what is not read, is not
def test_nan_in_blocks_that_nobody_visits_reaches_nothing():
    shape = Shape(T=40, S=48, N=2, K=1, B=1)
    arrays = problem(shape, bias="s")
    given = masks.Window(9, 3) & masks.Causal()
    unread = masks.block_map(given, (40, 48), (8, 8)).max(0) == 0
    unread = np.repeat(unread, 8)
    assert unread.sum() == 8
    with_nan = arrays | {
        name: planted(arrays[name], np.s_[:, unread], np.nan)
        for name in ("key", "value")
    }
    with_nan["bias"] = planted(arrays["bias"], np.s_[..., unread], np.nan)
    run = functools.partial(
        with_gradients,
        g_out=cotangents(arrays)[0],
        g_lse=cotangents(arrays)[1],
        traced={"mask": given},
        block_query=8,
        block_key=8,
    )
    results = (jax.tree.leaves(run(x)) for x in (arrays, with_nan))
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_nan_in_a_visited_block_reaches_the_rows_that_visit_it():
    """And no other: the blocks are what the plan says they are."""
    arrays = problem(Shape(T=40, S=40, N=2, K=1, B=1))
    for name in ("key", "value"):
        arrays[name][:, 16:24] = np.nan
    out, _ = attended(arrays, {"mask": masks.Window(8, 0)}, block_query=8, block_key=8)
    rows = np.isnan(out).any((0, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(rows), np.arange(16, 32))


@pytest.mark.parametrize(
    ("implementation", "normalizer"),
    [("xla", "softmax"), ("xla", "stablemax"), ("reference", "softmax")],
)
def test_what_lies_beyond_the_lengths_may_be_nan(implementation, normalizer):
    arrays = problem()
    lengths = {"query": np.array([21, 13]), "key": np.array([0, 14])}
    beyond = {
        name: np.arange(arrays[name].shape[1]) >= length[:, None]
        for name, length in (lengths | {"value": lengths["key"]}).items()
    }
    zeros, nans = (
        {name: planted(arrays[name], where, x) for name, where in beyond.items()}
        for x in (0, np.nan)
    )
    run = functools.partial(
        with_gradients,
        g_out=cotangents(arrays)[0],
        g_lse=cotangents(arrays)[1],
        traced={
            "query_seq_lengths": lengths["query"],
            "key_value_seq_lengths": lengths["key"],
        },
        normalizer=normalizer,
        block_query=8,
        block_key=8,
        implementation=implementation,
    )
    (_, gradients), dirty = run(zeros), run(nans)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all()
        assert (gradient[beyond[name]] == 0).all()
        np.testing.assert_array_equal(gradient, dirty[1][name])
    assert (dirty[0][0][0] == 0).all()  # no keys in this sequence
    assert (dirty[0][0][1, 13:] == 0).all()


# ------------------------------------------------------------------ as jax.nn spells it
LENGTHS = {
    "query_seq_lengths": np.array([21, 9]),
    "key_value_seq_lengths": np.array([27, 11]),
}


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "local_window_size": 3},
        {"local_window_size": (2, 5)},
        LENGTHS | {"is_causal": True, "scale": 0.3},
        {"mask": np.arange(27) % 3 != 1, "is_causal": True},
        {"bias": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_equals_jax_nn_where_no_row_is_empty(options):
    arrays = problem(Shape(H=6, E=6), bias="nts" if options.get("bias") else None)
    options = {name: value for name, value in options.items() if name != "bias"}
    if "mask" in options:
        options["mask"] = options["mask"][None, None, None]

    def run(function, **more):
        def call(arrays):
            out, lse = function(**arrays, **options, **more)
            real = jnp.ones(out.shape[:2], bool)
            if "query_seq_lengths" in options:
                real = jnp.arange(21)[None] < options["query_seq_lengths"][:, None]
            real = real[..., None]
            return jnp.where(real[..., None], out, 0), jnp.where(real, lse, 0)

        def total(arrays):
            out, lse = call(arrays)
            # Their residual has no derivative.
            return (out * jnp.cos(out)).sum(), (out, lse)

        return jax.jit(jax.grad(total, has_aux=True))(arrays)

    ours = run(attend, return_lse=True, block_query=8, block_key=8)
    theirs = run(jax.nn.dot_product_attention, return_residual=True)
    for one, two in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(one, two, dtype="float32", length=108, c=8)


def test_a_mask_and_the_options_are_conjoined():
    arrays = problem()
    random = np.random.default_rng(3)
    array = random.random((2, 1, 21, 27)) < 0.8
    query, key = np.arange(21)[:, None], np.arange(27)[None, :]
    near = (key <= query + 2) & (key >= query - 12)
    lengths = np.array([20, 25])
    options = {
        "local_window_size": (12, 2),
        "key_value_seq_lengths": lengths,
        "block_query": 8,
        "block_key": 8,
    }
    within = key[None, None] < lengths[:, None, None, None]
    out, lse = attended(arrays, mask=array, **options)  # a NumPy array will do
    expected = oracle(arrays, allowed=array & near & within)
    assert_close(out, expected.out, dtype="float32", length=27)
    assert_close(lse, expected.lse, dtype="float32", length=27)
    out, _ = attended(arrays, mask=masks.Chunked(9), is_causal=True, **options)
    allowed = near & within & (key <= query) & (key // 9 == query // 9)
    assert_close(out, oracle(arrays, allowed=allowed).out, dtype="float32", length=27)
    several = (masks.Chunked(9), array, jax.device_put(array[:1, :, :1]))
    out, _ = attended(arrays, mask=several, is_causal=True, **options)
    allowed = allowed & array & array[:1, :, :1]
    assert_close(out, oracle(arrays, allowed=allowed).out, dtype="float32", length=27)


# --------------------------------------------------------------------- single arguments
def test_a_decode_slice_equals_the_rows_of_the_whole():
    shape = Shape(T=24, S=24)
    arrays = problem(shape)
    options = {
        "mask": masks.Window(6, 0) | masks.Prefix(2),
        "is_causal": True,
        "block_query": 8,
        "block_key": 8,
    }
    whole = attended(arrays, **options)
    part = arrays | {"query": arrays["query"][:, 13:16]}
    for offset in (13, jnp.int32(13)):
        for rows, all_ in zip(
            attended(part, query_offset=offset, **options), whole, strict=True
        ):
            assert_close(rows, all_[:, 13:16], dtype="float32", length=24)
    positions = np.array([4, 19])
    one = np.take_along_axis(arrays["query"], positions[:, None, None, None], 1)
    rows = attended(arrays | {"query": one}, {"query_offset": positions}, **options)
    for row, all_ in zip(rows, whole, strict=True):
        for b, position in enumerate(positions):
            assert_close(row[b, 0], all_[b, position], dtype="float32", length=24)


def test_a_scale_is_a_number_or_a_scalar_array():
    arrays = problem(Shape(T=8, S=8, H=16))
    none, lse = attended(arrays)
    for scale in (0.25, jnp.float32(0.25)):
        out, own_lse = attended(arrays, scale=scale)
        assert_close(out, none, dtype="float32", length=16)
        assert_close(own_lse, lse, dtype="float32", length=16)
    narrow = {name: array.astype("bfloat16") for name, array in arrays.items()}
    assert attended(narrow, scale=jnp.float32(0.25))[0].dtype == jnp.bfloat16
    uniform = attended(arrays, scale=0)[0]
    mean = np.repeat(arrays["value"].mean(1, keepdims=True), 2, axis=2)
    assert_close(uniform[:, :1], mean, dtype="float32", length=8)


def test_the_log_sum_comes_on_request():
    arrays = problem(Shape(T=8, S=8), "bfloat16")
    out = np.asarray(jax.jit(attend)(**arrays))
    both = attended(arrays)
    np.testing.assert_array_equal(out.astype("float32"), both[0].astype("float32"))
    assert both[1].shape == (2, 8, 4)
    assert both[1].dtype == jnp.float32


def test_dtypes_may_be_mixed():
    arrays = problem(Shape(T=9, S=8), bias="ns", sinks=True)
    dtypes = {"query": "bfloat16", "key": "float32", "value": "float16"}
    dtypes |= {"bias": "bfloat16", "sinks": "float32"}
    arrays = {name: array.astype(dtypes[name]) for name, array in arrays.items()}
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(arrays, g_out, g_lse)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    expected = oracle(arrays, g_out=g_out, g_lse=g_lse)
    assert_close(lse, expected.lse, dtype="float32", length=8)
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype
        # All of them are made from an output that was rounded to bfloat16.
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype="bfloat16", length=36)


def test_a_bias_that_all_queries_share_may_be_large_where_queries_are_padded():
    """Rows that only fill a block have no lse; exp(bias) alone overflows there."""
    arrays = problem(Shape(T=13, S=13, B=1), bias="s")
    arrays["bias"] += 200.0
    g_out, g_lse = cotangents(arrays)
    _, gradients = with_gradients(arrays, g_out, g_lse, block_query=8, block_key=8)
    expected = oracle(arrays, g_out=g_out, g_lse=g_lse).gradients
    for name, gradient in gradients.items():
        # Scores of 200 leave 2**-16 of a unit to their exponentials.
        assert_close(gradient, expected[name], dtype="float32", length=52, c=256)


@pytest.mark.parametrize("normalizer", ["softmax", "softplus", "stablemax"])
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_scores_may_be_large(normalizer, size):
    """Softplus underflows below -104; far from 0 it is exp, or the score itself."""
    arrays = problem(Shape(T=9, S=9, B=1), bias="s")
    arrays["bias"] = f32(size) + 4 * np.round(arrays["bias"])
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, scale=0.0, normalizer=normalizer, block_key=8
    )
    # In float64 softplus underflows too, below -745; there it is exp.
    far = normalizer == "softplus" and size < 0
    expected = oracle(
        arrays,
        scale=0.0,
        normalizer="softmax" if far else normalizer,
        g_out=g_out,
        g_lse=g_lse,
    )
    assert_close(out, expected.out, dtype="float32", length=9)
    assert_close(lse, expected.lse, dtype="float32", length=9)
    for name, gradient in gradients.items():
        # A float32 lse of this size is rounded by eps * size, and the weights with it.
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype="float32", length=1, c=abs(size))


# -------------------------------------------------------------- plans, implementations
def test_a_plan_stands_for_its_mask_as_a_constant_and_as_an_operand():
    arrays = problem(Shape(T=21, S=27))
    given = masks.Causal(3) & masks.Window(9, None)
    sizes = {"block_query": 8, "block_key": 8}
    plan = attention.block_plan(given, 21, 27, **sizes)
    wanted = attended(arrays, {"mask": given}, **sizes)
    for found in (attended(arrays, mask=plan), attended(arrays, {"mask": plan})):
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, two)
    shifted = attention.block_plan(given, 21, 27, query_offset=2, **sizes)
    found = attended(arrays, {"mask": shifted})
    wanted = attended(arrays, {"mask": given}, query_offset=2, **sizes)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, two)


def test_plans_with_lists_of_equal_lengths_share_a_compilation():
    """Blocks that are data: chosen from the arrays, say."""
    arrays = problem(Shape(T=32, S=32, N=2, K=1, B=1))
    traces = []

    @jax.jit
    def call(arrays, plan):
        traces.append(plan)
        function = lambda arrays: attend(**arrays, mask=plan)
        out, pull = jax.vjp(function, arrays)
        return out, pull(jnp.cos(out))[0], jnp.cos(out)

    whole = attention.block_plan(None, 32, 32, block_query=8, block_key=8)
    random = np.random.default_rng(0)
    for _ in range(3):
        chosen = np.sort(random.choice(16, 7, replace=False))
        lists = np.stack(np.divmod(chosen, 4)).astype(np.int32)
        plan = dataclasses.replace(whole, whole=lists)
        out, gradients, g_out = jax.device_get(call(arrays, plan))
        blocks = np.zeros((4, 4), bool)
        blocks[tuple(lists)] = True
        allowed = np.kron(blocks, np.ones((8, 8), bool))[None, None]
        expected = oracle(
            arrays, allowed=allowed, g_out=g_out, g_lse=np.zeros((1, 32, 2))
        )
        assert_close(out, expected.out, dtype="float32", length=32)
        for name, gradient in gradients.items():
            assert_close(gradient, expected.gradients[name], dtype="float32", length=64)
    assert len(traces) == 1


def test_a_sequence_of_implementations_takes_the_first_that_can_run():
    arrays = problem(Shape(T=8, S=8))
    for names in (("pallas", "xla"), ["xla", "reference"], "reference", None):
        out, _ = attended(arrays, implementation=names)
        assert_close(out, oracle(arrays).out, dtype="float32", length=8)


def test_explain_shows_both_passes():
    arrays = problem(Shape(T=8, S=8))

    def loss(arrays, implementation):
        return attend(**arrays, implementation=implementation).sum()

    explanation = softlib.explain(jax.grad(loss), arrays, None)
    text = str(explanation)
    names = [found.operation for found in explanation.operations]
    assert names == ["dot_product_attention", "dot_product_attention_gradient"]
    assert "everywhere: xla" in text
    assert "not pallas_tpu: 8 queries are too few to gain by it" in text
    assert "not pallas_gpu: it is written for Hopper GPUs" in text
    text = str(softlib.explain(loss, arrays, ("pallas", "reference")))
    assert "everywhere: reference" in text


def test_shapes_alone_are_enough_to_trace():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    query, key = struct((2, 65536, 8, 64)), struct((2, 65536, 2, 64))
    call = functools.partial(attend, mask=masks.Window(1023, 0), return_lse=True)
    out, lse = jax.eval_shape(call, query, key, key)
    assert (out.shape, out.dtype) == (query.shape, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 65536, 8), jnp.float32)
