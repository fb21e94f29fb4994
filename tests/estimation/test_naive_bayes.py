"""Gaussian naive Bayes: moments in any order, and the head that they make."""

import pathlib

import jax
import numpy as np
import pytest
from scipy import special, stats

from softlib.estimation import (
    NaiveBayesState,
    fit_logistic_regression,
    naive_bayes_head,
    naive_bayes_logits,
    naive_bayes_merge,
    naive_bayes_update,
)
from softlib.losses import softmax_cross_entropy
from softlib.testing import assert_close, check_transformations
from tests.compiled import estimation
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
CASE = DATA / "discriminative_generative_case0.npz"


def blobs(seed, count=60, classes=3, features=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    means, scales = rng.normal(size=(2, classes, features))
    return means[labels] + np.exp(scales[labels] / 3) * rng.normal(
        size=(count, features)
    ), labels


def moments(x, labels, classes):
    """Of each class on its own."""
    parts = [x[labels == k] for k in range(classes)]
    mean = np.array([p.mean(0) if len(p) else np.zeros(x.shape[1]) for p in parts])
    squares = [((p - p.mean(0)) ** 2).sum(0) if len(p) else 0 * x[0] for p in parts]
    return np.array([len(p) for p in parts]), mean, np.array(squares)


def joint_densities(x, fitted, labels, classes, smoothing, shared):
    """Log of share times density, from the fitted moments by SciPy."""
    count, mean, squares = moments(fitted, labels, classes)
    variance = squares / count[:, None]
    share = count / count.sum()
    if shared:
        variance = np.broadcast_to(share @ variance, variance.shape)
    logs = stats.norm.logpdf(x[:, None], mean, np.sqrt(variance + smoothing))
    return np.log(share) + logs.sum(-1)


def fitted(x, labels, classes, dtype="float64", **options):
    empty = NaiveBayesState.zeros(classes, x.shape[1], dtype)
    return estimation.naive_bayes_update(empty, x, labels, **options)


def test_matches_independent_vectors():
    data = np.load(CASE)
    x, labels, split = data["in_x"], data["in_y"], int(data["in_split"])
    with jax.enable_x64():
        state = fitted(x, labels, 3)
        np.testing.assert_array_equal(state.count, data["out_count"])
        np.testing.assert_allclose(state.mean, data["out_mean"], rtol=1e-12)
        variance = state.squared_deviations / state.count[:, None]
        np.testing.assert_allclose(variance + 1e-9, data["out_var"], rtol=1e-12)
        head = estimation.naive_bayes_head(state)
        np.testing.assert_allclose(head.weight, data["out_weight"], rtol=1e-12)
        np.testing.assert_allclose(head.bias, data["out_bias"], rtol=1e-12)
        scores = x @ head.weight.T + head.bias[None]
        np.testing.assert_allclose(scores, data["out_scores"], rtol=1e-11)
        merged = estimation.naive_bayes_merge(
            fitted(x[:split], labels[:split], 3), fitted(x[split:], labels[split:], 3)
        )
        np.testing.assert_allclose(merged.mean, data["out_merged_mean"], rtol=1e-12)
        variance = merged.squared_deviations / merged.count[:, None]
        np.testing.assert_allclose(variance, data["out_merged_var"], rtol=1e-8)


@pytest.mark.parametrize("shared", [True, False])
def test_logits_are_the_posterior_of_the_densities(shared):
    x, labels = blobs(0)
    new = blobs(1)[0]
    with jax.enable_x64():
        logits = naive_bayes_logits(
            fitted(x, labels, 3), new, var_smoothing=0.01, shared_variance=shared
        )
        found = jax.nn.log_softmax(logits.materialize())
        wanted = joint_densities(new, x, labels, 3, 0.01, shared)
        np.testing.assert_allclose(
            found, special.log_softmax(wanted, axis=1), rtol=1e-10, atol=1e-12
        )
        # And those of the head that is not centred, where the variance is shared.
        head = naive_bayes_head(fitted(x, labels, 3), var_smoothing=0.01)
        if shared:
            scores = new @ head.weight.T + head.bias[None]
            np.testing.assert_allclose(jax.nn.log_softmax(scores), found, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_batches_in_any_order_are_one_batch(dtype):
    """In a scan, merged as a tree, and with batches in which classes are missing."""
    x, labels = blobs(2, 64)
    labels = np.sort(labels)  # most batches lack a class
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(x, dtype)
        empty = NaiveBayesState.zeros(3, 4, dtype)
        wanted = moments(np.asarray(x, np.float64), labels, 3)

        @jax.jit
        def streamed(x, labels):
            step = lambda state, batch: (naive_bayes_update(state, *batch), None)
            batches = x.reshape(8, 8, 4), labels.reshape(8, 8)
            one = jax.lax.scan(step, empty, batches)[0]
            each = jax.vmap(lambda x, y: naive_bayes_update(empty, x, y))(*batches)
            two = jax.lax.associative_scan(naive_bayes_merge, each, reverse=True)
            return one, jax.tree.map(lambda field: field[0], two)

        wide = "float64" if dtype == "float64" else "float32"
        for found in streamed(x, labels):
            for own, other in zip(found, wanted, strict=True):
                assert own.dtype == wide
                assert_close(own, other, dtype=wide, length=64)


def test_a_large_mean_takes_no_digits():
    """The deviation is a millionth of the mean; the square of it would vanish."""
    rng = np.random.default_rng(3)
    labels = rng.integers(2, size=400)
    x = (1e5 + 0.5 * labels[:, None] + 0.25 * rng.normal(size=(400, 2))).astype("f4")
    state = fitted(x, labels, 2, "float32")
    wanted = moments(x.astype(np.float64), labels, 2)
    np.testing.assert_allclose(state.squared_deviations, wanted[2], rtol=2e-2)
    halves = [fitted(x[k::2], labels[k::2], 2, "float32") for k in (0, 1)]
    merged = naive_bayes_merge(*halves)
    np.testing.assert_allclose(merged.squared_deviations, wanted[2], rtol=2e-2)
    # A feature that never varies, of weight 1e9, takes no digits of the others.
    both = np.column_stack([x, np.full(400, 7.7, np.float32)])
    state = fitted(both, labels, 2, "float32")
    found = naive_bayes_logits(state, jnp.asarray(both)).materialize().argmax(-1)
    exact = joint_densities(x.astype(float), x.astype(float), labels, 2, 0, True)
    assert (np.asarray(found) == exact.argmax(-1)).mean() > 0.98


def test_a_class_without_examples_has_no_probability():
    x, labels = blobs(4)
    state = fitted(x.astype("f4"), 2 * (labels % 2), 4, "float32")
    np.testing.assert_array_equal(state.count[jnp.asarray([1, 3])], 0)
    head = naive_bayes_head(state)
    np.testing.assert_array_equal(head.bias == -np.inf, [False, True, False, True])
    np.testing.assert_array_equal(head.weight[1], 0)
    for shared in (True, False):
        logits = naive_bayes_logits(state, x.astype("f4"), shared_variance=shared)
        probs = np.asarray(jax.nn.softmax(logits.materialize()))
        assert (probs[:, [1, 3]] == 0).all()
        assert np.isfinite(probs).all()
        loss = softmax_cross_entropy(logits, jnp.asarray(2 * (labels % 2)))
        assert np.isfinite(np.asarray(loss)).all()
    empty = naive_bayes_head(NaiveBayesState.zeros(2, 3))
    np.testing.assert_array_equal(empty.bias, -np.inf)
    np.testing.assert_array_equal(empty.weight, 0)


def test_examples_that_do_not_count_may_hold_anything():
    x, labels = blobs(5, 20)
    x = x.astype(np.float32)
    where = np.arange(20) % 3 > 0
    wanted = fitted(x[where], labels[where], 3, "float32")
    poisoned = np.where(where[:, None], x, np.nan), np.where(where, labels, -7)
    for own, other in zip(
        fitted(*poisoned, 3, "float32", where=where), wanted, strict=True
    ):
        np.testing.assert_allclose(own, other, rtol=1e-5)
    none = fitted(*poisoned, 3, "float32", where=np.zeros(20, bool))
    for field in none:
        np.testing.assert_array_equal(field, 0)


def test_a_label_out_of_range_is_nan():
    x = jnp.ones((2, 1))
    for label in (-1, 2):
        state = fitted(x, jnp.asarray([0, label]), 2, "float32")
        assert all(np.isnan(field).all() for field in state)
        assert np.isnan(naive_bayes_head(state).bias).all()


def test_update_and_head_under_transformations():
    x, labels = blobs(6, 6, 2, 3)
    labels = jnp.asarray([0, 1, 0, 1, 1, 0])

    def loss(x, new):
        state = naive_bayes_update(NaiveBayesState.zeros(2, 3, x.dtype), x, labels)
        return naive_bayes_logits(state, new, var_smoothing=0.1).materialize()

    check_transformations(
        loss,
        x.astype("f4"),
        blobs(7, 8, 2, 3)[0].astype("f4"),
        rows=(1,),
        c=64,  # a head divides by variances
    )


@pytest.mark.parametrize(("features", "least"), [(20, 1.0), (60, 1.4)])
def test_fewer_examples_than_logistic_regression_reach_the_error(features, least):
    """Two spherical laws with a Bayes error of .04; test error is in closed form."""
    shift = 1.7507 / np.sqrt(features)  # of each mean, in every feature
    counts = np.array([16, 24, 32, 48, 64, 96, 128])
    rng = np.random.default_rng(8)
    most = 5 * counts[-1]
    labels = np.tile([0, 1], most // 2)
    x = (2 * labels - 1)[:, None] * shift + rng.normal(size=(most, features))
    x, labels = x.reshape(5, -1, features).astype("f4"), labels.reshape(5, -1)

    def error(weight, bias):
        w, b = weight[1] - weight[0], bias[1] - bias[0]
        along, length = shift * w.sum(), jnp.linalg.norm(w)
        tail = lambda t: jax.scipy.stats.norm.cdf(t / length)
        return (tail(-along - b) + tail(-along + b)) / 2

    @jax.jit
    @jax.vmap
    def errors(x, labels, where):
        empty = NaiveBayesState.zeros(2, features)
        state = naive_bayes_update(empty, x, labels, where=where)
        bayes = error(*naive_bayes_head(state))
        fit = fit_logistic_regression(
            x, labels, num_classes=2, l2=1e-4 / where.sum(), where=where, max_steps=30
        )
        return bayes, error(fit.weight, fit.bias)

    needed = []
    for found in zip(
        *(
            errors(x, labels, np.tile(np.arange(counts[-1]) < n, (5, 1)))
            for n in counts
        ),
        strict=True,
    ):
        reached = np.array([np.mean(each) for each in found]) < 0.04 + 0.05
        needed.append(counts[reached.argmax()] if reached.any() else np.inf)
    assert needed[0] < np.inf
    assert needed[1] >= least * needed[0], needed


@pytest.mark.usefixtures("untyped")
def test_errors():
    state, x = NaiveBayesState.zeros(2, 3), jnp.ones((4, 3))
    labels = jnp.zeros(4, int)
    with pytest.raises(TypeError, match="naive_bayes_update: `x` must have a floating"):
        naive_bayes_update(state, x.astype(int), labels)
    with pytest.raises(TypeError, match="`labels` must have an integer"):
        naive_bayes_update(state, x, x[:, 0])
    with pytest.raises(ValueError, match=r"`labels` must have shape \(4,\)"):
        naive_bayes_update(state, x, labels[:3])
    with pytest.raises(ValueError, match=r"`state.mean` must have shape \(2, 5\)"):
        naive_bayes_update(state, jnp.ones((4, 5)), labels)
    with pytest.raises(TypeError, match="`state` must be a NaiveBayesState, got tuple"):
        naive_bayes_update(tuple(state), x, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`other.count` must have shape \(2,\)"):
        naive_bayes_merge(state, NaiveBayesState.zeros(3, 3))
    with pytest.raises(ValueError, match="`var_smoothing` must be >= 0, got -1"):
        naive_bayes_head(state, var_smoothing=-1)
    with pytest.raises(ValueError, match=r"`x` must have shape \(4, 3\)"):
        naive_bayes_logits(state, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        NaiveBayesState.zeros(0, 3)
