"""Linear attention: recurrent, parallel and chunked are one function, the oracle's."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib.recurrent import (
    attention_matrix,
    decode_step,
    gated_linear_attention,
    linear_attention,
    normalized_attention,
)
from softlib.testing import assert_close
from tests import pairwise
from tests.host import jnp
from tests.oracles import recurrent

DATA = pathlib.Path(__file__).parent.parent / "data"
SCORES = recurrent.SCORES


def draw(seed, *shape, dtype: Any = jnp.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def problem(
    *,
    batch=(2,),
    length=7,
    key_length=None,
    heads=(4, 2),
    decay=None,
    dtype=jnp.float32,
):
    """query, key, value and the options that have arrays."""
    n, k = heads
    key_length = key_length or length
    query = draw(0, *batch, length, n, 3, dtype=dtype)
    key = draw(1, *batch, key_length, k, 3, dtype=dtype)
    value = draw(2, *batch, key_length, k, 5, dtype=dtype)
    found = {"query": query, "key": key, "value": value}
    if decay is not None:
        width = {"key": k, "query": n}[decay]
        log_decay = -np.abs(draw(3, *batch, key_length, width, dtype=dtype))
        log_decay[..., key_length // 2, :] = -np.inf
        found["log_decay"] = log_decay
    return found


CASES = pairwise.pairwise(
    {
        "feature_map": ("elu1", "relu", "identity", "taylor2"),
        "normalizer": ("sum", "none", "array"),
        "heads": ((3, 3), (4, 2), (4, 1)),
        "decay": (None, "key", "query"),
        "masked": (False, True),
        "is_causal": (True, False),
        "length": (1, 7, 10),
        "chunk_size": (None, 1, 3, 7),
        "batch": ((), (2,), (1, 2)),
    },
    lambda case: (
        not (case.get("normalizer") == "sum" and case.get("feature_map") == "identity")
        and not (case.get("is_causal") is False and case.get("decay") is not None)
    ),
)


def from_case(case):
    causal = case["is_causal"]
    given = problem(
        batch=case["batch"],
        length=case["length"],
        key_length=None if causal else case["length"] + 2,
        heads=case["heads"],
        decay=case["decay"],
    )
    given["normalizer"] = case["normalizer"]
    if case["normalizer"] == "array":
        given["normalizer"] = np.exp(draw(4, *given["query"].shape[:-1]))
    if case["masked"]:
        shape = given["key"].shape[:-2]
        given["mask"] = np.random.default_rng(5).uniform(size=shape) < 0.7
    return given


def oracle(given, case):
    options = {"eta": given["normalizer"], "is_causal": case["is_causal"]}
    for name in ("log_decay", "mask"):
        options[name] = given.get(name)
    return recurrent.linear_attention(
        given["query"],
        given["key"],
        given["value"],
        score=SCORES[case["feature_map"]],
        **options,
    )


def arrays_of(given):
    static = {n: v for n, v in given.items() if isinstance(v, str)}
    return {n: v for n, v in given.items() if n not in static}, static


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_matches_oracle(case):
    given = from_case(case)
    arrays, static = arrays_of(given)
    call = functools.partial(
        linear_attention,
        feature_map=case["feature_map"],
        is_causal=case["is_causal"],
        chunk_size=case["chunk_size"],
        **static,
    )
    output = jax.jit(call)(**arrays)
    expected = oracle(given, case)
    assert_close(output, expected, dtype=jnp.float32, length=40, c=8)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["length"] > 1][::4], ids=pairwise.name
)
def test_matrix_times_values_is_the_output(case):
    given = from_case(case)
    arrays, static = arrays_of(given)
    del arrays["value"]
    options = {"feature_map": case["feature_map"], "is_causal": case["is_causal"]}
    call = functools.partial(attention_matrix, **options, **static)
    kernel = jax.jit(call)(**arrays)
    expected = recurrent.attention_matrix(
        given["query"],
        given["key"],
        score=SCORES[case["feature_map"]],
        eta=given["normalizer"],
        is_causal=case["is_causal"],
        log_decay=given.get("log_decay"),
        mask=given.get("mask"),
    )
    assert kernel.dtype == jnp.float32
    assert_close(kernel, expected, dtype=jnp.float32, length=40, c=8)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, None])
def test_independent_vectors(chunk_size):
    data = np.load(DATA / "dynamical_systems_case0.npz")
    with jax.enable_x64():
        given = {name: np.asarray(data[name]) for name in data}
        x = [given[f"in_{name}"][:, None] for name in ("query", "key", "value")]
        options = {"chunk_size": chunk_size}
        log_normalizer = given["in_log_normalizer"][:, None]
        log_decay = np.log(given["in_gate"])[:, None]
        call = lambda q, k, v, n, l: (
            linear_attention(q, k, v, feature_map="relu", **options),
            normalized_attention(q, k, v, n, **options),
            gated_linear_attention(q, k, v, l, **options),
        )
        found = jax.device_get(jax.jit(call)(*x, log_normalizer, log_decay))
    close = functools.partial(assert_close, dtype=jnp.float64, length=10)
    names = ("linear_attention", "normalized_attention", "gated_linear_attention")
    for name, output in zip(names, found, strict=True):
        close(output[:, 0], data[f"out_{name}"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        given = problem(decay="key", dtype=jnp.dtype(dtype))
        found = jax.jit(
            functools.partial(linear_attention, return_state=True, chunk_size=4)
        )(**given)
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        assert found.output.dtype == jnp.dtype(dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(found.state)} == {
            jnp.dtype(wide)
        }
        options = {"score": recurrent.elu1, "log_decay": given["log_decay"]}
        expected = recurrent.linear_attention(
            *(np.asarray(given[n], np.float64) for n in ("query", "key", "value")),
            **{**options, "log_decay": np.asarray(given["log_decay"], np.float64)},
        )
        assert_close(found.output, expected, dtype=dtype, length=30)


@pytest.mark.parametrize(
    ("normalizer", "decay"), [("sum", None), ("sum", "key"), ("array", "query")]
)
def test_decoding_step_by_step_is_the_whole_sequence(normalizer, decay):
    given = problem(length=9, decay=decay)
    if normalizer == "array":
        given["normalizer"] = np.exp(draw(4, *given["query"].shape[:-1]))
    whole = jax.jit(functools.partial(linear_attention, return_state=True))
    expected = whole(**given)

    def step(state, now):
        result = decode_step(state, **now)
        return result.state, result.output

    @jax.jit
    def decode(first, later):
        state, output = step(None, first)
        state, outputs = jax.lax.scan(step, state, later)
        return state, jnp.concatenate([output[None], outputs])

    first = {name: array[:, 0] for name, array in given.items()}
    later = {n: np.moveaxis(a[:, 1:], 1, 0) for n, a in given.items()}
    state, outputs = jax.device_get(decode(first, later))
    outputs = np.moveaxis(outputs, 0, 1)
    assert_close(outputs, expected.output, dtype=jnp.float32, length=40)
    for one, two in zip(
        jax.tree.leaves(state), jax.tree.leaves(expected.state), strict=True
    ):
        assert_close(one, two, dtype=jnp.float32, length=9)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_state_handed_over_is_one_pass(is_causal):
    given = problem(length=11, decay="query" if is_causal else None)
    part = lambda a, b: {name: array[:, a:b] for name, array in given.items()}
    call = jax.jit(
        functools.partial(
            linear_attention, return_state=True, chunk_size=3, is_causal=is_causal
        )
    )
    whole = jax.device_get(call(**given))
    state = call(**part(0, 4)).state
    state = call(**part(4, 5), initial_state=state).state
    last = call(**part(5, 11), initial_state=state)
    assert_close(last.output, whole.output[:, 5:], dtype=jnp.float32, length=40)
    for one, two in zip(
        jax.tree.leaves(last.state), jax.tree.leaves(whole.state), strict=True
    ):
        assert_close(one, two, dtype=jnp.float32, length=11)


def test_named_members_are_options_of_linear_attention():
    given = problem(decay="key")
    log_decay = given.pop("log_decay")
    n = draw(4, *given["query"].shape[:-1])
    close = functools.partial(assert_close, dtype=jnp.float32, length=10)

    @jax.jit
    def both(n, log_decay):
        plain = functools.partial(linear_attention, **given, feature_map="identity")
        gated = functools.partial(gated_linear_attention, **given)
        return (
            (
                normalized_attention(**given, log_normalizer=n),
                gated(log_decay=log_decay),
            ),
            (
                plain(normalizer=jnp.exp(n)),
                plain(normalizer="none", log_decay=log_decay),
            ),
            (gated(log_decay=jnp.zeros_like(log_decay)), plain(normalizer="none")),
        )

    named, options, kept = both(n, log_decay)
    for one, two in zip(named, options, strict=True):
        close(one, two)
    np.testing.assert_array_equal(*kept)


def test_derivative_of_the_log_normalizer_is_minus_the_output():
    given = problem()
    n = draw(4, *given["query"].shape[:-1])
    call = lambda n: normalized_attention(**given, log_normalizer=n)
    output, tangent = jax.jit(lambda n: jax.jvp(call, (n,), (jnp.ones_like(n),)))(n)
    assert_close(tangent, -np.asarray(output), dtype=jnp.float32, length=10)
