"""Attention of many batch entries and heads, a few of them at a time.

A batch head is one key head of one batch entry, with the query heads that read it. The
tiles of all batch heads of a step exist together, so a step takes as many as keep their
scores in the cache: scratch memory does not grow with the batch, and blocks can be
large. The number depends on the machine: with few cores a large tile is a step alone.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from softlib._sharding import device_count, match_varying
from softlib._symbolic import is_symbolic

from . import stream as _stream
from .host import has_few_cores
from .scores import Result
from .stream import BackwardOperands, Gradient
from .tiles import IN_RANGE, Operands, Options

# Scores of one step.
SCORES = 1 << 20
# On few cores the products of one batch head are fastest when its tile has _LARGE
# scores: XLA's batched products of matrices of that size take 1.4 times as long as one
# after the other, and their scores leave the cache between its passes.
_LARGE, _LARGE_STEP = 1 << 12, 1 << 14
# Up to this number of scores whole blocks are masked too instead of having a loop of
# their own: masking takes less than a millisecond on one core, compiling a loop 100.
MASKED = 1 << 18


def forward(options: Options, operands: Operands) -> Result:
    operands = _in_few_loops(options, operands)
    cut = Cut.of(operands, options.step_scores)
    if cut.is_one_step:
        return _stream.forward(options, operands)
    # Steps write into the result: stacked results would all be copied again.
    wanted = _result(options, operands)

    def step(i: Array, total: Result) -> Result:
        found = _stream.forward(options, cut.operands(operands, i))
        return jax.tree.map(lambda x, new: cut.written(x, new, i), total, found)

    return lax.fori_loop(0, cut.steps, step, match_varying(wanted, operands.query))


def backward(options: Options, given: BackwardOperands) -> Gradient:
    operands = _in_few_loops(options, given.operands)
    given = given._replace(operands=operands)
    cut = Cut.of(operands, options.step_scores)
    if cut.is_one_step:
        return _stream.backward(options, given)
    wide = dataclasses.replace(options, wide_gradients=True)

    def step(i: Array, total: Gradient) -> Gradient:
        found = _stream.backward(wide, cut.backward_operands(given, i))
        # Several batch heads may share a slice of the bias and a sink.
        shared = cut.added((total.bias, total.sinks), (found.bias, found.sinks), i)
        total, found = (x._replace(bias=None, sinks=None) for x in (total, found))
        total = jax.tree.map(lambda x, new: cut.written(x, new, i), total, found)
        return total._replace(bias=shared[0], sinks=shared[1])

    like = Gradient(
        *(operands.query, operands.key, operands.value),
        *(operands.bias, operands.sinks, operands.rows, operands.outer),
    )
    zeros = lambda x: jnp.zeros(x.shape, operands.dtype)
    narrow = lambda x: jnp.zeros(x.shape, x.dtype)
    total = jax.tree.map(zeros if options.wide_gradients else narrow, like)
    shared = jax.tree.map(zeros, (operands.bias, operands.sinks))
    total = total._replace(bias=shared[0], sinks=shared[1])
    total = lax.fori_loop(0, cut.steps, step, match_varying(total, operands.query))
    if options.wide_gradients:
        return total
    return jax.tree.map(lambda x, y: x.astype(y.dtype), total, like)


def _result(options: Options, operands: Operands) -> Result:
    """Zeros in the shapes of the result."""
    rows = operands.query.shape[:-1]
    zeros = lambda dtype, *features: jnp.zeros((*rows, *features), dtype)
    value = operands.value
    return Result(
        None if value is None else zeros(options.out_dtype, value.shape[-1]),
        zeros(operands.dtype),
        zeros(operands.dtype) if options.kind.keeps_max else None,
    )


class Cut(NamedTuple):
    """The division of batch heads into steps: whole batch entries, or heads of one.

    The entries (heads) of a step are spread evenly over the axis: so an axis that is
    divided over devices stays divided, and every device works on its own in each step.

    Attributes:
        batch: Number of batch entries.
        heads: Number of key heads.
        groups: Query heads per key head.
        batch_step: Batch entries per step.
        head_step: Key heads per step.
    """

    batch: int
    heads: int
    groups: int
    batch_step: int
    head_step: int

    @classmethod
    def of(cls, operands: Operands, scores: int | None = None) -> "Cut":
        """Steps of at most so many scores; None is for the cache of a CPU."""
        batch, _, heads, _ = operands.key.shape
        tile = operands.groups * math.prod(operands.plan.blocks)
        most = _batch_heads_on_cpu(tile) if scores is None else scores // tile
        if is_symbolic(batch):  # one entry at a time, whatever their number
            head_step = _divisor(heads, most)
            return cls(batch, heads, operands.groups, 1, head_step)
        devices = device_count(operands.key)
        # The axes divide over devices evenly: by a divisor of both numbers.
        batch_step = math.gcd(batch, devices)
        most = most * devices // batch_step
        head_step = _divisor(heads, most, math.gcd(heads, devices))
        if head_step == heads:
            batch_step = _divisor(batch, most * batch_step // heads, batch_step)
        return cls(batch, heads, operands.groups, batch_step, head_step)

    @property
    def is_one_step(self) -> bool:
        return not is_symbolic(self.batch) and self.steps <= 1  # 0 without entries

    @property
    def steps(self) -> int:
        return (self.batch // self.batch_step) * (self.heads // self.head_step)

    def operands(self, whole: Operands, i: Array) -> Operands:
        cut = lambda x: self._slice(x, i, 0, 2)
        return Operands(
            cut(whole.query),
            cut(whole.key),
            None if whole.value is None else cut(whole.value),
            dataclasses.replace(whole.plan, mask=self._mask(whole.plan.mask, i)),
            None if whole.dense is None else self._slice(whole.dense, i, 0, 1),
            None if whole.bias is None else self._slice(whole.bias, i, 0, 1),
            None if whole.sinks is None else self._slice(whole.sinks, i, None, 0),
            tuple(map(cut, whole.rows)),
            jax.tree.map(cut, whole.outer),
        )

    def backward_operands(self, whole: BackwardOperands, i: Array) -> BackwardOperands:
        cut: Any = lambda x: None if x is None else self._slice(x, i, 0, 2)
        return BackwardOperands(self.operands(whole.operands, i), *map(cut, whole[1:]))

    def written(self, total: Array, new: Array, i: Array) -> Array:
        """`total`, (B, length, heads, ...), with the slice of step i replaced."""
        view = self._view(total, 0, 2)
        new = new.astype(total.dtype).reshape(view.sizes)
        steps = total.reshape(view.shape)
        steps = lax.dynamic_update_slice(steps, new, view.start(i), **IN_RANGE)
        return steps.reshape(total.shape)

    def added(self, total: Any, found: Any, i: Array) -> Any:
        """Adds the bias and sinks that step i found to its slices of the totals."""
        (bias, sinks), (new_bias, new_sinks) = total, found
        if bias is not None:
            bias = self._added(bias, new_bias, i, 0, 1)
        if sinks is not None:
            sinks = self._added(sinks, new_sinks, i, None, 0)
        return bias, sinks

    def _slice(self, x: Array, i: Array, batch: int | None, heads: int | None) -> Array:
        """The slice of step i; `batch` and `heads` (query or key) are axes of `x`."""
        view = self._view(x, batch, heads)
        x, start = x.reshape(view.shape), view.start(i)
        return lax.dynamic_slice(x, start, view.sizes, **IN_RANGE).reshape(view.sliced)

    def _added(
        self, total: Array, new: Array, i: Array, batch: int | None, heads: int | None
    ) -> Array:
        """Adds to the slice of step i."""
        view = self._view(total, batch, heads)
        steps, start = total.reshape(view.shape), view.start(i)
        new = new.reshape(view.sizes)
        new = lax.dynamic_slice(steps, start, view.sizes, **IN_RANGE) + new
        steps = lax.dynamic_update_slice(steps, new, start, **IN_RANGE)
        return steps.reshape(total.shape)

    def _view(self, x: Array, batch: int | None, heads: int | None) -> "_View":
        head_steps = self.heads // self.head_step
        view = _View()
        for axis, size in enumerate(x.shape):
            # An axis of length 1 is shared.
            if axis == batch and size != 1:
                steps = size // self.batch_step
                at = lambda i: lax.div(i, i.dtype.type(head_steps))
                view.add(self.batch_step, steps, 1, at)
            elif axis == heads and size > 1:
                group = size // self.heads
                at = lambda i: lax.rem(i, i.dtype.type(head_steps))
                view.add(self.head_step, head_steps, group, at)
            else:
                view.add(size)
        return view

    def _mask(self, mask: Any, i: Array) -> Any:
        leaves, structure = jax.tree.flatten(mask)
        leaves = [
            self._slice(jnp.asarray(x), i, 0, None) if jnp.ndim(x) > rank else x
            for x, rank in zip(leaves, mask._leaf_ranks(), strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)


class _View:
    """The shape of an array with separate axes for the steps."""

    def __init__(self):
        self.shape: list[int] = []
        self.sizes: list[int] = []  # of a slice
        self.sliced: list[int] = []  # shape of the slice in the axes of the array
        self._starts: list[Any] = []

    def add(self, size: int, steps: int = 1, group: int = 1, at: Any = None) -> None:
        """Adds an axis of `size * steps * group`; step i has the index `at(i)`."""
        self.shape += [size, steps, group]
        self.sizes += [size, 1, group]
        self.sliced.append(size * group)
        self._starts += [None, at, None]

    def start(self, i: Array) -> list[Any]:
        return [jnp.zeros_like(i) if at is None else at(i) for at in self._starts]


def _in_few_loops(options: Options, operands: Operands) -> Operands:
    """The operands; if whole blocks are few they join the list that is masked."""
    plan, (batch, _, heads, _) = operands.plan, operands.query.shape
    whole, partial = (blocks.shape[-1] for blocks in (plan.whole, plan.partial))
    if not whole or not partial or plan.counts is not None or is_symbolic(batch):
        return operands
    most = MASKED if options.step_scores is None else options.step_scores
    if whole * batch * heads * math.prod(plan.blocks) > most:
        return operands
    return operands._replace(plan=plan.in_one_list())


def _batch_heads_on_cpu(tile: int) -> int:
    """Number of batch heads per step, if each has a tile of `tile` scores."""
    scores = SCORES
    if tile >= _LARGE and has_few_cores():
        scores = min(SCORES, _LARGE_STEP)
    return scores // tile


def _divisor(number: int, most: int, of: int = 1) -> int:
    """The largest divisor of `number` up to `most` that `of` divides; at least `of`."""
    candidates = range(min(number, most) // of * of, of, -of)
    return next((d for d in candidates if number % d == 0), of)
