"""`masked_mean`: the one reduction, alone and over devices."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

import softlib
from softlib.testing import assert_close, check_transformations
from tests.host import jnp


def oracle(values, where=None, axis=None):
    values = np.asarray(values, np.float64)
    where = np.broadcast_to(True if where is None else where, values.shape)
    total = np.sum(np.where(where, values, 0), axis=axis)
    count = np.sum(where, axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), 0)


def gradient_oracle(values, where=None, axis=None):
    """Of the sum of the means."""
    where = np.broadcast_to(True if where is None else where, np.shape(values))
    count = np.sum(where, axis=axis, keepdims=True)
    return np.where(where, 1 / np.maximum(count, 1), 0)


# ------------------------------------------------------------------------------ values
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_matches_oracle(dtype, axis, masked):
    random = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        values = jnp.asarray(random.normal(size=(3, 5, 7)), dtype)
        where = jnp.asarray(random.uniform(size=(3, 5, 7)) < 0.4) if masked else None
        computed = jnp.promote_types(dtype, jnp.float32)

        @jax.jit
        def run(values):
            mean = softlib.masked_mean(values, where, axis=axis)
            return mean.sum(), mean

        gradient, mean = jax.grad(run, has_aux=True)(values)
        assert (mean.dtype, gradient.dtype) == (computed, values.dtype)
        assert_close(mean, oracle(values, where, axis), dtype=computed, length=105)
        coarser = dtype if masked or dtype in ("bfloat16", "float16") else computed
        wanted = gradient_oracle(values, where, axis)
        assert_close(gradient, wanted, dtype=coarser, length=1)


@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (1, 1), (3, 5)])
def test_where_is_broadcast_to_the_values(shape):
    values = jnp.arange(15.0).reshape(3, 5)
    where = np.arange(np.prod(shape)).reshape(shape) % 2 == 0
    for axis in (None, 0, 1):
        wanted = oracle(values, where, axis)
        got = softlib.masked_mean(values, jnp.asarray(where), axis=axis)
        assert_close(got, wanted, dtype=jnp.float32, length=15)


@pytest.mark.parametrize("values", [[True, False, True, True], [3, 0, -1, 2**24 + 1]])
def test_booleans_and_integers_count_as_float32(values):
    """Accuracy is the mean of booleans."""
    got = softlib.masked_mean(jnp.array(values), jnp.array([True, True, True, False]))
    assert got.dtype == jnp.float32
    assert_close(got, oracle(values[:3]), dtype=jnp.float32, length=3)


def test_many_small_values_are_summed_in_float32():
    """In bfloat16 the sum of ones stops at 256, in float16 at 2048."""
    for dtype in (jnp.bfloat16, jnp.float16):
        assert softlib.masked_mean(jnp.ones(100_000, dtype)) == 1


# --------------------------------------------------------------------------- the edges
@pytest.mark.parametrize("fill", [1.0, np.nan, np.inf])
def test_all_masked_is_zero_with_gradient_zero(fill):
    values = jnp.full((3, 4), fill)
    for axis in (None, 0, 1):
        total = lambda v, axis=axis: softlib.masked_mean(
            v, jnp.zeros((3, 4), bool), axis=axis
        ).sum()
        value, gradient = jax.jit(jax.value_and_grad(total))(values)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_some_slices_masked():
    values = jnp.array([[1.0, np.nan], [2.0, 3.0]])
    where = jnp.array([[False, False], [True, True]])
    got, gradient = jax.jit(
        jax.value_and_grad(lambda v: softlib.masked_mean(v, where, axis=1).sum())
    )(values)
    assert got == 2.5
    np.testing.assert_array_equal(gradient, [[0, 0], [0.5, 0.5]])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_entries_have_no_influence_whatever_they_hold(garbage):
    where = jnp.array([True, False, True])
    values = jnp.array([1.0, garbage, 5.0])
    mean = lambda v: softlib.masked_mean(v, where)
    value, gradient = jax.jit(jax.value_and_grad(lambda v: mean(v) ** 2))(values)
    assert value == 9
    np.testing.assert_array_equal(gradient, [3, 0, 3])


def test_nan_that_counts_is_seen():
    assert np.isnan(softlib.masked_mean(jnp.array([1.0, np.nan])))


def test_no_values():
    value, gradient = jax.value_and_grad(softlib.masked_mean)(jnp.zeros(0))
    assert (value, gradient.shape) == (0, (0,))
    np.testing.assert_array_equal(softlib.masked_mean(jnp.zeros((2, 0)), axis=1), 0)


@given(seed=st.integers(0, 2**31), kept=st.integers(0, 6))
def test_the_mean_lies_between_the_values_and_is_linear(seed, kept):
    random = np.random.default_rng(seed)
    values = random.normal(size=6).astype(np.float32)
    where = random.permutation(6) < kept
    mean = lambda v: float(_mean(v, where))
    if kept:
        assert values[where].min() - 1e-6 <= mean(values) <= values[where].max() + 1e-6
    np.testing.assert_allclose(mean(3 * values), 3 * mean(values), atol=1e-5)
    shift = 1.0 if kept else 0.0
    np.testing.assert_allclose(mean(values + 1), mean(values) + shift, atol=1e-5)


@jax.jit
def _mean(values, where):
    return softlib.masked_mean(values, where)


def test_transformations():
    reason = "the rows are averaged, see the tests with axis_name"
    values = jnp.linspace(-1.0, 2.0, 24).reshape(8, 3)
    where = jnp.arange(24).reshape(8, 3) % 5 != 0
    check_transformations(
        softlib.masked_mean,
        *(values, where),
        rows=(),
        skip={"shard_map": reason, "sharded_jit": reason},
    )
    check_transformations(
        functools.partial(softlib.masked_mean, axis=1), values, where, rows=(0, 1)
    )


# ------------------------------------------------------------------------ many devices
WHERES = {
    # Shards with 4, 0, 1, ... counted values: a mean of means would be wrong.
    "unequal": np.repeat([4, 0, 1, 2, 0, 4, 3, 1], 4) > np.tile(np.arange(4), 8),
    "one": np.arange(32) == 17,
    "none": np.zeros(32, bool),
    "all": np.ones(32, bool),
}


@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_over_the_devices_it_is_the_mean_of_everything(where, axis_type, check_vma):
    random = np.random.default_rng(0)
    values = random.normal(size=32).astype(np.float32)
    values[~where] = np.nan
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    mean = jax.shard_map(
        functools.partial(softlib.masked_mean, axis_name="data"),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("data"))
        run = jax.jit(jax.value_and_grad(mean))
        value, gradient = jax.device_get(
            run(jax.device_put(values, sharding), jax.device_put(where, sharding))
        )
    assert_close(value, oracle(values, where), dtype=jnp.float32, length=32)
    wanted = gradient_oracle(values, where)
    assert_close(gradient, wanted, dtype=jnp.float32, length=1)


def test_over_the_devices_the_gradient_inside_is_that_of_the_global_mean():
    """The training step in shard_map: a replicated parameter, divided rows."""
    where = WHERES["unequal"]
    x = np.linspace(-1, 1, 32, dtype=np.float32)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))

    def step(w, x, where):
        return jax.value_and_grad(
            lambda w: softlib.masked_mean(jnp.sin(w * x), where, axis_name="data")
        )(w)

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    value, slope = jax.jit(sharded)(jnp.float32(0.7), x, where)
    assert_close(value, np.sin(0.7 * x)[where].mean(), dtype=jnp.float32, length=32)
    wanted = (np.cos(0.7 * x) * x)[where].mean()
    assert_close(slope, wanted, dtype=jnp.float32, length=32)


def test_an_axis_that_stays_and_several_axis_names():
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    where = values % 3 != 1
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    mean = jax.shard_map(
        lambda v, w: softlib.masked_mean(v, w, axis=0, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=(P(("a", "b")), P(("a", "b"))),
        out_specs=P(),
    )
    got = jax.jit(mean)(values, where)
    assert_close(got, oracle(values, where, 0), dtype=jnp.float32, length=8)


def test_without_a_mask_the_devices_count_all_values():
    values = np.arange(16, dtype=np.float32)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    mean = jax.shard_map(
        functools.partial(softlib.masked_mean, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    assert jax.jit(mean)(values) == 7.5


# ------------------------------------------------------------------------------ errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "axis", "error", "message"),
    [
        ((jnp.ones(3), jnp.ones(3)), None, TypeError, "`where` must .*got float32"),
        ((jnp.ones(3), jnp.ones(3, int)), None, TypeError, "`where` must .*got int32"),
        ((jnp.ones(3), jnp.ones(2, bool)), None, ValueError, r"`where` .*got \(2,\)"),
        (
            (jnp.ones(3), jnp.ones((2, 3), bool)),
            None,
            ValueError,
            r"`where` must .*got \(2, 3\)",
        ),
        ((jnp.ones(3),), 1, ValueError, "`axis` must .*got 1"),
        ((jnp.ones(3),), (0, 0), ValueError, r"`axis` must .*got \(0, 0\)"),
        ((jnp.ones(3, complex),), None, TypeError, "`values` must .*got complex64"),
    ],
)
def test_error_names_argument_condition_and_value(arguments, axis, error, message):
    with pytest.raises(error, match="^masked_mean: " + message):
        softlib.masked_mean(*arguments, axis=axis)
