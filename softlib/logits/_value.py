"""The base of logits as values."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from softlib._printed import argument
from softlib._sharding import in_auto_mode

from ._engine.tile import RowStatistics


class AbstractLogits(abc.ABC):
    """Logits of each row over the classes, as a value without their array.

    The base of all values that losses and `softlib.logits` accept besides arrays. A
    subclass defines the numbers of rows and classes, the statistics of rows, and how to
    form a small array. It becomes a pytree by naming its fields:

    Attributes:
        array_fields: Names of the attributes that hold arrays, or trees of them.
        static_fields: Names of the others, which are hashable.

    Unflattening checks nothing, so that transformations may put any object instead of
    an array.

    Example:
        >>> logits = softlib.LinearLogits(jnp.ones((2, 3)), jnp.ones((8, 3)))
        >>> isinstance(logits, softlib.logits.AbstractLogits), logits.shape
        (True, (2, 8))
    """

    array_fields: ClassVar[tuple[str, ...]] = ()
    static_fields: ClassVar[tuple[str, ...]] = ()

    # Name of the function that was called with it, with which messages begin.
    function: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.array_fields:
            jax.tree_util.register_pytree_with_keys(
                cls,
                _flatten_with_keys,
                lambda aux, arrays: _unflatten(cls, aux, arrays),
            )

    # ------------------------------------------------------------------ what it is
    @property
    @abc.abstractmethod
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the rows, which is that of labels and losses."""

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Number of classes on all devices, excluded ones too."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of numbers per row: float32, or float64 if an array is float64."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array of logits."""
        return (*self.batch_shape, self.num_classes)

    @property
    def ndim(self) -> int:
        """Number of axes, that of the classes included."""
        return len(self.batch_shape) + 1

    # ------------------------------------------------------------- what is asked of it
    @abc.abstractmethod
    def statistics(
        self,
        names: Sequence[str],
        labels: Array | None = None,
        label_logits: Array | None = None,
    ) -> RowStatistics:
        """Computes statistics of the rows.

        Args:
            names: Fields of `RowStatistics`.
            labels: Class ids, int32, one or several per row; -1 is no class.
            label_logits: The logits of the labels, needed for `label_rank`.
        """

    @abc.abstractmethod
    def masked(self, where: Bool[Array, "*batch"] | None) -> "AbstractLogits":
        """The value with zero rows where `where` is False, before other arithmetic."""

    @abc.abstractmethod
    def materialize(self) -> Array:
        """The array of logits: rows x classes numbers in memory."""

    @property
    def class_where(self) -> Bool[Array, "..."] | None:
        """True for the classes that exist, for all rows or per row; None: all do."""
        return None

    def count_classes(self) -> ArrayLike:
        """Counts the classes that exist, for all rows or per row."""
        where = self.class_where
        if where is None:
            return self.num_classes
        if where.ndim > 1:
            where = jnp.broadcast_to(where, self.shape)
        # An integer sum is exact, a sum of floats is not.
        count = where.sum(-1, dtype=jnp.int32)
        return self.over_devices(count).astype(self.dtype)

    def over_devices(self, sums: Array) -> Array:
        """Adds sums that each device has taken over its own classes."""
        return sums

    def at_labels(self, per_class: Array, labels: Array) -> Array:
        """Looks up a number per class at each label; arbitrary if out of range."""

        def look_up(labels, per_class):
            labels = jnp.where(labels < 0, 0, labels)
            if per_class.ndim == 1:
                return per_class[labels]
            per_row = jnp.broadcast_to(per_class, self.shape)
            if labels.ndim == per_row.ndim:  # several labels per row
                return jnp.take_along_axis(per_row, labels, -1)
            return jnp.take_along_axis(per_row, labels[..., None], -1)[..., 0]

        return in_auto_mode(look_up, lambda spec: spec, labels, per_class)

    # ------------------------------------------------------------------ rows of it
    @abc.abstractmethod
    def over_rows(self, function: Callable[[Array], Array]) -> "AbstractLogits":
        """Applies `function` to every array whose first axes are the batch."""

    @abc.abstractmethod
    def batch_axes(self, of_rows: Any = 0, of_all: Any = None) -> "AbstractLogits":
        """Makes `in_axes` of `jax.vmap`, or `in_specs` of `jax.shard_map`, for it.

        Args:
            of_rows: Axis or `PartitionSpec` of arrays per row.
            of_all: Axis or `PartitionSpec` of arrays without rows, such as a weight.

        Returns:
            A tree like this value, with these instead of arrays.
        """

    def __getitem__[L](self: L, index: Any) -> L:
        """Indexes the batch axes: `logits[:, :-1]` drops the last tokens."""
        return _rows_at(self, index)

    def reshape[L](self: L, *batch_shape: int) -> L:
        """Reshapes the batch axes; one size may be -1."""
        return _reshaped(self, batch_shape)

    # ----------------------------------------------------------------- what it is not
    def __jax_array__(self) -> Any:
        raise self._no_array("an array operation")

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise self._no_array("an array of NumPy")

    def __iter__(self) -> Any:
        raise self._no_array("a loop")

    def _no_array(self, what: str) -> TypeError:
        name = type(self).__name__
        return TypeError(
            f"{name}: logits as a value must not become {what}: they are not an array. "
            "Give them to losses and to functions of softlib.logits, or take "
            "`materialize()`, the array of shape "
            f"{self.shape}."
        )

    def _refused(self, *others: Any) -> Any:
        raise self._no_array("an operand of arithmetic")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refused
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = _refused
    __pow__ = __rpow__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _refused

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = type(self).__name__
        raise AttributeError(
            f"{kind}: `{name}` is of no logits as a value: they are not an array. "
            "`materialize()` is one, and softlib.logits has functions of them."
        )

    def shown(self) -> dict[str, Any]:
        """The arguments to print; those that are None are left out."""
        return {name: getattr(self, name) for name in self.array_fields}

    def __repr__(self) -> str:
        given = [f"{n}={argument(x)}" for n, x in self.shown().items() if x is not None]
        return f"{type(self).__name__}({', '.join(given)})"

    # ---------------------------------------------------------------------- for us
    def replaced[L](self: L, **fields: Any) -> L:
        """A copy with other fields, without checks."""
        new: Any = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **fields)
        return new


def _flatten_with_keys(value: AbstractLogits) -> tuple[Any, Any]:
    key = jax.tree_util.GetAttrKey
    arrays = [(key(name), getattr(value, name)) for name in value.array_fields]
    static = {name: getattr(value, name) for name in value.static_fields}
    return arrays, tuple(static.values())


def _unflatten(cls: type, static: Any, arrays: Any) -> Any:
    value = object.__new__(cls)
    names = (*cls.array_fields, *cls.static_fields)
    vars(value).update(zip(names, (*arrays, *static), strict=True))
    return value


def _rows_at(value: Any, index: Any) -> Any:
    index = _of_batch(index, len(value.batch_shape), type(value).__name__)
    return value.over_rows(lambda array: array[index])


def _reshaped(value: Any, batch_shape: tuple[int, ...]) -> Any:
    axes = len(value.batch_shape)
    rows = jax.ShapeDtypeStruct(value.batch_shape, bool)
    shape = jax.eval_shape(lambda rows: rows.reshape(*batch_shape), rows).shape
    return value.over_rows(lambda array: array.reshape(*shape, *array.shape[axes:]))


def _of_batch(index: Any, axes: int, name: str) -> tuple[Any, ...]:
    """The index as one of the batch axes only, without an ellipsis."""
    index = index if isinstance(index, tuple) else (index,)

    def width(each: Any) -> int:
        if each is None or each is Ellipsis:
            return 0
        is_mask = getattr(each, "dtype", None) == jnp.bool_
        return each.ndim if is_mask else 1

    used = sum(map(width, index))
    if used > axes:
        raise IndexError(
            f"{name}: an index must be of the {axes} batch axes, got one of {used}: "
            "the axis of the classes is whole. `materialize()` is an array."
        )
    ellipses = [i for i, each in enumerate(index) if each is Ellipsis]
    if not ellipses:
        return index
    (ellipsis,) = ellipses
    rest = (slice(None),) * (axes - used)
    return (*index[:ellipsis], *rest, *index[ellipsis + 1 :])
