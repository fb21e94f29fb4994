"""Calibrated confidence in sampled continuations."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.scoring import calibrated_confidence, identical_groups
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import sequences as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/ethicist_case0.npz"
_confidence = jax.jit(calibrated_confidence, static_argnames="num_groups")


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = {name: jnp.asarray(array) for name, array in np.load(DATA).items()}
        found = _confidence(data["in_sample_nll"], data["in_sample_group"])
        np.testing.assert_allclose(found, data["out_confidence"], rtol=1e-9)
        groups = np.asarray(data["in_sample_group"])
        first = np.unique(groups, return_index=True)[1]
        np.testing.assert_allclose(found[first].sum(), 1, rtol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_matches_oracle_and_sums_to_one(seed):
    """A number added to all losses, and the names of groups, do not matter."""
    random = np.random.default_rng(seed)
    groups = random.integers(0, 4, 9)
    nll = (60 + 4 * random.normal(size=4))[groups].astype(np.float32)
    found = _confidence(jnp.asarray(nll), jnp.asarray(groups))
    wanted = oracle.confidence(np.float64(nll), groups)
    assert_close(found, wanted, dtype="float32", length=9, c=16)
    first = np.unique(groups, return_index=True)[1]
    np.testing.assert_allclose(np.asarray(found)[first].sum(), 1, rtol=1e-5)
    renamed = _confidence(jnp.asarray(nll) + 32, jnp.asarray(8 - groups))
    assert_close(
        renamed, found, dtype="float32", length=9, c=64
    )  # nll is rounded at 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_does_not_underflow(dtype):
    """exp(-110) is 0 in float32, and exp(-800) in float64."""
    for nll in (110, 800):
        found = _confidence(jnp.full(4, nll, dtype), jnp.array([0, 1, 1, 1]))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, [0.25, 0.75, 0.75, 0.75])


def test_float64_stays():
    with jax.enable_x64():
        nll = jnp.array([1.0, 2.0], jnp.float64)
        assert _confidence(nll, jnp.array([0, 1])).dtype == jnp.float64


def test_what_does_not_count_has_confidence_zero():
    nll, groups = jnp.array([1.0, jnp.nan, 1.0]), jnp.array([0, -7, 2])
    where = jnp.array([True, False, True])
    found = _confidence(nll, groups, where=where)
    np.testing.assert_array_equal(found, [0.5, 0, 0.5])
    none = _confidence(nll, groups, where=jnp.zeros(3, bool))
    np.testing.assert_array_equal(none, 0)
    gradient = jax.grad(lambda n: _confidence(n, groups, where=where)[0])(nll)
    np.testing.assert_allclose(gradient, [-0.25, 0, 0.25])


def test_impossible_samples_and_bad_groups():
    infinite = jnp.array([jnp.inf, 3.0])
    groups = jnp.array([0, 1])
    np.testing.assert_array_equal(calibrated_confidence(infinite, groups), [0, 1])
    nothing = _confidence(jnp.full(2, jnp.inf), groups)
    np.testing.assert_array_equal(nothing, 0)
    for bad in (2, -1):
        found = _confidence(jnp.ones(2), jnp.array([0, bad]))
        assert np.isnan(found).all()
    assert np.isfinite(_confidence(jnp.ones(2), jnp.array([0, 2]), num_groups=3)).all()
    assert _confidence(jnp.zeros(0), jnp.zeros(0, int)).shape == (0,)


def test_groups_of_identical_sequences():
    samples = jnp.array([[1, 2, 9], [1, 2, 8], [1, 3, 9], [1, 2, 9]])
    np.testing.assert_array_equal(identical_groups(samples), [0, 1, 2, 0])
    where = jnp.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
    np.testing.assert_array_equal(identical_groups(samples, where=where), [0, 0, 2, 3])
    assert identical_groups(jnp.zeros((0, 3), int)).shape == (0,)


@pytest.mark.slow
def test_under_every_transformation():
    nll = jnp.asarray([3.0, 4.0, 3.0, 5.0])
    check_transformations(
        calibrated_confidence,
        nll,
        jnp.array([0, 1, 0, 3]),
        rows=(0, 1),
        skip={"shard_map": "confidence is relative to all samples"},
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("sequence_nll", {"sequence_nll": jnp.zeros(3, int)}, TypeError),
        ("sequence_nll", {"sequence_nll": jnp.zeros((3, 1))}, ValueError),
        ("groups", {"groups": jnp.zeros(3)}, TypeError),
        ("groups", {"groups": jnp.zeros(2, int)}, ValueError),
        ("num_groups", {"num_groups": 0}, ValueError),
        ("where", {"where": jnp.zeros(3)}, TypeError),
        ("where", {"where": jnp.zeros(2, bool)}, ValueError),
    ],
)
def test_errors(argument, options, error):
    arguments = {"sequence_nll": jnp.zeros(3), "groups": jnp.zeros(3, int)} | options
    with pytest.raises(error, match=f"^calibrated_confidence: `{argument}` must .*got"):
        calibrated_confidence(**arguments)


@pytest.mark.usefixtures("untyped")
def test_errors_of_groups():
    call = functools.partial(identical_groups, jnp.zeros((2, 3), int))
    with pytest.raises(TypeError, match=r"`sequences` must .* got float32\.$"):
        identical_groups(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"`sequences` must .* got shape \(3,\)\.$"):
        identical_groups(jnp.zeros(3, int))
    with pytest.raises(TypeError, match=r"`where` must .* got float32\.$"):
        call(where=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"`where` must .* got \(3,\)\.$"):
        call(where=jnp.zeros(3, bool))
