"""Interleaved timing of compiled programs.

Machines drift: the clock rises and falls, other work comes and goes. So all programs of
a comparison run in turn in one process, ratios are taken within a round, and their
median and range over the rounds are what is reported.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jaxlib


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One program of a comparison.

    Attributes:
        name: Its name.
        seconds: Median time of a call.
        ratio: Median over the rounds of its time by the time of the first program.
        lowest: Least ratio of a round.
        highest: Greatest ratio of a round.
        temporary_bytes: Scratch memory of the compiled program; outputs do not count.
    """

    name: str
    seconds: float
    ratio: float
    lowest: float
    highest: float
    temporary_bytes: int


def compare(
    programs: Mapping[str, Callable[..., Any]], *arrays: jax.Array, rounds: int
) -> list[Measurement]:
    """Compiles the programs and times them in turn; the first one is the yardstick."""
    compiled = {
        name: jax.jit(program).lower(*arrays).compile()
        for name, program in programs.items()
    }
    for program in compiled.values():
        jax.block_until_ready(program(*arrays))  # the first call pays for its pages
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, program in compiled.items():
            start = time.perf_counter()
            result = jax.block_until_ready(program(*arrays))
            times[name].append(time.perf_counter() - start)
            del result
    yardstick = times[next(iter(times))]
    found = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, yardstick, strict=True)]
        memory = compiled[name].memory_analysis()
        found.append(
            Measurement(
                name,
                statistics.median(own),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                memory.temp_size_in_bytes if memory else 0,
            )
        )
    return found


def machine() -> str:
    """What a table of measurements must say about where it was made."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    device = jax.devices()[0].device_kind
    return (
        f"{device}, {os.cpu_count()} cores ({platform.machine()}){load}; "
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"Python {platform.python_version()}"
    )
