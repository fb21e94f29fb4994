"""Floating-point operations of the matrix products of a compiled program."""

import math
import re
from collections.abc import Callable

from benchmarks.compile_kernels.program import Program, Run, Shape
from pallas_kernels._devices import H100
from pallas_kernels.gpu_mosaic.attention_tiles import (
    TILE,
    choose_backward_tiles,
    choose_tiles,
)


def of_program(program: Program) -> int:
    """Of a step on one device: two for each product of two numbers that is added."""
    return sum(run.times * _of(run) for run in program.runs())


def _of(run: Run) -> int:
    operation, text = run.instruction.operation, run.instruction.attributes
    if operation == "dot":
        return _product(run, run.instruction.sizes("lhs_contracting_dims"))
    if operation == "custom-call" and "__cublas$" in text:
        found = re.search(r'"lhs_contracting_dimensions":\[(.*?)\]', text)
        assert found is not None
        return _product(run, tuple(map(int, re.findall(r"\d+", found[1]))))
    if operation == "custom-call" and "mosaic_gpu" in text:
        return kernel(run)
    if operation == "convolution":
        raise ValueError("convolutions are not counted; TPU programs have these")
    return 0


def _product(run: Run, contracted: tuple[int, ...]) -> int:
    left = run.operands[0][0]
    length = math.prod(left.sizes[axis] for axis in contracted)
    return 2 * run.instruction.shapes[0].count * length


def kernel(run: Run) -> int:
    """Of a kernel for GPUs, by its name and the shapes of its operands.

    Raises:
        ValueError: The kernel is unknown.
    """
    found = re.search(r'op_name="[^"]*?(\w+)/mpmd_map"', run.instruction.attributes)
    name = found[1] if found else ""
    operands = [shapes[0] for shapes in run.operands]
    if name in _HEAD:
        return _HEAD[name](operands, run.instruction.shapes[0])
    if name in _ATTENTION:
        return _attention(name, operands)
    raise ValueError(f"how many operations does the kernel {name!r} have?")


# Products of the head: of the statistics all rows times all classes; those of gradients
# work on a slice of the classes, which is the width of the cotangents.
_HEAD: dict[str, Callable[[list[Shape], Shape], int]] = {
    "row_statistics_forward": lambda operands, result: (
        2 * operands[0].count * operands[1].sizes[0]
    ),
    "row_statistics_cotangent": lambda operands, result: (
        2 * result.count * operands[1].sizes[1]
    ),
    "row_statistics_hidden_gradient": lambda operands, result: (
        2 * operands[1].count * result.sizes[1]
    ),
    "row_statistics_weight_gradient": lambda operands, result: (
        2 * operands[1].count * result.sizes[1]
    ),
}
# Products of a tile of scores with features: of queries and keys, and of values.
_ATTENTION = {
    "block_sparse_attention": (1, 1),
    "attention_query_gradient": (2, 1),
    "attention_key_gradients": (2, 2),
}


def _attention(name: str, operands: list[Shape]) -> int:
    """Of the tiles in the list of the call, the last operand but one."""
    (batch, _, heads, features), values = operands[0].sizes, operands[2].sizes[-1]
    of_keys, of_values = _ATTENTION[name]
    if name == "block_sparse_attention":
        forward = choose_tiles(features, values, H100)
        side = forward.keys if forward else 0
    else:
        backward = choose_backward_tiles(features, values, H100)
        side = 0 if not backward else backward.keys
        if backward and name == "attention_key_gradients":
            side = backward.queries
    scores = operands[-2].count * TILE * side
    return 2 * batch * heads * scores * (of_keys * features + of_values * values)
