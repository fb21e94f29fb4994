"""Products and exponentials of the first tiles, kept for the backward pass.

On a CPU these are the raw products. Accelerators keep exponentials, relative to the
running maximum, in the dtype of the products' operands. Products in bfloat16 would be
wrong by a 2^-9th of a logit, which is many percent of its exponential; an exponential
that is rounded itself is wrong by a 2^-9th of itself, as is every cotangent that a
product takes. Where 1 is subtracted from a probability near 1, that of a label, nothing
is lost: the label's logit is the maximum then, and its exponential exact.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from softlib._dtypes import common_dtype
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import accelerator as _accelerator, chunks as _chunks, tile as _tile
from .accelerator import Accelerator
from .chunks import Index
from .head import Head
from .tile import Modifiers, Options, State, Tile


class Products(NamedTuple):
    """Raw products of the first classes, exact."""

    raw: Float[Array, "rows K"] | Float[Array, "K rows"]

    def count(self, class_axis: int) -> int:
        return self.raw.shape[class_axis]

    def with_step(
        self, state: State, tile: Tile, start: Index, modifiers: Modifiers
    ) -> "Products":
        return Products(_chunks.with_slice(self.raw, tile.raw, start, tile.class_axis))

    def of_classes(self, start: Index, size: int, class_axis: int) -> "Products":
        return Products(_chunks.slice_of(self.raw, start, size, class_axis))

    def tile(self, options: Options, head: Any, start: Index, class_axis: int) -> Tile:
        """The tile whose products these are."""
        return _tile.logits_of(self.raw, options, head.modifiers, class_axis)


class Exponentials(NamedTuple):
    """Exponentials e^(z - top) of the first classes.

    Attributes:
        values: The exponentials; 0 for a class that is not selected.
        tops: The maximum of all classes so far, less a constant: one per row and
            `LEAST` classes, because the steps of the two passes may differ.
    """

    values: Float[Array, "rows K"]
    tops: Float[Array, "rows blocks"]

    def count(self, class_axis: int) -> int:
        assert class_axis == 1
        return self.values.shape[1]

    def with_step(
        self, state: State, tile: Tile, start: Index, modifiers: Modifiers
    ) -> "Exponentials":
        assert state.exponentials is not None
        top = state.exponentials.max[:, None] - _headroom(self.values.dtype)
        # As `update` has them for the sum, so that XLA computes them once.
        present = _tile.select(tile.z, modifiers.class_where, -jnp.inf)
        values = jnp.exp(present - top).astype(self.values.dtype)
        tops = jnp.broadcast_to(top, (top.shape[0], _blocks(tile.z.shape[1])))
        return self._replace(
            values=_chunks.with_slice(self.values, values, start, 1),
            tops=_chunks.with_slice(self.tops, tops, _block_of(start), 1),
        )

    def of_classes(self, start: Index, size: int, class_axis: int) -> "Exponentials":
        return self._replace(
            values=_chunks.slice_of(self.values, start, size, 1),
            tops=_chunks.slice_of(self.tops, _block_of(start), _blocks(size), 1),
        )

    def tile(self, options: Options, head: Any, start: Index, class_axis: int) -> Tile:
        """The tile of logits with these exponentials."""
        size = self.values.shape[1]
        tops = jnp.repeat(self.tops, _accelerator.LEAST, axis=1)[:, :size]
        z = jnp.log(self.values.astype(tops.dtype)) + tops
        return Tile(z, None, z, 1)


type Kept = Products | Exponentials

# Statistics whose derivatives need logits by their exponentials alone.
_OF_PROBABILITIES = frozenset(
    ("lse", "label_logits", "sum_logits", "max_logit", "argmax")
)


def classes_of_exponentials(options: Options, head: Head) -> int:
    """Number of first classes whose exponentials an accelerator keeps.

    All that depends on z but by its exponential needs z itself, which a bfloat16
    exponential gives only to a 2^-9th.
    """
    modifiers, labels = head.modifiers, head.labels
    others = (
        *(options.softcap, options.gradient_filter_eps),
        *(options.vocab_chunk, options.token_chunk),
        *(modifiers.scale, modifiers.temperature, modifiers.centre),
        modifiers.class_log_weights,
    )
    if (
        not options.wants("lse")
        or not _OF_PROBABILITIES.issuperset(options.statistics)
        or options.exclude_labels
        or any(other is not None for other in others)
        or (labels is not None and labels.shape[1] != 1)
        or is_symbolic(head.rows)
        or head.features < _chunks.KEPT_FEATURES
    ):
        return 0
    machine = Accelerator()
    vocabulary = head.vocabulary(options)
    if head.rows > machine.most_rows(head.dtype):
        return 0
    size = machine.classes(head.rows, head.features, vocabulary, head.dtype)
    return machine.kept_classes(head.rows, vocabulary, size, _dtype(head))


def exponentials(
    options: Options, head: Head, value: float = 0.0
) -> Exponentials | None:
    """Arrays for the exponentials that are kept, filled with a value; None if none."""
    count = classes_of_exponentials(options, head)
    if count == 0:
        return None
    full = lambda dtype, *shape: jnp.full(shape, value, dtype)
    made = Exponentials(
        full(_dtype(head), head.rows, count),
        full(head.dtype, head.rows, _blocks(count)),
    )
    return match_varying(made, head.hidden)


def _dtype(head: Head) -> Any:
    """The dtype of the products' operands."""
    return common_dtype(head.hidden.dtype, head.weight.dtype)


def _headroom(dtype: DTypeLike) -> float:
    """A number that is subtracted from the maximum, for small exponentials' sake.

    Float16 has no number between 0 and 6e-8, but all up to 65504. The exponential of
    the maximum is a power of two, and so still exact.
    """
    return 15 * math.log(2) if dtype == jnp.float16 else 0.0


def _blocks(classes: int) -> int:
    return math.ceil(classes / _accelerator.LEAST)


def _block_of(start: Index) -> Index:
    least = _accelerator.LEAST
    if isinstance(start, int):
        return start // least
    return lax.div(start, jnp.full_like(start, least))
