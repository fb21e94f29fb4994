"""Cross-entropy where the label is so far above the others that a plain one is 0."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from tests.compiled import of_stored
from tests.host import jnp

MARGINS = np.array([0, 5, 16, 17, 20, 40, 60, 80, -20, -80], np.float32)
OTHERS = np.array([0, -0.7, 0.3, -np.inf], np.float32)


def separated():
    """Logits whose label, class 1, is so far above the others."""
    rows = [np.insert(OTHERS, 1, margin) for margin in MARGINS]
    return np.stack(rows)


def separated_oracle():
    """Loss and gradient, of sums without the label."""
    z = separated().astype(np.float64)
    others = np.exp(np.delete(z, 1, axis=1) - z[:, 1:2])
    total = 1 + others.sum(1, keepdims=True)
    slope = np.insert(others, 1, -others.sum(1), axis=1) / total
    return np.log1p(others.sum(1)), slope


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(
    "name",
    ["softmax_cross_entropy", "softmax_token_log_probs", "class_weights", "divided"],
)
def test_loss_of_class_ids_is_accurate_relative_to_itself(name, implementation):
    loss_of = of_stored.softmax_cross_entropy
    if name == "softmax_token_log_probs":
        loss_of = lambda *a, **o: -of_stored.token_log_probs(*a, **o)
    factor = 1.0
    options: dict[str, Any] = {"implementation": implementation}
    if name == "class_weights":
        factor, options["class_weights"] = 3.0, jnp.full(5, 3.0)
    if name == "divided":  # the final logits count
        options["temperature"] = jnp.float32(0.5)
        options["bias"] = jnp.array([0.0, 1.0, 0.0, 0.0, 0.0])
        options["class_where"] = jnp.array([True] * 4 + [False])
    logits, labels = jnp.asarray(separated()), jnp.ones(len(MARGINS), int)
    if name == "divided":
        logits = (0.5 * logits).at[:, 1].add(-1).at[:, 4].set(0)
    run = lambda z: loss_of(z, labels, **options)
    value, pull = jax.jit(lambda z: jax.vjp(run, z))(logits)
    wanted, slope = separated_oracle()
    np.testing.assert_allclose(value, factor * wanted, rtol=1e-5)
    (found,) = jax.jit(pull)(jnp.ones(len(MARGINS)))
    if name == "divided":
        factor = 2  # by the temperature
    np.testing.assert_allclose(found, factor * slope, rtol=2e-5, atol=1e-37)


def test_loss_is_0_where_exp_underflows():
    logits = jnp.array([[86.0, 0.0], [105.0, 0.0], [1e4, 0.0], [3.0, -jnp.inf]])
    run = lambda z: of_stored.softmax_cross_entropy(z, jnp.zeros(4, int))
    value, found = jax.jit(lambda z: (run(z), jax.grad(lambda z: run(z).sum())(z)))(
        logits
    )
    np.testing.assert_array_equal(value[1:], jnp.zeros(3))
    assert value[0] > 0
    np.testing.assert_array_equal(found[1:], jnp.zeros((3, 2)))
    assert found[0, 0] < 0 < found[0, 1]


def test_terms_of_options_are_added_to_an_accurate_label_term():
    """Smoothing and penalty belong to all classes, with the lse of all."""
    logits, labels = jnp.asarray(separated()[:, :4]), jnp.ones(len(MARGINS), int)
    epsilon, coefficient = 0.1, 0.01

    def run(z):
        return of_stored.softmax_cross_entropy(
            z,
            labels,
            label_smoothing=epsilon,
            logsumexp_penalty=coefficient,
            return_lse=True,
        )

    result, pull = jax.jit(lambda z: jax.vjp(run, z))(logits)
    value, lse = result
    z = separated()[:, :4].astype(np.float64)
    label, slope = separated_oracle()
    wanted_lse = z[:, 1] + label
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    uniform = wanted_lse - z.mean(1)
    wanted = 0.9 * label + epsilon * uniform + coefficient * wanted_lse**2
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    p = np.exp(z - wanted_lse[:, None])
    wanted = 0.9 * slope[:, :4] + epsilon * (p - 0.25)
    wanted += 2 * coefficient * wanted_lse[:, None] * p
    cotangents = type(result)(jnp.ones_like(value), jnp.zeros_like(lse))
    (found,) = jax.jit(pull)(cotangents)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_entropy_beside_the_loss_is_that_of_all_classes():
    logits = jnp.asarray(separated())
    labels = jnp.ones(len(MARGINS), int)
    metrics = functools.partial(of_stored.token_metrics, metrics=("loss", "entropy"))
    found = jax.jit(metrics)(logits, labels)
    alone = jax.jit(of_stored.entropy)(logits)
    np.testing.assert_allclose(found.entropy, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_logit_makes_loss_and_lse_nan(place, bad):
    run = functools.partial(of_stored.softmax_cross_entropy, return_lse=True)
    logits = np.zeros((1, 3), np.float32)
    logits[0, place] = bad
    for found in jax.jit(run)(jnp.asarray(logits), jnp.array([1])):
        assert jnp.isnan(found).all()
