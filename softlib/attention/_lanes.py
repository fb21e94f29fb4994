"""Attention of many batch entries and heads, a few of them at a time.

A lane is one key head of one batch entry, with the query heads that read it. The tiles
of all lanes of a step exist together, so steps take as many as keep a tile of scores in
a cache: scratch memory does not grow with the batch, and blocks can be large.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from softlib._sharding import match_varying

from . import _stream
from ._scores import Result
from ._stream import BackwardOperands, Gradient
from ._tiles import Operands, Options

# Scores of one step.
SCORES = 1 << 20


def forward(options: Options, operands: Operands) -> Result:
    cut = Cut.of(operands)
    if cut.steps <= 1:  # 0 without batch entries
        return _stream.forward(options, operands)
    part = lambda i: _stream.forward(options, cut.operands(operands, i))
    found = lax.map(part, jnp.arange(cut.steps))
    return jax.tree.map(cut.joined, found)


def backward(options: Options, given: BackwardOperands) -> Gradient:
    operands, cut = given.operands, Cut.of(given.operands)
    if cut.steps <= 1:  # 0 without batch entries
        return _stream.backward(options, given)
    wide = dataclasses.replace(options, wide_gradients=True)

    def step(shared: Any, i: Array) -> tuple[Any, Gradient]:
        found = _stream.backward(wide, cut.backward_operands(given, i))
        # Several lanes may share a part of the bias and a sink.
        shared = cut.added(shared, (found.bias, found.sinks), i)
        return shared, found._replace(bias=None, sinks=None)

    zeros = [
        None if x is None else jnp.zeros(x.shape, operands.dtype)
        for x in (operands.bias, operands.sinks)
    ]
    zeros = match_varying(tuple(zeros), operands.query)
    (bias, sinks), found = lax.scan(step, zeros, jnp.arange(cut.steps))
    found = jax.tree.map(cut.joined, found)._replace(bias=bias, sinks=sinks)
    if options.wide_gradients:
        return found
    like = Gradient(
        *(operands.query, operands.key, operands.value),
        *(operands.bias, operands.sinks, operands.rows, operands.outer),
    )
    return jax.tree.map(lambda x, y: x.astype(y.dtype), found, like)


class Cut(NamedTuple):
    """How lanes are divided: whole batch entries, or some heads of one.

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
        lanes = SCORES // (operands.groups * math.prod(operands.plan.blocks))
        head_step = _divisor(heads, lanes)
        batch_step = _divisor(batch, lanes // heads) if head_step == heads else 1
        return cls(batch, heads, operands.groups, batch_step, head_step)

    @property
    def steps(self) -> int:
        return (self.batch // self.batch_step) * (self.heads // self.head_step)

    def operands(self, whole: Operands, i: Array) -> Operands:
        return Operands(
            self._rows(whole.query, i),
            self._keys(whole.key, i),
            None if whole.value is None else self._keys(whole.value, i),
            dataclasses.replace(whole.plan, mask=self._mask(whole.plan.mask, i)),
            None if whole.dense is None else self._pairs(whole.dense, i),
            None if whole.bias is None else self._pairs(whole.bias, i),
            None if whole.sinks is None else self._heads(whole.sinks, i, 0),
            tuple(self._rows(row, i) for row in whole.rows),
            jax.tree.map(lambda x: self._keys(x, i), whole.outer),
        )

    def backward_operands(self, whole: BackwardOperands, i: Array) -> BackwardOperands:
        rows = lambda x: None if x is None else self._rows(x, i)
        return BackwardOperands(
            self.operands(whole.operands, i),
            rows(whole.out),
            self._rows(whole.normalizer, i),
            rows(whole.out_cotangent),
            self._rows(whole.normalizer_cotangent, i),
        )

    def joined(self, x: Array) -> Array:
        """(steps, batch_step, length, some heads, ...) -> (B, length, heads, ...)."""
        _, batch_step, length, heads, *features = x.shape
        steps = (self.batch // self.batch_step, self.heads // self.head_step)
        x = x.reshape(*steps, batch_step, length, heads, *features)
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(self.batch, length, steps[1] * heads, *features)

    def added(self, total: Any, found: Any, i: Array) -> Any:
        """Adds what a step found to (bias, sinks), where its lanes lie in them."""
        (bias, sinks), (bias_part, sinks_part) = total, found
        if bias is not None:
            start = [*self._start_of_pairs(bias, i), 0, 0]
            before = lax.dynamic_slice(bias, start, bias_part.shape)
            bias = lax.dynamic_update_slice(bias, before + bias_part, start)
        if sinks is not None:
            before = self._heads(sinks, i, 0)
            start = self._first_head(i) * self.groups
            sinks = lax.dynamic_update_slice_in_dim(
                sinks, before + sinks_part, start, 0
            )
        return bias, sinks

    def _first_batch(self, i: Array) -> Array:
        return i // (self.heads // self.head_step) * self.batch_step

    def _first_head(self, i: Array) -> Array:
        return i % (self.heads // self.head_step) * self.head_step

    def _batch(self, x: Array, i: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, self._first_batch(i), self.batch_step, 0)

    def _heads(self, x: Array, i: Array, axis: int) -> Array:
        """Of query heads."""
        start, size = self._first_head(i) * self.groups, self.head_step * self.groups
        return lax.dynamic_slice_in_dim(x, start, size, axis)

    def _rows(self, x: Array, i: Array) -> Array:
        return self._heads(self._batch(x, i), i, 2)

    def _keys(self, x: Array, i: Array) -> Array:
        start = self._first_head(i)
        return lax.dynamic_slice_in_dim(self._batch(x, i), start, self.head_step, 2)

    def _pairs(self, x: Array, i: Array) -> Array:
        """An axis of length 1 is shared."""
        x = self._batch(x, i) if x.shape[0] > 1 else x
        return self._heads(x, i, 1) if x.shape[1] > 1 else x

    def _start_of_pairs(self, x: Array, i: Array) -> list[Any]:
        return [
            self._first_batch(i) if x.shape[0] > 1 else 0,
            self._first_head(i) * self.groups if x.shape[1] > 1 else 0,
        ]

    def _mask(self, mask: Any, i: Array) -> Any:
        leaves, structure = jax.tree.flatten(mask)
        parts = [
            self._batch(jnp.asarray(leaf), i) if jnp.ndim(leaf) > rank else leaf
            for leaf, rank in zip(leaves, mask._leaf_ranks(), strict=True)
        ]
        return jax.tree.unflatten(structure, parts)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; at least 1."""
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)
