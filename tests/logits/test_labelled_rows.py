"""A loss of one's own obeys the edge rules by what `labelled_rows` gives it."""

import re

import jax
import numpy as np
import pytest

import softlib
from softlib import LinearLogits, losses
from softlib.logits import StoredLogits
from softlib.testing import assert_close
from tests.host import jnp

ROWS, FEATURES, CLASSES = 7, 4, 9


def penalised_loss(logits, labels, label_weights, *, beta=0.1, where=None):
    rows = softlib.logits.labelled_rows(
        logits, labels, where=where, statistics=("mean_logit",)
    )
    mean = rows.statistics.mean_logit
    assert mean is not None
    entropy = rows.lse - mean
    weights = rows.at_labels(label_weights)
    return rows.finish(-weights * rows.log_prob - beta * entropy)


def arrays():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(ROWS, FEATURES)).astype("float32")
    weight = random.normal(size=(CLASSES, FEATURES)).astype("float32")
    hidden[1] = np.nan
    labels = np.array([0, 1, CLASSES, -1, 3, 4, 5])
    where = np.arange(ROWS) != 1
    exists = np.arange(CLASSES) != 3
    return hidden, weight, labels, where, exists


def logits_of(kind, hidden, weight, exists):
    if kind == "stored":
        return StoredLogits(hidden @ weight.T, class_where=exists)
    if kind == "columns":
        return LinearLogits(hidden, weight.T, vocab_axis=1, class_where=exists)
    return LinearLogits(hidden, weight, class_where=exists)


every = pytest.mark.parametrize("kind", ["linear", "columns", "stored"])


@every
def test_without_its_terms_it_is_cross_entropy_with_every_exception(kind):
    hidden, weight, labels, where, exists = map(jnp.asarray, arrays())
    ones = jnp.ones(CLASSES)

    @jax.jit
    def both(hidden, weight, exists):
        def total(hidden, weight):
            logits = logits_of(kind, hidden, weight, exists)
            own = penalised_loss(logits, labels, ones, beta=0.0, where=where)
            return jnp.where(jnp.isfinite(own), own, 0).sum(), own

        logits = logits_of(kind, hidden, weight, exists)
        wanted = losses.softmax_cross_entropy(logits, labels, where=where)
        return wanted, *jax.grad(total, (0, 1), has_aux=True)(hidden, weight)

    wanted, gradients, found = both(hidden, weight, exists)
    assert_close(found, wanted, dtype=jnp.float32, length=CLASSES)
    np.testing.assert_array_equal(np.asarray(found)[1:5], [0, np.nan, np.nan, np.inf])
    if kind == "stored":  # the product with NaN is the test's own
        gradients = gradients[:1]
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(np.asarray(gradients[0])[1:5], 0)
    nothing, _, of_nothing = both(hidden, weight, jnp.zeros(CLASSES, bool))
    np.testing.assert_array_equal(nothing, of_nothing)


@every
def test_values_are_those_of_the_formula(kind):
    hidden, weight, labels, where, exists = arrays()
    label_weights = np.linspace(0.5, 2, CLASSES).astype("float32")
    found = jax.jit(
        lambda h, w: penalised_loss(
            logits_of(kind, h, w, jnp.asarray(exists)),
            jnp.asarray(labels),
            jnp.asarray(label_weights),
            where=jnp.asarray(where),
        )
    )(hidden, weight)
    z = np.where(exists, hidden.astype(float) @ weight.T.astype(float), -np.inf)
    for row in (0, 5, 6):
        log_p = z[row] - np.log(np.exp(z[row][exists]).sum())
        entropy = -(np.exp(log_p[exists]) * log_p[exists]).sum()
        label = labels[row]
        wanted = -label_weights[label] * log_p[label] - 0.1 * entropy
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_function():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"^labelled_rows: `labels` must have shape"):
        softlib.logits.labelled_rows(logits, labels[:1])
    with pytest.raises(ValueError, match=r"^labelled_rows: `statistics` must"):
        softlib.logits.labelled_rows(logits, labels, statistics=("variance",))
    rows = softlib.logits.labelled_rows(logits, labels)
    with pytest.raises(
        ValueError, match=r"^labelled_rows: `per_class` must have shape"
    ):
        rows.at_labels(jnp.ones(2))


def test_the_page_ends_in_a_loss_of_eight_lines(repository):
    page = (repository / "docs/how-to/write-a-loss.md").read_text()
    (loss,) = re.findall(
        r"^def confidence_penalised_loss\(.*?\n(?:    .*\n)+", page, re.M
    )
    assert len(loss.splitlines()) <= 8
    assert "labelled_rows" in loss
