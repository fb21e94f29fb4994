"""Reads the text of a compiled program: what runs, on which shapes, and how often."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0}
_CALLED = ("calls", "to_apply")
# Attributes of a conditional that name its branches.
BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's dtype, as XLA names it, its sizes, and where it lies.

    The memory space of a device's large memory is 0.
    """

    dtype: str
    sizes: tuple[int, ...]
    memory_space: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.ceil(self.count * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: Unique in the program.
        operation: Such as `dot` or `all-gather-start`.
        shapes: Of the arrays of its result.
        operands: Names of its operands.
        attributes: The rest of its text.
    """

    name: str
    operation: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    def called(self, *attributes: str) -> Iterator[str]:
        """Names of the computations that these attributes hold."""
        for attribute in attributes:
            pattern = rf"\b{attribute}=(?:\{{(.*?)\}}|(%?[\w.\-]+))"
            if found := re.search(pattern, self.attributes):
                yield from re.findall(r"[\w.\-]+", found[1] or found[2])

    def sizes(self, attribute: str) -> tuple[int, ...]:
        """Integers in braces, such as the contracting axes of a product."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction, the shapes of its operands, and how often it runs in a step."""

    instruction: Instruction
    operands: tuple[tuple[Shape, ...], ...]
    times: int

    @property
    def operand_bytes(self) -> int:
        return sum(shape.bytes for operand in self.operands for shape in operand)


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by name, and the name of the first to run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def of(cls, text: str) -> "Program":
        """Parses the text of `jax.stages.Compiled.as_text()`.

        Raises:
            ValueError: The text holds no program.
        """
        found: dict[str, tuple[Instruction, ...]] = {}
        entry = ""
        for head, lines in _computations(text):
            name = head.removeprefix("ENTRY ").lstrip("%")
            found[name] = tuple(map(_instruction, lines))
            entry = name if head.startswith("ENTRY") else entry
        if not entry:
            raise ValueError("the text holds no program: no computation is its ENTRY")
        return cls(found, entry)

    def steps(self, loop: Instruction) -> int | None:
        """The number of times that a loop runs; None if only the devices know.

        A compiler that does not write it down leaves a condition that compares a
        counter with a constant. A counter of JAX begins at 0.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known is not None:
            return int(known[1])
        (condition,) = loop.called("condition")
        compared = [i for i in self._inside(condition) if i.operation == "compare"]
        if len(compared) != 1 or "direction=LT" not in compared[0].attributes:
            return None
        numbers = [i for i in self._inside(condition) if i.operation == "constant"]
        limits = [i for i in numbers if i.name in compared[0].operands[1:]]
        return int(limits[0].operands[0]) if limits else None

    def _inside(self, name: str) -> Iterator[Instruction]:
        """The instructions of a computation and of its fusions."""
        for instruction in self.computations[name]:
            yield instruction
            if instruction.operation == "fusion":
                for inner in instruction.called("calls"):
                    yield from self._inside(inner)

    @functools.cached_property
    def unknown_loops(self) -> int:
        """Number of loops whose steps are data; their bodies count once."""
        return sum(
            i.operation == "while" and self.steps(i) is None
            for body in self.computations.values()
            for i in body
        )

    @functools.cached_property
    def kernels(self) -> int:
        """Number of calls of Pallas kernels in the text."""
        return sum(
            "mosaic_gpu" in i.attributes or "tpu_custom_call" in i.attributes
            for body in self.computations.values()
            for i in body
            if i.operation == "custom-call"
        )

    def runs(self, name: str = "", times: int = 1) -> Iterator[Run]:
        """Every instruction that runs; of branches, those of the largest.

        A loop has the instructions of its body for each of its steps. What is fused is
        visited as well.
        """
        body = self.computations[name or self.entry]
        shapes = {instruction.name: instruction.shapes for instruction in body}
        for instruction in body:
            operands = tuple(shapes.get(each, ()) for each in instruction.operands)
            yield Run(instruction, operands, times)
            if instruction.operation == "while":
                (inner,) = instruction.called("body")
                steps = self.steps(instruction)
                yield from self.runs(inner, times * (1 if steps is None else steps))
            elif instruction.operation == "conditional":
                branches = instruction.called(*BRANCHES)
                yield from self.runs(max(branches, key=self._weight), times)
            elif instruction.operation in ("fusion", "call", "async-start"):
                for inner in instruction.called(*_CALLED):
                    yield from self.runs(inner, times)

    def _weight(self, name: str) -> int:
        """How much a branch does: results of what can hold a product."""
        heavy = ("dot", "convolution", "custom-call", "fusion")
        return sum(
            run.times * shape.count
            for run in self.runs(name)
            if run.instruction.operation in heavy
            for shape in run.instruction.shapes
        )


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The head and the instructions of each; long instructions have several lines."""
    head, lines = "", []
    for line in text.splitlines():
        if found := re.match(r"((?:ENTRY )?%?[\w.\-]+) \(", line):
            head, lines = found[1], []
        elif line.startswith("}") and head:
            yield head, lines
            head = ""
        elif re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        elif lines:
            lines[-1] += line


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    rest = re.sub(r"/\*.*?\*/", "", rest)
    # A type has no spaces, unless it is a tuple.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    # Operands may be written with their types.
    operands = re.findall(r"%?([\w.\-]+)(?=,|$)", _flat(rest[start + 1 : stop]))
    return Instruction(
        name.lstrip("%"),
        rest[:start],
        tuple(_shapes(kind)),
        tuple(operands),
        rest[stop + 1 :],
    )


def _shapes(text: str) -> Iterator[Shape]:
    array = r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?"
    for dtype, sizes, space in re.findall(array, text):
        yield Shape(dtype, tuple(map(int, re.findall(r"\d+", sizes))), int(space or 0))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def _flat(operands: str) -> str:
    """Operands without their types, whose braces hold commas."""
    return re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", operands)
