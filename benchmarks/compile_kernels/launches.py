"""Steps and launches of a compiled GPU program, counted in its text.

Each instruction of the scheduled program is one launch of a kernel, except those that
only name memory; what runs beside other work is counted where it starts. A loop has the
launches of its body for each of its steps. Autotuning on a device may change the number
by one or two a step.
"""

import dataclasses
import re
from collections.abc import Iterator

# Instructions that launch nothing.
_FREE = frozenset(
    (
        *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier"),
        *("parameter", "partition-id", "replica-id", "tuple"),
    )
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program; in a loop inside another, the steps of one outer step.

    Attributes:
        steps: How often its body runs; None if the compiler does not know.
        launches: Of one step, those of loops inside included.
        is_innermost: Whether no loop is inside.
    """

    steps: int | None
    launches: int
    is_innermost: bool = True


@dataclasses.dataclass(frozen=True)
class Launches:
    """Launches of a whole program, and its loops, inner ones first.

    The body of a loop whose steps are unknown is counted once.
    """

    total: int
    loops: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    operation: str
    line: str

    def called(self, *attributes: str) -> Iterator[str]:
        """Names of the computations that these attributes hold."""
        for attribute in attributes:
            pattern = rf" {attribute}=(?:\{{(.*?)\}}|(%?[\w.\-]+))"
            if found := re.search(pattern, self.line):
                yield from re.findall(r"[\w.\-]+", found[1] or found[2])


def count(program: str) -> Launches:
    """Counts in the text of `jax.stages.Compiled.as_text()`."""
    bodies, entry = _computations(program)
    loops: list[Loop] = []

    def launches(name: str) -> int:
        return sum(map(of, bodies[name]))

    def of(instruction: _Instruction) -> int:
        operation = instruction.operation
        if operation == "while":
            (body,) = instruction.called("body")
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.line)
            before = len(loops)
            own = launches(body)
            loop = Loop(int(known[1]) if known else None, own, len(loops) == before)
            loops.append(loop)
            return (1 if loop.steps is None else loop.steps) * loop.launches
        if operation == "conditional":
            branches = instruction.called(
                "branch_computations", "true_computation", "false_computation"
            )
            return max(map(launches, branches))
        if operation == "call":
            return sum(map(launches, instruction.called("to_apply")))
        return int(operation not in _FREE and not operation.endswith("-done"))

    total = launches(entry)
    return Launches(total, tuple(loops))


def _computations(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of each computation, and the name of the first to run."""
    bodies: dict[str, list[_Instruction]] = {}
    entry = name = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)", line):
            # The type of a result may be a tuple, with comments that number its parts.
            rest = re.sub(r"/\*.*?\*/", "", found[1])
            while rest.startswith("("):
                rest = re.sub(r"\([^()]*\)", "", rest, count=1)
            operation = re.search(r"(?:^| )([a-z][\w\-]*)\(", rest)
            if name and operation:
                bodies[name].append(_Instruction(operation[1], line))
    if not entry:
        raise ValueError("the text holds no program: no computation is its ENTRY")
    return bodies, entry
