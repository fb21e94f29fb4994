"""The study of verified digits: a whole small run, its images and its rules."""

import numpy as np
from study.command_line import EXAMPLES
from verified_digits_study import digits, rules
from verified_digits_study.network import Seen

from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "verified_digits.py"


def test_run_accepts_and_draws(tmp_path):
    out, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    assert "SDM, calibrated" in printed
    assert (out / "report.png").is_file()
    findings = metrics["findings"]
    assert {*findings["accuracy"]} == {*digits.CONDITIONS}
    assert findings["accuracy"]["as in training"]["value"] > 0.2
    assert findings["accuracy"]["letters"]["value"] == 0
    for of_rule in findings["rules"].values():
        for name, numbers in of_rule.items():
            accepted, right = numbers["accepted"]["value"], numbers["right"]
            assert 0 <= numbers["wrong"]["value"] <= accepted <= 1
            assert (right is None) == (numbers["networks"] == 0)
            if name == "letters":
                assert numbers["wrong"]["value"] == accepted


def test_images_are_those_of_their_condition():
    fonts = digits.glyphs(digits.DIGITS)
    assert {*digits.HELD_OUT} < {*fonts}
    assert not {*digits.SYMBOLS} & {*fonts}
    usual = digits.draw(400, digits.CONDITIONS["as in training"], (0, 0))
    skewed = digits.draw(400, digits.CONDITIONS["1 and 7 frequent"], (0, 0))
    assert usual.pixels.shape == (400, digits.SIZE**2)
    assert np.isin(usual.labels, [1, 7]).mean() < 0.3 < 0.4
    assert np.isin(skewed.labels, [1, 7]).mean() > 0.4
    again = digits.draw(400, digits.CONDITIONS["as in training"], (0, 0))
    np.testing.assert_array_equal(again.pixels, usual.pixels)


def test_a_threshold_is_the_least_that_serves():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([True, True, False, True, False])
    assert rules.selective_threshold(confidence, right, 0.75) == 0.6
    assert rules.selective_threshold(confidence, right, 0.9) == 0.8
    assert rules.selective_threshold(confidence, ~right, 0.9) == np.inf


def test_conformal_sets_hold_the_label_as_often_as_promised():
    """Over new points of the same law, whatever is accepted."""
    random = np.random.default_rng(0)

    def seen(count):
        labels = random.integers(0, 10, count)
        logits = random.normal(size=(count, 10))
        logits[np.arange(count), labels] += 3
        none = jnp.zeros(count)
        return Seen(jnp.asarray(logits), none, none, none, none), labels

    known, labels = seen(3000)
    accepts = rules.conformal(known, labels, 0.9)
    new, truth = seen(3000)
    taken = accepts(new)
    wrong = (np.asarray(new.logits.argmax(-1)) != truth) & taken
    # A set of one class that is wrong does not hold the label.
    assert 0.3 < taken.mean() < 1
    assert wrong.mean() < 0.12


def test_the_temperature_is_the_one_that_was_used():
    random = np.random.default_rng(1)
    logits = 2 * random.normal(size=(4000, 10))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(10, p=row) for row in p])
    found = rules.fitted_temperature(2.5 * logits, labels)
    assert abs(found - 2.5) < 0.15
