"""The protocol of masks: fields of a class, and checks of what its methods return."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from softlib import _checks as checks

_AXES = "axes"


def array_field(axes: int, *, default: Any = dataclasses.MISSING) -> Any:
    """Declares a field of a mask as an array: data, which may be traced.

    All other fields are static: hashable, and part of the program. An array may have
    a leading batch axis besides those declared. `Mask.attends` never sees that axis,
    `Mask.block_status` never sees the array.

    Args:
        axes: Static number of axes without that of the batch; 0 for a number.
        default: Default of the field; None for an array that may be absent.

    Returns:
        A field of a dataclass: the right-hand side of an annotated name.

    Example:
        >>> class Visible(softlib.masks.Mask):
        ...     keys: jax.Array = softlib.masks.array_field(axes=1)
        ...
        ...     def attends(self, query_index, key_index):
        ...         return self.keys[key_index]
        >>> print(Visible(jnp.array([True, False, True])).materialize(2, 3).astype(int))
        [[1 0 1]
         [1 0 1]]
    """
    return dataclasses.field(default=default, metadata={_AXES: axes})


def mask_field() -> Any:
    """Declares a field of a mask as another mask, whose arrays are data as well.

    Returns:
        A field of a dataclass: the right-hand side of an annotated name.

    Example:
        >>> class Mirrored(softlib.masks.Mask):
        ...     mask: softlib.masks.Mask = softlib.masks.mask_field()
        ...
        ...     def attends(self, query_index, key_index):
        ...         return self.mask.attends(key_index, query_index)
        >>> print(Mirrored(softlib.masks.Causal()))
        Mirrored(Causal())
    """
    return dataclasses.field(metadata={_AXES: None})


@dataclass_transform(frozen_default=True, field_specifiers=(array_field, mask_field))
def mask_value[T: type](cls: T) -> T:
    """Makes a frozen dataclass that is a pytree and keeps its own `__repr__`."""
    dataclasses.dataclass(frozen=True, repr=False)(cls)
    leaves = [field.name for field in _leaf_fields(cls)]
    static = [f.name for f in dataclasses.fields(cls) if f.name not in leaves]
    return jax.tree_util.register_dataclass(cls, leaves, static)


def define_mask(cls: type) -> None:
    """Makes a subclass of `Mask` a value, and wraps its methods with checks."""
    for name, checked in (
        ("block_status", checked_status),
        ("row_count", checked_row_count),
    ):
        if name in vars(cls):
            setattr(cls, name, checked(vars(cls)[name]))
    mask_value(cls)


def leaf_ranks(mask: Any) -> tuple[int, ...]:
    """Declared number of axes of each array of a mask, in the order of leaves."""
    ranks: list[int] = []
    for field in _leaf_fields(mask):
        given, axes = getattr(mask, field.name), field.metadata[_AXES]
        if axes is None:
            ranks += given._leaf_ranks()
        elif given is not None:
            ranks.append(axes)
    return tuple(ranks)


def _leaf_fields(cls: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if _AXES in field.metadata]


def checked_status(method: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Converts the arguments of a `block_status` to NumPy and broadcasts its result."""

    @functools.wraps(method)
    def block_status(self: Any, *bounds: Any, **named: Any) -> np.ndarray:
        # Of one rank: jax.numpy may be set to refuse to broadcast ranks.
        rank = max(map(np.ndim, (*bounds, *named.values())), default=0)
        array = lambda bound: np.array(bound, ndmin=rank, copy=None)
        bounds = tuple(map(array, bounds))
        named = {name: array(bound) for name, bound in named.items()}
        # A program may be being traced, and the method may use jax.numpy.
        with jax.ensure_compile_time_eval():
            found = np.asarray(method(self, *bounds, **named))
        if found.dtype.kind not in "biu":
            raise TypeError(
                f"{type(self).__name__}: `block_status` must return numbers of "
                f"`masks.Block`, got {found.dtype}."
            )
        shape = np.broadcast_shapes(*map(np.shape, (*bounds, *named.values())))
        return np.broadcast_to(found.astype(np.int8, copy=False), shape)

    return block_status


