"""Moments of the surprisal: float64 oracle, exact cases, every kind of logits."""

from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib.logits import StoredLogits, VQLogits, moments
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles.surprisal import moments as oracle

ROWS, CLASSES, FEATURES = 7, 205, 5


def values() -> dict[str, Any]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, weight = draw(ROWS, FEATURES), draw(CLASSES, FEATURES)
    own: dict[str, Any] = {
        "bias": draw(CLASSES),
        "softcap": 9.0,
        "temperature": jnp.linspace(0.5, 2, ROWS),
    }
    exists = jnp.arange(CLASSES) % 5 != 0
    mapping = jnp.arange(CLASSES) % 7
    cut = {"vocab_chunk": 60, "token_chunk": 3}
    masked = StoredLogits(3 * draw(ROWS, CLASSES), class_where=exists)
    return {
        "array": 4 * draw(ROWS, CLASSES),
        "stored": masked,
        "head": softlib.LinearLogits(hidden, weight, **own, **cut),
        "columns": softlib.LinearLogits(hidden, weight.T, vocab_axis=1, **own),
        "codes": VQLogits(hidden, weight[:7], mapping, token_bias=own["bias"]),
    }


@pytest.mark.parametrize("kind", values())
def test_matches_the_oracle(kind):
    logits = values()[kind]
    array = logits.materialize() if hasattr(logits, "materialize") else logits
    found = jax.jit(lambda logits: moments(logits, order=4))(logits)
    for ours, wanted in zip(found, oracle(array), strict=True):
        assert_close(ours, wanted, dtype=jnp.float32, length=30 * CLASSES)


def test_order_says_how_many():
    array = values()["array"]
    found = moments(array)
    assert found.third is None
    assert found.fourth is None
    assert moments(array, order=1).variance is None
    assert_close(
        found.mean, softlib.logits.entropy(array), dtype=jnp.float32, length=CLASSES
    )


def test_nothing_cancels():
    """Equal classes, certain ones, huge logits, and one class beside many."""
    count = 1000
    equal = np.full(count, 7000.0)
    certain = np.where(np.arange(count) == 3, 9000.0, 8980.0)
    single = np.where(np.arange(count) == 3, 1e4, -np.inf)
    beside = np.where(np.arange(count) == 3, 1.0, 0.0)
    z = np.stack([equal, certain, single, beside, equal - 1e4])
    found: Any = moments(jnp.asarray(z, jnp.float32), order=4)
    mean, variance, third, fourth = found
    wanted = oracle(z)
    np.testing.assert_allclose(mean, wanted[0], rtol=1e-5)
    assert (variance[jnp.array([0, 2, 4])] == 0).all()
    some = [1, 3]
    np.testing.assert_allclose(variance[jnp.array(some)], wanted[1][some], rtol=2e-4)
    np.testing.assert_allclose(third[jnp.array(some)], wanted[2][some], rtol=2e-4)
    np.testing.assert_allclose(fourth[jnp.array(some)], wanted[3][some], rtol=2e-4)


def test_a_row_without_a_probability_has_none():
    array = jnp.full((2, 4), -jnp.inf)
    for logits in (array, StoredLogits(jnp.ones((2, 4)), class_where=array == 0)):
        for each in moments(logits, order=4):
            np.testing.assert_array_equal(each, 0)


def test_forms_no_array_of_logits():
    rows, classes = 256, 100_000
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    run = lambda hidden, weight: moments(softlib.LinearLogits(hidden, weight))
    compiled = jax.jit(run).lower(shape(rows, 32), shape(classes, 32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.2 * rows * classes * 4


@pytest.mark.usefixtures("untyped")
def test_bad_orders():
    with pytest.raises(ValueError, match="moments: `order` must be 1 to 4, got 5"):
        moments(jnp.ones((2, 3)), order=5)
    with pytest.raises(ValueError, match="`order` must be at least 1"):
        moments(jnp.ones((2, 3)), order=0)
