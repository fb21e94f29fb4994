"""Sums the duration of tests by package and compares it with `time_budget.toml`.

A slow package is reported, never failed: how fast a machine runs is no property of the
code. Seconds are summed over the processes of the suite.
"""

import collections
import pathlib
import tomllib
from collections.abc import Iterable, Mapping

REPOSITORY = "(repository)"  # tests that lie in tests/ itself


def parse(table: str) -> dict[str, float]:
    return {name: float(value) for name, value in tomllib.loads(table).items()}


def package_of(nodeid: str) -> str:
    """`tests/losses/test_x.py::test_y` belongs to `losses`."""
    folders = pathlib.PurePosixPath(nodeid.partition("::")[0]).parts[:-1]
    return folders[1] if len(folders) > 1 else REPOSITORY


def seconds_by_package(durations: Iterable[tuple[str, float]]) -> dict[str, float]:
    spent: dict[str, float] = collections.defaultdict(float)
    for nodeid, seconds in durations:
        spent[package_of(nodeid)] += seconds
    return dict(spent)


def lines(spent: Mapping[str, float], budget: Mapping[str, float]) -> list[str]:
    """One line per package, the most expensive first, and the total."""
    width = max(map(len, [*spent, "total"]))
    written = []
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        limit = budget.get(name)
        if limit is None:
            verdict = "without a budget: add it to tests/time_budget.toml"
        elif seconds > limit:
            verdict = f"of {limit:.0f} s: OVER BUDGET"
        else:
            verdict = f"of {limit:.0f} s"
        written.append(f"{name:{width}} {seconds:8.1f} s {verdict}")
    total, allowed = sum(spent.values()), sum(budget.values())
    written.append(f"{'total':{width}} {total:8.1f} s of {allowed:.0f} s")
    return written
