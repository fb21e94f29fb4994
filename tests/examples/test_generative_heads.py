"""The study of heads: a whole small run, its laws and its digits."""

import numpy as np
from generative_heads_study import laws, session
from study.command_line import EXAMPLES

from tests.examples.smoke import complete_run


def test_run_counts_and_draws(tmp_path):
    script = EXAMPLES / "generative_heads.py"
    out, metrics, printed = complete_run(script, tmp_path / "smoke")
    assert "half noisy, naive Bayes" in printed
    assert (out / "report.png").is_file()
    assert len(metrics["findings"]["digits"]) == 4


def test_error_of_a_head_is_that_of_a_large_sample():
    law = laws.half_noisy(6)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 6)), rng.normal(size=2)
    x, labels = law.draw(rng, 1, 200_000)
    said = (x[0] @ weight.T + bias).argmax(1)
    wrong = (said != labels[0]).mean()
    np.testing.assert_allclose(law.error(weight, bias), wrong, atol=0.005)
    best = law.mean / law.scale**2
    head = np.stack([-best, best]) / 2
    np.testing.assert_allclose(law.error(head, np.zeros(2)), law.bayes_error())
    np.testing.assert_allclose(laws.even(50).bayes_error(), laws.BAYES_ERROR)


def test_digits_are_those_of_the_file():
    x, labels = session.read_digits(EXAMPLES / "data" / "digits.txt.xz")
    assert x.shape == (1797, 64)
    assert x.min() == 0
    assert x.max() == 16
    np.testing.assert_array_equal(np.unique(labels), range(10))
