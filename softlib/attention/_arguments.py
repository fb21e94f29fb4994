"""Turns users' arguments into operands of the attention engine."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

from softlib import _checks as checks, masks
from softlib._array_arguments import as_array
from softlib._dtypes import accumulator_dtype
from softlib._ids import signed
from softlib._sharding import match_varying, per_shard
from softlib.masks import Mask
from softlib.typing import Implementations

from ._engine import operations
from ._engine.plan import BlockPlan, plan_of
from ._engine.scores import Result
from ._engine.tiles import Operands, Options


class Shapes(NamedTuple):
    """The checked axes of a call."""

    batch: tuple[int, ...]
    query_length: int
    key_length: int
    heads: int
    key_heads: int

    @classmethod
    def of(
        cls,
        function: str,
        query: Array,
        key: Array,
        value: Array,
        *,
        names: tuple[str, ...] = ("key", "value"),
    ) -> "Shapes":
        arrays = dict(zip(("query", *names), (query, key, value), strict=True))
        checks.require_floating(function, **arrays)
        for name, array in arrays.items():
            axes = "(..., length, heads, features)"
            checks.require_rank(function, name, array, 3, axes)
        *batch, query_length, heads, features = query.shape
        key_length, key_heads = key.shape[-3:-1]
        expected = (*batch, key_length, key_heads, features)
        why = "the batch axes and the features of `query`"
        checks.require_shape(function, names[0], key, expected, why)
        expected = (*batch, key_length, key_heads, value.shape[-1])
        why = f"the batch axes, length and heads of `{names[0]}`"
        checks.require_shape(function, names[1], value, expected, why)
        if key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"{function}: `query` must have a multiple of the heads of "
                f"`{names[0]}`, "
                f"got {heads} and {key_heads}."
            )
        return cls(tuple(batch), query_length, key_length, heads, key_heads)

    @property
    def size(self) -> int:
        return math.prod(self.batch)

    def flat(self, *arrays: Array) -> list[Array]:
        """Query, key and value with exactly one batch axis."""
        count = len(self.batch)
        return [x.reshape(self.size, *x.shape[count:]) for x in arrays]

    def unflat(self, array: Any) -> Array:
        return array.reshape(*self.batch, *array.shape[1:])

    def on_pairs(self, function: str, name: str, array: Array) -> Array:
        """An array over pairs as (b, n, t, s), each axis of full length or 1."""
        full = (*self.batch, self.heads, self.query_length, self.key_length)
        why = "batch, heads, queries, keys"
        if array.ndim != len(full):
            raise ValueError(
                f"{function}: `{name}` must have {len(full)} axes that broadcast to "
                f"{full} ({why}), got shape {array.shape}"
                f"{self._axes_for(name, array.shape)}."
            )
        checks.require_broadcastable(function, name, array, full, why)
        batch, pairs = array.shape[: len(self.batch)], array.shape[len(self.batch) :]
        if batch not in (self.batch, (1,) * len(batch)):
            array, batch = jnp.broadcast_to(array, (*self.batch, *pairs)), self.batch
        return array.reshape(math.prod(batch), *pairs)

    def _axes_for(self, name: str, shape: tuple[int, ...]) -> str:
        """The ways to say what an array of few axes means, if it has a known shape."""
        known = [
            ((*self.batch, self.key_length), "[:, None, None, :] for keys that exist"),
            ((self.query_length, self.key_length), "[None, None] for pairs of all"),
            (
                (*self.batch, self.query_length, self.key_length),
                "[:, None] for pairs of each sequence",
            ),
        ]
        ways = [f"`{name}{how}" for of, how in known if of == shape]
        if name != "mask" or len(self.batch) != 1 or not ways:
            return ""
        ways = [way.replace("]", "]`", 1) for way in ways]
        if shape == known[0][0]:
            ways.append("`softlib.masks.Padding` for lengths")
            ways.append("`softlib.masks.Segments` for packed sequences")
        return "; write " + ", ".join(ways)

    def on_rows(self, function: str, name: str, array: Array) -> Array:
        """An array that broadcasts to (B, T, N), broadcast."""
        full = (*self.batch, self.query_length, self.heads)
        checks.require_floating(function, **{name: array})
        why = "batch, queries, heads"
        checks.require_broadcastable(function, name, array, full, why)
        array = array.reshape((1,) * (len(full) - array.ndim) + array.shape)
        return jnp.broadcast_to(array, full).reshape(self.size, *full[-2:])

    def lengths(self, function: str, name: str, given: ArrayLike | None) -> Any:
        """Checked integers, one for all or one per entry of the flat batch axis."""
        if given is None:
            return None
        array = signed(as_array(function, name, given))
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"{function}: `{name}` must have an integer dtype, got {array.dtype}."
            )
        why = "one for all, or one per batch entry"
        checks.require_shape_in(function, name, array, ((), self.batch), why)
        return array if array.ndim == 0 else array.reshape(self.size)

    def without_padding(self, array: Array, lengths: ArrayLike) -> Array:
        """Zeros padding, which may hold NaN: products with 0 would keep it."""
        lengths = signed(jnp.asarray(lengths)).reshape(-1, 1)
        inside = jnp.arange(array.shape[1])[None, :] < lengths
        return jnp.where(inside[..., None, None], array, 0)


def tuple_shapes(
    function: str,
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    names: tuple[str, str] = ("keys", "values"),
) -> list[Shapes]:
    """The shapes of every key axis with the queries; only lengths differ."""
    _require_tuple(function, "keys", keys)
    _require_tuple(function, "values", values)
    if len(values) != len(keys):
        raise ValueError(
            f"{function}: `values` must be as many arrays as `keys`, {len(keys)}, got "
            f"{len(values)}."
        )
    # Members of tuples in one function, separate arguments in the other.
    suffix = "[{}]" if names == ("keys", "values") else "{}"
    start = 0 if names == ("keys", "values") else 1
    found: list[Shapes] = []
    for axis, (key, value) in enumerate(zip(keys, values, strict=True), start):
        key_name, value_name = (name + suffix.format(axis) for name in names)
        if found and key.ndim >= 3:
            expected = (*key.shape[:-2], found[0].key_heads, key.shape[-1])
            why = f"the heads of `{names[0] + suffix.format(start)}`"
            checks.require_shape(function, key_name, key, expected, why)
        own = Shapes.of(function, query, key, value, names=(key_name, value_name))
        expected = (*value.shape[:-1], values[0].shape[-1])
        why = f"the features of `{names[1] + suffix.format(start)}`"
        checks.require_shape(function, value_name, value, expected, why)
        found.append(own)
    return found


def _require_tuple(function: str, name: str, arrays: Any) -> None:
    if not isinstance(arrays, tuple | list):
        shape = getattr(arrays, "shape", None)
        got = type(arrays).__name__ if shape is None else f"one of shape {shape}"
        raise TypeError(
            f"{function}: `{name}` must be a tuple of arrays, one per key axis, got "
            f"{got}."
        )
    if not arrays:
        raise ValueError(
            f"{function}: `{name}` must hold at least one array, got {arrays!r}."
        )
    for array in arrays:
        if not hasattr(array, "dtype"):
            raise TypeError(
                f"{function}: `{name}` must hold arrays, got {type(array).__name__}."
            )


def values_and_array(
    function: str, shapes: Shapes, mask: Any
) -> tuple[Any, Array | None]:
    """Splits `mask` into mask values and one boolean array."""
    values, dense = [], None
    for each in mask if isinstance(mask, tuple) else (mask,):
        if not isinstance(each, jax.Array | np.ndarray | np.generic | bool | list):
            values.append(each)
            continue
        array = as_array(function, "mask", each)
        checks.require_boolean(function, mask=array)
        if array.ndim == 0:  # one value for all pairs
            array = array.reshape((1,) * (len(shapes.batch) + 3))
        array = shapes.on_pairs(function, "mask", array)
        dense = array if dense is None else dense & array
    if not isinstance(mask, tuple):
        return (values[0] if values else None), dense
    for value in values:
        if not isinstance(value, Mask):
            raise TypeError(
                f"{function}: `mask` must hold only mask values and boolean arrays if "
                f"it is a tuple, got {type(value).__name__}."
            )
    return _conjunction(values), dense


def planned(
    function: str,
    shapes: Shapes,
    mask: Any,
    *,
    query_offset: ArrayLike = 0,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    blocks: tuple[int | None, int | None] = (None, None),
    all_partial: bool = False,
) -> BlockPlan:
    """The block plan of all arguments that exclude pairs by position."""
    lengths = (shapes.query_length, shapes.key_length)
    query_lengths = shapes.lengths(function, "query_seq_lengths", query_seq_lengths)
    key_lengths = shapes.lengths(
        function, "key_value_seq_lengths", key_value_seq_lengths
    )
    padded = query_lengths is not None or key_lengths is not None
    if isinstance(mask, BlockPlan):
        others = is_causal or local_window_size is not None or padded
        others = others or not (isinstance(query_offset, int) and query_offset == 0)
        require_plan(function, shapes, mask, lengths, others=others or any(blocks))
        return mask
    if mask is not None and not isinstance(mask, Mask):
        got = type(mask).__name__
        if isinstance(mask, type) and issubclass(mask, Mask):
            got = f"the class {mask.__name__}; write `{mask.__name__}(...)`"
        raise TypeError(
            f"{function}: `mask` must be a mask value, a BlockPlan, a boolean array or "
            f"None, got {got}."
        )
    for name, size in (("block_query", blocks[0]), ("block_key", blocks[1])):
        if size is not None:
            checks.require_positive_integer(function, name, size)
    values: list[Mask] = [] if mask is None else [mask]
    if is_causal:
        values.append(masks.Causal())
    if local_window_size is not None:
        values.append(_window(function, local_window_size))
    if not isinstance(query_offset, int):
        query_offset = shapes.lengths(function, "query_offset", query_offset)
    values = [value.shift(query_offset) for value in values]
    if padded:
        values.append(masks.Padding(query=query_lengths, key=key_lengths))
    require_batch(function, shapes, values)
    return plan_of(
        _conjunction(values),
        lengths,
        blocks,
        all_partial=all_partial,
        groups=shapes.heads // shapes.key_heads,
    )


def are_given(mask: Any, *sizes: Any) -> bool:
    """Whether the user gave a plan or block sizes."""
    return isinstance(mask, BlockPlan) or any(size is not None for size in sizes)


def require_plan(
    function: str,
    shapes: Shapes,
    plan: BlockPlan,
    lengths: tuple[int, ...],
    *,
    others: bool,
) -> None:
    """Requires a plan given as a mask to be the only one and to have these lengths."""
    if others:
        raise ValueError(
            f"{function}: `mask` must not be a BlockPlan together with other masks,"
            " offsets or block sizes; make the plan of all of them with block_plan."
        )
    if plan.lengths != lengths:
        raise ValueError(
            f"{function}: `mask` must be a plan of {lengths[0]} queries and "
            f"{', '.join(map(str, lengths[1:]))} keys, got one of {plan.lengths}."
        )
    require_batch(function, shapes, [plan.mask])


def scaled(function: str, query: Array, scale: Any) -> tuple[Array, float]:
    """The queries and a static scale; a traced scale is multiplied into the queries."""
    if scale is None:
        return query, float(max(query.shape[-1], 1)) ** -0.5
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        return query, float(scale)
    scale = jnp.asarray(scale)
    checks.require_floating(function, scale=scale)
    checks.require_shape(function, "scale", scale, (), "a number or a scalar array")
    wide = accumulator_dtype(query)
    return query.astype(wide) * scale.astype(wide), 1.0


def run(
    function: str, names: Implementations, options: Options, operands: Operands
) -> Result:
    """Runs the engine on arrays that may be divided over an Explicit mesh."""
    checks.require_implementation(function, operations.operation_of(operands), names)

    def call(query: Array, rest: Operands) -> Result:
        given = rest._replace(query=query)
        return operations.attention(names, options, match_varying(given))

    def specs(spec: PartitionSpec) -> Any:
        per_row = PartitionSpec(*spec[:3])
        out = None if operands.value is None else spec
        has_max = operands.value is None
        return Result(out, per_row, per_row if has_max else None)

    # The lists of a plan are NumPy until here; only JAX arrays vary over mesh axes.
    rest = jax.tree.map(jnp.asarray, operands._replace(query=None))
    shared = functools.partial(_by_batch_and_heads, rest)
    return per_shard(call, shared, specs, operands.query, rest)


def _by_batch_and_heads(
    rest: Operands, spec: PartitionSpec
) -> tuple[PartitionSpec, Operands]:
    """Specs that divide every array by batch entries and heads, like the queries."""
    batch, _, heads, _ = spec
    of_keys: Any = lambda array: PartitionSpec(batch, None, heads, None)
    of_rows: Any = lambda array: PartitionSpec(batch, None, heads)
    either = lambda size, axis: None if size == 1 else axis

    def on_pairs(array: Array) -> PartitionSpec:
        sizes = array.shape[:2]
        return PartitionSpec(*map(either, sizes, (batch, heads)), None, None)

    mask, structure = jax.tree.flatten(rest.plan.mask)
    ranks = rest.plan.mask._leaf_ranks()
    of_mask = [
        PartitionSpec(batch) if leaf.ndim > rank else PartitionSpec()
        for leaf, rank in zip(mask, ranks, strict=True)
    ]
    whole = jax.tree.map(lambda leaf: PartitionSpec(), rest.plan)
    plan = dataclasses.replace(whole, mask=jax.tree.unflatten(structure, of_mask))
    specs = Operands(
        None,
        of_keys(rest.key),
        jax.tree.map(of_keys, rest.value),
        plan,
        jax.tree.map(on_pairs, rest.dense),
        jax.tree.map(on_pairs, rest.bias),
        jax.tree.map(lambda _: PartitionSpec(heads), rest.sinks),
        tuple(map(of_rows, rest.rows)),
        jax.tree.map(of_keys, rest.outer),
    )
    return PartitionSpec(batch, None, heads, None), specs


def _window(function: str, size: int | tuple[int, int]) -> Mask:
    pair = (size, size) if isinstance(size, int) else size
    good = isinstance(pair, Sequence) and len(pair) == 2
    if not good or not all(isinstance(n, int) and n >= 0 for n in pair):
        raise ValueError(
            f"{function}: `local_window_size` must be a non-negative int or a pair "
            f"(before, after) of them, got {size!r}."
        )
    return masks.Window(*pair)


def _conjunction(values: Sequence[Mask]) -> Mask:
    mask: Mask = masks.All()
    for i, value in enumerate(values):
        mask = value if i == 0 else mask & value
    return mask


def require_batch(function: str, shapes: Shapes, values: Sequence[Any]) -> None:
    for value in values:
        leaves = jax.tree.leaves(value)
        for leaf, rank in zip(leaves, value._leaf_ranks(), strict=True):
            extra = jnp.ndim(leaf) - rank
            if extra and (extra > 1 or jnp.shape(leaf)[0] != shapes.size):
                raise ValueError(
                    f"{function}: `mask` must hold arrays without a batch axis or with "
                    f"one of {shapes.size}, got {type(value).__name__} with an array "
                    f"of shape {jnp.shape(leaf)}."
                )
