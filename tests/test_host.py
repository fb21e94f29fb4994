"""Arrays made by NumPy are those that `jax.numpy` makes."""

import jax
import jax.numpy
import numpy as np
import pytest

from tests.host import jnp

HALF = jax.numpy.arange(4, dtype="bfloat16")
CALLS = {
    "asarray of float64": lambda jnp: jnp.asarray(np.arange(3.0)),
    "asarray of a list": lambda jnp: jnp.asarray([1, 2]),
    "asarray with a dtype": lambda jnp: jnp.asarray(np.arange(3.0), "bfloat16"),
    "array of the largest integers": lambda jnp: jnp.array([0, 255], "uint8"),
    "array of booleans": lambda jnp: jnp.array([True, False]),
    "arange": lambda jnp: jnp.arange(1, 9, 3),
    "arange of floats": lambda jnp: jnp.arange(5.0),
    "eye": lambda jnp: jnp.eye(3, 4, dtype=int),
    "full": lambda jnp: jnp.full((2, 1), -1.5, "float16"),
    "linspace": lambda jnp: jnp.linspace(0, 1, 5),
    "ones": lambda jnp: jnp.ones((2, 3)),
    "zeros": lambda jnp: jnp.zeros(3, bool),
    "stack": lambda jnp: jnp.stack([HALF, HALF], axis=1),
    "where and a number": lambda jnp: jnp.where(HALF > 1, HALF, jnp.nan),
    "where with a wider dtype": lambda jnp: jnp.where(HALF > 1, HALF, np.float32(2)),
    "concatenate": lambda jnp: jnp.concatenate([HALF, jax.numpy.ones(2)]),
    "roll": lambda jnp: jnp.roll(HALF, 1),
    "isfinite": lambda jnp: jnp.isfinite(HALF / 0),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("x64", [False, True])
def test_values_and_dtypes_are_those_of_jax(call, x64):
    with jax.enable_x64(x64):
        found, wanted = CALLS[call](jnp), CALLS[call](jax.numpy)
    assert isinstance(found, jax.Array)
    assert found.dtype == wanted.dtype
    # NumPy has no NaN of bfloat16.
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    np.testing.assert_array_equal(found, wanted)


def test_inside_a_program_they_are_operations():
    make = lambda: (jnp.arange(3), jnp.ones(2), jnp.stack([HALF, HALF]))
    program = str(jax.make_jaxpr(make)())
    assert "iota" in program
    assert "broadcast_in_dim" in program


def test_a_later_change_of_the_given_array_does_not_matter():
    given = np.zeros(1000, np.float32)
    made = jnp.asarray(given)
    given[:] = 1
    np.testing.assert_array_equal(made, 0)
