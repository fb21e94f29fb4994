"""Options of pytest, and its hooks, that make it run what `selection` selects."""

import time

import pytest

from tests import long_tests, selection

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("selection", "which cases run (tests/selection.py)")
    options.addoption(
        "--every",
        type=int,
        default=1,
        help="of a test with several cases run one in so many, and at least one for "
        "each value of a parameter; of tests that take long some run in turns",
    )
    options.addoption(
        "--one-in",
        type=int,
        default=1,
        help="of the tests of a file run one in so many",
    )
    options.addoption(
        "--offset",
        type=int,
        help="which ones; by default the number of commits, 0 without git",
    )
    options.addoption(
        "--slice",
        type=int,
        help="run one in so many of the cases that are not selected, slow ones too",
    )
    options.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="skip the tests that have not started so many seconds after the run has",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Processes of xdist are started with the options as they are then: they agree.
    if config.option.offset is None:
        config.option.offset = selection.commits(config.rootpath)


def pytest_report_header(config: pytest.Config) -> str | None:
    option = config.option
    if option.slice:
        taken = f"one in {option.slice} of the cases that one in {option.every} leaves"
    elif option.every > 1 or option.one_in > 1:
        taken = f"one case in {option.every} of one test in {option.one_in}"
    else:
        return None
    return f"selection: {taken}, offset {option.offset} (--offset, OFFSET= of make)"


@pytest.hookimpl(trylast=True)  # after `-m` and `-k`
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    option = config.option
    by_name = {item.nodeid: item for item in items}
    long = long_tests.read(long_tests.TABLE.read_text())
    sampled, slow = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)  # of a test with parameters
        entry = long_tests.entry(item.nodeid)
        turns = long_tests.turns(entry, long[entry]) if entry in long else None
        parameters = callspec.params if callspec else {}
        case = selection.case(item.nodeid, parameters, turns, entry)
        if option.slice and item.get_closest_marker("slow"):
            slow.append(case)
        else:
            sampled.append(case)
    chosen = selection.select(sampled, option.every, option.offset, option.one_in)
    if option.slice:
        left_out = [*slow, *sorted({*sampled} - {*chosen}, key=lambda case: case.name)]
        chosen = selection.slice_of(left_out, option.slice, option.offset)
        kept = [by_name[case.name] for case in chosen]
    else:
        names = {case.name for case in chosen}
        kept = [item for item in items if item.nodeid in names]
    if left := [item for item in items if item not in {*kept}]:
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.option.seconds
    if time.monotonic() - STARTED > seconds:
        pytest.skip(f"{seconds:g} seconds are over")
