"""Calibration of similarity-distance-magnitude outputs, against loops in float64."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy import optimize

from softlib.estimation import fit_sdm_calibration, sdm_estimate
from softlib.testing import assert_close
from tests.host import jnp

POINTS, CLASSES, LEVEL = 90, 3, 0.8


def problem(seed=0, points=POINTS, dtype="float64") -> Any:
    """Outputs of which the likelier a class the more often it is true; some are odd."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(0.4 * np.ones(CLASSES), points)
    labels = np.array([random.choice(CLASSES, p=row) for row in p])
    q = random.integers(0, 40, points)
    where = np.ones(points, bool)
    if points > 6:
        p[4], labels[5], where[6] = np.nan, CLASSES, False
    return (
        jnp.asarray(p, dtype),
        jnp.asarray(q),
        jnp.asarray(labels),
        jnp.asarray(where),
    )


class Oracle:
    """The definitions, point by point."""

    def __init__(self, p, q, labels, where, l2):
        p, q, labels = (np.asarray(a, np.float64) for a in (p, q, labels))
        keep = np.asarray(where) & (labels < CLASSES) & ~np.isnan(p).any(1)
        self.p, self.q, self.labels = p[keep], q[keep], labels[keep].astype(int)
        self.outputs = [self.p[self.labels == c, c] for c in range(CLASSES)]
        found = [self.quantiles(row) for row in self.p]
        self.v = np.array(found)
        self.rescaled = np.array(
            [
                self.rescale(v, row.argmax(), q)
                for v, row, q in zip(self.v, self.p, self.q, strict=True)
            ]
        )
        eye = np.eye(CLASSES)

        def loss(x):
            w, total = x.reshape(CLASSES, CLASSES), 0.0
            for v, q, y in zip(self.v, self.rescaled, self.labels, strict=True):
                total -= np.log(self.output(w, v, q)[y]) / np.log(2 + q)
            return total / len(self.v) + l2 / 2 * np.sum((w - eye) ** 2)

        self.loss = loss
        found = optimize.minimize(loss, eye.ravel(), method="BFGS", tol=1e-9)
        self.weight = found.x.reshape(CLASSES, CLASSES)

    def quantiles(self, row):
        return np.array([(self.outputs[c] < row[c]).mean() for c in range(CLASSES)])

    def rescale(self, v, prediction, q):
        return v[prediction] * np.log(2 + q)

    def output(self, w, v, rescaled):
        power = (2 + rescaled) ** (w @ v)
        return power / power.sum()

    def thresholds(self, weight, level):
        """By trying every similarity, from the least on."""
        o = np.array(
            [
                self.output(weight, v, q)[y]
                for v, q, y in zip(self.v, self.rescaled, self.labels, strict=True)
            ]
        )
        for least in sorted({*self.rescaled}):
            inside = [
                np.sort(o[(self.rescaled >= least) & (self.labels == c)])
                for c in range(CLASSES)
            ]
            if all(
                (own < level).sum() <= (1 - level) * len(own) + 1e-9 for own in inside
            ):
                skip = [int((1 - level) * len(own) + 1e-9) for own in inside]
                at = zip(inside, skip, strict=True)
                return least, [own[k] if len(own) else np.inf for own, k in at]
        return np.inf, [np.inf] * CLASSES

    def estimate(self, weight, row, q, level):
        v, prediction = self.quantiles(row), row.argmax()
        rescaled = self.rescale(v, prediction, q)
        edge = np.zeros(CLASSES)
        for c in range(CLASSES):
            n = (self.rescaled[self.labels == c] < rescaled).sum()
            radius = min(1, np.sqrt(np.log(2 / (1 - level)) / (2 * n))) if n else 1
            edge[c] = v[c] - radius if c == prediction else v[c] + radius
        edge = np.clip(edge, 0, 1)
        least = self.rescale(edge, prediction, q)
        return (
            prediction,
            self.output(weight, v, rescaled),
            self.output(weight, edge, least)[prediction],
            rescaled,
            least,
        )


