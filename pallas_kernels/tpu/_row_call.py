"""The common code of row-statistics kernels: operands, grid, products, slices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._devices import tpu
from pallas_kernels._results import result

from . import _row_filter as filter_, _row_math as rows_of, _row_products as products
from ._row_math import LANES, Columns, Form, Slice
from ._row_tiles import SHARE, Pass, Tiles
from .bfloat16_parts import pairs, part_count, parts_of, product
from .row_statistics_plan import Operands, Options, tiles_of

# Shape, dtype and block of a result.
type Block = tuple[tuple[int, ...], Any, tuple[int, ...]]


class Step(NamedTuple):
    """A step of the grid.

    Attributes:
        refs: References by name.
        outer: Index of the tile that stays for all steps of the second grid axis.
        inner: Index of the tile that changes from step to step.
        span: Index of the span of features; the backward pass visits all spans twice.
        is_first: Whether this step is the first one of its outer tile.
        is_last: Whether this step is the last one of its outer tile.
    """

    refs: dict[str, Any]
    outer: Any
    inner: Any
    span: Any
    is_first: Any
    is_last: Any

    @classmethod
    def of(cls, refs: dict[str, Any]) -> "Step":
        # All read here: the interpreter does not know them inside `pl.when`.
        outer, inner, span = map(pl.program_id, range(3))
        inner_end, span_end = pl.num_programs(1) - 1, pl.num_programs(2) - 1
        is_first = (inner == 0) & (span == 0)
        is_last = (inner == inner_end) & (span == span_end)
        return cls(refs, outer, inner, span, is_first, is_last)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a kernel: operands and grid, products, the loop over slices."""

    kind: Pass
    options: Options
    operands: Operands
    form: Form
    tiles: Tiles

    @classmethod
    def of(
        cls, kind: Pass, options: Options, operands: Operands, tiles: Tiles | None
    ) -> "Call":
        labels = operands.labels
        form = Form(
            options.statistics,
            options.softcap,
            0 if labels is None else labels.shape[1],
            Columns(tuple(operands.per_row)),
            Columns(tuple(operands.per_class)),
            options.filter_eps,
        )
        tiles = tiles or tiles_of(kind, options, operands)
        if tiles is None:
            raise ValueError(f"no tiles of {operands.hidden.shape} fit {tpu().name}")
        return cls(kind, options, operands, form, tiles)

    @property
    def spans(self) -> int:
        """Number of spans into which the features are cut."""
        return self.operands.hidden.shape[1] // self.tiles.features

    @property
    def rows(self) -> int:
        return self.operands.hidden.shape[0]

    @property
    def classes(self) -> int:
        return self.operands.weight.shape[self.options.vocab_axis]

    @property
    def grid(self) -> tuple[int, int, int]:
        outer = pl.cdiv(self.rows, self.tiles.rows)
        inner = pl.cdiv(self.classes, self.tiles.classes)
        if self.kind == "weight":
            outer, inner = inner, outer
        # The backward pass visits the spans for the logits, then for the gradient.
        again = 2 if self.kind != "forward" and self.spans > 1 else 1
        return outer, inner, self.spans * again

    # ------------------------------------------------------------------ inside a kernel
    def multiply(self, step: Step) -> None:
        """Adds the product over one span of features to the logits of the tile."""
        span, axis = step.span, self.options.vocab_axis
        turn = lambda *at: at if axis == 0 else at[::-1]

        def add(first: bool) -> None:
            for name in ("hidden", "weight"):
                self.divide(step, name)

            def at(rows: Any, classes: Any) -> Any:
                return (rows, slice(None)), turn(classes, slice(None))

            self.add_product(
                step, "raw", (), ("hidden", "weight"), (1, 1 - axis), at, fresh=first
            )

        if self.spans == 1:
            return add(first=True)
        pl.when(span == 0)(functools.partial(add, first=True))
        pl.when((span > 0) & (span < self.spans))(functools.partial(add, first=False))
        return None

    def divide(self, step: Step, name: str) -> None:
        """Writes a float32 operand as a sum of bfloat16 ones; bfloat16 is kept."""
        parts = step.refs.get(f"{name}_parts")
        if parts is None:
            return
        prepare = lambda found, start: found
        if name == self._streamed_operand:
            axis = self.options.vocab_axis if name == "weight" else 0
            prepare = lambda found, start: self._without_overhang(
                found, axis, step, start
            )
        products.split(step.refs[name], parts, prepare)

    def add_product(
        self,
        step: Step,
        to: str,
        into: tuple[Any, ...],
        names: tuple[str, str],
        contract: tuple[int, int],
        at: Callable[[Any, Any], tuple[Any, Any]],
        *,
        fresh: bool = False,
    ) -> None:
        """Adds the product of two references, by their names, to `refs[to][into]`.

        `at` gives, for rows and columns of the product, the indices of each factor.
        """
        add = functools.partial(
            self._add_product, step, to, into, names, contract, at, fresh
        )
        whole, tile = self._streamed
        is_divided = f"{self._streamed_operand}_parts" in step.refs
        if to == "raw" or whole % tile == 0 or is_divided:
            return add(masked=False)
        if self.kind == "weight" or self.options.vocab_axis == 0:
            return add(masked=True)
        # A mask along lanes takes registers: only the last tile has one.
        at_end = step.inner == whole // tile
        pl.when(at_end)(functools.partial(add, masked=True))
        pl.when(~at_end)(functools.partial(add, masked=False))
        return None

    def _add_product(
        self,
        step: Step,
        to: str,
        into: tuple[Any, ...],
        names: tuple[str, str],
        contract: tuple[int, int],
        at: Callable[[Any, Any], tuple[Any, Any]],
        fresh: bool,
        *,
        masked: bool,
    ) -> None:
        shape, ref = step.refs[to].shape[len(into) :], step.refs[to]
        # Products of bfloat16 parts one by one: together they would spill.
        for which in pairs((self._count(names[0]), self._count(names[1]))):
            factors = [
                self._factor(step, name, i, masked=masked)
                for name, i in zip(names, which, strict=True)
            ]

            def block(
                rows: Any, columns: Any, factors: Any = factors, fresh: bool = fresh
            ) -> None:
                index, indices = (*into, rows, columns), at(rows, columns)
                first, second = (f(x) for f, x in zip(factors, indices, strict=True))
                found = product(first, second, contract)
                ref[index] = found if fresh else ref[index] + found

            lanes = masked and contract[1] == 1
            products.each_block(shape, block, turned=contract[0] == 0, masked=lanes)
            fresh = False

    def _factor(
        self, step: Step, name: str, i: int, *, masked: bool
    ) -> products.Factor:
        refs = step.refs
        if name == "draw" or f"{name}_parts" in refs:
            parts = refs["draw" if name == "draw" else f"{name}_parts"]
            return lambda at: parts[(i, *at)]
        if not masked or name != self._streamed_operand:
            return lambda at: refs[name][at]
        axis = self.options.vocab_axis if name == "weight" else 0
        return lambda at: self._without_overhang(refs[name][at], axis, step)

    def _count(self, name: str) -> int:
        hidden, weight = self.operands.hidden.dtype, self.operands.weight.dtype
        dtypes = {
            "hidden": hidden,
            "weight": weight,
            "draw": jnp.promote_types(hidden, weight),
        }
        return part_count(dtypes[name], self.options.precision)

    def visit(self, step: Step, body: Callable[[Any, Slice], None]) -> None:
        """Calls `body` for each slice of the tile."""
        refs, size, width = step.refs, _rows_per_slice(self), self.tiles.classes
        first = (step.outer if self.kind == "weight" else step.inner) * width

        def walk(ragged: bool) -> None:
            def visit(r: Any, _: None) -> None:
                at = pl.ds(pl.multiple_of(r * size, size), size)
                ids = first + lax.broadcasted_iota(jnp.int32, (size, width), 1)
                real = None
                if ragged:
                    real = self._real(step, ids, r * size)
                take = lambda name: refs[name][at, :] if name in refs else None
                classes = refs["classes"][...] if "classes" in refs else None
                raw = refs["raw"][at, :]
                if real is not None:
                    raw = jnp.where(real, raw, 0)  # padding may hold anything
                piece = Slice(
                    self.form, raw, take("rows"), classes, take("labels"), ids, real
                )
                body(at, piece)

            lax.fori_loop(0, self.tiles.rows // size, visit, None)

        whole, tile = self._streamed
        if self.form.filter_eps is not None:
            # Padding of either axis must not keep a block.
            return walk(ragged=True)
        if whole % tile == 0:
            return walk(ragged=False)
        at_end = step.inner == whole // tile
        pl.when(at_end)(functools.partial(walk, ragged=True))
        pl.when(~at_end)(functools.partial(walk, ragged=False))
        return None

    def _real(self, step: Step, ids: Any, first_row: Any) -> Any:
        by_class = self.kind == "weight"
        of_class = ids < self.classes
        tile = step.inner if by_class else step.outer
        row = first_row + lax.broadcasted_iota(jnp.int32, ids.shape, 0)
        of_row = tile * self.tiles.rows + row < self.rows
        if self.form.filter_eps is not None:
            return of_class & of_row
        return of_row if by_class else of_class

    @property
    def _streamed(self) -> tuple[int, int]:
        """The length of the summed axis, and its tile size.

        Padding of this axis would enter the sum; padding of the other axis only gives
        results that are not written.
        """
        if self.kind == "weight":
            return self.rows, self.tiles.rows
        return self.classes, self.tiles.classes

    @property
    def _streamed_operand(self) -> str:
        return "hidden" if self.kind == "weight" else "weight"

    def _without_overhang(
        self, array: Any, axis: int, step: Step, start: Any = 0
    ) -> Any:
        """The array with zeros in the padding of the summed axis.

        `start` is the index in the tile of the array's first row.
        """
        whole, tile = self._streamed
        if whole % tile == 0:
            return array
        index = lax.broadcasted_iota(jnp.int32, array.shape, axis)
        left = whole - step.inner * tile
        if axis == 0:
            left = left - start
        return jnp.where(index < left, array, jnp.zeros_like(array))

    def turn_and_add(
        self,
        step: Step,
        turn: Callable[[Any, Slice], None],
        add: Callable[[Any], None],
    ) -> None:
        """Turns logits into cotangents and adds their contribution to a gradient.

        `turn` does so for a slice of complete logits; `add` adds the product of the
        cotangents and the given span of an operand.
        """
        refs, span = step.refs, step.span

        @pl.when(span == self.spans - 1)
        def _():
            self.visit(step, turn)
            if self.form.filter_eps is not None:
                filter_.drop_negligible(refs, self.tiles, self.form.filter_eps)

        def add_all(at: Any) -> None:
            if self.spans > 1:
                self.divide(step, self._streamed_operand)
            add(at)

        due = True if self.spans == 1 else span >= self.spans
        if self.form.filter_eps is not None:
            due = jnp.logical_and(due, refs["kept"][0] > 0)
        at = 0 if self.spans == 1 else span - self.spans
        if due is True:
            add_all(at)
        else:
            pl.when(due)(functools.partial(add_all, at))

    def note_cotangents(self, step: Step, at: Any, raw: Any) -> None:
        """Stores the cotangents of some rows as bfloat16 parts for the products."""
        draw = step.refs["draw"]
        for i, part in enumerate(parts_of(raw, draw.shape[0])):
            draw[i, at, :] = part

    def write_sum(self, refs: dict[str, Any], axis: int) -> None:
        size = self.tiles.features
        for span in range(self.spans):
            at = [slice(None), slice(None)]
            at[axis] = slice(span * size, (span + 1) * size)
            refs["out"][tuple(at)] = refs["sum"][span].astype(refs["out"].dtype)

    # --------------------------------------------------------------- around a kernel
    def raw_scratch(self) -> tuple[int, int]:
        return self.tiles.rows, self.tiles.classes

    def operand_scratch(self) -> dict[str, Any]:
        """The scratch that holds float32 operands as sums of bfloat16 ones."""
        tiles, found = self.tiles, {}
        block = (tiles.classes, tiles.features)
        blocks = {
            "hidden": (tiles.rows, tiles.features),
            "weight": block if self.options.vocab_axis == 0 else block[::-1],
        }
        for name, block in blocks.items():
            if getattr(self.operands, name).dtype == jnp.float32:
                shape = (self._count(name), *block)
                found[f"{name}_parts"] = pltpu.VMEM(shape, jnp.bfloat16)
        return found

    def backward_scratch(self, shape: tuple[int, ...]) -> dict[str, Any]:
        draw = (self._count("draw"), *self.raw_scratch())
        scratch: dict[str, Any] = {
            "raw": self.raw_scratch(),
            "draw": pltpu.VMEM(draw, jnp.bfloat16),
            "sum": (self.spans, *shape),
        }
        if self.form.filter_eps is not None:
            scratch["distance"] = (self.tiles.rows, LANES)
            scratch["kept"] = pltpu.SMEM((1,), jnp.int32)
        return scratch

    def run(
        self,
        kernel: Callable[[Step], None],
        results: dict[str, Block],
        scratch: dict[str, Any],
        interpret: Any,
    ) -> dict[str, Array]:
        """Runs a kernel that takes references by name; returns results by name."""
        operands, tiles = self._operands(), self.tiles
        scratch = scratch | self.operand_scratch()
        names = (*operands, *results, *scratch)
        arrays = tuple(array for array, _ in operands.values())

        def spec(shape: tuple[int, ...], block: tuple[int, ...]) -> pl.BlockSpec:
            # Cut along the axis of the outer tiles.
            down = block[0] != shape[0] or block[1] == shape[1]
            at = lambda a, b, k: (a, 0) if down else (0, a)
            return pl.BlockSpec(block, at)

        def allocated(size: Any) -> Any:
            return pltpu.VMEM(size, jnp.float32) if isinstance(size, tuple) else size

        call = pl.pallas_call(
            lambda *refs: kernel(Step.of(dict(zip(names, refs, strict=True)))),
            out_shape=[
                result(shape, dtype, *arrays) for shape, dtype, _ in results.values()
            ],
            grid=self.grid,
            in_specs=[spec_ for _, spec_ in operands.values()],
            out_specs=[spec(shape, block) for shape, _, block in results.values()],
            scratch_shapes=[allocated(size) for size in scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=_limit(tiles),
            ),
            cost_estimate=self._cost(),
            interpret=interpret,
            name=f"row_statistics_{self.kind}",
        )
        return dict(zip(results, call(*arrays), strict=True))

    def _operands(self) -> dict[str, tuple[Array, pl.BlockSpec]]:
        given, tiles, spans = self.operands, self.tiles, self.spans
        by_class = self.kind == "weight"
        row = lambda a, b: b if by_class else a
        column = lambda a, b: a if by_class else b
        # The spans of features for the logits, then for the gradient. An operand that
        # the gradient does not need is not fetched again.
        again = lambda k: jnp.where(k < spans, k, k - spans) if spans > 1 else 0
        stays = lambda k: jnp.minimum(k, spans - 1) if spans > 1 else 0
        of_hidden, of_weight = (again, stays) if by_class else (stays, again)
        if self.kind == "forward":
            of_hidden = of_weight = lambda k: k
        hidden = pl.BlockSpec(
            (tiles.rows, tiles.features), lambda a, b, k: (row(a, b), of_hidden(k))
        )
        if self.options.vocab_axis == 0:
            weight = pl.BlockSpec(
                (tiles.classes, tiles.features),
                lambda a, b, k: (column(a, b), of_weight(k)),
            )
        else:
            weight = pl.BlockSpec(
                (tiles.features, tiles.classes),
                lambda a, b, k: (of_weight(k), column(a, b)),
            )
        found = {"hidden": (given.hidden, hidden), "weight": (given.weight, weight)}
        at_rows = lambda a, b, k: (row(a, b), 0)
        if given.labels is not None and self._reads_labels():
            block = (tiles.rows, given.labels.shape[1])
            found["labels"] = (given.labels, pl.BlockSpec(block, at_rows))
        if given.per_row:
            table = jnp.stack(
                [x.astype(jnp.float32) for x in given.per_row.values()], axis=1
            )
            block = (tiles.rows, table.shape[1])
            found["rows"] = (table, pl.BlockSpec(block, at_rows))
        if given.per_class:
            table = jnp.stack([x.astype(jnp.float32) for x in given.per_class.values()])
            block = (table.shape[0], tiles.classes)
            at_classes = lambda a, b, k: (0, column(a, b))
            found["classes"] = (table, pl.BlockSpec(block, at_classes))
        return found

    def _reads_labels(self) -> bool:
        if self.kind == "forward":
            return self.form.wants("label_logits")
        return rows_of.form_labels(self.form) > 0 or self.form.filter_eps is not None

    def _cost(self) -> pl.CostEstimate:
        hidden, weight = self.operands.hidden, self.operands.weight
        pairs = self.rows * self.classes
        products = 1 if self.kind == "forward" else 2
        return pl.CostEstimate(
            flops=2 * products * pairs * hidden.shape[1],
            transcendentals=pairs,
            bytes_accessed=_moved(self, hidden, weight),
        )


def _moved(call: Call, hidden: Array, weight: Array) -> int:
    outer = call.grid[0]
    size = lambda x: x.size * x.dtype.itemsize
    kept, streamed = (weight, hidden) if call.kind == "weight" else (hidden, weight)
    return size(kept) * (1 if call.kind == "forward" else 2) + outer * size(streamed)


def _rows_per_slice(call: Call) -> int:
    # A store of 16-bit numbers writes at least 16 rows.
    return 8 if call.kind == "forward" else 16


def _limit(tiles: Tiles) -> int:
    return int(tiles.vmem_bytes / SHARE)
