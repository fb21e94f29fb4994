"""Interleaved timing of compiled programs.

Machines drift: the clock rises and falls, other work comes and goes. So all programs of
a comparison run in turn in one process, ratios are taken within a round, and what is
reported is their median over the rounds with a distribution-free interval.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import psutil

# Threads of XLA's pool spin for 20 to 40 ms after a call and would take a core from
# whatever comes next.
PAUSE = 0.08
FEWEST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median over the rounds of one program's time by another's, and an interval.

    Attributes:
        median: Of the ratios within a round.
        low: Lower end of the sign interval of the median, an order statistic.
        high: Upper end.
        coverage: Probability that such an interval holds the true median.
    """

    median: float
    low: float
    high: float
    coverage: float


@dataclasses.dataclass(frozen=True)
class Turns:
    """Seconds of every round by program, and how many cores other processes used."""

    seconds: dict[str, list[float]]
    foreign_cores: float


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled program with its operands, ready to be called.

    Attributes:
        call: Runs it and waits for the result.
        temporary_bytes: Scratch memory of the program; operands and outputs do not
            count. None where the platform does not say.
    """

    call: Callable[[], Any]
    temporary_bytes: int | None


def prepare(program: Callable[..., Any], *arrays: Any) -> Prepared:
    """Compiles it and runs it once: the first call pays for its pages."""
    compiled = jax.jit(program).lower(*arrays).compile()
    call = lambda: jax.block_until_ready(compiled(*arrays))
    call()
    return Prepared(call, _temporary_bytes(compiled))


def temporary_bytes(program: Callable[..., Any], *shapes: Any) -> int | None:
    """Scratch memory of a program that is compiled for these shapes and not run."""
    return _temporary_bytes(jax.jit(program).lower(*shapes).compile())


def _temporary_bytes(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes if memory else None


def reason_of(error: Exception) -> str:
    """Why a program cannot run, in one line of a table."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    first = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first}".replace("|", "/")
    return text if len(text) <= 100 else f"{text[:97]}..."


# ------------------------------------------------------------------------------- timing
def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = math.inf,
    partner: Callable[[], Mapping[str, float]] | None = None,
    partner_process: int | None = None,
    pause: float = PAUSE,
    shuffled: bool = False,
) -> Turns:
    """Times the programs in turn; each has run before.

    Args:
        calls: Each runs a program and waits for its result.
        rounds: The most rounds.
        seconds: No further round starts once they are over, but three are run.
        partner: Runs the programs of another process and returns their seconds; it is
            asked once a round.
        partner_process: Its id, whose work is not foreign.
        pause: Seconds of rest after each program.
        shuffled: For short programs, which notice who ran before them: another order in
            every round instead of there and back.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    orders = random.Random(0)

    def round_of(names: Iterable[str]) -> None:
        for name in names:
            start = time.perf_counter()
            result = calls[name]()
            times[name].append(time.perf_counter() - start)
            del result
            time.sleep(pause)
        for name, value in (partner() if partner else {}).items():
            times.setdefault(name, []).append(value)

    time.sleep(pause)
    load = ForeignLoad([os.getpid(), *([partner_process] if partner_process else [])])
    start = time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        # There and back again: a drift within a round then favours nobody.
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        if shuffled:
            orders.shuffle(order)
        round_of(order)
    return Turns(times, load.cores())


class ForeignLoad:
    """How many cores processes other than the given ones use, from its making on."""

    def __init__(self, processes: Sequence[int]):
        self._processes = [psutil.Process(number) for number in processes]
        self._start = self._now()

    def cores(self) -> float:
        wall, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(busy - own, 0.0) / wall if wall else 0.0

    def _now(self) -> tuple[float, float, float]:
        system = psutil.cpu_times()
        idle = system.idle + getattr(system, "iowait", 0.0)
        # `user` and `nice` already hold what guests of this machine took.
        guests = getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)
        own = 0.0
        for process in self._processes:
            used = process.cpu_times()
            own += used.user + used.system
        return time.perf_counter(), sum(system) - idle - guests, own


# --------------------------------------------------------------------------- arithmetic
def ratio(own: Sequence[float], yardstick: Sequence[float]) -> Ratio:
    """Of times of the same rounds of one process."""
    ratios = [a / b for a, b in zip(own, yardstick, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios))


def median_interval(
    values: Sequence[float], level: float = 0.9
) -> tuple[float, float, float]:
    """The sign interval of the median: lower end, upper end, coverage.

    Order statistics k and n + 1 - k of n independent values miss the median with
    probability 2 P(Binomial(n, 1/2) < k), whatever the distribution. The narrowest that
    covers with the wanted probability is returned, or the range if none does.
    """
    n = len(values)
    ordered = sorted(values)
    coverage = lambda k: 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
    best = max(
        (k for k in range(1, (n + 1) // 2 + 1) if coverage(k) >= level), default=1
    )
    return ordered[best - 1], ordered[n - best], max(coverage(best), 0.0)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of the least-squares fit of log(values) = p log(sizes) + constant."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


# ------------------------------------------------------------------------------ machine
def machine() -> dict[str, str]:
    """What a table of measurements must say about where it was made."""
    versions = {"Python": platform.python_version()}
    for name in ("jax", "jaxlib", "optax", "softlib", "tokamax", "jax-cce"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": _processor() or jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "cores": str(_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str | None:
    """The name that Linux has for the processor, if that is what JAX runs on."""
    if jax.devices()[0].platform != "cpu" or not os.path.exists("/proc/cpuinfo"):
        return None
    with open("/proc/cpuinfo") as lines:
        found = (
            line.split(":", 1)[1].strip() for line in lines if "model name" in line
        )
        return next(found, None)
