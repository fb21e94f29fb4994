"""Maps that are ratios, where a sum overflows or a reciprocal is subnormal."""

import jax
import numpy as np
import pytest

from softlib import softmax
from tests.host import jnp

MAPS = ("stablemax", "spherical_softmax", "taylor_softmax")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MAPS)
def test_the_largest_scores_share_all(name, dtype, jitted):
    with jax.enable_x64():
        most = float(jnp.finfo(dtype).max)
        function, log = (getattr(softmax, n) for n in (name, f"log_{name}"))
        slope_of_first = jax.jit(jax.grad(lambda x: function(x)[0]))
        if jitted:
            function, log = jax.jit(function), jax.jit(log)
        for x, wanted in (
            ([most / 3, 0, 0], [1, 0, 0]),
            ([most, most, 0], [0.5, 0.5, 0]),
            ([most / 3, 1, most / 3], [0.5, 0, 0.5]),
        ):
            scores = np.array(x, dtype)
            np.testing.assert_allclose(function(scores), wanted, atol=1e-6)
            np.testing.assert_allclose(np.exp(log(scores)), wanted, atol=1e-5)
            assert np.isfinite(slope_of_first(scores)).all()
