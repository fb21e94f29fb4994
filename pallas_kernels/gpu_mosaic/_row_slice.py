r"""The mathematics of a slice of logits, (rows, classes), in registers.

    raw -> u = scale * raw + bias -> cap = c * tanh(u / c) -> z = cap / temperature

A warpgroup holds a tile of logits in the layout of an accumulator, a number per row in
that layout reduced over classes, a number per class in that layout reduced over rows.
A tile is processed in slices of a few columns, so that only the intermediate values of
one slice are in registers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._row_formulas import (
    cotangent_of_logits,
    state_names,
    without_inf,
)

from . import _ring

FILTER_CLASSES = 128  # per block that the gradient filter keeps or drops
_BEYOND = 2**30  # more than any class


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of the logits and of their statistics; Python values.

    Attributes:
        statistics: Names, as in `row_statistics.STATISTICS`.
        softcap: c; None for none.
        classes: Number of classes; arrays of numbers per class are longer.
        labels: Number of labels per row.
        per_row: Names of the numbers per row, in the order of their table.
        per_class: Names of the numbers per class, in the order of their table.
        overhang: Whether a tile may reach beyond the last class.
        filter: Whether the gradient filter needs the distances of p to the labels.
        vocab_axis: The axis of the weight that runs over classes.
    """

    statistics: tuple[str, ...]
    softcap: float | None
    classes: int
    labels: int
    per_row: tuple[str, ...]
    per_class: tuple[str, ...]
    overhang: bool
    filter: bool = False
    vocab_axis: int = 0

    def wants(self, *names: str) -> bool:
        return any(name in self.statistics for name in names)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Numbers per row of a tile, in registers."""

    values: Mapping[str, Any]
    labels: tuple[Any, ...]

    @classmethod
    def load(
        cls,
        form: Form,
        table_ref: Any,
        labels_ref: Any,
        first: Any,
        count: int,
        layout: Any = plgpu.Layout.WGMMA,
    ) -> "Rows":
        """Loads from the tables (names, rows) and (labels, rows) in global memory."""
        own = pl.ds(first, count)
        of = lambda ref, at: _ring.read(ref.at[at, own], layout.reduce(1))
        values = {name: of(table_ref, at) for at, name in enumerate(form.per_row)}
        labels = tuple(of(labels_ref, at) for at in range(form.labels))
        return cls(values, labels)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some columns of a tile of logits, with their numbers per row and class.

    Attributes:
        form: Static options.
        raw: Products of hidden and weight, float32, (rows, classes).
        rows: Numbers per row.
        classes: Numbers per class, by name.
        first: The first class.
        layout: Layout of `raw`.
    """

    form: Form
    raw: Any
    rows: Rows
    classes: Mapping[str, Any]
    first: Any
    layout: Any = plgpu.Layout.WGMMA

    @classmethod
    def load(
        cls,
        form: Form,
        raw: Any,
        rows: Rows,
        table_ref: Any,
        first: Any,
        layout: Any = plgpu.Layout.WGMMA,
    ) -> "Slice":
        """A slice with its numbers per class from the table (names, classes)."""
        own = pl.ds(first, raw.shape[1])
        of = lambda at: _ring.read(table_ref.at[at, own], layout.reduce(0))
        classes = {name: of(at) for at, name in enumerate(form.per_class)}
        # The cast only tells the layout of `raw` to the compiler's inference.
        # The barrier keeps the compiler from computing all slices at once, which would
        # exceed the registers.
        raw = lax.optimization_barrier(plgpu.layout_cast(raw, layout))
        return cls(form, raw, rows, classes, first, layout)

    def over_rows(self, values: Any) -> Any:
        return lax.broadcast_in_dim(values, self.raw.shape, (0,))

    def per_row(self, name: str) -> Any:
        """A number per row broadcast over the classes, or None if there is none."""
        values = self.rows.values.get(name)
        return None if values is None else self.over_rows(values)

    def per_class(self, name: str) -> Any:
        values = self.classes.get(name)
        if values is None:
            return None
        return lax.broadcast_in_dim(values, self.raw.shape, (1,))

    @functools.cached_property
    def ids(self) -> Any:
        """Indices of the classes, from 0 in this slice."""
        return plgpu.broadcasted_iota(jnp.int32, self.raw.shape, 1, layout=self.layout)

    def label(self, index: int) -> Any:
        """True where the class is this label of the row, (rows, classes)."""
        return self.ids == self.over_rows(self.rows.labels[index] - self.first)

    def select(self, z: Any, other: float) -> Any:
        """`z`, but `other` in padding and in classes that are not selected."""
        if self.form.overhang:
            z = jnp.where(self.ids < self.form.classes - self.first, z, other)
        where = self.per_class("where")
        return z if where is None else jnp.where(where > 0, z, other)

    def logits(self) -> tuple[Any, Any]:
        """The logits z, and tanh(u / c) or None."""
        u, saturation, cap = self.raw, None, self.form.softcap
        scale, bias = self.per_row("scale"), self.per_class("bias")
        temperature = self.per_row("inverse_temperature")
        if scale is not None:
            u = u * scale
        if bias is not None:
            u = u + bias
        if cap is not None:
            saturation = _tanh(u * (1 / cap))
            u = cap * saturation
        if temperature is not None:
            u = jnp.where(u == -jnp.inf, u, u * temperature)
        return u, saturation


