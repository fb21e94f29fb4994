"""What kronecker_attention promises, sentence by sentence."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import attention, masks
from softlib.testing import assert_close
from tests.attention.problems import planted
from tests.attention.tensor_problems import (
    Between,
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
from tests.compiled import f32
from tests.host import jnp

BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])
BLOCKS: Any = {"block_query": 8, "block_keys": (8, 8)}


# ----------------------------------------------------------------------- the definition
def scalars(numbers):
    """(S, 1, 1): a head with one feature, without a batch axis."""
    return jax.device_put(f32(numbers).reshape(-1, 1, 1))


@BOTH
def test_the_softmax_is_joint_over_all_pairs(implementation):
    """Weights 1, 1, 1, 2 by hand; a softmax per axis would give a half."""

    @jax.jit
    def call(values):
        return attend(
            scalars([1]),
            (scalars([0, 1]), scalars([0, np.log(2)])),
            values,
            scale=1.0,
            return_lse=True,
            implementation=implementation,
        )

    for v1, v2, wanted in (
        ([1, 0], [1, 1], 2 / 5),
        ([1, 1], [1, 0], 2 / 5),
        ([0, 1], [0, 1], 2 / 5),
        ([3, 0], [5, 0], 15 / 5),
        ([3, 7], [5, 11], (15 + 33 + 35 + 2 * 77) / 5),
    ):
        out, lse = jax.device_get(call((scalars(v1), scalars(v2))))
        assert_close(out[0, 0, 0], wanted, dtype="float32", length=4)
        assert_close(lse[0, 0], np.log(5), dtype="float32", length=4)  # nats


def test_the_scale_is_1_over_h_or_a_number_or_a_scalar_array():
    arrays = problem(Shape(H=8))
    run = functools.partial(attended, arrays)
    out, lse = run()
    for scale in (1 / 8, jnp.float32(1 / 8)):
        for one, two in zip(run(scale=scale), (out, lse), strict=True):
            assert_close(one, two, dtype="float32", length=63)
    expected = oracle(arrays, scale=8**-0.5)
    assert_close(run(scale=8**-0.5)[0], expected.out, dtype="float32", length=63)
    means = [np.repeat(v.mean(1, keepdims=True), 2, 2) for v in arrays["values"]]
    wanted = np.broadcast_to(means[0] * means[1], out.shape)
    assert_close(run(scale=0)[0], wanted, dtype="float32", length=63)


def test_a_scale_array_does_not_widen_the_output():
    arrays = problem(dtype="bfloat16")
    out, lse = attended(arrays, {"scale": jnp.float32(0.3)})
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_query_head_reads_the_key_head_of_its_group():
    arrays = problem(Shape(N=4, K=2))
    wide = lambda a: np.repeat(a, 2, axis=2)
    spread = {name: tuple(map(wide, arrays[name])) for name in ("keys", "values")}
    for one, two in zip(attended(arrays), attended(arrays | spread), strict=True):
        assert_close(one, two, dtype="float32", length=63)


def test_the_log_sum_comes_on_request():
    arrays = problem(dtype="bfloat16")
    out = np.asarray(jax.jit(attend)(**arrays))
    both = attended(arrays)
    np.testing.assert_array_equal(out.astype("float32"), both[0].astype("float32"))
    assert both[1].shape == (2, 11, 4)
    assert both[1].dtype == jnp.float32


@pytest.mark.parametrize("name", ["windows", "joint"])
def test_the_log_sum_is_that_of_the_scores_that_attend(name):
    shape = Shape(N=2, K=1, B=1)
    arrays, given = problem(shape), mask(name, shape)
    _, lse = attended(arrays, given.options, **BLOCKS)
    query, (one, two) = arrays["query"][0], (k[0, :, 0] for k in arrays["keys"])
    scores = np.einsum("tnc,jc,kc->ntjk", query, one, two) / 4
    scores = np.where(given.allowed[0], scores, -np.inf).reshape(2, 11, 63)
    wanted = np.logaddexp.reduce(scores, -1).T
    assert_close(lse[0], wanted, dtype="float32", length=63)


# --------------------------------------------------------------------------- empty rows
@pytest.mark.parametrize(
    ("axis", "implementation"), [(0, "xla"), (1, "xla"), (1, "reference")]
)
def test_a_row_that_one_axis_empties_has_output_0_lse_minus_inf_and_no_gradient(
    axis, implementation
):
    shape = Shape(T=20, S=(16, 12), B=1)
    arrays = problem(shape)
    axes: list[Any] = [None, None]
    axes[axis] = masks.Causal(-10)
    s = shape.S[axis]
    allowed = np.ones((1, 1, 20, 16, 12), bool)
    keeps = np.arange(s)[None, :] <= np.arange(20)[:, None] - 10
    allowed &= keeps.reshape(1, 1, 20, *((s, 1) if axis == 0 else (1, s)))
    empty, unread = ~keeps.any(1), ~keeps.any(0)
    assert empty.sum() == 10
    g_out, g_lse = cotangents(arrays)
    # Also the cotangents that no optimizer should meet: the lse is -inf itself.
    g_out[:, empty], g_lse[:, empty] = 1e3, 1e3
    (out, lse), gradients = with_gradients(
        arrays,
        g_out,
        g_lse,
        {"mask": PerAxis(*axes)},
        implementation=implementation,
        **(BLOCKS if implementation == "xla" else {}),
    )
    assert (out[:, empty] == 0).all()
    assert (lse[:, empty] == -jnp.inf).all()
    assert (gradients["query"][:, empty] == 0).all()
    assert (gradients["keys"][axis][:, unread] == 0).all()
    assert (gradients["values"][axis][:, unread] == 0).all()
    g_out[:, empty], g_lse[:, empty] = 0, 0
    expected = oracle(arrays, allowed=allowed, g_out=g_out, g_lse=g_lse)
    assert_gradients(
        gradients, expected.gradients, arrays, dtype="float32", length=shape.terms
    )


def test_rows_whose_axes_have_keys_but_no_tuple_are_empty_too():
    """No axis alone empties a row here: only the joint condition does."""
    shape = Shape(T=9, S=(8, 8), B=1, N=2, K=1)
    arrays = problem(shape)
    given = PerAxis(
        masks.Window(0, 0), masks.Causal(), joint=Between(2, 1, masks.Causal(-1))
    )
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, {"mask": given}, block_query=4, block_keys=(4, 4)
    )
    # j = i and k <= i, but j < k.
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


# ------------------------------------------------------------- what is not read, is not
UNREAD = {
    # Keys from 24 on have no query, on either axis.
    "windows": (Shape(T=24, S=(32, 40), N=2, K=1, B=1), (4, 0), (6, 0), None, (24, 24)),
    # Nothing but `j < k` keeps the last keys of the first axis from being read.
    "between": (
        Shape(T=24, S=(32, 24), N=2, K=1, B=1),
        (None, None),
        (6, 0),
        Between(2, 1, masks.Causal(-1)),
        (24, 24),
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_nan_in_blocks_that_nobody_visits_reaches_nothing(name):
    shape, left, right, joint, stops = UNREAD[name]
    given = PerAxis(*(masks.Window(*reach) for reach in (left, right)), joint=joint)
    unread = [np.arange(s) >= stop for s, stop in zip(shape.S, stops, strict=True)]
    assert unread[0].sum() == 8
    dense = given.materialize(24, *shape.S)
    assert not dense[:, unread[0]].any()
    assert not dense[:, :, unread[1]].any()
    arrays = problem(shape)
    with_nan = arrays | {
        name: tuple(
            planted(array, np.s_[:, where], np.nan)
            for array, where in zip(arrays[name], unread, strict=True)
        )
        for name in ("keys", "values")
    }
    g_out, g_lse = cotangents(arrays)
    run = functools.partial(
        with_gradients, g_out=g_out, g_lse=g_lse, traced={"mask": given}, **BLOCKS
    )
    results = (jax.tree.leaves(run(x)) for x in (arrays, with_nan))
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_empty_rows_are_clean_where_an_axis_that_they_see_is_nan():
    """The second axis has no key for the first 16 rows: nobody visits their tuples."""
    arrays = problem(Shape(T=24, S=(16, 24), N=2, K=1, B=1))
    k1, k2 = arrays["keys"]
    arrays["keys"] = (np.full_like(k1, np.nan), k2)
    given = PerAxis(None, masks.Causal(-16))
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, {"mask": given}, **BLOCKS
    )
    assert (out[:, :16] == 0).all()
    assert (lse[:, :16] == -jnp.inf).all()
    assert (gradients["query"][:, :16] == 0).all()
    assert np.isnan(out[:, 16:]).all()


def test_nan_in_a_visited_block_reaches_no_row_that_does_not_visit_it():
    arrays = problem(Shape(T=40, S=(40, 40), N=2, K=1, B=1))
    k1, k2 = arrays["keys"]
    arrays["keys"] = (k1, planted(k2, np.s_[:, 16:24], np.nan))
    given = PerAxis(masks.Window(3, 0), masks.Window(8, 0))
    out, lse = attended(arrays, {"mask": given}, **BLOCKS)
    rows = np.r_[0:16, 32:40]
    assert np.isfinite(out[:, rows]).all()
    assert np.isfinite(lse[:, rows]).all()


def test_what_lies_beyond_the_lengths_of_padding_has_gradient_0():
    shape = Shape()
    arrays, given = problem(shape), mask("padding", shape)
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(
        arrays, g_out, g_lse, given.options, block_query=8, block_keys=(4, 8)
    )
    assert (out[0] == 0).all()  # no keys on the last axis in this sequence
    assert (lse[0] == -jnp.inf).all()
    assert all((leaf[0] == 0).all() for leaf in jax.tree.leaves(gradients))
    read = given.allowed[1, 0]
    for t, others in enumerate(((0, 2), (0, 1))):
        beyond = ~read.any(others)
        assert beyond.any()
        for name in ("keys", "values"):
            assert (gradients[name][t][1, beyond] == 0).all()
            assert (gradients[name][t][1, ~beyond] != 0).any((-1, -2)).all()


# -------------------------------------------------------------------------------- masks
def test_a_plain_mask_is_the_same_mask_on_every_axis():
    arrays = problem(Shape(N=2, K=1, B=1))
    given = masks.Radial(2) & masks.Causal()
    found = [attended(arrays, {"mask": m}) for m in (given, PerAxis(given, given))]
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_none_restricts_no_axis():
    arrays = problem(Shape(N=2, K=1, B=1))
    found = [attended(arrays, {"mask": m}) for m in (None, PerAxis(None, None))]
    for one, two in zip(*found, strict=True):
        assert_close(one, two, dtype="float32", length=63)


def odd(query, one, two):
    return (query + one * two) % 2 == 1


def odd_in_jax(query, one, two):
    return jnp.logical_not(jnp.equal(jnp.remainder(query + one * two, 2), 0))


@pytest.mark.parametrize("joint", [odd, odd_in_jax])
def test_a_joint_condition_is_numpy_or_jax_on_absolute_positions(joint):
    shape = Shape(T=19, S=(17, 9), N=2, K=1, B=1)
    arrays = problem(shape)
    i, j, k = np.ogrid[:19, :17, :9]
    allowed = ((i + j * k) % 2 == 1)[None, None]
    given = PerAxis(None, None, joint=joint)
    out, lse = attended(arrays, {"mask": given}, **BLOCKS)
    expected = oracle(arrays, allowed=allowed)
    assert_close(out, expected.out, dtype="float32", length=153)
    assert_close(lse, expected.lse, dtype="float32", length=153)


def test_unordered_pairs_may_count_once():
    """Keys and values shared by both axes: j < k and k < j weigh the same."""
    shape = Shape(T=5, S=(10, 10), N=2, K=1, B=1)
    arrays = problem(shape)
    arrays |= {name: (arrays[name][0],) * 2 for name in ("keys", "values")}
    results = [
        attended(arrays, {"mask": PerAxis(None, None, joint=joint)}, **BLOCKS)
        for joint in (
            Between(2, 1, masks.Causal(-1)),
            Between(1, 2, masks.Causal(-1)),
            Between(1, 2, ~masks.Window(0, 0)),
        )
    ]
    for out, _ in results[1:]:
        assert_close(out, results[0][0], dtype="float32", length=90)
    assert_close(results[1][1], results[0][1], dtype="float32", length=45)
    twice = results[0][1] + np.log(2)
    assert_close(results[2][1], twice, dtype="float32", length=90)


def test_pairs_of_equal_keys_count_unless_they_are_excluded():
    """Both windows hold the query itself and nothing else."""
    arrays = problem(Shape(T=7, S=(7, 7), N=2, K=2, B=1))
    out, lse = attended(arrays, mask=masks.Window(0, 0))
    v1, v2 = arrays["values"]
    k1, k2 = arrays["keys"]
    assert_close(out, v1 * v2, dtype="float32", length=1)
    wanted = (arrays["query"] * k1 * k2).sum(-1) / 4
    assert_close(lse, wanted, dtype="float32", length=4)
    unequal = PerAxis(
        *[masks.Window(0, 0)] * 2, joint=Between(1, 2, ~masks.Window(0, 0))
    )
    out, lse = attended(arrays, mask=unequal)
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()


def test_a_shifted_mask_is_a_slice_of_the_rows():
    shape = Shape(T=16, S=(16, 16), N=2, K=1, B=1)
    arrays = problem(shape)
    given = PerAxis(masks.Window(4, 0), masks.Causal(), joint=odd)
    whole = attended(arrays, {"mask": given}, **BLOCKS)
    part = arrays | {"query": arrays["query"][:, 9:13]}
    for rows, all_ in zip(
        attended(part, {"mask": given.shift(9, 0, 0)}, **BLOCKS), whole, strict=True
    ):
        assert_close(rows, all_[:, 9:13], dtype="float32", length=80)


# ------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("blocks", [None, (3, 2)])
def test_scores_may_be_large(blocks):
    """Integers, so that all scores are exact; the row's own maximum is subtracted."""
    random = np.random.default_rng(0)
    arrays = problem(Shape(N=2, K=1, B=1))
    draw = lambda a: f32(random.integers(-4, 5, a.shape))
    arrays |= {
        "query": draw(arrays["query"]),
        "keys": jax.tree.map(draw, arrays["keys"]),
    }
    g_out, g_lse = cotangents(arrays)
    sizes = {} if blocks is None else {"block_query": 4, "block_keys": blocks}
    (out, lse), gradients = with_gradients(arrays, g_out, g_lse, scale=100.0, **sizes)
    expected = oracle(arrays, scale=100.0, g_out=g_out, g_lse=g_lse)
    assert np.abs(expected.lse).max() > 5e3
    assert_close(out, expected.out, dtype="float32", length=63)
    assert_close(lse, expected.lse, dtype="float32", length=63)
    # A float32 lse of this size is rounded by eps * size, and the weights with it.
    size = np.abs(expected.lse).max()
    assert_gradients(
        gradients, expected.gradients, arrays, dtype="float32", length=1, c=size
    )


