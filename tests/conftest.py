"""What every test shares: devices, strictness, and the account of the time spent."""

import gc
import inspect
import os
import pathlib
from typing import Any

# Threads of XLA's pool, read when JAX starts. A collective blocks one thread per device
# until all have come, and two may be under way: with too few they wait for ever.
os.environ.setdefault("NPROC", "64")

import hypothesis
import jax
import jaxtyping
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import time_budget, type_checks
from tests.selection_hooks import (
    pytest_addoption as pytest_addoption,
    pytest_collection_modifyitems as pytest_collection_modifyitems,
    pytest_configure as pytest_configure,
    pytest_report_header as pytest_report_header,
    pytest_runtest_setup as pytest_runtest_setup,
)

assert type_checks  # pyproject.toml names its function

# Set before the first use of a device. Float32 stays the default: a test that needs
# float64 asks for it with `jax.enable_x64()`, so that the default path is tested too.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, so a deadline would measure XLA. The same
# examples on every run: a failure in one place can be repeated in another.
hypothesis.settings.register_profile(
    "softlib",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("softlib")


@pytest.fixture
def untyped():
    """Turns the runtime type checker off, to reach the errors that users see."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch):
    """Functions from `tests.compiled` run operation by operation after all."""
    # By its name: what is imported above this has no checked annotations.
    monkeypatch.setattr("tests.compiled.ENABLED", False)


@pytest.fixture(autouse=True)
def batteries_are_eager(request: pytest.FixtureRequest):
    """`check_transformations` compares compiled calls with eager ones."""
    if "check_transformations" in inspect.unwrap(request.function).__code__.co_names:
        request.getfixturevalue("eager")


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The folder that holds pyproject.toml."""
    return pathlib.Path(__file__).parent.parent


def pytest_collection_finish() -> None:
    """Modules stay, and so do most programs: to walk them often took a sixth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


class Scheduler(LoadScopeScheduling):
    """Test by test, but the tests of an example stay in one process.

    They share its runs through fixtures of their module, which two processes would each
    make.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.startswith("tests/examples/") else nodeid


@pytest.hookimpl(optionalhook=True)  # absent with `-p no:xdist`
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    # Under xdist the reports of all workers arrive here, in the controlling process.
    reports = [
        report
        for group in terminalreporter.stats.values()
        for report in group
        if isinstance(report, pytest.TestReport)
    ]
    table = pathlib.Path(__file__).with_name("time_budget.toml").read_text()
    spent = time_budget.seconds_by_package((r.nodeid, r.duration) for r in reports)
    if spent:
        terminalreporter.section("test time by package")
        for line in time_budget.lines(spent, time_budget.parse(table)):
            terminalreporter.write_line(line)
