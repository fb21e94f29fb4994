"""Tables of sizes of tiles: what the compilers say of each, and what the model says."""

import itertools
from collections.abc import Sequence

from .case import Case
from .compiled import Compiled
from .report import HEADING, byte_count


def markdown(cases: Sequence[Case], everything: Sequence[Compiled]) -> str:
    """A table for each swept kernel: a line for each size, a column for each target."""
    found = {compiled.key: compiled for compiled in everything}
    swept = [case for case in cases if case.sizes]
    parts = [HEADING]
    title = lambda case: case.name.removesuffix(case.sizes).rstrip(", ")
    for name, group in itertools.groupby(swept, title):
        same = list(group)
        targets = list(dict.fromkeys(t for case in same for t in case.targets))
        lines = [
            f"| {name} | {' | '.join(targets)} |",
            f"| --- |{' --- |' * len(targets)}",
        ]
        for case in same:
            cells = [
                _cell(found.get((case.family, case.name, target))) for target in targets
            ]
            lines.append(f"| {case.sizes} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(compiled: Compiled | None) -> str:
    if compiled is None:
        return "-"
    if compiled.error is not None:
        short = "no memory" if "VmemOom" in compiled.error else "refused"
        return short if "RESOURCE" not in compiled.error else "no memory"
    (kernel,) = compiled.kernels
    spills = f", **{kernel.spills} spilled**" if kernel.spills else ""
    return f"{byte_count(kernel.memory_bytes)}{spills}"
