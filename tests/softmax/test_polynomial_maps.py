"""Taylor softmax and spherical softmax, and their logarithms."""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib.softmax import (
    log_spherical_softmax,
    log_taylor_softmax,
    softmax,
    spherical_softmax,
    taylor_softmax,
)
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import sparse_maps as oracle

CASE = pathlib.Path(__file__).parent.parent / "data" / "sparse_softmax_case0.npz"
ORDERS = (2, 8)
TWO: Any = 2.0


def scores(*shape, std=2.0, seed=0):
    return std * np.random.default_rng(seed).normal(size=shape)


def all_maps(z, where=None):
    found = {}
    for order in ORDERS:
        found[f"taylor {order}"] = taylor_softmax(z, order=order, where=where)
        found[f"log taylor {order}"] = log_taylor_softmax(z, order=order, where=where)
    found["spherical"] = spherical_softmax(z, epsilon=0.25, where=where)
    found["log spherical"] = log_spherical_softmax(z, epsilon=0.25, where=where)
    return found


def all_oracles(z):
    found = {f"taylor {n}": oracle.taylor_softmax(z, n) for n in ORDERS}
    found["spherical"] = oracle.spherical_softmax(z, 0.25).astype(float)
    with np.errstate(divide="ignore"):
        return found | {f"log {name}": np.log(p) for name, p in found.items()}


@jax.jit
def compiled(z, where):
    return all_maps(z, where)


def run(z, where: Any = True) -> dict[str, np.ndarray]:
    z = jnp.asarray(z, jnp.float32)
    found = compiled(z, jnp.broadcast_to(jnp.asarray(where), z.shape))
    return {name: np.asarray(p) for name, p in found.items()}


def test_vectors():
    with jax.enable_x64():
        case = np.load(CASE)
        z = jnp.asarray(case["in_scores"])
        order, epsilon = int(case["in_taylor_order"]), float(case["in_spherical_eps"])
        values = jax.jit(
            lambda z: (
                taylor_softmax(z, order=order),
                spherical_softmax(z, epsilon=epsilon),
            )
        )(z)
        for value, name in zip(values, ("taylor", "spherical"), strict=True):
            np.testing.assert_allclose(value, case[f"out_{name}"], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float16")),
    ],
)
def test_matches_oracle(dtype):
    with jax.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        z = jnp.asarray(scores(8, 9), dtype)
        wanted = all_oracles(np.float64(z))
        for name, value in compiled(z, jnp.ones(z.shape, bool)).items():
            assert value.dtype == z.dtype
            assert_close(value, wanted[name], dtype=dtype, length=9)


def test_no_digits_are_lost_for_negative_scores():
    """Where the polynomial is small, its terms are large and of both signs."""
    z = np.float32(np.linspace(-8, 0, 33))[None]
    p = jax.jit(lambda z: taylor_softmax(z, order=20))(jnp.asarray(z))
    np.testing.assert_allclose(p, oracle.taylor_softmax(z, 20), rtol=2e-5)


def test_large_orders_are_softmax():
    z = jnp.asarray(scores(4, 9), jnp.float32)
    p = jax.jit(lambda z: (taylor_softmax(z, order=32), softmax(z)))(z)
    np.testing.assert_allclose(*p, atol=1e-6)


def test_order_two_grows_below_minus_one():
    p = run(np.tile([-9, -5, -1, 0, 1, 2, 3, 4, 5], (8, 1)))["taylor 2"][0]
    assert np.argmin(p) == 2
    assert p[0] == p.max()


def test_spherical_softmax_is_blind_to_signs_and_uniform_at_zero():
    z = scores(8, 9)
    np.testing.assert_array_equal(run(z)["spherical"], run(-z)["spherical"])
    np.testing.assert_allclose(run(0 * z)["spherical"], 1 / 9, rtol=1e-6)


