"""Softmax against drawn negatives."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from softlib.losses._sampled_softmax import _draw
from softlib.testing import assert_close, check_transformations
from tests.compiled import losses, of_head
from tests.host import jnp

ROWS, FEATURES, CLASSES, DRAWN = 8, 3, 11, 6
IDS = np.array(
    [[0, -1], [2, 5], [-1, 9], [-1, -1], [1, 4], [7, -1], [0, 1], [3, CLASSES]]
)
sampled = losses.sampled_softmax_loss


def arrays(dtype="float32", classes=CLASSES) -> dict[str, Any]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    return {
        "hidden": draw(ROWS, FEATURES),
        "weight": draw(classes, FEATURES),
        "bias": draw(classes),
    }


def expected(floating, ids, drawn, log_q, scale):
    """By loops, in float64."""
    hidden, table, bias = (np.asarray(a, np.float64) for a in floating.values())
    z = scale * hidden @ table.T + bias
    found = np.zeros(len(z))
    for i, row in enumerate(z):
        labels = [l for l in ids[i] if l != -1]
        if any(not 0 <= l < len(row) for l in labels):
            found[i] = np.nan
            continue
        mass = sum(
            np.exp(row[j] - q) / len(drawn)
            for j, q in zip(drawn, log_q, strict=True)
            if j not in labels
        )
        costs = [np.log1p(mass / np.exp(row[l])) for l in labels]
        found[i] = np.mean(costs) if costs else 0
    return found


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_loops_over_the_same_draws(distribution, dtype):
    floating, key = arrays(dtype), jax.random.key(3)
    options = {"key": key, "num_sampled": DRAWN, "distribution": distribution}

    @jax.jit
    def run(floating):
        def total(floating):
            loss = sampled(**floating, positives=jnp.asarray(IDS), scale=1.5, **options)
            return jnp.where(jnp.isnan(loss), 0, loss).sum(), loss

        return jax.grad(total, has_aux=True)(floating)

    gradients, loss = run(floating)
    drawn, log_q = _draw(key, DRAWN, CLASSES, distribution)
    wanted = expected(floating, IDS, np.asarray(drawn), np.asarray(log_q), 1.5)
    assert loss.dtype == jnp.float32
    assert_close(loss, wanted, dtype=jnp.float32, length=CLASSES)
    used = set(np.asarray(drawn).tolist()) | set(IDS[:7].ravel().tolist())
    for j in set(range(CLASSES)) - used:
        np.testing.assert_array_equal(gradients["weight"][j], 0)
    for name, gradient in gradients.items():
        assert gradient.dtype == jnp.dtype(dtype), name
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients["hidden"][np.array([3, 7])], 0)


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_draws_have_their_probabilities(distribution):
    count, labels = 200_000, 7
    drawn, log_q = jax.jit(_draw, static_argnums=(1, 2, 3))(
        jax.random.key(0), count, labels, distribution
    )
    found = np.bincount(np.asarray(drawn), minlength=labels) / count
    wanted = np.zeros(labels)
    wanted[np.asarray(drawn)] = np.exp(np.asarray(log_q))
    assert wanted.sum() == pytest.approx(1, abs=1e-5)
    # Five standard deviations.
    assert np.abs(found - wanted).max() < 5 * 0.5 / np.sqrt(count)
    large, _ = _draw(jax.random.key(1), 10_000, 1_000_003, distribution)
    assert large.min() >= 0
    assert large.max() < 1_000_003


def test_too_low_on_average_and_right_in_the_limit():
    """Means over many keys, of one program."""
    classes = 50
    floating = arrays(classes=classes)
    ids = jnp.asarray(np.where(IDS == CLASSES, 6, IDS))
    exact = of_head.decoupled_softmax_loss(**floating, positives=ids)

    @functools.partial(jax.jit, static_argnums=1)
    def mean(keys, count):
        one = lambda key: sampled(**floating, positives=ids, key=key, num_sampled=count)
        return jax.lax.map(one, keys).mean(0)

    keys = jax.random.split(jax.random.key(0), 400)
    few, many = (exact - mean(keys, count) for count in (8, 512))
    rows = np.arange(ROWS) != 3  # it has no positives
    assert (few[rows] > 0.3).all()  # too low
    assert (many[rows] > 0).all()
    assert (many[rows] < 0.12 * few[rows]).all()


def test_a_row_whose_draws_are_all_positives_is_zero():
    table = jnp.ones((2, 1))
    loss, slope = jax.jit(
        jax.value_and_grad(
            lambda h: sampled(
                h, table, jnp.array([[0, 1]]), key=jax.random.key(0), num_sampled=3
            ).sum()
        )
    )(jnp.ones((1, 1)))
    assert loss == 0
    assert slope == 0


def test_where_and_weights():
    floating, ids = arrays(), jnp.asarray(np.where(IDS == CLASSES, 6, IDS))
    call = functools.partial(
        sampled, positives=ids, key=jax.random.key(0), num_sampled=DRAWN
    )
    plain = call(**floating)
    count = jnp.maximum((ids >= 0).sum(-1), 1)
    equal = jnp.where(ids >= 0, 1 / count[:, None], 7.0)
    assert_close(call(**floating, weights=equal), plain, dtype="float32", length=4)
    floating["hidden"] = floating["hidden"].at[0].set(jnp.nan)
    where = jnp.arange(ROWS) > 0
    gradient = jax.jit(
        jax.grad(lambda w: call(**{**floating, "weight": w}, where=where).sum())
    )(floating["weight"])
    assert np.isfinite(gradient).all()
    kept = call(**floating, where=where)
    assert kept[0] == 0
    assert_close(kept[1:], plain[1:], dtype="float32", length=4)


@pytest.mark.slow
def test_under_every_transformation():
    ids = jnp.asarray(np.where(IDS == CLASSES, 6, IDS))

    def function(hidden, table, bias, ids):
        options = {"key": jax.random.key(0), "num_sampled": DRAWN}
        return sampled(hidden, table, ids, bias=bias, **options)

    check_transformations(function, *arrays().values(), ids, rows=(0, 3))


@pytest.mark.usefixtures("untyped")
def test_wrong_options_are_named():
    head, ids = arrays(), jnp.asarray(IDS)
    every: Any = losses
    options: dict[str, Any] = {"key": jax.random.key(0), "num_sampled": 4}
    for changed, error, message in (
        ({"num_sampled": 0}, ValueError, "`num_sampled` must be at least 1, got 0"),
        ({"distribution": "zipf"}, ValueError, "`distribution` must be one of"),
        ({"positives": jnp.zeros((ROWS, 2))}, TypeError, "`positives` must be class"),
        ({"weights": jnp.ones(ROWS)}, ValueError, "`weights` must have shape"),
    ):
        arguments = {**head, "positives": ids, **options, **changed}
        with pytest.raises(error, match=f"sampled_softmax_loss: {message}"):
            every.sampled_softmax_loss(**arguments)
