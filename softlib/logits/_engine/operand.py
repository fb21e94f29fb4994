"""The questions that the loops over rows and classes ask of operands of logits.

`head` answers for a linear head, `blocks` for logits that are made block by block.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Int

from .chunks import Index, RowCut
from .tile import Modifiers, Options, Ranked
from .tile_gradient import RawCotangents

# (buffer, values of the classes of a step, axis of the classes) -> the buffer
type Write = Callable[[Array, Array, int], Array]
# The array, laid out in memory as it stands before a product or a transpose.
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
        """Numbers per row, and per class, that a step reads: for the cost model."""
        ...

    @property
    def like(self) -> Array:
        """An array that varies over as many mesh axes as all others do."""
        ...

    def vocabulary(self, options: Options, /) -> int: ...

    def is_one_tile(self, options: Options, rows: int, /) -> bool:
        """Whether the logits of so many rows are few enough to be one tile."""
        ...

    def lies_across(self, options: Options, /) -> bool:
        """Whether tiles of many rows are best laid out as (classes, rows)."""
        ...

    def rows_of(self, cut: RowCut, group: Index | None, /) -> Any: ...

    def classes_of(self, start: Any, size: int, options: Options, /) -> Any: ...

    def raw(self, options: Options, class_axis: int = 1, /) -> Array:
        """The logits before what modifies them."""
        ...

    def class_buffers(self) -> Any:
        """The gradients of all but rows, before any row has added to them."""
        ...

    def zeros(self, *shape: int) -> Array: ...

    def no_row_sums(self, options: Options, rows: int, across: bool, /) -> Any:
        """Nothing yet per row of a group."""
        ...

    def no_class_sums(self, size: int, /) -> Any:
        """Nothing yet per class of a step."""
        ...

    def no_entries(self, rows: int, /) -> tuple[Array, ...]:
        """Nothing yet for each row of a group and class of a step."""
        ...

    def pull(
        self, options: Options, found: RawCotangents, across: bool, copied: Copied, /
    ) -> tuple[Any, Any, tuple[Array, ...]]:
        """The share of a tile in the sums per row and per class, and its entries."""
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
        """The buffers with the sums of a step's classes, and with its entries."""
        ...

    def turned(self, sums: Any, /) -> Any:
        """Sums of tiles that lay across, with rows first."""
        ...

    def gradient(self, sums: Any, classes: Any, /) -> Any:
        """The sums in the dtypes and shapes of the operands.

        `as_operands()` of it has their structure.
        """
        ...