def test_exceptions():
    """Infinite and masked scores do not count, bad rows are NaN, large ones fine."""
    x = np.full((8, 9), -np.inf)
    x[1, :3] = [0, np.nan, 1]
    x[2, :3] = [0, np.inf, 1]
    x[3, :3] = [1e4, -1e4, 0]
    x[4, :3] = [1e30, -1e30, 1e30]
    x[5, :3] = [0, 0, 0]
    x[6, :3] = [1, 2, 3]
    ok = np.ones((8, 9), bool)
    ok[7, :] = False
    x[7, :] = np.nan
    for name, value in run(x, ok).items():
        nothing = -np.inf if "log" in name else 0
        assert (value[[0, 7]] == nothing).all(), name
        assert np.isnan(value[1:3, :3]).all(), name
        p = np.exp(value) if "log" in name else value
        np.testing.assert_allclose(p[3:7].sum(-1), 1, rtol=1e-5)
        assert (value[3:7, 3:] == nothing).all()
        np.testing.assert_allclose(p[4, :3], 1 / 3, rtol=1e-4)
        if "log" in name:
            assert np.isfinite(value[3:7, :3]).all(), name
    alone = all_oracles(np.array([[1.0, 2.0, 3.0]]))
    for name, value in run(x, ok).items():
        np.testing.assert_allclose(value[6, :3], alone[name][0], rtol=1e-5)


def test_gradients():
    """Against differences, and 0 at what does not count."""
    with jax.enable_x64():
        z, move = jnp.asarray(scores(8, 9)), jnp.asarray(scores(8, 9, seed=1))
        _, tangents = jax.jit(lambda z, move: jax.jvp(all_maps, (z,), (move,)))(z, move)
        step = 1e-5
        above, below = all_oracles(z + step * move), all_oracles(z - step * move)
        for name, tangent in tangents.items():
            wanted = (above[name] - below[name]) / (2 * step)
            np.testing.assert_allclose(tangent, wanted, rtol=1e-6, atol=1e-7)

    @jax.jit
    def gradient(z, where):
        total = lambda z: sum(
            jnp.where(where, value, 0).sum() for value in all_maps(z, where).values()
        )
        return jax.grad(total)(z)

    z = jnp.asarray(scores(8, 9), jnp.float32)
    z = z.at[0].set(-jnp.inf).at[1, 1].set(-jnp.inf).at[:, 3].set(jnp.nan)
    z = z.at[2, 0].set(1e4).at[3, 0].set(-1e4).at[4].set(0)
    where = jnp.ones(z.shape, bool).at[:, 3].set(False).at[1, 1].set(False)
    found = np.asarray(gradient(z, where.at[0].set(False)))
    assert np.isfinite(found).all()
    assert not found[:, 3].any()
    assert not found[0].any()
    assert found[1, 1] == 0


def test_axes_and_shapes():
    x = jnp.asarray(scores(3, 4, 5), jnp.float32)
    run = jax.jit(lambda x: (taylor_softmax(x, (0, 2)), spherical_softmax(x, None)))
    taylor, spherical = run(x)
    rows = np.moveaxis(np.asarray(x), 1, 0).reshape(4, 15)
    wanted = np.moveaxis(oracle.taylor_softmax(rows, 2).reshape(4, 3, 5), 0, 1)
    np.testing.assert_allclose(taylor, wanted, atol=1e-6)
    np.testing.assert_allclose(spherical.sum(), 1, rtol=1e-6)
    for shape in ((0, 3), (3, 0), (3, 1)):
        for value in jax.jit(all_maps)(jnp.ones(shape)).values():
            assert value.shape == shape
            assert np.isin(value, (0, 1)).all()


def test_epsilon_is_differentiable():
    z = jnp.asarray([[0.0, 1.0]])
    call = lambda epsilon: spherical_softmax(z, epsilon=epsilon)[0, 0]
    value, slope = jax.jit(jax.value_and_grad(call))(jnp.float32(1))
    np.testing.assert_allclose((value, slope), (1 / 3, 1 / 9), rtol=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: taylor_softmax(x, order=3), ValueError, "`order` must be even, got"),
        (lambda x: log_taylor_softmax(x, order=0), ValueError, "`order` must be at le"),
        (lambda x: taylor_softmax(x, order=TWO), TypeError, "`order` must be a Python"),
        (lambda x: spherical_softmax(x, epsilon=0), ValueError, "`epsilon` must be po"),
        (
            lambda x: log_spherical_softmax(x, epsilon=jnp.ones(3)),
            ValueError,
            "`epsilon` must be a number or a scalar array, got shape",
        ),
        (lambda x: spherical_softmax(x > 0), TypeError, "`x` must have a floating dty"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.zeros((3, 4)))


@pytest.mark.slow
def test_transformations():
    z = jnp.asarray(scores(8, 5), jnp.float32)
    check_transformations(lambda z: tuple(all_maps(z).values()), z)
