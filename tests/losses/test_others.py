"""Sums over the classes other than the label, of rows cut into pieces.

The other tests of losses have vocabularies that are too small to be cut.
"""

from typing import Any

import jax
import numpy as np
import pytest

from softlib.logits._engine.other_classes import pieces_of
from softlib.testing import assert_close
from tests.heads import of_stored
from tests.host import jnp

ROWS = 24


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 127, 1000, 4096, 30_522, 50_257])
def test_pieces_are_equal_and_not_too_small(vocabulary):
    pieces = pieces_of(vocabulary)
    assert vocabulary % pieces == 0
    assert pieces == 1 or vocabulary // pieces >= 64


@pytest.mark.parametrize("vocabulary", [32_000, 50_257, 128_256, 151_936])
def test_vocabularies_of_models_are_cut(vocabulary):
    assert 16 <= pieces_of(vocabulary) <= 64


@pytest.mark.parametrize("vocabulary", [1024, 32_000, 128_256])
def test_pieces_are_divided_as_classes_are(vocabulary):
    assert pieces_of(vocabulary) % 16 == 0


def problem(vocabulary):
    """Labels at the borders of pieces and out of range; confident and odd rows."""
    random = np.random.default_rng(0)
    size = vocabulary // pieces_of(vocabulary)
    logits = 3 * random.normal(size=(ROWS, vocabulary)).astype(np.float32)
    labels = random.integers(0, vocabulary, ROWS)
    labels[:6] = [0, size - 1, size, vocabulary - 1, -1, vocabulary]
    above = [5, 15, 30, 60, 80, 200, -200, -np.inf]  # the label, beside all others
    for row, value in zip(range(6, 14), above, strict=True):
        logits[row, labels[row]] = value
    logits[14] = -np.inf  # an empty row
    logits[15] = -np.inf  # the label alone
    logits[15, labels[15]] = 2.0
    logits[16, labels[16] - 1] = np.inf
    logits[17, labels[17]] = np.inf
    logits[18, labels[18] - 1] = np.nan
    logits[19, labels[19]] = np.nan
    logits[20, : vocabulary // 2] = -np.inf
    logits[21] = 1e10 * logits[21]
    return jnp.asarray(logits), jnp.asarray(labels)


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "smoothing": {"label_smoothing": 0.1, "logsumexp_penalty": 0.01},
    "scale": {"scale": 0.5, "softcap": 50.0, "temperature": 2.0},
    "classes": {"class_where": True, "bias": True},
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_the_definition_in_float64(options):
    vocabulary = 192
    assert pieces_of(vocabulary) > 1
    logits, labels = problem(vocabulary)
    options = dict(OPTIONS[options])
    random = np.random.default_rng(1)
    if "bias" in options:
        options["bias"] = jnp.float32(random.normal(size=vocabulary))
        options["class_where"] = jnp.asarray(random.uniform(size=vocabulary) < 0.7)

    def both(logits, implementation, options):
        def loss(logits):
            metrics = of_stored.token_metrics(
                logits,
                labels,
                metrics=("loss", "entropy", "lse"),
                implementation=implementation,
                **options,
            )
            return metrics.loss, metrics.entropy, metrics.lse

        found, pull = jax.vjp(loss, logits)
        seen = jnp.ones(ROWS, logits.dtype)
        return found, pull((seen, jnp.zeros_like(seen), jnp.zeros_like(seen)))[0]

    found, gradient = jax.jit(lambda z: both(z, "xla", options))(logits)
    with jax.enable_x64(True):
        wide = {
            key: value.astype(jnp.float64) if key == "bias" else value
            for key, value in options.items()
        }
        run = jax.jit(lambda z: both(z, "reference", wide))
        expected, slope = jax.tree.map(np.array, run(logits.astype(jnp.float64)))
    # Of a small entropy, lse less the mean logit, digits cancel; of a small loss none.
    for got, want, least in zip(found, expected, (1e-38, 1e-5, 1e-38), strict=True):
        np.testing.assert_allclose(got, want, rtol=4e-6, atol=least)
    # The gradients of the rows of NaN and +inf are NaN in classes that count.
    bad = np.isnan(expected[0]) & (np.arange(ROWS) > 5)
    np.testing.assert_allclose(gradient[~bad], slope[~bad], rtol=4e-5, atol=1e-7)
    assert np.isnan(gradient[bad]).any(1).all()


def test_second_derivatives():
    """Of a whole row and of one that is cut: of confident labels too."""
    logits, labels = problem(192)
    rows = np.r_[0:4, 6:13]
    logits, labels = logits[rows], labels[rows]
    direction = jnp.asarray(
        np.random.default_rng(2).normal(size=logits.shape), jnp.float32
    )

    def products(logits, direction, implementation):
        loss = lambda z: of_stored.softmax_cross_entropy(
            z, labels, implementation=implementation
        ).sum()
        along = lambda z: jnp.vdot(jax.grad(loss)(z), direction)
        forward = jax.jvp(jax.grad(loss), (logits,), (direction,))[1]
        return forward, jax.grad(along)(logits)

    with jax.enable_x64(True):
        wide = logits.astype(jnp.float64)
        run = jax.jit(products, static_argnums=2)
        expected = jax.device_get(
            run(wide, direction.astype(jnp.float64), "reference")[0]
        )
    for found in jax.jit(products, static_argnums=2)(logits, direction, "xla"):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_one_versus_all_of_many_classes():
    logits, labels = problem(192)
    rows = np.r_[0:4, 6:13]
    logits, positives = logits[rows], labels[rows, None]
    found = jax.jit(of_stored.one_versus_all_loss)(logits, positives)
    z = np.asarray(logits, np.float64)
    own = np.take_along_axis(z, np.asarray(positives), 1)[:, 0]
    softplus = np.logaddexp(0, z).sum(1) - np.logaddexp(0, own)
    expected = softplus + np.logaddexp(0, -own)
    assert_close(found, expected, dtype=jnp.float32, length=192)
