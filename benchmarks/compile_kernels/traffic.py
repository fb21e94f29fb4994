"""Bytes between the memory of a device and its units, counted in a program's text.

Each instruction that runs reads its operands and writes its results. What stays inside
a fusion or a kernel does not count, nor what the compiler lays into another memory
space (vector memory of a TPU); caches are not modelled. Of an array that is only sliced
the slices are read, and an update of a part writes that part in place. A loop moves the
bytes of its body in each of its steps, once if only the device knows how many.
"""

import dataclasses
from collections.abc import Iterator

from .program import BRANCHES, Instruction, Program, Shape

# Instructions that only name memory.
FREE = frozenset(
    (
        *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier"),
        *("parameter", "partition-id", "replica-id", "tuple"),
    )
)
_SLICES = ("dynamic-slice", "gather", "slice")
# Fusions that run beside other work have a start and an end.
_FUSIONS = ("async-start", "fusion", "fusion-start")


def of_program(program: Program) -> int:
    """Bytes that the program reads and writes, from its start to its end."""
    return _Traffic(program).of(program.entry)


@dataclasses.dataclass(frozen=True)
class _Traffic:
    program: Program

    def of(self, name: str) -> int:
        """Bytes of a computation."""
        return sum(self._moved(name, each) for each in self.program.computations[name])

    def _moved(self, inside: str, instruction: Instruction) -> int:
        operation = instruction.operation
        if operation == "while":
            (body,) = instruction.called("body")
            steps = self.program.steps(instruction)
            return (1 if steps is None else steps) * self.of(body)
        if operation == "conditional":
            return max(map(self.of, instruction.called(*BRANCHES)))
        if operation == "call":
            return sum(map(self.of, instruction.called("to_apply")))
        if operation in FREE or operation.endswith("-done"):
            return 0
        if operation == "copy-start":
            return _bytes(instruction.shapes[:2])
        reads = [self._shapes(inside, name) for name in instruction.operands]
        if operation in _FUSIONS:
            (fused,) = instruction.called("calls")
            return self._of_fusion(fused, reads, instruction)
        if operation in _SLICES:
            return 2 * _bytes(instruction.shapes)
        if operation == "dynamic-update-slice":
            return 2 * _bytes(reads[1])
        return sum(map(_bytes, reads)) + _bytes(instruction.shapes)

    def _of_fusion(
        self, name: str, reads: list[tuple[Shape, ...]], instruction: Instruction
    ) -> int:
        body = self.program.computations[name]
        named = {int(i.operands[0]): i.name for i in body if i.operation == "parameter"}
        read = sum(
            min(_bytes(shapes), self._read(body, named[place]))
            for place, shapes in enumerate(reads)
        )
        written = list(self._written(body, body[-1]))
        if len(written) == len(instruction.shapes):
            # Results in another memory space cost nothing; inside they lie nowhere.
            pairs = zip(written, instruction.shapes, strict=True)
            written = [min(count, _bytes((shape,))) for count, shape in pairs]
        return read + sum(written)

    def _read(self, body: tuple[Instruction, ...], name: str) -> int:
        """Bytes that a fusion reads of one of its values."""
        read = 0
        for user in body:
            if name not in user.operands:
                continue
            if user.operation == "bitcast":
                read += self._read(body, user.name)
            elif user.operation in _SLICES and name == user.operands[0]:
                read += _bytes(user.shapes)
            elif user.operation == "dynamic-update-slice" and name == user.operands[0]:
                continue
            elif user.operation == "fusion":
                (fused,) = user.called("calls")
                inner = self.program.computations[fused]
                read += sum(
                    self._read(inner, each.name)
                    for each in inner
                    if each.operation == "parameter"
                    and user.operands[int(each.operands[0])] == name
                )
            else:
                found = next(each for each in body if each.name == name)
                return _bytes(found.shapes)
        return read

    def _written(
        self, body: tuple[Instruction, ...], result: Instruction
    ) -> Iterator[int]:
        """Bytes of each result of a fusion; of an update, those of the part."""
        by_name = {each.name: each for each in body}
        if result.operation == "tuple":
            for name in result.operands:
                yield from self._written(body, by_name[name])
        elif result.operation == "bitcast":
            yield from self._written(body, by_name[result.operands[0]])
        elif result.operation == "dynamic-update-slice":
            yield _bytes(by_name[result.operands[1]].shapes)
        elif result.operation == "fusion":
            (fused,) = result.called("calls")
            inner = self.program.computations[fused]
            yield from self._written(inner, inner[-1])
        else:
            yield from (_bytes((shape,)) for shape in result.shapes)

    def _shapes(self, inside: str, name: str) -> tuple[Shape, ...]:
        body = self.program.computations[inside]
        return next((each.shapes for each in body if each.name == name), ())


def _bytes(shapes: tuple[Shape, ...]) -> int:
    """The bytes of the arrays that lie in the large memory."""
    return sum(shape.bytes for shape in shapes if shape.memory_space == 0)
