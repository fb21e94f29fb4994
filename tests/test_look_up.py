"""A look-up whose transpose is a product: the values and derivatives of `jnp.take`."""

import jax
import numpy as np
import pytest

from softlib._look_up import look_up
from tests.host import jnp

ARRAY = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
PLACES = jnp.array(
    [[1, 3, 1], [0, 1, 2]]
)  # 3 never in the second, 1 twice in the first


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mapped", ["nothing", "array", "places", "both"])
def test_values_and_derivatives_under_vmap(axis, mapped):
    """Inside and around the derivative, and the forward one of the reverse one."""
    of_array, of_places = mapped in ("array", "both"), mapped in ("places", "both")
    array = jnp.stack([ARRAY, 2 * ARRAY]) if of_array else ARRAY
    places = PLACES if of_places else PLACES[0]

    def everything(function):
        total = lambda array, places: jnp.sin(function(array, places)).sum()
        slope = jax.grad(total)

        def one(array, places):
            along = lambda array: slope(array, places)
            return (
                function(array, places),
                along(array),
                jax.jvp(along, (array,), (array,))[1],
            )

        def whole(array, places):
            if mapped == "nothing":
                return one(array, places)
            axes = (0 if of_array else None, 0 if of_places else None)
            return jax.vmap(one, axes)(array, places)

        def again(array):
            return sum(jnp.cos(found).sum() for found in whole(array, places))

        return jax.jit(lambda array: (whole(array, places), jax.grad(again)(array)))

    found = everything(lambda array, places: look_up(array, places, axis))(array)
    wanted = everything(lambda array, places: jnp.take(array, places, axis))(array)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_narrow_cotangents_are_summed_in_float32():
    """1 + 256 times 1/256 is 2, and 1 in bfloat16 all along."""
    places = jnp.zeros(257, int)
    cotangent = jnp.asarray([1.0] + 256 * [1 / 256], jnp.bfloat16)
    array = jnp.zeros(2, jnp.bfloat16)
    _, pull = jax.vjp(lambda array: look_up(array, places, 0), array)
    np.testing.assert_array_equal(np.asarray(pull(cotangent)[0], np.float32), [2, 0])
