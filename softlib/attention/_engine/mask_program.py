"""A mask as kernels evaluate it: arithmetic per pair, on numbers given per position.

Kernels cannot gather. A mask that looks into arrays (segment ids, a table of each
position's class) does so at the index of a query or of a key alone, and only compares
what it found per pair. So the program of a mask is cut in two: what depends on one
index and is no arithmetic that the kernel has becomes an array with a number per query
or per key, computed once by XLA; what is left is the mask in the kernel.

A value is outside of the kernel if it descends from an array of the mask, or from an
operation that the kernel lacks; other values are computed from the index, as cheaply as
they would be read. A kernel sees tiles, so the program is traced again for each shape
of indices, and cut in the same places: in the order in which numbers are read.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, Int32

from pallas_kernels._mask_operations import inner, name_of
from softlib._ids import signed
from softlib._sharding import match_varying

# Most numbers that a kernel reads per query, and per key: each takes fast memory.
MOST_NUMBERS = 4
# Operations that read an array at places that may differ from pair to pair.
_LOOK_UPS = {"gather", "dynamic_slice", "scatter", "sort"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
# What a value depends on.
_QUERY, _KEY, _PAIR = 1, 2, 3


class Numbers(NamedTuple):
    """Numbers, int32, that a mask reads in a kernel besides positions; None for none.

    Attributes:
        scalars: Per batch entry.
        queries: Per query; one batch entry stands for all.
        keys: Per key, likewise.
    """

    scalars: Int32[Array, "B n"] | None
    queries: Int32[Array, "b n T"] | None
    keys: Int32[Array, "b n S"] | None


def program_of(
    mask: Any, lengths: tuple[int, int], operations: frozenset[str]
) -> "MaskProgram":
    """The program of a mask for kernels that have these operations; cached."""
    leaves, structure = jax.tree.flatten(mask)
    types = []
    for leaf, rank in zip(leaves, mask._leaf_ranks(), strict=True):
        shape, dtype = np.shape(leaf), np.dtype(jnp.result_type(leaf))
        shape = shape[len(shape) - rank :]
        types.append((shape, np.dtype(np.int32) if _is_index(shape, dtype) else dtype))
    wide = jax.config.jax_enable_x64  # the dtypes of a trace depend on it
    return _program(structure, tuple(types), lengths, operations, wide)


@functools.lru_cache(maxsize=256)
def _program(
    structure: Any,
    types: tuple[tuple[tuple[int, ...], Any], ...],
    lengths: tuple[int, int],
    operations: frozenset[str],
    wide: bool,
) -> "MaskProgram":
    return MaskProgram(structure, types, lengths, operations)


def _is_index(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a leaf of a mask is an integer, which kernels take as it is."""
    return shape == () and jnp.issubdtype(dtype, jnp.integer)