def test_gradients_of_shared_values_are_summed_in_float32():
    """Over 8 heads and 64 queries of bfloat16, with one rounding at the end."""
    shape = Shape(T=64, S=(5, 6), N=8, K=1, B=1)
    arrays = problem(shape, "bfloat16")
    g_out, g_lse = cotangents(arrays)
    g_out, g_lse = np.abs(g_out), np.zeros_like(g_lse)
    arrays["values"] = jax.tree.map(np.abs, arrays["values"])
    _, gradients = with_gradients(
        arrays, g_out, g_lse, block_query=8, block_keys=(4, 8)
    )
    expected = oracle(arrays, g_out=g_out, g_lse=g_lse).gradients["values"]
    for one, two in zip(gradients["values"], expected, strict=True):
        relative = np.abs(np.asarray(one, np.float64) / two - 1)
        assert relative.max() < 2**-8 + 2**-12


def test_dtypes_may_be_mixed():
    arrays = problem(Shape(T=9))
    (k1, k2), (v1, v2) = arrays["keys"], arrays["values"]
    arrays["query"] = arrays["query"].astype("bfloat16")
    arrays["keys"] = (k1.astype("bfloat16"), k2)
    arrays["values"] = (v1, v2.astype("float16"))
    g_out, g_lse = cotangents(arrays)
    (out, lse), gradients = with_gradients(arrays, g_out, g_lse)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    expected = oracle(arrays, g_out=g_out, g_lse=g_lse)
    assert_close(lse, expected.lse, dtype="float32", length=63)
    # All gradients are made from an output that was rounded to bfloat16.
    assert_gradients(
        gradients, expected.gradients, arrays, dtype="bfloat16", length=400
    )


