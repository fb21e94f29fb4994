"""Attention of many batch entries and heads, a few of them at a time.

A lane is one key head of one batch entry, with the query heads that read it. The tiles
of all lanes of a step exist together, so steps take as many as keep a tile of scores in
a cache: scratch memory does not grow with the batch, and blocks can be large. How many
lanes that are depends on the machine: a tile that is large enough is a step of its own
on a few cores.
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
# On a few cores the products of one lane are as fast as they get when its tile has
# _LARGE scores: XLA's products of several matrices of that size at once take 1.4 times
# as long as one after the other, and their scores leave the cache between its passes.
_LARGE, _LARGE_STEP = 1 << 12, 1 << 14
# Scores of whole blocks that are masked, too, rather than visited in a loop of their
# own: that takes a fraction of a millisecond on one core, compiling a loop a hundred.
MASKED = 1 << 18


def forward(options: Options, operands: Operands) -> Result:
    operands = _in_few_loops(operands)
    cut = Cut.of(operands)
    if cut.is_one_step:
        return _stream.forward(options, operands)
    # Results of a step are put where they belong: stacked, all would be copied again.
    wanted = _result(options, operands)

    def step(i: Array, total: Result) -> Result:
        found = _stream.forward(options, cut.operands(operands, i))
        return jax.tree.map(lambda x, part: cut.placed(x, part, i), total, found)

    return lax.fori_loop(0, cut.steps, step, match_varying(wanted, operands.query))


def backward(options: Options, given: BackwardOperands) -> Gradient:
    operands = _in_few_loops(given.operands)
    given, cut = given._replace(operands=operands), Cut.of(operands)
    if cut.is_one_step:
        return _stream.backward(options, given)
    wide = dataclasses.replace(options, wide_gradients=True)

    def step(i: Array, total: Gradient) -> Gradient:
        found = _stream.backward(wide, cut.backward_operands(given, i))
        # Several lanes may share a part of the bias and a sink.
        shared = cut.added((total.bias, total.sinks), (found.bias, found.sinks), i)
        total, found = (x._replace(bias=None, sinks=None) for x in (total, found))
        total = jax.tree.map(lambda x, part: cut.placed(x, part, i), total, found)
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
    """Zeros, as many as there are results."""
    rows = operands.query.shape[:-1]
    zeros = lambda dtype, *features: jnp.zeros((*rows, *features), dtype)
    value = operands.value
    return Result(
        None if value is None else zeros(options.out_dtype, value.shape[-1]),
        zeros(operands.dtype),
        zeros(operands.dtype) if options.kind.keeps_max else None,
    )


class Cut(NamedTuple):
    """How lanes are divided: whole batch entries, or some heads of one.

    The entries (heads) of a step are spread evenly over the axis, so that an axis that
    is divided over devices stays so: each of them works on entries of its own in every
    step, and none is moved.

    Attributes:
        batch: Batch entries in all.
        heads: Key heads in all.
        groups: Query heads per key head.
        batch_step: Batch entries of a step.
        head_step: Key heads of a step.
    """

    batch: int
    heads: int
    groups: int
    batch_step: int
    head_step: int

    @classmethod
    def of(cls, operands: Operands) -> "Cut":
        batch, _, heads, _ = operands.key.shape
        lanes = _lanes_of_step(operands.groups * math.prod(operands.plan.blocks))
        if is_symbolic(batch):  # one entry at a time, whatever their number
            head_step = _divisor(heads, lanes)
            return cls(batch, heads, operands.groups, 1, head_step)
        devices = device_count(operands.key)
        # An even division over devices is one by a divisor of both numbers.
        batch_step = math.gcd(batch, devices)
        lanes = lanes * devices // batch_step
        head_step = _divisor(heads, lanes, math.gcd(heads, devices))
        if head_step == heads:
            batch_step = _divisor(batch, lanes * batch_step // heads, batch_step)
        return cls(batch, heads, operands.groups, batch_step, head_step)

    @property
    def is_one_step(self) -> bool:
        return not is_symbolic(self.batch) and self.steps <= 1  # 0 without entries

    @property
    def steps(self) -> int:
        return (self.batch // self.batch_step) * (self.heads // self.head_step)

    def operands(self, whole: Operands, i: Array) -> Operands:
        part = lambda x: self._part(x, i, 0, 2)
        return Operands(
            part(whole.query),
            part(whole.key),
            None if whole.value is None else part(whole.value),
            dataclasses.replace(whole.plan, mask=self._mask(whole.plan.mask, i)),
            None if whole.dense is None else self._part(whole.dense, i, 0, 1),
            None if whole.bias is None else self._part(whole.bias, i, 0, 1),
            None if whole.sinks is None else self._part(whole.sinks, i, None, 0),
            tuple(map(part, whole.rows)),
            jax.tree.map(part, whole.outer),
        )

    def backward_operands(self, whole: BackwardOperands, i: Array) -> BackwardOperands:
        part: Any = lambda x: None if x is None else self._part(x, i, 0, 2)
        return BackwardOperands(self.operands(whole.operands, i), *map(part, whole[1:]))

    def placed(self, total: Array, part: Array, i: Array) -> Array:
        """`total`, (B, length, heads, ...), with what a step found in its place."""
        view = self._view(total, 0, 2)
        part = part.astype(total.dtype).reshape(view.sizes)
        parts = total.reshape(view.shape)
        parts = lax.dynamic_update_slice(parts, part, view.start(i), **IN_RANGE)
        return parts.reshape(total.shape)

    def added(self, total: Any, found: Any, i: Array) -> Any:
        """Adds what a step found to (bias, sinks), where its lanes lie in them."""
        (bias, sinks), (bias_part, sinks_part) = total, found
        if bias is not None:
            bias = self._added(bias, bias_part, i, 0, 1)
        if sinks is not None:
            sinks = self._added(sinks, sinks_part, i, None, 0)
        return bias, sinks

    def _part(self, x: Array, i: Array, batch: int | None, heads: int | None) -> Array:
        """Of a step, with these axes of batch entries and of heads (query or key)."""
        view = self._view(x, batch, heads)
        x, start = x.reshape(view.shape), view.start(i)
        return lax.dynamic_slice(x, start, view.sizes, **IN_RANGE).reshape(view.part)

    def _added(
        self, total: Array, part: Array, i: Array, batch: int | None, heads: int | None
    ) -> Array:
        """Adds a part, in its place."""
        view = self._view(total, batch, heads)
        parts, start = total.reshape(view.shape), view.start(i)
        part = part.reshape(view.sizes)
        part = lax.dynamic_slice(parts, start, view.sizes, **IN_RANGE) + part
        parts = lax.dynamic_update_slice(parts, part, start, **IN_RANGE)
        return parts.reshape(total.shape)

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
        parts = [
            self._part(jnp.asarray(leaf), i, 0, None) if jnp.ndim(leaf) > rank else leaf
            for leaf, rank in zip(leaves, mask._leaf_ranks(), strict=True)
        ]
        return jax.tree.unflatten(structure, parts)


class _View:
    """An array whose steps have axes of their own."""

    def __init__(self):
        self.shape: list[int] = []
        self.sizes: list[int] = []  # of a slice
        self.part: list[int] = []  # the slice in the axes of the array
        self._starts: list[Any] = []

    def add(self, size: int, steps: int = 1, group: int = 1, at: Any = None) -> None:
        """An axis of `size * steps * group` entries; `at(i)` is where step i lies."""
        self.shape += [size, steps, group]
        self.sizes += [size, 1, group]
        self.part.append(size * group)
        self._starts += [None, at, None]

    def start(self, i: Array) -> list[Any]:
        return [jnp.zeros_like(i) if at is None else at(i) for at in self._starts]


def _in_few_loops(operands: Operands) -> Operands:
    """The operands, with few whole blocks listed among those that need the mask."""
    plan, (batch, _, heads, _) = operands.plan, operands.query.shape
    whole, partial = (blocks.shape[-1] for blocks in (plan.whole, plan.partial))
    if not whole or not partial or plan.counts is not None or is_symbolic(batch):
        return operands
    if whole * batch * heads * math.prod(plan.blocks) > MASKED:
        return operands
    return operands._replace(plan=plan.in_one_list())


def _lanes_of_step(tile: int) -> int:
    """Number of lanes that one step takes, if each has a tile of `tile` scores."""
    scores = SCORES
    if tile >= _LARGE and has_few_cores():
        scores = min(SCORES, _LARGE_STEP)
    return scores // tile


def _divisor(number: int, most: int, of: int = 1) -> int:
    """The largest divisor of `number` of at most `most` that is a multiple of `of`.

    At least `of`, which divides `number`.
    """
    candidates = range(min(number, most) // of * of, of, -of)
    return next((d for d in candidates if number % d == 0), of)