def _tanh(x: jax.Array) -> jax.Array:
    """The tanh with an absolute error of a few 1e-7 (`tanh.approx`: 5e-4, relative).

    1 / y = rsqrt(y)^2 avoids a division.
    """
    inverse = lax.rsqrt(jnp.exp(2 * x) + 1)
    return 1 - 2 * (inverse * inverse)


# ------------------------------------------------------------------------------ forward
def start(form: Form, rows: int, layout: Any = plgpu.Layout.WGMMA) -> dict[str, Any]:
    """The per-row numbers that the forward pass carries between slices, by name."""
    tops = ("top", "max_logit")
    return {
        name: plgpu.layout_cast(
            jnp.full((rows,), -jnp.inf if name in tops else 0, jnp.float32),
            layout.reduce(1),
        )
        for name in state_names(form.statistics, form.labels)
    }


def updated(state: Mapping[str, Any], piece: Slice) -> dict[str, Any]:
    """The state with the classes of a slice added."""
    form, after = piece.form, dict(state)
    z, _ = piece.logits()
    present, counted = piece.select(z, -jnp.inf), piece.select(z, 0)
    top: Any = None
    if form.wants("lse", "mean_logit", "max_logit", "argmax"):
        top = present.max(1)
    if form.wants("lse", "mean_logit"):
        after["top"] = jnp.maximum(state["top"], top)
        shift = jnp.where(after["top"] == -jnp.inf, 0, after["top"])
        exponentials = jnp.exp(present - piece.over_rows(shift))
        factor = jnp.exp(state["top"] - shift)
        after["total"] = state["total"] * factor + exponentials.sum(1)
        if form.wants("mean_logit"):
            # p z is 0 where z is -inf.
            added = (exponentials * without_inf(present)).sum(1)
            after["weighted"] = state["weighted"] * factor + added
    if form.wants("sum_logits"):
        after["sum_logits"] = state["sum_logits"] + counted.sum(1)
    if form.wants("sum_squared_logits"):
        added = (counted * counted).sum(1)
        after["sum_squared_logits"] = state["sum_squared_logits"] + added
    if form.wants("argmax"):
        # The lowest class that attains the maximum. Numbers of classes are exact in
        # float32 below 2^24.
        attained = jnp.where(present == piece.over_rows(top), piece.ids, _BEYOND)
        lowest = (attained.min(1) + piece.first).astype(jnp.float32)
        higher = top > state["max_logit"]
        after["argmax"] = jnp.where(higher, lowest, state["argmax"])
    if form.wants("max_logit", "argmax"):
        after["max_logit"] = jnp.maximum(state["max_logit"], top)
    if form.wants("label_logits"):
        for i in range(form.labels):
            # From the same logits as lse, which it must not exceed by rounding.
            found = jnp.where(piece.label(i), z, 0).sum(1)
            after[f"label_{i}"] = state[f"label_{i}"] + found
    return after


