"""The search for the greatest entries of rows."""

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from softlib._largest import largest
from tests.host import jnp


def rows(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_is_a_sort_cut_off():
    x = rows((3, 40))
    values, places = jax.jit(largest, static_argnums=1)(x, 5)
    np.testing.assert_array_equal(places, np.argsort(-x, axis=1)[:, :5])
    np.testing.assert_array_equal(values, np.take_along_axis(x, places, axis=1))


def test_every_device_searches_its_part():
    x = rows((4, 64))
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    search = jax.shard_map(
        lambda part: largest(part, 3),
        mesh=mesh,
        in_specs=P("rows", "classes"),
        out_specs=P("rows", "classes"),
    )
    values, places = jax.jit(search)(x)
    parts = x.reshape(4, 4, 16)
    expected = np.argsort(-parts, axis=-1)[..., :3]
    np.testing.assert_array_equal(places.reshape(4, 4, 3), expected)
    np.testing.assert_array_equal(
        values.reshape(4, 4, 3), np.take_along_axis(parts, expected, axis=-1)
    )


def test_several_readers_make_no_sort_of_it():
    def read_twice(x):
        values, places = largest(x, 3)
        return values + values[..., -1:], values.sum(), places.max(), places + 1

    text = jax.jit(read_twice).lower(jnp.ones((4, 5000))).compile().as_text()
    assert text is not None
    assert "TopK" in text
    assert " sort(" not in text
