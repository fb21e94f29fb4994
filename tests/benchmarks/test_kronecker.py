"""The benchmark of tuple attention: its loops do what they are named after."""

import jax
import numpy as np
import pytest

from benchmarks import kronecker, tuple_products
from benchmarks.kronecker import Pass, Point
from softlib.attention import block_plan

PLAN = block_plan(None, 32, (32, 32), block_query=8, block_key=(4, 16))


@pytest.mark.parametrize("loop", [tuple_products.forward, tuple_products.backward])
def test_bare_loops_have_the_products_of_every_tile(loop):
    query, key, value = (x[:, 0] for x in kronecker.arrays(32, 8, 3))
    arrays = {"query": query, "key": key, "value": value}

    def cost(exponential):
        program = lambda **arrays: loop(PLAN, exponential=exponential, **arrays)
        text = jax.jit(program).lower(**arrays).as_text()
        return text.count("dot_general"), text.count("exponential")

    products = 2 if loop is tuple_products.forward else 6
    assert cost(True) == (products, 1)
    assert cost(False) == (products, 0)
    assert PLAN.whole.shape == (3, 4 * 8 * 2)
    assert PLAN.partial.shape == (3, 0)


def test_the_methods_compute_the_same():
    operands = [np.tanh(x) for x in kronecker.arrays(16, kronecker.NARROW, 5)]
    exact = jax.jit(kronecker.exact)(*operands)
    near = jax.jit(kronecker.polynomial)(*operands)
    np.testing.assert_allclose(near, exact, atol=2 * kronecker.TOLERANCE)


def test_the_crossover_lies_between_the_points_around_it():
    points = lambda *seconds: [Point(2**i, s, 1) for i, s in enumerate(seconds, 4)]
    assert kronecker.crossover(points(1, 2, 4), points(0.1, 1, 10)) == pytest.approx(
        2**5 * 2 ** (np.log(2) / np.log(5))
    )
    assert kronecker.crossover(points(1, 2), points(0.1, 1)) is None


def test_page_and_picture(tmp_path):
    points = [Point(2**i, 2.0**i, 2**i) for i in range(3)]
    passes = [Pass(64, "forward", 1.0, "1.10 (1.00-1.20)", "1.40 (1.30-1.50)", 2**20)]
    page = kronecker.markdown(passes, points, points, points[:1])
    assert "| 64 | forward | 1.000 | 1.10 (1.00-1.20) | 1.40 (1.30-1.50) |" in page
    assert "over the last 3 lengths: time 1.00, scratch 1.00" in page
    kronecker.draw(points, points, points[:1], tmp_path / "a" / "picture.png")
    assert (tmp_path / "a" / "picture.png").stat().st_size > 10_000
