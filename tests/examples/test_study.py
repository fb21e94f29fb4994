"""What experiments share: intervals that cover, results that keep what they were."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from study import intervals, results


def test_intervals_hold_the_true_value_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = intervals.bootstrap(rng.exponential(size=60), draws=200)
        held += found.low <= 1.0 <= found.high
    # 95 % less what the percentile method lacks at 60 skewed samples, +- 3 deviations.
    assert 0.86 <= held / 200 <= 0.99


def test_samples_of_one_item_are_drawn_together():
    scores = np.arange(40.0)
    found = intervals.bootstrap(
        scores, 2 * scores, statistic=lambda one, two: float(two.mean() / one.mean())
    )
    np.testing.assert_allclose([found.value, found.low, found.high], 2.0, rtol=1e-12)


def test_draws_without_a_value_count_for_nothing():
    found = intervals.bootstrap(
        np.array([1.0, 2.0, 3.0]),
        statistic=lambda some: float("nan") if some.min() == 3 else float(some.mean()),
    )
    assert np.isfinite([found.low, found.high]).all()


def test_one_sample_has_a_value_and_no_interval():
    found = intervals.bootstrap(np.array([3.0]))
    assert found.value == 3.0
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(intervals.of_seeds(np.array([3.0])).low)


def test_the_interval_over_seeds_is_that_of_student():
    # The 97.5 % point of Student's t with 4 degrees of freedom is 2.776445.
    found = intervals.of_seeds(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.776445 * np.sqrt(2.5 / 5)
    np.testing.assert_allclose([found.low, found.high], [3 - half, 3 + half], rtol=1e-6)
    alike = intervals.of_seeds(np.ones(5))
    assert (alike.low, alike.high) == (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class _Options:
    out: pathlib.Path
    seeds: int = 5


def test_a_result_is_read_as_it_was_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    found = {"auroc": intervals.of_seeds(np.array([0.5, 0.75])), "curve": np.arange(3)}
    results.record(tmp_path, _Options(tmp_path), found, results.Watch())
    (tmp_path / "metrics.json").rename(tmp_path / "some.json")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    read = results.load("some")
    assert read["settings"] == {"seeds": 5}
    assert read["findings"]["auroc"]["value"] == 0.625
    assert read["findings"]["curve"] == [0, 1, 2]
    assert {"jax", "python"} <= read["versions"].keys()
    assert str(tmp_path) not in json.dumps(read)
