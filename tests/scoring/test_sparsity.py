"""Truncation of neurons: float64 oracle, vectors, bisection, edges, errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from softlib.testing import assert_close, check_transformations
from tests.compiled import scoring
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/sparsing_law_case0.npz"
TOKENS, NEURONS, FEATURES = (3, 5), 8, 4


def problem(dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    a = random.normal(size=(*TOKENS, NEURONS))
    a = a * (a > -0.3)
    kernel = random.normal(size=(NEURONS, FEATURES))
    where = random.uniform(size=TOKENS) < 0.7
    where[0, 0] = True
    a[0, 0] = 0  # a token without an output
    return *(jnp.asarray(x, dtype) for x in (a, kernel)), jnp.asarray(where)


def error(a, kernel, threshold, where):
    """By loops over tokens and neurons in float64."""
    a, kernel = np.asarray(a, np.float64), np.asarray(kernel, np.float64)
    found = []
    for token in np.argwhere(np.asarray(where)):
        row = a[tuple(token)]
        terms = [row[i] * kernel[i] for i in range(NEURONS)]
        cut = [t for t in terms if np.linalg.norm(t) < threshold]
        whole = np.linalg.norm(sum(terms))
        found.append(np.linalg.norm(sum(cut)) / whole if whole else 0.0)
    return np.mean(found) if found else 0.0


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        a, kernel = jnp.asarray(data["in_activations"]), jnp.asarray(data["in_down"])
        check = functools.partial(assert_close, dtype="float64", length=40)
        for i, target in enumerate(data["in_targets"]):
            found = scoring.truncation_threshold(
                a, kernel, error=jnp.asarray(target), num_steps=60
            )
            check(found, data["out_threshold"][i])
            check(
                scoring.tail_truncation_error(a, kernel, threshold=found),
                data["out_cett"][i],
            )
            share = scoring.activation_ratio(a, kernel, threshold=found)
            check(share, data["out_activation_ratio"][i])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_its_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        a, kernel, where = problem(dtype)
        dirty = jnp.where(where[..., None], a, jnp.nan)
        for tau in (0.0, 0.7, 1.9, 100.0):
            t: Any = jnp.asarray(tau)
            found = scoring.tail_truncation_error(
                dirty, kernel, threshold=t, where=where
            )
            assert found.dtype == jnp.promote_types(dtype, jnp.float32)
            wanted = error(a, kernel, tau, where)
            assert_close(found, wanted, dtype=found.dtype, length=100)
            share = scoring.activation_ratio(dirty, kernel, threshold=t, where=where)
            kept = scoring.truncate_activations(a, kernel, threshold=t)
            assert kept.dtype == a.dtype
            lengths = np.linalg.norm(np.asarray(kernel, np.float64), axis=1)
            u = np.abs(np.asarray(a, np.float64)) * lengths
            np.testing.assert_array_equal(kept, np.where(u >= tau, a, 0))
            shares = np.where(where, (u >= tau).mean(-1), 0)
            np.testing.assert_allclose(share, shares, rtol=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), allowed=st.sampled_from([0.02, 0.2, 0.6, 1.0]))
def test_the_threshold_keeps_the_error_and_the_next_neuron_breaks_it(seed, allowed):
    a, kernel, where = problem(seed=seed)
    given = jnp.asarray(allowed)
    found = scoring.truncation_threshold(a, kernel, error=given, where=where)
    # The oracle compares in float64: the threshold is above its rounding.
    assert error(a, kernel, float(found) * (1 - 1e-6), where) <= allowed + 1e-5
    lengths = np.linalg.norm(np.asarray(kernel, np.float64), axis=1)
    u = (np.abs(np.asarray(a, np.float64)) * lengths)[np.asarray(where)]
    above = float(found) * (1 + 1e-5)
    if above < u.max():
        assert error(a, kernel, above, where) > allowed - 1e-5
        # The bisection ends at a neuron, whose truncation is the step.
        assert np.abs(u / float(found) - 1).min() < 1e-5


# ---------------------------------------------------------------------------- promises
def test_nothing_is_allowed_nothing_is_cut():
    a, kernel, where = problem()
    assert scoring.truncation_threshold(a, kernel, error=0.0) == 0
    np.testing.assert_array_equal(
        scoring.activation_ratio(a, kernel, threshold=0.0, where=where), where
    )
    none = scoring.tail_truncation_error(
        a, kernel, threshold=1.0, where=jnp.zeros(TOKENS, bool)
    )
    assert none == 0


def test_gradients_are_those_of_differences_and_finite_at_zero():
    with jax.enable_x64():
        a, kernel, where = problem("float64")
        run = lambda a, kernel: scoring.tail_truncation_error(
            a, kernel, threshold=1.1, where=where
        )
        some = a.at[0, 0].set(1.3)
        check_grads(run, (some, kernel), order=1, modes=["rev"], eps=1e-6)
        for gradient in jax.grad(run, (0, 1))(a, kernel):
            assert np.isfinite(gradient).all()
        of_threshold = lambda a: scoring.truncation_threshold(a, kernel, error=0.2)
        assert not np.asarray(jax.grad(of_threshold)(a)).any()


def test_perplexity_rises_by_the_percentage():
    """Losses with a known crossing, one that is never reached, and under `jit`."""
    loss = lambda error: 2.0 + error**2
    find = functools.partial(scoring.perplexity_sparsity, loss)
    for percent in (1.0, 5.0):
        for found in (
            find(percent=percent, num_steps=20),
            jax.jit(lambda p=percent: find(percent=p, num_steps=20))(),
        ):
            wanted = np.sqrt(np.log1p(percent / 100))
            np.testing.assert_allclose(found.error, wanted, atol=2e-6)
            ratio = found.perplexity_ratio
            np.testing.assert_allclose(ratio, 1 + percent / 100, rtol=1e-5)
    calls = []
    flat = scoring.perplexity_sparsity(lambda error: calls.append(error) or 3.0)
    assert len(calls) == 13
    assert flat.error > 0.999
    assert flat.perplexity_ratio == 1


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    a = jnp.asarray(random.normal(size=(8, 5)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(5, 3)), jnp.float32)

    def function(a, kernel):
        cut = scoring.truncate_activations(a, kernel, threshold=0.9)
        return cut, scoring.activation_ratio(a, kernel, threshold=0.9)

    check_transformations(function, a, kernel)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    a, kernel, where = problem()
    cut, find = scoring.tail_truncation_error, scoring.truncation_threshold
    for call, error, message in (
        (lambda: cut(a > 0, kernel, threshold=1.0), TypeError, "`activations` must"),
        (lambda: cut(a, kernel.T, threshold=1.0), ValueError, "`down_kernel` must"),
        (lambda: cut(a, kernel, threshold=-1.0), ValueError, "`threshold` must be >="),
        (lambda: cut(a, kernel, threshold=1.0, where=a), TypeError, "`where` must"),
        (lambda: find(a, kernel, error=1.5), ValueError, r"`error` must be in \[0, 1"),
        (lambda: find(a, kernel, error=0.5, num_steps=0), ValueError, "`num_steps`"),
        (
            lambda: scoring.activation_ratio(
                a, kernel, threshold=1.0, where=where[0, :2]
            ),
            ValueError,
            "`where` must broadcast",
        ),
        (
            lambda: scoring.perplexity_sparsity(lambda e: jnp.ones(2)),
            ValueError,
            "`loss` must return a scalar",
        ),
        (
            lambda: scoring.perplexity_sparsity(lambda e: e, percent=-1.0),
            ValueError,
            "`percent` must be positive",
        ),
    ):
        name = (
            "tail_truncation_error|truncation_threshold|activation_ratio|"
            "perplexity_sparsity"
        )
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
