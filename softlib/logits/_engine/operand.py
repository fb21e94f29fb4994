"""The protocol by which the loops over rows and classes use operands.

`head` implements it for a linear head, `blocks` for logits made block by block.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Int

from .chunks import Index, RowCut
from .tile import Modifiers, Options, Ranked
from .tile_gradient import RawCotangents

# (buffer, values of the classes of a step, axis of the classes) -> the buffer
type Write = Callable[[Array, Array, int], Array]
# The array with a barrier, so that a transpose of it is a copy in memory.
type Copied = Callable[[Array], Array]


@runtime_checkable
class Operand(Protocol):
    """A NamedTuple of arrays; its rows are one axis."""

    @property
    def labels(self) -> Int[Array, "rows L"] | None: ...  # -1: outside the vocabulary
    @property
    def modifiers(self) -> Modifiers: ...
    @property
    def ranked(self) -> Ranked | None: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def rows(self) -> int: ...

    @property
    def features(self) -> int:
        """Numbers that a step reads per row, and per class: for the cost model."""
        ...

    @property
    def like(self) -> Array:
        """An array that varies over the same mesh axes as all others."""
        ...

    def vocabulary(self, options: Options, /) -> int: ...

    def is_one_tile(self, options: Options, rows: int, /) -> bool:
        """Whether all logits of this number of rows are few enough to be one tile."""
        ...

    def lies_across(self, options: Options, /) -> bool:
        """Whether tiles of many rows are fastest in the layout (classes, rows)."""
        ...

    def rows_of(self, cut: RowCut, group: Index | None, /) -> Any: ...

    def classes_of(self, start: Any, size: int, options: Options, /) -> Any: ...

    def raw(self, options: Options, class_axis: int = 1, /) -> Array:
        """The logits before modifiers are applied."""
        ...

    def class_buffers(self) -> Any:
        """Zero buffers of all gradients but those per row."""
        ...

    def zeros(self, *shape: int) -> Array: ...

    def no_row_sums(self, options: Options, rows: int, across: bool, /) -> Any:
        """Zero sums per row of a group."""
        ...

    def no_class_sums(self, options: Options, size: int, /) -> Any:
        """Zero sums per class of a step."""
        ...

    def no_entries(self, rows: int, /) -> tuple[Array, ...]:
        """Zero gradients per entry, for the rows of a group and classes of a step."""
        ...

    def pull(
        self, options: Options, found: RawCotangents, across: bool, copied: Copied, /
    ) -> tuple[Any, Any, tuple[Array, ...]]:
        """Gradients of a tile: its sums per row and per class, and its entries."""
        ...

    def written(
        self,
        options: Options,
        buffers: Any,
        found: Any,
        entries: Any,
        write: Write,
        across: bool,
        copied: Copied,
        /,
    ) -> Any:
        """The buffers with the sums and entries of a step's classes written."""
        ...

    def turned(self, sums: Any, /) -> Any:
        """Sums of tiles (classes, rows), transposed to rows first."""
        ...

    def gradient(self, sums: Any, classes: Any, /) -> Any:
        """The gradients in the shapes and dtypes of the operands.

        Its `as_operands()` has the structure of the operands.
        """
        ...