def test_matches_the_definition():
    """Quantiles, the convex fit, thresholds, and estimates of other points."""
    with jax.enable_x64():
        p, q, labels, where = problem()
        oracle = Oracle(p, q, labels, where, 1e-2)
        fit = jax.jit(fit_sdm_calibration, static_argnames="max_steps")(
            p, q, labels, level=LEVEL, l2=1e-2, where=where
        )
        new, similarity, _, _ = problem(1, 25)
        found = jax.jit(sdm_estimate)(fit, new, similarity)
        assert fit.counts.tolist() == [len(own) for own in oracle.outputs]
        for c, own in enumerate(oracle.outputs):
            assert_close(
                fit.outputs[c, : len(own)], np.sort(own), dtype=p.dtype, length=1
            )
            assert np.isinf(fit.outputs[c, len(own) :]).all()
        # SciPy's derivatives are differences.
        np.testing.assert_allclose(fit.weight, oracle.weight, atol=2e-5)
        weight = np.asarray(fit.weight)
        assert oracle.loss(weight.ravel()) <= oracle.loss(oracle.weight.ravel())
        least, thresholds = oracle.thresholds(weight, LEVEL)
        assert np.isfinite(least)
        assert_close(fit.least_similarity, least, dtype=p.dtype, length=CLASSES)
        assert_close(fit.thresholds, np.array(thresholds), dtype=p.dtype, length=9)
        for i, (row, of_row) in enumerate(
            zip(np.asarray(new), similarity, strict=True)
        ):
            if np.isnan(row).any():
                assert np.isnan(found.lower[i])
                assert np.isnan(found.probabilities[i]).all()
                assert not found.accepted[i]
                continue
            wanted = oracle.estimate(weight, row, float(of_row), LEVEL)
            actual = (a[i] for a in found[:-1])
            for one, other in zip(actual, wanted, strict=True):
                assert_close(one, other, dtype=p.dtype, length=CLASSES)
            fine = wanted[2] >= thresholds[wanted[0]] and wanted[4] >= least
            assert found.accepted[i] == fine


def test_what_is_accepted_is_right_as_often_as_wanted():
    """Over calibration sets and new points of one law; most are not accepted."""
    right = []

    @jax.jit
    def run(p, q, labels, new, similarity):
        fit = fit_sdm_calibration(p, q, labels, level=0.9)
        return sdm_estimate(fit, new, similarity)

    for seed in range(12):
        p, _, labels, _ = problem(2 * seed, 400, "float32")
        new, _, truth, _ = problem(2 * seed + 1, 400, "float32")
        # The depth of agreement is larger where the model is surer.
        depth = lambda p: jnp.nan_to_num(100 * p.max(-1) ** 4).astype(int)
        found = run(p, depth(p), labels, new, depth(new))
        right += (found.predictions == truth)[found.accepted].tolist()
    assert len(right) > 200
    assert np.mean(right) > 0.9


def test_edges_accept_nothing():
    """No point, a class without points, and no similarity that serves."""
    fit = fit_sdm_calibration(jnp.zeros((0, 2)), jnp.zeros(0, int), jnp.zeros(0, int))
    assert np.isinf(fit.least_similarity)
    assert np.isinf(fit.thresholds).all()
    assert (fit.weight == jnp.eye(2)).all()
    found = sdm_estimate(fit, jnp.array([0.9, 0.1]), jnp.array(1000))
    assert not found.accepted
    assert_close(found.lower, 1 / 3, dtype=jnp.float32, length=1)
    p, q, labels, _ = problem(dtype="float32")
    without = fit_sdm_calibration(p, q, jnp.where(labels == 1, CLASSES, labels))
    assert without.counts[1] == 0
    assert np.isinf(without.thresholds[1])
    wrong = fit_sdm_calibration(p, q, (jnp.nan_to_num(p).argmax(-1) + 1) % CLASSES)
    assert not sdm_estimate(wrong, p, q).accepted.any()
    negative = sdm_estimate(fit, jnp.array([0.9, 0.1]), jnp.array(-1))
    assert np.isnan(negative.lower)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"probabilities": np.ones(3, "float32")}, ValueError, "`probabilities` must"),
        ({"labels": np.ones(5)}, TypeError, "`labels` must"),
        ({"labels": np.ones(5, int)}, ValueError, "`labels` must"),
        ({"similarity": np.ones(5, int)}, ValueError, "`similarity` must"),
        ({"level": 1.5}, ValueError, "`level` must"),
        ({"l2": 0.0}, ValueError, "`l2` must"),
        ({"max_steps": 0}, ValueError, "`max_steps` must"),
        ({"where": np.ones(5, bool)}, ValueError, "`where` must"),
    ],
)
def test_errors_name_the_argument(changed, error, text):
    names = ("probabilities", "similarity", "labels")
    arguments = dict(zip(names, problem(dtype="float32"), strict=False)) | changed
    with pytest.raises(error, match=f"^fit_sdm_calibration: {text}"):
        fit_sdm_calibration(**arguments)


@pytest.mark.usefixtures("untyped")
def test_errors_of_an_estimate():
    fit = fit_sdm_calibration(*problem(dtype="float32")[:3])
    cases: list[Any] = [
        (np.ones((2, 4), "float32"), np.ones(2), fit, ValueError),
        (np.ones((2, 3), "float32"), np.ones(3), fit, ValueError),
        (np.ones((2, 3), "float32"), np.ones(2), None, TypeError),
    ]
    for p, q, calibration, error in cases:
        with pytest.raises(error, match=r"^sdm_estimate: `"):
            sdm_estimate(calibration, p, q)