def merged(form: Form, state: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics, from states (splits, rows) of consecutive splits of classes."""
    found: dict[str, jax.Array] = {}
    if form.wants("lse", "mean_logit"):
        top = state["top"].max(0)
        shift = jnp.where(top == -jnp.inf, 0, top)
        factor = jnp.exp(state["top"] - shift[None])
        total = (state["total"] * factor).sum(0)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        found["lse"] = jnp.where(empty, -jnp.inf, shift + jnp.log(safe))
        if form.wants("mean_logit"):
            weighted = (state["weighted"] * factor).sum(0)
            found["mean_logit"] = jnp.where(empty, 0, weighted / safe)
    for name in ("sum_logits", "sum_squared_logits"):
        if form.wants(name):
            found[name] = state[name].sum(0)
    if form.wants("max_logit", "argmax"):
        found["max_logit"] = state["max_logit"].max(0)
    if form.wants("argmax"):
        split = jnp.argmax(state["max_logit"], axis=0)  # the first that attains it
        lowest = jnp.take_along_axis(state["argmax"], split[None], axis=0)[0]
        found["argmax"] = lowest.astype(jnp.int32)
    if form.wants("label_logits"):
        labels = [state[f"label_{i}"].sum(0) for i in range(form.labels)]
        found["label_logits"] = jnp.stack(labels, axis=1)
    return {name: found[name] for name in form.statistics}


# ----------------------------------------------------------------------------- backward
@dataclasses.dataclass(frozen=True)
class Cotangents:
    """Cotangents of a slice.

    Attributes:
        raw: Cotangent of the raw products.
        biased: Cotangent of the logits before the softcap, per entry.
        scale: Cotangent of the scale, summed per row.
        temperature: Cotangent of the temperature, summed per row.
        distance: Largest |p - onehot| per row, for the gradient filter; infinite for
            NaN.
    """

    raw: Any
    biased: Any
    scale: Any
    temperature: Any
    distance: Any


def cotangents(piece: Slice) -> Cotangents:
    form = piece.form
    z, saturation = piece.logits()
    p: Any = _probabilities(piece, z) if "lse" in form.per_row else None
    labels = form.labels if "g_label_0" in form.per_row else 0
    du = cotangent_of_logits(piece, z, p, labels)
    dscale, dtemperature, distance = None, None, None
    inverse, scale = piece.per_row("inverse_temperature"), piece.per_row("scale")
    if inverse is not None:
        du = du * inverse
        dtemperature = -(du * without_inf(z)).sum(1)
    if saturation is not None:
        du = du * (1 - saturation * saturation)
    draw = du
    if scale is not None:
        dscale = (du * piece.raw).sum(1)
        draw = du * scale
    if form.filter:
        if form.labels:
            hit = piece.label(0)
            for i in range(1, form.labels):
                hit = hit | piece.label(i)
            p = jnp.abs(p - jnp.where(hit, 1.0, 0.0))
        distance = jnp.where(p >= 0, p, jnp.inf).max(1)  # a NaN is not small
    return Cotangents(draw, du, dscale, dtemperature, distance)


def _probabilities(piece: Slice, z: Any) -> Any:
    """The softmax, exactly 0 for excluded classes; lse is +inf if all are excluded."""
    lse = piece.per_row("lse")
    return jnp.exp(piece.select(z, -jnp.inf) - lse)