def checked_row_count(method: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the lengths given to a `row_count`; broadcasts its result to queries."""

    @functools.wraps(method)
    def row_count(self: Any, query_length: int, key_length: int | None = None) -> Any:
        lengths = checked_lengths("row_count", query_length, key_length)
        found = method(self, *lengths)
        if isinstance(found, jax.Array):
            return found
        return np.broadcast_to(np.asarray(found, np.int32), query_length)

    return row_count


def checked_lengths(
    function: str, query_length: int, key_length: int | None
) -> tuple[int, int]:
    if key_length is None:
        key_length = query_length
    for name, value in (("query_length", query_length), ("key_length", key_length)):
        if value != 0:
            checks.require_positive_integer(function, name, value)
    return query_length, key_length


def evaluate(attends: Callable[..., Any], mask: Any, *indices: Any) -> Any:
    """`attends(mask, *indices)`, mapped over the batch axis of the mask's arrays."""
    indices = tuple(
        index if isinstance(index, jax.Array) else np.asarray(index)
        for index in indices
    )
    leaves, structure = jax.tree.flatten(mask)
    axes = [
        _batch_axis(leaf, rank)
        for leaf, rank in zip(leaves, mask._leaf_ranks(), strict=True)
    ]
    if not leaves and not any(isinstance(index, jax.Array) for index in indices):
        # A program may be being traced, and the method may use jax.numpy.
        with jax.ensure_compile_time_eval():
            return _checked_pairs(mask, np.asarray(attends(mask, *indices)), indices)
    if all(axis is None for axis in axes):
        return _checked_pairs(mask, attends(mask, *indices), indices)

    def one(leaves, indices):
        entry = jax.tree.unflatten(structure, leaves)
        return _checked_pairs(mask, attends(entry, *indices), indices)

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    return jax.vmap(one, in_axes=(axes, None))(leaves, indices)


def _checked_pairs(mask: Any, found: Any, indices: tuple[Any, ...]) -> Any:
    """Booleans that a mask returned, broadcast to the shape of the indices."""
    found = found if isinstance(found, jax.Array) else np.asarray(found)
    if found.dtype != np.bool_:
        raise TypeError(
            f"{type(mask).__name__}: `attends` must return booleans, got {found.dtype}."
        )
    shape = jnp.broadcast_shapes(*map(np.shape, indices))
    if found.shape == shape:
        return found
    return (jnp if isinstance(found, jax.Array) else np).broadcast_to(found, shape)


def _batch_axis(leaf: Any, rank: int) -> int | None:
    """Batch axis of an array of a mask: 0, or None if it has none."""
    axes = np.ndim(leaf) - rank
    if axes not in (0, 1):
        raise ValueError(
            f"Mask: an array of the mask must have {rank} axes, or {rank + 1} with a "
            f"leading batch axis, got shape {np.shape(leaf)}."
        )
    return 0 if axes else None


def is_arithmetic(mask: Any) -> bool:
    """Whether `attends` is arithmetic on the indices and reads no array.

    It can then be evaluated inside a kernel, which cannot gather. Scalars that are data
    do not count as arrays.
    """
    if any(leaf_ranks(mask)):
        return False
    leaves, structure = jax.tree.flatten(mask)
    return not _looks_up(structure, len(leaves))


@functools.lru_cache(maxsize=256)
def _looks_up(structure: Any, leaves: int) -> bool:
    def attends(query: Any, key: Any, *scalars: Any) -> Any:
        return jax.tree.unflatten(structure, scalars).attends(query, key)

    index, scalar = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((8, 8), ()))
    closed = jax.make_jaxpr(attends)(index, index, *[scalar] * leaves)
    return any(map(np.ndim, closed.consts)) or _has_look_up(closed.jaxpr)


def _has_look_up(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name in _LOOK_UPS:
            return True
        inner = equation.params.get("jaxpr")
        if inner is not None and (
            any(map(np.ndim, getattr(inner, "consts", ())))
            or _has_look_up(getattr(inner, "jaxpr", inner))
        ):
            return True
    return False


_LOOK_UPS = {"gather", "dynamic_slice", "scatter", "sort"}
