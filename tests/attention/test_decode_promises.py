"""Each promise of decode_attention: exact in every range, masks, splits, laziness."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import attention
from softlib.attention._decode import stream as stream
from softlib.testing import assert_close, check_transformations
from tests.attention.decode_problems import (
    LENGTHS,
    decoded,
    gradients,
    oracle,
    problem,
)
from tests.attention.problems import planted
from tests.compiled import f32
from tests.host import jnp


def scaled(arrays, factors):
    """Sequences whose scores are larger by a factor each."""
    factors = np.asarray(factors, arrays["query"].dtype)[:, None, None, None]
    return arrays | {"query": arrays["query"] * factors}


# -------------------------------------------------------------- exact for any reference
def test_result_does_not_depend_on_phi():
    arrays = problem(T=2)
    expected = oracle(arrays, lengths=LENGTHS)

    for phi in (-20.0, -3.0, 0.0, 5.0, 20.0):
        out, statistics = decoded(arrays, LENGTHS, phi=phi)
        np.testing.assert_allclose(out, expected.out, atol=1e-6)
        np.testing.assert_allclose(statistics.lse, expected.lse, atol=4e-6)
        assert not statistics.needs_recompute.any()


@pytest.mark.parametrize(
    ("phi", "valid_range"),
    [
        (0.0, (-70.0, 80.0)),  # scores beyond 500: overflow
        (300.0, (-1e9, 1e9)),  # all 300 below: underflow, whatever the range says
        (-100.0, (-1e9, 1e9)),  # overflow, whatever the range says
        (0.0, (1.0, 1.5)),  # nearly every row outside
        (float("-inf"), (-70.0, 80.0)),
        (float("nan"), (-70.0, 80.0)),
    ],
)
def test_rows_outside_of_the_range_are_exact(phi, valid_range):
    arrays = scaled(problem(), (1, 1, 1, 400))
    options = {"phi": phi, "valid_range": valid_range, "num_splits": 3}
    out, statistics = decoded(arrays, LENGTHS, **options)
    expected = oracle(arrays, lengths=LENGTHS)
    assert expected.lse.max() > 500
    assert_close(out, expected.out, dtype="float32", length=11)
    assert_close(statistics.lse, expected.lse, dtype="float32", length=11)
    flags = np.asarray(statistics.needs_recompute)
    if abs(phi) < 50:
        np.testing.assert_array_equal(flags, expected.outside(phi, valid_range))
    assert flags[[0, 3]].any()
    assert not flags[2].any()  # it sees no keys
    g_out, g_lse = np.ones(out.shape), np.ones(statistics.lse.shape)
    found = gradients(arrays, LENGTHS, g_out, g_lse, **options)
    wanted = oracle(arrays, lengths=LENGTHS, g_out=g_out, g_lse=g_lse).gradients
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], dtype="float32", length=32)


def test_an_overflow_of_the_values_alone_is_found():
    """The sum of weights is e^80 and finite, the sum of weighted values is not."""
    arrays = problem(B=1, N=1, K=1, S=3)
    arrays["query"] = np.full_like(arrays["query"], 1.0)
    arrays["key"] = np.full_like(arrays["key"], 79 / 6 / 0.4)
    arrays["value"] = np.full_like(arrays["value"], 1e6)
    out, statistics = decoded(arrays, phi=0.0)
    assert statistics.needs_recompute.all()
    np.testing.assert_allclose(out, 1e6, rtol=1e-6)


@pytest.mark.parametrize("criterion", ["row_max", "elementwise"])
def test_flags_are_those_of_the_criterion(criterion):
    arrays = scaled(problem(T=2, S=40, seed=3), (1, 2, 3, 4))
    options = {"phi": 1.0, "valid_range": (-6.0, 5.0), "criterion": criterion}
    _, statistics = decoded(arrays, **options)
    flags = oracle(arrays).outside(1.0, (-6.0, 5.0), criterion)
    assert 0 < flags.sum() < flags.size
    np.testing.assert_array_equal(statistics.needs_recompute, flags)


def test_range_and_phi_may_differ_by_head():
    arrays = problem(T=2)
    top = oracle(arrays).max_score
    phi = top.max((0, 1))  # no row of a head is above
    low = f32([-100.0, -1e-3, -100.0, -1e-3])
    _, statistics = decoded(arrays, phi=f32(phi), valid_range=(low, 1.0))
    flags = (top - phi < np.array(low)) & (np.array(low) > -1)
    np.testing.assert_array_equal(statistics.needs_recompute, flags)


def test_a_row_does_not_depend_on_other_rows_that_are_recomputed():
    arrays = problem()
    alone = decoded(arrays, phi=0.0)
    among = decoded(scaled(arrays, (1, 1, 1, 900)), phi=0.0)
    assert among[1].needs_recompute[3].any()
    for one, two in zip(*map(jax.tree.leaves, (alone, among)), strict=True):
        np.testing.assert_array_equal(one[:3], two[:3])


def test_under_vmap_each_sequence_is_exact():
    """There both sides of the branch run, and are selected from."""
    arrays = scaled(problem(), (1, 1, 1, 400))
    scale = float(arrays.pop("scale"))
    alone = {name: array[:, None] for name, array in arrays.items()}

    @jax.jit
    @jax.vmap
    def call(arrays, length):
        return attention.decode_attention(
            **arrays,
            scale=scale,
            key_value_seq_lengths=length,
            phi=0.0,
            return_lse=True,
        )

    out, lse = call(alone, np.array(LENGTHS)[:, None])
    expected = oracle({**arrays, "scale": scale}, lengths=LENGTHS)
    assert_close(out[:, 0], expected.out, dtype="float32", length=11)
    assert_close(lse[:, 0], expected.lse, dtype="float32", length=11)


def test_the_fast_path_rescales_nothing():
    """Exponentials of scores only: with a running maximum there are others."""

    def exponentials(phi):
        arrays = problem(dtype="float32")
        unified = None if phi is None else softlib.numerics.UnifiedMax(phi)
        operands = stream.Operands(
            jnp.moveaxis(arrays["query"], 1, 2),
            arrays["key"],
            arrays["value"],
            arrays["scale"],
            None,
            unified,
        )
        options = stream.Options(num_splits=3)
        operands = operands._replace(key=jnp.repeat(operands.key, 2, axis=2))
        operands = operands._replace(value=jnp.repeat(operands.value, 2, axis=2))
        made = jax.make_jaxpr(functools.partial(stream.forward, options))(operands)
        return str(made).count("= exp ")

    assert exponentials(None) == 2
    assert exponentials(0.0) == 1


# ------------------------------------------------------------------------- what is seen
@pytest.mark.parametrize(("phi", "num_splits"), [(None, None), (0.0, 3)])
def test_what_lies_behind_the_length_has_no_influence(phi, num_splits):
    arrays = problem(T=2)
    beyond = np.arange(11)[None, :] >= np.array(LENGTHS)[:, None]
    spoilt = dict(arrays)
    for name in ("key", "value"):
        spoilt[name] = planted(arrays[name], beyond, np.nan)
    options = {"is_causal": True, "phi": phi, "num_splits": num_splits}
    for one, two in zip(
        *(jax.tree.leaves(decoded(a, LENGTHS, **options)) for a in (arrays, spoilt)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    g_out, g_lse = np.ones((4, 2, 4, 5)), np.ones((4, 2, 4))
    found = gradients(spoilt, LENGTHS, g_out, g_lse, **options)
    wanted = gradients(arrays, LENGTHS, g_out, g_lse, **options)
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, wanted[name])
    for name in ("key", "value"):
        assert (np.asarray(found[name])[beyond] == 0).all()


def test_a_query_without_keys_is_zero_and_its_lse_the_sink():
    arrays = problem(sinks=True)
    out, statistics = decoded(arrays, LENGTHS)
    assert (out[2] == 0).all()
    np.testing.assert_array_equal(statistics.lse[2, 0], arrays["sinks"])
    assert (statistics.max_score[2] == -jnp.inf).all()
    del arrays["sinks"]
    _, statistics = decoded(arrays, LENGTHS, phi=0.0)
    assert (statistics.lse[2] == -jnp.inf).all()


def test_a_sink_of_minus_infinity_is_none():
    arrays = problem(sinks=True)
    arrays["sinks"] = np.full(4, -np.inf, np.float32)
    with_sinks = decoded(arrays, LENGTHS)
    del arrays["sinks"]
    without = decoded(arrays, LENGTHS)
    for one, two in zip(*map(jax.tree.leaves, (with_sinks, without)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_a_draft_gives_what_its_tokens_give_one_by_one():
    arrays = problem(T=3)
    lengths = np.array((11, 1, 0, 7))
    together = decoded(arrays, lengths, is_causal=True)
    for t in range(3):
        one = arrays | {"query": arrays["query"][:, t : t + 1]}
        alone = decoded(one, np.maximum(lengths - 2 + t, 0))
        for whole, part in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
            np.testing.assert_allclose(whole[:, t : t + 1], part, atol=1e-6)


@pytest.mark.parametrize("phi", [None, 0.0])
def test_an_impossible_length_is_nan_in_its_own_rows(phi):
    out, statistics = decoded(problem(), (11, 12, -1, 7), phi=phi)
    for values in (out, statistics.lse, statistics.max_score):
        nan = np.isnan(values).reshape(4, -1)
        np.testing.assert_array_equal(nan.all(1), [False, True, True, False])
        np.testing.assert_array_equal(nan.any(1), [False, True, True, False])


@pytest.mark.parametrize(
    ("name", "phi"), [("query", None), ("key", 0.0), ("value", None), ("value", 0.0)]
)
def test_nan_stays_in_its_sequence(name, phi):
    arrays = problem()
    arrays[name][1] = np.nan
    out, _ = decoded(arrays, phi=phi)
    nan = np.isnan(out).reshape(4, -1)
    np.testing.assert_array_equal(nan.all(1), [False, True, False, False])
    np.testing.assert_array_equal(nan.any(1), [False, True, False, False])


# ---------------------------------------------------------------------- work and memory
@pytest.mark.parametrize(
    ("lengths", "visited"), [((3, 1), 1), ((0, 0), 0), ((5, 4), 2), ((20, 0), 5)]
)
def test_parts_behind_the_longest_sequence_are_not_visited(
    lengths, visited, monkeypatch
):
    visits = []
    update = stream._updated
    monkeypatch.setattr(
        stream, "_updated", lambda *args: (visits.append(1), update(*args))[1]
    )
    arrays: Any = problem(S=20, B=2)
    arrays["scale"] = float(arrays["scale"])
    lengths = jnp.asarray(lengths)
    with jax.disable_jit():
        attention.decode_attention(
            **arrays, key_value_seq_lengths=lengths, num_splits=5
        )
    assert len(visits) == visited


def test_parts_keep_the_memory_below_that_of_all_scores():
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    cache = shape(8, 16384, 4, 64)

    def scratch(implementation):
        call = functools.partial(
            attention.decode_attention, implementation=implementation
        )
        compiled = jax.jit(call).lower(shape(8, 1, 16, 64), cache, cache).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Keys or values in float32 are 134 MB, one part of both 17 MB.
    assert scratch("xla") < 40e6 < 134e6 < scratch("reference")


# ------------------------------------------------------------------------ dispatch etc.
def test_explain_names_what_runs():
    arrays = problem()
    call = functools.partial(attention.decode_attention, phi=0.0)
    # The second pass is the same operation.
    (found,) = softlib.explain(call, **arrays).operations
    assert str(found).splitlines()[:2] == ["decode_attention", "  everywhere: xla"]


LATER = ("shard_map", "sharded_jit", "checkpoint", "gradient_of_gradient")
SLOW = dict.fromkeys(LATER, "done by the slow test")


@pytest.mark.slow  # that of attention to all keys is not
@pytest.mark.parametrize(
    ("implementation", "phi", "skip"),
    [
        ("xla", None, SLOW),
        pytest.param("xla", 0.0, {}, marks=pytest.mark.slow),
        pytest.param("reference", 0.0, {}, marks=pytest.mark.slow),
    ],
)
def test_transformations(implementation, phi, skip):
    arrays = problem(B=2 if skip else 8, S=5, N=2, K=1, H=3, Hv=2)
    lengths = jnp.asarray([5, 1, 2, 3, 4, 5, 3, 2])[: 2 if skip else 8]
    # The largest score of some row is outside: both branches take part.
    low = float(oracle(arrays, lengths=lengths).max_score.min()) + 1e-3

    def call(query, key, value, lengths, scale, sinks):
        return attention.decode_attention(
            query,
            key,
            value,
            key_value_seq_lengths=lengths,
            scale=scale,
            sinks=sinks,
            softcap=5.0,
            phi=phi,
            valid_range=(low, 80.0),
            num_splits=2 if implementation == "xla" else None,
            implementation=implementation,
            return_lse=True,
        )

    check_transformations(
        call,
        arrays["query"],
        arrays["key"],
        arrays["value"],
        lengths,
        arrays["scale"],
        jnp.asarray([0.5, -1.0]),
        rows=(0, 1, 2, 3),
        skip=skip,
    )
