"""The benchmark of the head in factors: its programs do the same, its page says it."""

import jax
import numpy as np

from benchmarks import spherical
from softlib import losses
from tests.host import jnp


def test_both_z_loss_programs_take_the_same_step():
    classes = 50
    weight = jax.random.normal(jax.random.key(0), (classes, spherical.FEATURES))
    hidden = jax.random.normal(jax.random.key(1), (8, spherical.FEATURES))
    labels = jnp.arange(8) % 5
    stored = jax.jit(spherical.stored_step(spherical.STORED["Z-loss, stored"]))
    state = losses.FactoredSphericalState.init(weight)
    state, of_hidden = jax.jit(spherical.factored_step)(state, hidden, labels)
    after, expected = stored(weight, hidden, labels)
    np.testing.assert_allclose(of_hidden, expected, rtol=1e-3, atol=1e-6)
    found = state.weight()
    np.testing.assert_allclose(found - weight, after - weight, rtol=1e-2, atol=2e-6)


def test_the_page_and_the_picture(tmp_path):
    lines = [
        spherical.Line(name, size, size**p / 1e6, 2 * size**p / 1e6)
        for size in (1000, 32_000)
        for name, p in (
            ("cross-entropy, stored", 1.0),
            ("Z-loss, stored", 0.9),
            (spherical.FACTORED, 0.02),
            (spherical.REBASE, 1.0),
        )
    ]
    page = spherical.markdown(lines)
    assert "Z-loss, in factors 0.02, rebase 1.00." in page
    assert "| 32,000 | 32.00 (64.00) |" in page
    assert "| 2,000 |" in page  # a sixteenth of the classes
    spherical.draw(lines, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
