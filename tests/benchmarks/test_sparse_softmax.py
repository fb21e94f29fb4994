"""The sorting forms are the maps they are held against; the table says the ratio."""

import jax
import numpy as np

from benchmarks import sparse_softmax
from benchmarks.sparse_softmax import Line
from tests.host import jnp


def test_the_sorting_forms_compute_the_same():
    z = jnp.asarray(sparse_softmax.scores(2, 50, 1.0))
    maps = sparse_softmax.softlib_maps()
    for name, program in sparse_softmax.SORTED.items():
        found = jax.jit(lambda z, f=program, g=maps[name]: (f(z), g(z)))(z)
        np.testing.assert_allclose(*found, atol=2e-6)


def test_the_table():
    lines = [Line("flat", "sparsemax", 2.0, 50.0, "not installed: torch")]
    page = sparse_softmax.markdown(lines)
    assert "| flat | sparsemax | 2.0 | 50.0 | 25.0 | not installed: torch |" in page
