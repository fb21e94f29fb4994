"""Interleaving, ratios within a round, their interval, and what others take."""

import collections
import itertools

import pytest

from benchmarks import measure
from tests.host import jnp


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9])
def test_the_interval_covers_the_median_as_often_as_it_says(n):
    low, high, coverage = measure.median_interval(range(n))
    # Each value lies above the median or below it, as a fair coin falls. The interval
    # from order statistic `low` to `high` holds it unless too few lie on one side.
    held = [
        low < below <= high for below in map(sum, itertools.product((0, 1), repeat=n))
    ]
    assert coverage == pytest.approx(sum(held) / 2**n)
    assert low == n - 1 - high


def test_the_interval_is_the_narrowest_that_reaches_the_level():
    assert measure.median_interval(range(9)) == (1, 7, pytest.approx(1 - 20 / 512))
    assert measure.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0, 0.75)
    assert measure.median_interval([5.0]) == (5.0, 5.0, 0.0)


def test_a_ratio_is_taken_within_a_round():
    # Something disturbed the second round, then half of the third: the ratio of the
    # medians would be 0.3.
    found = measure.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 10.0])
    assert (found.median, found.low, found.high) == (2.0, 0.3, 2.0)
    with pytest.raises(ValueError, match="longer"):
        measure.ratio([1.0], [1.0, 1.0])


def test_an_exponent_is_that_of_a_power():
    sizes = [8, 16, 32, 128]
    assert measure.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert measure.exponent(sizes, [7, 7, 7, 7]) == pytest.approx(0)


def test_programs_run_in_turn_there_and_back():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    partner = lambda: order.append("|") or {"other": 0.5}
    turns = measure.take_turns(calls, rounds=4, partner=partner, pause=0)
    assert "".join(order) == "abc|cba|abc|cba|"
    assert {name: len(times) for name, times in turns.seconds.items()} == {
        "a": 4,
        "b": 4,
        "c": 4,
        "other": 4,
    }
    assert turns.seconds["other"] == [0.5] * 4


def test_time_over_ends_the_rounds_after_the_third():
    turns = measure.take_turns({"a": lambda: None}, rounds=9, seconds=0, pause=0)
    assert len(turns.seconds["a"]) == measure.FEWEST_ROUNDS == 3


def test_foreign_load_is_what_neither_process_used(monkeypatch):
    System = collections.namedtuple("System", "user system idle iowait guest")
    Own = collections.namedtuple("Own", "user system")
    # In 10 s on two cores: 12 s busy, guests counted in `user`; 3 + 4 s were our own.
    system = iter([System(0, 0, 0, 0, 0), System(13, 1, 7, 1, 2)])
    own = {1: iter([Own(0, 0), Own(2, 1)]), 2: iter([Own(5, 0), Own(8, 1)])}
    clock = iter([0.0, 10.0])
    process = lambda number: collections.namedtuple("Process", "cpu_times")(
        lambda: next(own[number])
    )
    monkeypatch.setattr(measure.psutil, "cpu_times", lambda: next(system))
    monkeypatch.setattr(measure.psutil, "Process", process)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    # user 13 + system 1 is busy; guest 2 is part of user and not added again.
    assert measure.ForeignLoad([1, 2]).cores() == pytest.approx((14 - 7) / 10)


def test_a_program_runs_and_tells_its_memory():
    ready = measure.prepare(lambda x: jnp.exp(jnp.add.outer(x, x)).sum(), jnp.zeros(64))
    assert ready.call() == 64**2
    assert ready.temporary_bytes is not None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("x", name="tokamax"), "not installed: tokamax"),
        (ValueError("first | line\nsecond"), "ValueError: first / line"),
        (KeyError(), "KeyError: "),
    ],
)
def test_a_reason_fits_into_a_table(error, reason):
    assert measure.reason_of(error) == reason


def test_a_long_reason_is_cut():
    reason = measure.reason_of(ValueError("x" * 300))
    assert len(reason) == 100
    assert reason.endswith("...")


def test_the_machine_names_versions():
    known = measure.machine()
    assert {"device", "cores", "jax", "jaxlib", "softlib"} <= known.keys()
