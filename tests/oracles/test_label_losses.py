"""These oracles agree with complex steps, and with a definition that shares nothing."""

import numpy as np
import pytest

from tests.oracles import label_losses
from tests.oracles.label_losses import label_loss
from tests.oracles.weighted_cross_entropy import weighted_cross_entropy

STEP = 1e-40
PARAMETERS = {
    "focal": {"gamma": 1.5},
    "comp_sum": {"tau": 0.25},
    "generalized": {"q": 0.7},
    "absolute": {},
    "poly1": {"epsilon": 0.5},
    "symmetric": {"alpha": 0.3, "beta": 0.7, "log_zero": -4.0},
}


def problem():
    random = np.random.default_rng(0)
    arrays = {
        "hidden": random.normal(size=(2, 3, 4)),
        "weight": random.normal(size=(7, 4)),
        "bias": random.normal(size=7),
    }
    return random, arrays, np.arange(7) != 2


def check_slopes(call, gradients, changes, random):
    """`call(**{name: value})` has these gradients, by a complex step of each."""
    for name, value in changes.items():
        direction = random.normal(size=np.shape(value))
        loss = call(**{name: value + 1j * STEP * direction})
        slope = np.where(np.isfinite(loss), loss, 0).imag.sum() / STEP
        wanted = (gradients[name] * direction).sum()
        np.testing.assert_allclose(slope, wanted, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_of_label_losses(name):
    random, arrays, class_where = problem()
    labels = np.array([[0, 1, 3], [6, 4, -1]])  # one outside
    given = arrays | PARAMETERS[name] | {"class_weights": random.uniform(size=7)}
    loss = getattr(label_losses, name)

    def run(cotangent=None, **arguments):
        parameters = {n: arguments.pop(n) for n in PARAMETERS[name]}
        where = np.array([[True, True, False], [True, True, True]])
        options = {"class_where": class_where, "where": where}
        return label_loss(
            loss, labels, parameters, cotangent=cotangent, **options, **arguments
        )

    with np.errstate(invalid="ignore"):
        gradients = run(np.ones((2, 3)), **given).gradients
        call = lambda **change: run(**(given | change)).values["loss"]
        check_slopes(call, gradients, given, random)


@pytest.mark.parametrize(
    ("name", "change"), [("comp_sum", {"tau": 1.5}), ("generalized", {"q": 0.7})]
)
def test_slope_of_the_limit_for_a_label_on_no_class(name, change):
    _, arrays, class_where = problem()
    loss = getattr(label_losses, name)
    labels = np.full((2, 3), 2)  # not selected

    def run(parameters, **options):
        return label_loss(
            loss, labels, parameters, class_where=class_where, **options, **arrays
        )

    got = run(change, cotangent=np.ones((2, 3))).gradients
    moved = {n: value + 1j * STEP for n, value in change.items()}
    slope = run(moved).values["loss"].imag.sum() / STEP
    np.testing.assert_allclose(slope, got[next(iter(change))], rtol=1e-12)
    np.testing.assert_array_equal(got["weight"], 0)


def test_comp_sum_is_continuous_at_one():
    _, arrays, _ = problem()
    labels = np.zeros((2, 3), int)
    run = lambda tau: label_loss(
        label_losses.comp_sum,
        labels,
        {"tau": tau},
        cotangent=np.ones((2, 3)),
        **arrays,
    )
    one, near = run(1.0), run(1.0 + 1e-5)
    slope = one.gradients["tau"]
    np.testing.assert_allclose(near.gradients["tau"], slope, rtol=1e-4)
    gap = (near.values["loss"] - one.values["loss"]).sum() / 1e-5
    np.testing.assert_allclose(gap, slope, rtol=1e-4)


def test_gradients_of_weighted_cross_entropy():
    random, arrays, class_where = problem()
    given = {
        "target": random.uniform(size=(2, 3, 7)),
        "class_weights": random.uniform(size=7),
    }

    def run(target, **arguments):
        return weighted_cross_entropy(
            target * class_where,  # anything elsewhere costs infinity
            class_where=class_where,
            where=np.array([[True, True, False], [True, True, True]]),
            broken=np.array([[True, False, False], [False, False, False]]),
            label_smoothing=0.3,
            logsumexp_penalty=0.1,
            **arguments,
        )

    with np.errstate(invalid="ignore"):
        gradients = run(cotangent=np.ones((2, 3)), **arrays, **given).gradients
        gradients["target"] *= class_where
        call = lambda **change: run(**(arrays | given | change)).values["loss"]
        check_slopes(call, gradients, arrays | given, random)


def test_weighted_cross_entropy_is_a_sum_over_the_classes():
    """One row, spelled out."""
    z, a = np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.5, 1.0])
    log_p = z - np.log(np.exp(z).sum())
    smoothed = 0.8 * np.array([0.0, 1.0, 0.0]) + 0.2 / 3
    got = weighted_cross_entropy(
        np.eye(3)[[1]], class_weights=a, label_smoothing=0.2, logits=z[None]
    )
    np.testing.assert_allclose(got.values["loss"], [-(a * smoothed * log_p).sum()])
