"""NaN that stays NaN in what is computed from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softlib._nan import nan_where


@pytest.mark.parametrize("function", [jnp.exp, jnp.log, jnp.tanh, jax.nn.softmax])
def test_what_follows_is_nan_in_a_program(function):
    x = np.ones((2, 17), np.float32)
    bad = np.array([[True], [False]])
    # At the user's level of optimisation, whatever this run has.
    options = {"xla_backend_optimization_level": 3}
    options |= {"xla_llvm_disable_expensive_passes": False}
    program = jax.jit(lambda bad, x: function(nan_where(bad, x)))
    found = program.lower(bad, x).compile(compiler_options=options)(bad, x)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_keeps_dtype_and_derivative():
    x = jnp.ones(3, jnp.bfloat16)
    bad = jnp.array([True, False, False])
    assert nan_where(bad, x).dtype == x.dtype
    gradient = jax.grad(lambda x: nan_where(bad, x).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [0, 1, 1])
