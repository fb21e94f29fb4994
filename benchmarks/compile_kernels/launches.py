"""Steps and launches of a compiled GPU program, counted in its text.

Each instruction of the scheduled program is one launch of a kernel, except those that
only name memory; what runs beside other work is counted where it starts. A loop has the
launches of its body for each of its steps. Autotuning on a device may change the number
by one or two a step.
"""

import dataclasses

from .program import BRANCHES, Instruction, Program
from .traffic import FREE


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program; in a loop inside another, the steps of one outer step.

    Attributes:
        steps: How often its body runs; None if the compiler does not know.
        launches: Of one step, those of loops inside included; 0 on a TPU.
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


def count(text: str) -> Launches:
    """Counts in the text of `jax.stages.Compiled.as_text()`."""
    program = Program.of(text)
    loops: list[Loop] = []

    def launches(name: str) -> int:
        return sum(map(of, program.computations[name]))

    def of(instruction: Instruction) -> int:
        operation = instruction.operation
        if operation == "while":
            (body,) = instruction.called("body")
            before = len(loops)
            own = launches(body)
            loop = Loop(program.steps(instruction), own, len(loops) == before)
            loops.append(loop)
            return (1 if loop.steps is None else loop.steps) * loop.launches
        if operation == "conditional":
            return max(map(launches, instruction.called(*BRANCHES)))
        if operation == "call":
            return sum(map(launches, instruction.called("to_apply")))
        return int(operation not in FREE and not operation.endswith("-done"))

    total = launches(program.entry)
    return Launches(total, tuple(loops))