class MaskProgram:
    """The part of a mask that a kernel evaluates, and the numbers that this part reads.

    Attributes:
        lacks: Names of operations per pair that the kernel lacks.
        looks_up_pairs: Whether the mask looks into an array at pairs, so that only
            blocks in which every pair attends or none can be left to a kernel.
        reason: Why numbers of the mask cannot be read per position; None if they can.
        scalars: Numbers per batch entry that `attends` takes.
        queries: Numbers per query.
        keys: Numbers per key.
    """

    def __init__(
        self,
        structure: Any,
        types: tuple[tuple[tuple[int, ...], Any], ...],
        lengths: tuple[int, int],
        operations: frozenset[str],
    ):
        self._structure, self._lengths = structure, lengths
        self._types = [jax.ShapeDtypeStruct(*each) for each in types]
        self._operations = operations
        self._cuts: dict[Any, _Cut] = {}
        cut = self._cut((lengths[0], 1), (1, lengths[1]))
        self.lacks = sorted(cut.lacks - _LOOK_UPS)
        self.looks_up_pairs = bool(cut.lacks & _LOOK_UPS) or cut.looks_up_pairs
        self.reason = _why_not(cut, operations)
        self.scalars = sum(map(_is_index, *zip(*types, strict=True))) if types else 0
        self._indices, self._wanted = self.scalars, cut.numbers
        self.scalars += len(cut.numbers[0])
        self.queries, self.keys = (len(cut.numbers[side]) for side in (_QUERY, _KEY))

    @property
    def is_evaluable(self) -> bool:
        """Whether a kernel can evaluate the mask in any block."""
        return not (self.looks_up_pairs or self.lacks or self.reason)

    @property
    def why_not(self) -> str | None:
        """The reason why no kernel can evaluate the mask, or None."""
        if self.looks_up_pairs:
            if self._types:
                return "the mask looks into an array for every pair"
            return None  # it may decide whole blocks only, which are listed
        if self.lacks:
            return f"the mask takes operations that it lacks: {', '.join(self.lacks)}"
        return self.reason

    def attends(self, query: Any, key: Any, *numbers: Any) -> Any:
        """True where the pair attends, inside a kernel.

        Args:
            query: int32 indices; broadcasts with `key`.
            key: int32 indices.
            *numbers: int32: the scalars, then the numbers of queries, each of the shape
                of `query`, then those of keys, of the shape of `key`.
        """
        if not any(self._wanted):
            return self._mask(numbers)._within(*self._lengths)(query, key)
        leaves = iter(numbers[: self._indices])
        given = [
            next(leaves) if _is_index(each.shape, each.dtype) else None
            for each in self._types
        ]
        cut = self._cut(np.shape(query), np.shape(key))
        # The shape of indices must not decide what a mask computes.
        assert _dtypes(cut.numbers) == _dtypes(self._wanted)
        return cut.inside(given, query, key, numbers[self._indices :])

    def numbers(self, mask: Any, batch: int) -> Numbers:
        """The numbers that `attends` takes, of a mask of this program."""
        leaves = jax.tree.leaves(mask)
        every = lambda x: jnp.broadcast_to(_index(x), (batch,))
        scalars = [
            every(leaf)
            for leaf, each in zip(leaves, self._types, strict=True)
            if _is_index(each.shape, each.dtype)
        ]
        queries = keys = None
        if any(self._wanted):
            found = self._outside(leaves)
            scalars += [jnp.broadcast_to(x, (batch,)) for x in found[0]]
            queries, keys = (
                jnp.stack(found[side], 1) if found[side] else None
                for side in (_QUERY, _KEY)
            )
        return Numbers(jnp.stack(scalars, 1) if scalars else None, queries, keys)

    def _mask(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self._structure, leaves)

    def _outside(self, leaves: Sequence[Any]) -> list[list[Array]]:
        """The numbers outside of the kernel, (b,), (b, T) and (b, S)."""
        axes = [
            0 if np.ndim(leaf) > len(each.shape) else None
            for leaf, each in zip(leaves, self._types, strict=True)
        ]
        leaves = [
            _index(leaf) if _is_index(each.shape, each.dtype) else jnp.asarray(leaf)
            for leaf, each in zip(leaves, self._types, strict=True)
        ]
        shapes = [(self._lengths[0], 1), (1, self._lengths[1])]
        cut = self._cut(*shapes)
        query, key = (
            jnp.arange(max(shape), dtype=jnp.int32).reshape(shape) for shape in shapes
        )
        one = lambda leaves: [
            [_stored(x).reshape(-1) if x.ndim else _stored(x) for x in found]
            for found in cut.outside(leaves, query, key)
        ]
        if all(axis is None for axis in axes):
            return [[x[None] for x in found] for found in one(leaves)]
        return jax.vmap(one, (axes,))(leaves)

    def _cut(self, query: tuple[int, ...], key: tuple[int, ...]) -> "_Cut":
        """The cut program for indices of these shapes."""
        if (query, key) not in self._cuts:
            index = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)

            def attends(leaves: Any, query: Any, key: Any) -> Any:
                return self._mask(leaves)._within(*self._lengths)(query, key)

            closed = jax.make_jaxpr(attends)(self._types, index(query), index(key))
            self._cuts[query, key] = _Cut(closed, self._operations)
        return self._cuts[query, key]


def _dtypes(numbers: Sequence[Sequence["_Value"]]) -> list[list[Any]]:
    return [[value.type.dtype for value in found] for found in numbers]


def _why_not(cut: "_Cut", operations: frozenset[str]) -> str | None:
    for side, name in ((_QUERY, "query"), (_KEY, "key")):
        if len(cut.numbers[side]) > MOST_NUMBERS:
            return (
                f"the mask reads {len(cut.numbers[side])} numbers per {name}, more "
                f"than {MOST_NUMBERS}"
            )
    for value in cut.every_number:
        dtype = value.type.dtype
        if dtype == jnp.float32 and "bitcast_convert_type" in operations:
            continue
        if dtype != jnp.bool_ and not _is_integer(dtype):
            return f"it takes no numbers of {dtype} per position from a mask"
    if cut.narrow:
        return f"it computes with no {cut.narrow} per pair"
    return None


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize <= 4


