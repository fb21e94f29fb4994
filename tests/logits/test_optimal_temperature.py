"""What the best temperature of a row is at the ends of its range."""

import jax
import numpy as np

from tests.heads import of_head, of_stored
from tests.host import jnp

CLASSES = 4


def test_the_ends_of_the_range_are_exact():
    """Whatever number an end is: the exponential of its logarithm is often another."""
    z = np.zeros((2, CLASSES), np.float32)
    z[1, 0] = 1e4  # as flat as can be, and peaked at any temperature
    ends = np.linspace(0.05, 0.95, 40, dtype=np.float32)
    other = np.exp(np.log(ends))
    assert (other > ends).any()
    assert (other < ends).any()

    @jax.jit
    def run(z, low, high):
        given = {"rho": 0.5, "temperature_min": low, "temperature_max": high}
        of_array = of_stored.optimal_temperature(z, **given)
        of_linear = of_head.optimal_temperature(z, jnp.eye(CLASSES), **given)
        return of_array, of_linear

    found = jax.vmap(run, (None, 0, 0))(z, ends, ends + np.float32(1))
    for temperature in found:
        np.testing.assert_array_equal(temperature[:, 0], ends)
        np.testing.assert_array_equal(temperature[:, 1], ends + np.float32(1))
