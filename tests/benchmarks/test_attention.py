"""The attention benchmark: what it compares computes the same, and its page says it."""

import jax
import numpy as np

from benchmarks import attention
from benchmarks.attention import Point, Row


def test_all_programs_compute_the_same():
    *arrays, cotangent = attention.arrays(32, 2)
    expected = None
    for name, attend in attention.PEERS.items():
        if "tokamax" in name:
            continue  # optional, and slow to import
        found = jax.jit(attention.with_gradients(attend))(*arrays, cotangent)
        expected = found if expected is None else expected
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


def test_the_mask_is_sparse_at_the_lengths_of_the_table():
    density = [attention.radial(tokens).density for tokens in (4096, 16384, 65536)]
    assert density == sorted(density, reverse=True)
    assert density[-1] < 0.11


def test_the_page_tells_growth_and_the_price_of_a_block():
    rows = [Row("softlib", 1.0, "1.00", 2**20), Row("peer", reason="not installed")]
    points = [
        Point(1000, 10, 0.5, 1.0, 1000),
        Point(2000, 20, 0.25, 2.0, 2000, dense_ratio=0.3),
    ]
    page = attention.markdown(rows, rows, points, "a shape")
    assert "power 1.00 of the visited blocks" in page
    assert "1.20 times the visited fraction" in page
    assert "| peer | does not run | - | - | does not run | - | - |" in page


def test_a_picture_is_drawn(tmp_path):
    rows = [Row("softlib", 1.0, "1.00", 2**20)]
    points = [Point(1024 * n, 10 * n, 0.5, n, 1000) for n in (1, 2, 4)]
    attention.draw(rows, points, tmp_path / "a" / "picture.png")
    assert (tmp_path / "a" / "picture.png").stat().st_size > 10_000
