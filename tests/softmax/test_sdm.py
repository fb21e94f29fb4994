"""The SDM activation: oracle, vectors, limits, rows that do not count, errors."""

import pathlib

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib import softmax as library
from softlib.testing import assert_close
from tests.compiled import computed, f32
from tests.host import jnp
from tests.oracles import similarity as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
softmax = computed(library.softmax)
sdm, log_sdm = computed(library.sdm), computed(library.log_sdm)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        x = (rng.normal(size=(5, 6)) * 3).astype(jnp.dtype(dtype))
        x[2, [0, 4]] = -INF
        q = np.array([0, 1, 7, 100, 3])
        d = np.asarray([0.0, 1, 0.5, 0.25, 1], x.dtype)
        expected = oracle.log_sdm(x, q, np.asarray(d, float))
        base = np.log(2 + q)[:, None]
        p, log_p = sdm(x, q, d), log_sdm(x, q, d)
        own = log_sdm(x, q, d, base="similarity")
        assert p.dtype == log_p.dtype == own.dtype == dtype
        assert_close(p, np.exp(expected), dtype=dtype, length=6, c=8)
        assert_close(log_p, expected, dtype=dtype, length=6)
        assert_close(own, expected / base, dtype=dtype, length=6)


def test_vectors():
    with np.load(DATA / "sdm_case0.npz") as data, jax.enable_x64(True):
        of = lambda name: data[name]
        p = sdm(of("in_logits"), of("out_q"), of("out_d"))
        np.testing.assert_allclose(p, data["out_sdm"], rtol=1e-13)
        np.testing.assert_array_equal(p[7], np.full(3, 1 / 3))


def test_is_softmax_at_distance_one_and_uniform_at_distance_zero():
    x = f32([[1.0, 2.0, -INF], [3.0, 1e4, 0.0]])
    q = np.array(np.e - 2, np.float32)
    assert_close(sdm(x, q, 1.0), softmax(x), dtype="float32", length=3)
    uniform = [[0.5, 0.5, 0], [1 / 3] * 3]
    assert_close(sdm(x, 5, 0.0), uniform, dtype="float32", length=3)


def test_logarithm_of_what_rounds_to_zero_is_finite():
    x = f32([1000.0, 0.0])
    log_p = log_sdm(x, 0, 0.5, base="similarity")
    np.testing.assert_array_equal(log_p, [0, -500])
    slopes = jax.grad(lambda x: log_sdm(x, 0, 0.5)[1])(x)
    assert_close(slopes, np.log(2) * np.array([-0.5, 0.5]), dtype="f4", length=2)


def test_rows_and_entries_that_do_not_count():
    x = f32([[NAN, 1.0, 2.0], [-INF] * 3, [NAN] * 3, [NAN, 0, 1], [INF, 0, 1]])
    where = np.array([[False, True, True]] * 2 + [[False] * 3] + [[True] * 3] * 2)
    for d in (0.0, 0.5):
        p, log_p = sdm(x, 1, d, where=where), log_sdm(x, 1, d, where=where)
        assert p[0, 0] == 0
        assert log_p[0, 0] == -INF
        assert_close(p[0].sum(), 1, dtype="float32", length=3)
        assert not p[1:3].any()
        assert (log_p[1:3] == -INF).all()
        assert np.isnan(p[3:]).all()
        assert np.isnan(log_p[3:]).all()
        call = lambda x, d=d: log_sdm(x, 1, d, where=where[:3])[0, 1]
        assert np.isfinite(jax.jit(jax.grad(call))(x[:3])).all()
    for bad in ((-1, 0.5), (1, -0.5), (1, NAN), (NAN, 1.0)):
        assert np.isnan(sdm(x[:1], *bad, where=where[:1])).all()
        assert np.isnan(log_sdm(x[:1], *bad, where=where[:1])[:, 1:]).all()


def test_axes_and_empty_shapes():
    x = np.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), np.float32)
    q, d = np.arange(8).reshape(2, 4), f32(np.linspace(0, 1, 8)).reshape(2, 4)
    moved = np.moveaxis(sdm(np.moveaxis(x, 1, -1), q, d), -1, 1)
    assert_close(sdm(x, q, d, axis=1), moved, dtype="float32", length=3)
    flat = sdm(x.reshape(-1), 2, 0.5).reshape(x.shape)
    assert_close(sdm(x, 2, 0.5, axis=None), flat, dtype="float32", length=24)
    for shape in ((0, 3), (2, 0), (2, 1)):
        x = np.zeros(shape, np.float32)
        assert sdm(x, 1, 0.5).shape == log_sdm(x, 1, 0.5).shape == shape


def test_derivatives_by_logits_and_none_by_the_statistics():
    with jax.enable_x64(True):
        x = np.random.default_rng(2).normal(size=(2, 3))
        q, d = np.array([1.0, 4.0]), np.array([0.5, 1.0])
        both = jax.jit(lambda x: (sdm(x, q, d), log_sdm(x, q, d, base="similarity")))
        check_grads(both, (x,), order=2, modes=["rev"], rtol=1e-5)
        total = jax.jit(jax.grad(lambda q, d: sdm(x, q, d)[0, 0], (0, 1)))
        assert not any(np.any(slope) for slope in total(q, d))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.zeros(3, int), 1, 1), TypeError, "`x` must have a floating dtype"),
        ((jnp.zeros((2, 3)), jnp.zeros(3), 1), ValueError, "`similarity` must broad"),
        ((jnp.zeros((2, 3)), 1, jnp.zeros(3)), ValueError, "`distance` must broad"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"sdm: {message}"):
        sdm(*arguments)
    with pytest.raises(ValueError, match="`base` must be one of"):
        log_sdm(jnp.zeros(3), 1, 1, base="e")  # type: ignore
