"""Writes the table of `docs/kernels.md`: what each public function runs on each device.

It asks `softlib.explain` about the calls in `scripts.operations`, with gradients where
they have any. No device is needed.

    python -m scripts.operations_table  # after a change of what kernels take
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import softlib
from softlib import ExplainedOperation

from .operations import Call, calls

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs/kernels.md"
BEGIN = "<!-- Written by scripts/operations_table.py from what explain says. -->\n"
END = "<!-- End of what scripts/operations_table.py has written. -->\n"

# Names of devices for `explain`, and of the columns.
DEVICES = {
    "cpu": "CPU",
    "a100": "A100",
    "h100": "H100",
    "b200": "B200",
    "v5e": "v5e",
    "v6e": "v6e",
    "tpu7x": "7x",
}
_WORDS = {
    "pallas_tpu": "kernel",
    "pallas_gpu": "kernel",
    "cudnn": "cuDNN",
    "xla": "plain",
    "xla_blocks": "plain",
    "reference": "plain",
}
# Reasons that hold for all of a device or of an operation: the page says them once.
_SAID_ONCE = re.compile(r"it is written for |this version has no ")


@dataclasses.dataclass(frozen=True)
class Passes:
    """What runs for the value of a call alone, and what its gradient adds."""

    forward: tuple[ExplainedOperation, ...]
    backward: tuple[ExplainedOperation, ...] | None

    @property
    def cell(self) -> str:
        forward = _words(self.forward)
        if self.backward is None or _words(self.backward) == forward:
            return forward
        return f"{forward} / {_words(self.backward)}"

    @property
    def reasons(self) -> list[str]:
        """Why what comes first does not run; of the gradient if it differs."""
        further = self.backward if "/" in self.cell else None
        shown = [*self.forward, *(further or ())]
        given = [why for operation in shown for why in operation.refused.values()]
        return [why for why in dict.fromkeys(given) if not _SAID_ONCE.match(why)]


def passes(call: Call, device: str) -> Passes:
    """What runs on the device."""
    learned = {name: call.arrays[name] for name in call.learned}
    given = {name: x for name, x in call.arrays.items() if name not in learned}

    def total(learned: Any, given: Any) -> Any:
        return _total(call.function(**learned, **given))

    with softlib.implementations():  # whatever the environment prefers
        forward = softlib.explain(total, learned, given, device=device).operations
        if not learned:
            return Passes(forward, None)
        both = softlib.explain(jax.grad(total), learned, given, device=device)
    known = {operation.operation for operation in forward}
    added = tuple(o for o in both.operations if o.operation not in known)
    return Passes(forward, added)


def line(call: Call) -> str:
    """The call's line of the table."""
    cells: list[str] = []
    devices_of: dict[str, list[str]] = {}
    for device, name in DEVICES.items():
        found = passes(call, device)
        cells.append(found.cell)
        for why in found.reasons:
            devices_of.setdefault(why, []).append(name)
    reasons = [f"{', '.join(names)}: {why}" for why, names in devices_of.items()]
    return f"| {' | '.join([call.name, *cells, '; '.join(reasons)])} |"


def table() -> str:
    return "\n".join(_lines()) + "\n"


def with_table(page: str) -> str:
    """Returns the text of the page with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has no place for the table"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _lines() -> Iterator[str]:
    heads = ["function", *DEVICES.values(), "why not what comes first"]
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(['---'] * len(heads))} |"
    family = None
    for call in calls():
        if call.family != family:
            family = call.family
            yield f"| **{family}** |{' |' * (len(heads) - 1)}"
        yield line(call)


def _words(operations: tuple[ExplainedOperation, ...]) -> str:
    """What runs the operations; JAX itself where there is none."""
    names = [name for operation in operations for name in operation.runs.values()]
    return " + ".join(sorted({_WORDS[name] for name in names})) or "plain"


def _total(tree: Any) -> Any:
    """The sum of all numbers, so that every array of the result is asked for."""
    return sum(
        leaf.astype(jnp.float32).sum()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.number)
    )


def main() -> int:
    PAGE.write_text(with_table(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
