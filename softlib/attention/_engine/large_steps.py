"""Attention in steps for machines with large matrix units: GPUs and TPUs.

On a CPU the scores of a step stay in a cache. Here they pass through the memory of the
device, a step costs as much time as millions of scores, and products are fastest on
the dtypes of the arrays. So blocks are as large as the memory of a step allows and the
mask makes worthwhile, and bfloat16 and float16 operands are not cast: the sums are
float32, the weights of a step are rounded before the product with the values.

Nothing depends on the device itself: a program is the same for every GPU and TPU.
"""

import dataclasses
import math
from typing import Any

from softlib._symbolic import is_symbolic

from . import batch_heads as _batch_heads
from .plan import BlockPlan, plan_of
from .scores import Result
from .stream import BackwardOperands, Gradient
from .tiles import Operands, Options, narrowest_dtype

# Memory for the scores of a step, in all forms that exist together in a backward pass.
STEP_MIB = 768
# Products take two of these forms, in the dtype of the arrays; two are of the sums.
_OF_SUMS = _OF_PRODUCTS = 2
# Arrays of queries times keys, and of their cotangents, in attention over tuples.
_SPREAD = 3
# Scores that take as long as a step's launches, estimated for an H100: 10 launches of
# 3 us forward and 16 bytes a score at 3 TB/s, 20 launches and 28 bytes backward.
_STEP = 1 << 23
# A block reads and writes rows of features and of sums as well: as many bytes as so
# many scores, per query and per key.
_ROW = 64
_SIZES = tuple(1 << n for n in range(17, 6, -1))


def forward(options: Options, operands: Operands, copies: int) -> Result:
    return _batch_heads.forward(*_sized(options, operands, copies))


def backward(options: Options, given: BackwardOperands, copies: int) -> Gradient:
    options, operands = _sized(options, given.operands, copies)
    return _batch_heads.backward(options, given._replace(operands=operands))


def described(options: Options, operands: Operands) -> str:
    """The sizes of blocks and steps, as `explain` states them."""
    product = lambda sizes: " x ".join(map(str, sizes))
    own = product(operands.plan.blocks)
    options, operands = _sized(options, operands, 1)
    cut = _batch_heads.Cut.of(operands, options.step_scores)
    heads = cut.batch_step * cut.head_step * cut.groups
    return (
        f"blocks of {own} (queries x keys), on GPUs and TPUs of "
        f"{product(operands.plan.blocks)}, {heads} heads of the batch at a time"
    )


def _sized(
    options: Options, operands: Operands, copies: int
) -> tuple[Options, Operands]:
    """The options and operands with the steps of this file."""
    scores = step_scores(options, operands, copies)
    options = dataclasses.replace(options, step_scores=scores)
    plan: BlockPlan = operands.plan
    # The user chose the blocks; or combinations of keys fill blocks, which are few rows
    # of any one key axis.
    if options.has_given_blocks or operands.outer:
        return options, operands
    batch, _, heads, _ = operands.key.shape
    sizes = LargeBlocks(operands.groups, _known(batch) * heads, scores)
    plan = plan_of(
        plan.mask, plan.lengths, all_partial=operands.dense is not None, sizes=sizes
    )
    return options, operands._replace(plan=plan)


def step_scores(options: Options, operands: Operands, copies: int) -> int:
    """Number of scores of one step that `STEP_MIB` holds."""
    sums = operands.dtype.itemsize
    products = narrowest_dtype(options, operands).itemsize
    size = _OF_SUMS * sums + _OF_PRODUCTS * products
    if operands.outer:  # of every combination of keys there are rows of features too
        features = operands.query.shape[-1] + operands.key.shape[-1]
        size += math.ceil(_SPREAD * features * sums / operands.plan.blocks[-1])
    return (STEP_MIB << 20) // (size * _known(copies))


def _known(size: Any) -> int:
    return 1 if is_symbolic(size) else size


@dataclasses.dataclass(frozen=True)
class LargeBlocks:
    """Sizes of blocks to choose from, and what they cost.

    Attributes:
        groups: Query heads per key head, whose scores exist together.
        batch_heads: Number of key heads in all batch entries.
        scores: Most scores of one step.
    """

    groups: int
    batch_heads: int
    scores: int

    def candidates(
        self, lengths: tuple[int, ...], blocks: tuple[int | None, ...]
    ) -> list[tuple[int, ...]]:
        """Squares, the largest first, cut evenly out of each axis."""

        def fitted(size: int) -> tuple[int, ...]:
            return tuple(
                _even(size, length) if given is None else given
                for given, length in zip(blocks, lengths, strict=True)
            )

        every = list(dict.fromkeys(map(fitted, _SIZES)))
        fits = lambda sizes: self.groups * math.prod(sizes) <= self.scores
        return list(filter(fits, every)) or every[-1:]

    def cost(self, sizes: tuple[int, ...], visited: float, whole: float) -> float:
        """Number of scores that take as long; the blocks are those of one head."""
        block = self.groups * math.prod(sizes)
        rows = 1 + sum(_ROW / size for size in sizes)
        steps = math.ceil(self.batch_heads / max(1, self.scores // block))
        return visited * (block * self.batch_heads * rows + steps * _STEP)


def _even(size: int, length: int) -> int:
    """Length of the equal parts of an axis that are at most about `size`."""
    parts = max(1, -(-length // size))
    return max(8, -(-length // (8 * parts)) * 8)