@dataclasses.dataclass(eq=False)
class _Value:
    """A value of a program.

    Attributes:
        type: Its shape and dtype.
        reads: Which of the indices it depends on.
        is_outside: Whether it is computed outside of the kernel.
        is_ordered: Whether the kernel has `_ordered` of it instead.
        constant: Its value, if it is known.
    """

    type: Any
    reads: int = 0
    is_outside: bool = False
    is_ordered: bool = False
    constant: Any = None


def _literal(given: Any) -> _Value:
    return _Value(given.aval, constant=given.aval.dtype.type(given.val))


class _Step(NamedTuple):
    equation: Any
    inputs: list[_Value]
    outputs: list[_Value]


class _Cut:
    """The program of a mask for some shape of indices, cut in two.

    Attributes:
        lacks: Operations per pair that are not among those of the kernel.
        looks_up_pairs: Whether a pair reads an array that is not one number per
            position.
        numbers: The values that pairs read: scalars, of queries, of keys.
        narrow: A dtype that pairs compute with after reading it; None for none.
    """

    def __init__(self, closed: Any, operations: frozenset[str]):
        jaxpr, count = closed.jaxpr, len(closed.jaxpr.invars) - 2
        shapes = [var.aval.shape for var in jaxpr.invars[count:]]
        self._shapes = ((), *shapes, np.broadcast_shapes(*shapes))
        self._operations = operations
        self._arguments = [
            _Value(var.aval, is_outside=not _is_index(var.aval.shape, var.aval.dtype))
            for var in jaxpr.invars[:count]
        ] + [
            _Value(var.aval, reads)
            for var, reads in zip(jaxpr.invars[count:], (_QUERY, _KEY), strict=True)
        ]
        self._steps: list[_Step] = []
        (self._result,) = self._flat(jaxpr, closed.consts, self._arguments)
        self.lacks: set[str] = set()
        self.narrow: Any = None
        self.looks_up_pairs = False
        self.numbers: list[list[_Value]] = [[], [], []]
        self._inside: list[_Step] = self._live([self._result], outside=False)
        read = [value for step in self._inside for value in step.inputs]
        self._note_reads([*read, self._result])
        for step in self._inside:
            self._check(step)

    @property
    def every_number(self) -> list[_Value]:
        return list(chain(*self.numbers))

    def _flat(
        self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[_Value]
    ) -> list[_Value]:
        """Appends the steps of a program, calls inlined; returns its results."""
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, constant in zip(jaxpr.constvars, constants, strict=True):
            values[var] = _Value(
                var.aval, is_outside=np.ndim(constant) > 0, constant=constant
            )
        read = lambda x: _literal(x) if isinstance(x, core.Literal) else values[x]
        for equation in jaxpr.eqns:
            inputs = [read(x) for x in equation.invars]
            body = inner(equation)
            if body is not None:
                found = self._flat(body.jaxpr, body.consts, inputs)
            else:
                found = self._appended(equation, inputs)
            values.update(zip(equation.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _appended(self, equation: Any, inputs: list[_Value]) -> list[_Value]:
        reads = functools.reduce(lambda x, y: x | y.reads, inputs, 0)
        outside = any(value.is_outside for value in inputs)
        ordered = False
        if equation.primitive is lax.broadcast_in_dim_p:
            (value,), (out,) = inputs[:1], equation.outvars
            # A number of a position becomes one of each pair: the kernel does that.
            if outside and value.type.shape != out.aval.shape == self._shapes[_PAIR]:
                reads = _PAIR
            ordered = value.is_ordered or (value.is_outside and _is_narrow(value))
        outside |= name_of(equation) not in self._operations
        outside &= reads != _PAIR
        outputs = [
            _Value(var.aval, reads, outside, ordered) for var in equation.outvars
        ]
        self._steps.append(_Step(equation, inputs, outputs))
        return outputs

    def _live(self, wanted: Sequence[_Value], *, outside: bool) -> list[_Step]:
        """The steps that the wanted values need, in order; only those of the kernel."""
        live, found = set(map(id, wanted)), []
        for step in reversed(self._steps):
            if not live & set(map(id, step.outputs)):
                continue
            if not outside and step.outputs[0].is_outside:
                continue
            live |= set(map(id, step.inputs))
            found.append(step)
        return found[::-1]

    def _note_reads(self, values: Sequence[_Value]) -> None:
        """Notes what the kernel reads, in the order in which it is computed.

        The order of reading may change where an operation broadcasts its operands.
        """
        computed = [*self._arguments, *chain(*(step.outputs for step in self._steps))]
        known = set(map(id, computed))
        read = {id(value) for value in values if value.is_outside}
        # Arrays that are constants are no numbers of a position.
        self.looks_up_pairs = not read <= known
        for value in computed:
            if id(value) not in read:
                continue
            if value.type.shape != self._shapes[value.reads]:
                self.looks_up_pairs = True
            self.numbers[value.reads].append(value)

    def _check(self, step: _Step) -> None:
        name = name_of(step.equation)
        if name not in self._operations:
            self.lacks.add(name)
        if name in _COMPARISONS or name == "broadcast_in_dim":
            return
        for value in step.inputs:
            if value.is_ordered or (value.is_outside and _is_narrow(value)):
                self.narrow = value.type.dtype

    def outside(
        self, leaves: Sequence[Any], query: Array, key: Array
    ) -> list[list[Array]]:
        """The values that the kernel reads."""
        values = self._started((*leaves, query, key))
        for step in self._live(self.every_number, outside=True):
            inputs = [jnp.asarray(self._value(values, x)) for x in step.inputs]
            self._run(step, values, match_varying(inputs))
        return [[self._value(values, x) for x in found] for found in self.numbers]

    def inside(
        self, leaves: Sequence[Any], query: Any, key: Any, numbers: Sequence[Any]
    ) -> Any:
        """The mask, from what the kernel has."""
        values = self._started((*leaves, query, key))
        for value, number in zip(self.every_number, numbers, strict=True):
            values[id(value)] = _loaded(number, value.type.dtype)
        for step in self._inside:
            inputs = [self._value(values, x) for x in step.inputs]
            if name_of(step.equation) in _COMPARISONS:
                inputs = [
                    _ordered(x) if _is_narrow(value) else x
                    for x, value in zip(inputs, step.inputs, strict=True)
                ]
            self._run(step, values, inputs)
        return self._value(values, self._result)

    def _started(self, arguments: Sequence[Any]) -> dict[int, Any]:
        pairs = zip(self._arguments, arguments, strict=True)
        return {id(value): x for value, x in pairs}

    def _value(self, values: dict[int, Any], value: _Value) -> Any:
        return values[id(value)] if value.constant is None else value.constant

    def _run(self, step: _Step, values: dict[int, Any], inputs: list[Any]) -> None:
        primitive = step.equation.primitive
        options = primitive.get_bind_params(step.equation.params)
        found = primitive.bind(*inputs, **options)
        found = found if primitive.multiple_results else [found]
        values.update((id(x), y) for x, y in zip(step.outputs, found, strict=True))


# ----------------------------------------------------- int32 in the place of any dtype
def _index(leaf: Any) -> Array:
    """An integer of a mask as int32; one that int32 cannot hold is its nearest."""
    leaf = signed(jnp.asarray(leaf))
    if leaf.dtype == jnp.int64:
        limits = jnp.iinfo(jnp.int32)
        leaf = jnp.clip(leaf, limits.min, limits.max)
    return leaf.astype(jnp.int32)


def _is_narrow(value: _Value) -> bool:
    """Whether kernels compare int32 in the place of these integers."""
    return _is_integer(value.type.dtype) and value.type.dtype != jnp.int32


def _ordered(x: Any) -> Any:
    """int32 that compare like the integers `x`, of at most 32 bits."""
    if isinstance(x, np.generic):
        return np.int32(int(x) - (1 << 31 if x.dtype == jnp.uint32 else 0))
    if x.dtype == jnp.uint32:
        x = lax.bitcast_convert_type(x, jnp.int32)
        return x ^ jnp.int32(jnp.iinfo(jnp.int32).min)
    return x.astype(jnp.int32)


def _stored(x: Array) -> Array:
    """A number of a position as int32."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return _ordered(x)


def _loaded(x: Any, dtype: Any) -> Any:
    """The inverse of `_stored`, but for integers, which stay int32."""
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.float32)
    return x != 0 if dtype == jnp.bool_ else x
