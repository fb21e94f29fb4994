"""Softmax against a reference that is given: values, flags, fallback, derivatives."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from softlib.softmax import unified_max_log_softmax, unified_max_softmax
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import extended as oracle

FUNCTIONS = {
    "softmax": (unified_max_softmax, oracle.softmax),
    "log_softmax": (unified_max_log_softmax, oracle.log_softmax),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def scores(shape=(6, 11), dtype="float32", scale=3.0) -> Any:
    x = scale * np.random.default_rng(0).normal(size=shape)
    return x.astype(jnp.dtype(dtype))


def run(function, *arrays):
    """Compiled; results of NumPy."""
    return jax.device_get(jax.jit(function)(*arrays))


@every_function
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_longdouble(name, dtype):
    function, expected = FUNCTIONS[name]
    with jax.enable_x64(dtype == "float64"):
        x = scores(dtype=dtype)
        y, flag = run(lambda x: function(x, phi=1.0, return_needs_recompute=True), x)
        assert y.dtype == x.dtype
        assert not flag.any()
        exact = expected(x if dtype == "float64" else x.astype(jnp.float32))
        assert_close(y, exact, dtype=dtype, length=11)


@every_function
def test_results_do_not_depend_on_phi(name):
    function, expected = FUNCTIONS[name]
    x = scores()
    call = jax.jit(lambda x, phi: function(x, phi=phi, return_needs_recompute=True))
    for phi in (-20.0, -3.0, 0.0, 5.0, 20.0):
        y, flag = call(x, phi)
        assert not flag.any()
        np.testing.assert_allclose(y, np.float64(expected(x)), atol=4e-6)


@every_function
@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_axes_where_and_a_reference_per_row(name, axis):
    function, expected = FUNCTIONS[name]
    x, rng = scores((3, 5, 4)), np.random.default_rng(1)
    where = rng.random((5, 4)) < 0.7
    phi = {0: rng.normal(size=(5, 4)), (0, 2): rng.normal(size=5), None: 0.5}[axis]
    given = np.where(where, x, f32(np.nan))  # may hold anything
    call = lambda x, where, phi: function(
        x, axis, where=where, phi=phi, return_needs_recompute=True
    )
    y, flag = run(call, given, where, f32(phi))
    axes = range(3) if axis is None else np.atleast_1d(axis)
    axes, last = [int(a) for a in axes], range(-len(np.atleast_1d(axes)), 0)

    def rows(array):
        array = np.moveaxis(np.asarray(array), axes, last)
        return array.reshape(*array.shape[: 3 - len(axes)], -1)

    exact = expected(rows(np.where(where, x, -np.inf)))
    np.testing.assert_allclose(rows(y), np.float64(exact), rtol=2e-6, atol=2e-6)
    assert flag.shape == np.shape(phi)
    assert not flag.any()


# ------------------------------------------------------------------- range, fallback
ROWS = [
    ([1.0, 2.0], False, False),
    ([1.0, -9.0], False, True),  # a small score does no harm
    ([4.0, 2.0], True, True),  # the range is open
    ([-2.0, -3.0], True, True),
    ([-np.inf, 1.0], False, False),
    ([-np.inf, -np.inf], False, False),
    ([np.nan, 1.0], True, True),
    ([np.inf, 1.0], True, True),
    ([500.0, 499.0], True, True),
    ([-300.0, -300.0], True, True),
]


@every_function
@pytest.mark.parametrize("criterion", ["row_max", "elementwise"])
@pytest.mark.parametrize("fallback", [True, False])
def test_rows_that_leave_the_range(name, criterion, fallback):
    function, expected = FUNCTIONS[name]
    x = f32([row for row, _, _ in ROWS])
    options = {"valid_range": (-3.0, 3.0), "criterion": criterion, "fallback": fallback}
    y, flag = run(
        lambda x: function(x, phi=1.0, return_needs_recompute=True, **options), x
    )
    wanted = np.array([row[1 if criterion == "row_max" else 2] for row in ROWS])
    np.testing.assert_array_equal(flag, wanted)
    exact = expected(np.where(np.isnan(x) | (x == np.inf), 0, x)).astype(np.float64)
    exact[5] = 0 if name == "softmax" else -np.inf
    exact[[6, 7]] = np.nan
    if not fallback:
        exact[wanted] = np.nan
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("phi", [-np.inf, np.inf, np.nan])
def test_a_reference_that_is_no_number_is_not_used(phi):
    x = f32([[0.0, 0.0], [-np.inf, -np.inf]])
    call = lambda x: unified_max_softmax(x, phi=phi, return_needs_recompute=True)
    y, flag = run(call, x)
    np.testing.assert_array_equal(y, [[0.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(flag, [True, False])


def test_the_fast_path_subtracts_no_maximum():
    """The maximum is read for the flags, and enters nothing else."""
    x = scores()
    fast = lambda x: unified_max_softmax(x, phi=1.0, fallback=False)
    text = str(operations.make_jaxpr(fast)(x))
    assert text.count("= exp ") == 2
    whole = str(operations.make_jaxpr(lambda x: unified_max_softmax(x, phi=1.0))(x))
    assert re.search(r"= cond\[", whole)


def test_vmap_is_a_loop():
    x = np.stack([scores(), 300 + scores()])
    call = lambda x: unified_max_softmax(x, return_needs_recompute=True)
    y, flag = run(jax.vmap(call), x)
    for i in range(2):
        one, one_flag = run(call, x[i])
        np.testing.assert_allclose(y[i], one, rtol=1e-6)
        np.testing.assert_array_equal(flag[i], one_flag)


def test_devices_decide_for_themselves():
    """One of them computes its rows again: no branch holds a collective."""
    x = scores((8, 5))
    x[3] += 400
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    call = functools.partial(unified_max_softmax, return_needs_recompute=True)
    found = jax.jit(
        jax.shard_map(call, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    )(x)
    y, flag = jax.jit(call)(x)
    np.testing.assert_allclose(found[0], y, rtol=1e-6)
    np.testing.assert_array_equal(found[1], flag)
    assert np.flatnonzero(flag).tolist() == [3]


# ------------------------------------------------------------------------- derivatives
@every_function
def test_first_and_second_derivatives(name):
    """In rows of either path, and 0 where an entry does not count."""
    function: Any = FUNCTIONS[name][0]
    plain = jax.nn.softmax if name == "softmax" else jax.nn.log_softmax
    with jax.enable_x64():
        x = np.random.default_rng(0).normal(size=(2, 5))
        x[1] += 400.0
        g = np.random.default_rng(1).normal(size=(2, 5))
        for differentiate in (jax.grad, jax.hessian):
            one, two = (
                jax.jit(differentiate(lambda x, f=f: (f(x) * g).sum()))(x)
                for f in (
                    functools.partial(function, valid_range=(-600.0, 300.0)),
                    plain,
                )
            )
            np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)
        absent = np.array([[1.0] + [-np.inf] * 4])
        gradient = run(lambda x: jax.vjp(function, x)[1](g[:1])[0], absent)
        np.testing.assert_array_equal(gradient, 0)


def test_the_reference_and_the_range_have_no_derivative():
    x = scores()

    def result(phi, low):
        return unified_max_softmax(x, phi=phi, valid_range=(low, 80.0))[:, 0].sum()

    for slope in run(jax.grad(result, (0, 1)), 0.5, -70.0):
        assert slope == 0


@pytest.mark.slow
@every_function
def test_transformations(name):
    x = np.asarray(np.random.default_rng(0).normal(size=(8, 5)), np.float32)
    check_transformations(functools.partial(FUNCTIONS[name][0], phi=0.5), x)


@pytest.mark.usefixtures("untyped")
@every_function
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"phi": jnp.zeros(3)}, ValueError, "`phi` must broadcast to shape (2,)"),
        ({"criterion": "max"}, ValueError, "`criterion` must be one of 'row_max'"),
        ({"valid_range": (1.0, 1.0)}, ValueError, "a < b, got (1.0, 1.0)"),
        ({"valid_range": (1.0,)}, ValueError, "a pair (a, b), got 1 values"),
        ({"axis": 2}, ValueError, "`axis` must hold axes"),
        ({"where": jnp.zeros((2, 2))}, TypeError, "`where` must have dtype bool"),
    ],
)
def test_errors(name, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        FUNCTIONS[name][0](jnp.zeros((2, 2)), **options)