def test_the_precision_reaches_the_matrix_products():
    arrays = problem()

    def text(precision):
        call = functools.partial(attend, precision=precision)
        total = lambda arrays: call(**arrays).sum()
        return jax.jit(jax.grad(total)).lower(arrays).as_text()

    assert "HIGHEST" in text("highest")
    assert "HIGHEST" not in text(None)


# --------------------------------------------------------------- plans, implementations
def test_a_plan_stands_for_its_mask_as_a_constant_and_as_an_operand():
    arrays = problem(Shape(T=19, S=(17, 9), N=2, K=1, B=1))
    given = PerAxis(masks.Causal(), masks.Window(3, 2), joint=odd)
    sizes = {"block_query": 8, "block_key": (4, 8)}
    plan = attention.block_plan(given, 19, (17, 9), **sizes)
    wanted = attended(arrays, {"mask": given}, block_query=8, block_keys=(4, 8))
    for found in (attended(arrays, mask=plan), attended(arrays, {"mask": plan})):
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_plan_of_a_plain_mask_is_that_of_the_mask_on_every_axis():
    for given in (None, masks.Causal()):
        sizes = {"block_query": 8, "block_key": (4, 8)}
        one = attention.block_plan(given, 19, (17, 9), **sizes)
        two = attention.block_plan(PerAxis(given, given), 19, (17, 9), **sizes)
        assert one.grid == two.grid == (3, 5, 2)
        for name in ("whole", "partial"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_block_sizes_are_chosen_where_they_are_not_given():
    arrays = problem(Shape(T=19, S=(17, 9), N=2, K=1, B=1))
    wanted = attended(arrays, mask=masks.Causal())
    for sizes in ((None, (4, None)), (8, (None, 4))):
        found = attended(
            arrays, mask=masks.Causal(), block_query=sizes[0], block_keys=sizes[1]
        )
        for one, two in zip(found, wanted, strict=True):
            assert_close(one, two, dtype="float32", length=153)


def test_keys_and_values_may_be_lists():
    arrays = problem(Shape(T=5, N=2, K=1, B=1))
    lists = arrays | {name: list(arrays[name]) for name in ("keys", "values")}
    for one, two in zip(attended(lists), attended(arrays), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_sequence_of_implementations_takes_the_first_that_can_run():
    arrays = problem(Shape(T=5, N=2, K=1, B=1))
    expected = oracle(arrays).out
    for names in (("pallas", "xla"), ["xla", "reference"], "reference", None):
        out, _ = attended(arrays, implementation=names)
        assert_close(out, expected, dtype="float32", length=63)


def test_explain_shows_both_passes():
    arrays = problem(Shape(T=5, N=2, K=1, B=1))

    def loss(arrays, implementation):
        return attend(**arrays, implementation=implementation).sum()

    explanation = softlib.explain(jax.grad(loss), arrays, None)
    text = str(explanation)
    names = [found.operation for found in explanation.operations]
    assert names == ["kronecker_attention", "kronecker_attention_gradient"]
    assert "everywhere: xla" in text
    assert "not pallas_tpu: 5 queries are too few to gain by it" in text
    text = str(softlib.explain(loss, arrays, ("pallas", "reference")))
    assert "everywhere: reference" in text


def test_shapes_alone_are_enough_to_trace():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    query, key = struct((2, 16384, 8, 64)), struct((2, 16384, 2, 64))
    given = PerAxis(masks.Window(511, 0), masks.Window(31, 0))
    call = functools.partial(attend, mask=given, return_lse=True)
    out, lse = jax.eval_shape(call, query, (key, key), (key, key))
    assert (out.shape, out.dtype) == (query.shape, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 16384, 8), jnp.float32)


# ------------------------------------------------------------------ what it is good for
def match3(n, samples, dtype, seed=0):
    """Numbers below n**2, and one head that tells which are part of a triple.

    The triples (with repetition) sum to 0 modulo n**2. The scores of matches are above
    that of a pair of blank keys, all others below it.
    """
    random = np.random.default_rng(seed)
    numbers = random.integers(0, n**2, (samples, n))
    angle = 2 * np.pi * numbers / n**2
    gap = 1 - np.cos(2 * np.pi / n**2)
    beta = 2 / gap * np.log(n**2 / 0.05)
    cos, sin, zero, one = np.cos(angle), np.sin(angle), 0 * angle, 1 + 0 * angle
    query = beta * np.stack([cos, cos, sin, sin, (1 - gap / 2) * one, one], -1)
    blank = np.broadcast_to(np.eye(6)[4], (samples, 1, 6))
    keys = [
        np.concatenate([np.stack(features, -1), blank], 1)
        for features in (
            [cos, sin, sin, cos, zero, zero],
            [cos, -sin, -cos, -sin, zero, zero],
        )
    ]
    value = np.concatenate([one, zero[:, :1]], 1)[..., None]
    head = lambda a: np.asarray(a[:, :, None], dtype)
    keys, value = tuple(map(head, keys)), head(value)
    out = jax.jit(functools.partial(attend, scale=1.0))(
        head(query), keys, (value, value)
    )
    sums = numbers[:, :, None, None] + numbers[:, None, :, None]
    sums = (sums + numbers[:, None, None, :]) % n**2
    return np.asarray(out)[:, :, 0, 0], (sums == 0).any((2, 3))


@pytest.mark.parametrize(
    ("n", "samples"),
    [
        (16, 40),
        pytest.param(8, 400, marks=pytest.mark.slow),
        pytest.param(32, 40, marks=pytest.mark.slow),
        pytest.param(64, 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_head_finds_the_members_of_triples(n, samples, dtype):
    """Match3: hand-set weights of width 6, no training."""
    with jax.enable_x64(dtype == "float64"):
        scores, matches = match3(n, samples, dtype)
    assert 0.2 < matches.mean() < 0.7
    assert (scores[matches] > 0.99).all()
    assert (scores[~matches] < 0.05).all()
