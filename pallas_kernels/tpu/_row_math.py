r"""The mathematics of a slice of logits, (rows, classes), in vector registers.

    raw -> u = scale * raw + bias -> cap = c * tanh(u / c) -> z = cap / temperature

Numbers per row are columns, (rows, 1), of one table; numbers per class are rows,
(1, classes), of another. A table takes one block of vector memory for up to 128
columns, because a block is 128 lanes wide.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels._row_formulas import (
    cotangent_of_logits,
    state_names,
    without_inf,
)

LANES = 128


@dataclasses.dataclass(frozen=True)
class Columns:
    """Named columns of a table of numbers per row, or rows of one per class."""

    names: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)

    def of_rows(self, table: Any, name: str) -> Any:
        """A column of the table, (rows, 1), or None."""
        if name not in self.names:
            return None
        at = self.names.index(name)
        return table[:, at : at + 1]

    def of_classes(self, table: Any, name: str) -> Any:
        """A row of the table, (1, classes), or None."""
        if name not in self.names:
            return None
        at = self.names.index(name)
        return table[at : at + 1, :]

    def replaced(self, table: Any, values: dict[str, Any]) -> Any:
        """The table of numbers per row with some columns replaced."""
        lane = lax.broadcasted_iota(jnp.int32, table.shape, 1)
        for name, value in values.items():
            table = jnp.where(lane == self.names.index(name), value, table)
        return table


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of the logits and of their statistics; Python values.

    Attributes:
        statistics: Names, in the order of `softlib.logits.RowStatistics`.
        softcap: c; None for none.
        labels: Number of labels per row.
        per_row: Columns of the table of numbers per row.
        per_class: Rows of the table of numbers per class.
        filter_eps: Threshold of the gradient filter; None for none.
    """

    statistics: tuple[str, ...]
    softcap: float | None
    labels: int
    per_row: Columns
    per_class: Columns
    filter_eps: float | None = None

    def wants(self, *names: str) -> bool:
        return any(name in self.statistics for name in names)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some rows of a tile of logits, with their numbers per row and class.

    Attributes:
        form: Static options.
        raw: Products of hidden and weight, float32, (rows, classes).
        rows: Table of numbers per row, for these rows, or None.
        classes: Table of numbers per class, for these classes, or None.
        labels: (rows, L) int32, or None.
        ids: The class of each entry, (rows, classes) int32.
        real: True where the entry is a logit, not padding; None for everywhere.
    """

    form: Form
    raw: Any
    rows: Any
    classes: Any
    labels: Any
    ids: Any
    real: Any

    def per_row(self, name: str) -> Any:
        return self.form.per_row.of_rows(self.rows, name)

    def per_class(self, name: str) -> Any:
        return self.form.per_class.of_classes(self.classes, name)

    def logits(self) -> tuple[Any, Any]:
        """The logits z, and tanh(u / c) or None."""
        u, saturation, cap = self.raw, None, self.form.softcap
        scale, bias = self.per_row("scale"), self.per_class("bias")
        temperature = self.per_row("temperature")
        if scale is not None:
            u = jnp.where(u == -jnp.inf, u, without_inf(u) * scale)
        if bias is not None:
            u = u + bias
        if self.real is not None and bias is not None:
            u = jnp.where(self.real, u, 0)
        if cap is not None:
            saturation = jnp.tanh(u / cap)
            u = cap * saturation
        if temperature is not None:
            u = jnp.where(u == -jnp.inf, u, without_inf(u) / temperature)
        return u, saturation

    def select(self, z: Any, other: ArrayLike) -> Any:
        """`z`, but `other` in padding and in classes that are not selected."""
        if self.real is not None:
            z = jnp.where(self.real, z, other)
        where = self.per_class("where")
        return z if where is None else jnp.where(where > 0, z, other)

    def label(self, index: int) -> Any:
        """True where the class is this label of the row, (rows, classes)."""
        return self.ids == self.labels[:, index : index + 1]


# ------------------------------------------------------------------------------ forward
def state_columns(form: Form) -> Columns:
    """Columns of the numbers that the forward pass carries from tile to tile."""
    return Columns(state_names(form.statistics, form.labels))


def result_columns(form: Form) -> Columns:
    names: list[str] = []
    for name in form.statistics:
        labels = range(form.labels)
        names += [f"label_{i}" for i in labels] if name == "label_logits" else [name]
    return Columns(tuple(names))


def start(columns: Columns, shape: tuple[int, int]) -> Any:
    tops = {"top": -jnp.inf, "max_logit": -jnp.inf}
    values = {name: value for name, value in tops.items() if name in columns}
    return columns.replaced(jnp.zeros(shape, jnp.float32), values)


def updated(state: Any, columns: Columns, piece: Slice) -> Any:
    """The state with the classes of a slice added."""
    form = piece.form
    z, _ = piece.logits()
    present, counted = piece.select(z, -jnp.inf), piece.select(z, 0)
    before = lambda name: columns.of_rows(state, name)
    after: dict[str, Any] = {}
    needs_top = form.wants("lse", "mean_logit", "max_logit", "argmax")
    tile_top: Any = present.max(1, keepdims=True) if needs_top else None
    if form.wants("lse", "mean_logit"):
        top = jnp.maximum(before("top"), tile_top)
        shift = jnp.where(top == -jnp.inf, 0, top)
        exponentials = jnp.exp(present - shift)
        factor = jnp.exp(before("top") - shift)
        total = exponentials.sum(1, keepdims=True)
        after |= {"top": top, "total": before("total") * factor + total}
        if form.wants("mean_logit"):
            # p z is 0 where z is -inf.
            added = (exponentials * without_inf(present)).sum(1, keepdims=True)
            after["weighted"] = before("weighted") * factor + added
    if form.wants("sum_logits"):
        after["sum_logits"] = before("sum_logits") + counted.sum(1, keepdims=True)
    if form.wants("sum_squared_logits"):
        added = (counted * counted).sum(1, keepdims=True)
        after["sum_squared_logits"] = before("sum_squared_logits") + added
    if form.wants("max_logit", "argmax"):
        known = before("max_logit")
        if form.wants("argmax"):
            # The lowest class that attains the maximum. Numbers of classes are exact in
            # float32 below 2^24.
            attained = jnp.where(present == tile_top, piece.ids, _BEYOND)
            lowest = attained.min(1, keepdims=True).astype(jnp.float32)
            after["argmax"] = jnp.where(tile_top > known, lowest, before("argmax"))
        after["max_logit"] = jnp.maximum(known, tile_top)
    if form.wants("label_logits"):
        for i in range(form.labels):
            # From the same logits as lse, which it must not exceed by rounding.
            found = jnp.where(piece.label(i), z, 0).sum(1, keepdims=True)
            after[f"label_{i}"] = before(f"label_{i}") + found
    return columns.replaced(state, after)


_BEYOND = 2**30


def finished(state: Any, columns: Columns, form: Form, width: int) -> Any:
    """The table of results, (rows, width)."""
    found = {name: columns.of_rows(state, name) for name in columns.names}
    if form.wants("lse", "mean_logit"):
        empty = found["total"] == 0
        total = jnp.where(empty, 1, found["total"])
        top = jnp.where(found["top"] == -jnp.inf, 0, found["top"])
        found["lse"] = jnp.where(empty, -jnp.inf, top + jnp.log(total))
        if form.wants("mean_logit"):
            found["mean_logit"] = jnp.where(empty, 0, found["weighted"] / total)
    results = result_columns(form)
    table = jnp.zeros((state.shape[0], width), jnp.float32)
    return results.replaced(table, {name: found[name] for name in results.names})


# ----------------------------------------------------------------------------- backward
@dataclasses.dataclass(frozen=True)
class Cotangents:
    """Cotangents of a slice.

    Attributes:
        raw: Cotangent of the products, scale included.
        biased: Cotangent of the bias, before the sum over rows.
        scale: (rows, 1), or None.
        temperature: (rows, 1), or None.
        distance: |p - onehot| for the gradient filter; -1 in a row without a cotangent.
    """

    raw: Any
    biased: Any
    scale: Any
    temperature: Any
    distance: Any


def cotangents(piece: Slice) -> Cotangents:
    form = piece.form
    z, saturation = piece.logits()
    has_slope = any(name in form.per_row for name in ("g_lse", "g_mean_logit"))
    p = _probabilities(piece, z) if has_slope else None
    dz = cotangent_of_logits(piece, z, p, form_labels(form))
    du, dscale, dtemperature, distance = dz, None, None, None
    temperature, scale = piece.per_row("temperature"), piece.per_row("scale")
    if temperature is not None:
        terms = dz * without_inf(z) / temperature
        dtemperature = -terms.sum(1, keepdims=True)
        du = du / temperature
    if saturation is not None:
        du = du * (1 - saturation * saturation)
    draw = du
    if scale is not None:
        dscale = (du * without_inf(piece.raw)).sum(1, keepdims=True)
        draw = du * scale
    if piece.real is not None:
        # The numbers of a padded row may be NaN.
        draw, du = jnp.where(piece.real, draw, 0), jnp.where(piece.real, du, 0)
    if form.filter_eps is not None:
        distance = _distance(piece, z)
    return Cotangents(draw, du, dscale, dtemperature, distance)


def form_labels(form: Form) -> int:
    """Number of labels with a cotangent."""
    return sum(name.startswith("g_label_") for name in form.per_row.names)


def _probabilities(piece: Slice, z: Any) -> Any:
    lse = piece.per_row("lse")
    # In an empty row, where lse is -inf, p must be 0, not exp(-inf + inf).
    offset = jnp.where(lse == -jnp.inf, 0, lse)
    return jnp.exp(piece.select(z, -jnp.inf) - offset)


def _distance(piece: Slice, z: Any) -> Any:
    """|p - onehot|, with 1 at each label; infinite for NaN."""
    distance = piece.select(_probabilities(piece, z), 0)
    if piece.labels is not None:
        hit = piece.label(0)
        for i in range(1, piece.form.labels):
            hit = hit | piece.label(i)
        distance = jnp.abs(distance - jnp.where(hit, 1.0, 0.0))
    active: Any = None
    for name in piece.form.per_row.names:
        if name.startswith("g_"):
            some = piece.per_row(name) != 0
            active = some if active is None else active | some
    distance = jnp.where(jnp.isnan(distance), jnp.inf, distance)
    distance = jnp.where(active, distance, -1.0)
    return distance if piece.real is None else jnp.where(piece.real, distance, -1.0)
