"""What was compiled, as a line, as a page and as numbers."""

import dataclasses
import itertools
import json
from collections.abc import Sequence

from .case import Case
from .compiled import Compiled, Kernel


def to_json(everything: Sequence[Compiled]) -> str:
    values = [dataclasses.asdict(compiled) for compiled in everything]
    return json.dumps(values, indent=1) + "\n"


def from_json(text: str) -> list[Compiled]:
    return [Compiled.of(values) for values in json.loads(text)]


def row(compiled: Compiled) -> str:
    """A line of the terminal."""
    head = f"{compiled.target:6} {compiled.family}: {compiled.name}"
    if compiled.error is not None:
        return f"{head}\n       {compiled.error}"
    lines = [f"{head}, {byte_count(compiled.temp_bytes)} of temporaries"]
    lines += [f"       {exchanges}"] if (exchanges := _exchanges(compiled)) else []
    lines += [f"       {loops}"] if (loops := _loops(compiled)) else []
    for kernel in compiled.kernels:
        facts = dataclasses.asdict(kernel) | {"memory": byte_count(kernel.memory_bytes)}
        del facts["memory_bytes"], facts["name"]
        shown = ", ".join(f"{key} {value}" for key, value in facts.items() if value)
        lines.append(f"       {kernel.name}: {shown}")
    return "\n".join(lines)


HEADING = "<!-- Written by `make kernels ARGS=--write`; do not edit. -->"


def markdown(cases: Sequence[Case], everything: Sequence[Compiled]) -> str:
    """A table for each family: a line for each kernel on each target."""
    parts = [HEADING]
    by_key = {compiled.key: compiled for compiled in everything}
    cases = [case for case in cases if not case.sizes]
    for family, of_family in itertools.groupby(cases, lambda case: case.family):
        lines = [
            "| program | target | temporaries | of naive | kernel | memory | registers "
            "| matrix | all | spills |",
            "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for case in of_family:
            for target in case.targets:
                found = by_key.get((family, case.name, target))
                lines += [] if found is None else _lines(case, found)
        parts += [f"### {family.capitalize()}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _lines(case: Case, compiled: Compiled) -> list[str]:
    if compiled.error is not None:
        reason = compiled.error.splitlines()[0][:100]
        return [f"| {case.name} | {compiled.target} | {reason} | | | | | | | |"]
    share = "-"
    if case.naive_bytes:
        share = f"{compiled.temp_bytes / case.naive_bytes:.2%}"
    temporaries = byte_count(compiled.temp_bytes)
    name = case.name
    if loops := _loops(compiled):
        name += f": {loops}"
    if case.division is not None:
        name += f": {_exchanges(compiled) or 'no exchange'}"
    head = f"| {name} | {compiled.target} | {temporaries} | {share}"
    lines = [f"{head} | {_cells(kernel)} |" for kernel in compiled.kernels]
    return lines or [f"{head} | none | | | | | |"]


def _cells(kernel: Kernel) -> str:
    cells = (
        f"`{kernel.name}`",
        byte_count(kernel.memory_bytes),
        kernel.registers or "-",
        kernel.matrix_instructions,
        kernel.instructions,
        kernel.spills,
    )
    return " | ".join(map(str, cells))


def _exchanges(compiled: Compiled) -> str:
    """Between devices: how many of which."""
    return ", ".join(f"{count} {name}" for name, count in compiled.collectives.items())


def _loops(compiled: Compiled) -> str:
    """Launches in all, steps and launches a step of each loop, and bytes moved."""
    if not compiled.moved_bytes:
        return ""
    facts = [f"{compiled.launches} launches"] if compiled.launches else []
    for loop in compiled.loops:
        of = f" of {loop.launches}" if loop.launches else ""
        facts.append(f"{loop.steps} steps{of}")
    return ", ".join([*facts, f"{byte_count(compiled.moved_bytes)} moved"])


def byte_count(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
