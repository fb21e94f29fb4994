"""Cotangents of a tile: from those of statistics to those of products and modifiers.

Options, modifiers and the forward computation are in `tile`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .tile import (
    FILTER_BLOCK,
    Modifiers,
    Options,
    RowStatistics,
    Tile,
    over_rows,
    scattered,
    select,
    weighted,
    without_inf,
    without_labels,
)


class RowCotangents(NamedTuple):
    """Numbers per row that the backward pass needs besides the operands."""

    lse: Array | None  # of the forward pass; None if no exponential is needed
    mean_logit: Array | None  # of the forward pass
    cotangents: RowStatistics


class RawCotangents(NamedTuple):
    """Cotangents of a tile with respect to raw products and modifiers."""

    raw: Float[Array, "rows classes"]  # of the raw products, scale included
    bias: Array | None  # (classes,)
    scale: Array | None  # (rows,)
    temperature: Array | None  # (rows,)
    class_log_weights: Array | None = None  # (classes,)


def cotangent_of_raw(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> RawCotangents:
    dz = _cotangent_of_logits(tile, start, labels, rows, options, modifiers)
    found = through_modifiers(tile, dz, modifiers)
    if modifiers.class_log_weights is not None:
        dweights = _cotangent_of_weights(tile, start, labels, rows, options, modifiers)
        found = found._replace(class_log_weights=dweights)
    if options.gradient_filter_eps is None:
        return found
    # Only products are skipped: sums per class and per row stay exact.
    kept = _not_negligible(tile, start, labels, rows, options, modifiers)
    return found._replace(raw=jnp.where(kept, found.raw, 0))


def through_modifiers(tile: Tile, dz: Array, modifiers: Modifiers) -> RawCotangents:
    """Cotangents of raw products and modifiers from that of the final logits."""
    axis, dtype = tile.class_axis, dz.dtype
    dtemperature = None
    du = dz
    if modifiers.temperature is not None:
        temperature = over_rows(modifiers.temperature.astype(dtype), axis)
        finite = without_inf(tile.z)
        if modifiers.centre is not None:
            finite = finite + over_rows(modifiers.centre.astype(dtype), axis)
        dtemperature = -(dz * finite / temperature).sum(axis)
        du = du / temperature
    if tile.saturation is not None:
        du = du * (1 - tile.saturation * tile.saturation)
    dbias = None if modifiers.bias is None else du.sum(1 - axis)
    dscale, draw = None, du
    if modifiers.scale is not None:
        dscale = (du * without_inf(tile.raw)).sum(axis)
        draw = du * over_rows(modifiers.scale.astype(dtype), axis)
    return RawCotangents(draw, dbias, dscale, dtemperature)


def _cotangent_of_logits(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> Array:
    """The cotangent of z, for p = exp(z - lse) and the mean logit m, term by term.

    p (g_lse + g_mean (1 + z - m)) + g_sum + 2 g_squared z + g_softplus sigmoid(z)
    + sum of g_label onehot. With `exclude_labels` p and sigmoid(z) are 0 at the labels.
    """
    z, axis, g = tile.z, tile.class_axis, rows.cotangents
    per_row = functools.partial(over_rows, class_axis=axis)
    class_where = modifiers.class_where
    dz = None
    others = labels if options.exclude_labels else None
    if g.lse is not None or g.mean_logit is not None:
        p = _probabilities(tile, rows, modifiers, start, others)
        factors = [] if g.lse is None else [per_row(g.lse)]
        if g.mean_logit is not None:
            assert rows.mean_logit is not None
            deviation = 1 + without_inf(z) - per_row(rows.mean_logit)
            factors.append(per_row(g.mean_logit) * deviation)
        # p is exactly 0 where a class is excluded, but the deviation may be infinite.
        dz = select(p * sum(factors), class_where, 0, axis)
    of_sums = None
    if g.sum_logits is not None:
        of_sums = jnp.broadcast_to(per_row(g.sum_logits), z.shape)
    if g.sum_squared_logits is not None:
        twice = 2 * per_row(g.sum_squared_logits) * without_inf(z)
        of_sums = twice if of_sums is None else of_sums + twice
    if g.sum_softplus is not None:
        weighed = z if others is None else without_labels(z, others, start, tile)
        slopes = per_row(g.sum_softplus) * jax.nn.sigmoid(weighed)
        of_sums = slopes if of_sums is None else of_sums + slopes
    if of_sums is not None:
        of_sums = select(of_sums, class_where, 0, axis)
        dz = of_sums if dz is None else dz + of_sums
    if g.label_logits is not None:
        assert labels is not None
        of_labels = scattered(g.label_logits, labels - start, tile)
        dz = of_labels if dz is None else dz + of_labels
    return jnp.zeros_like(z) if dz is None else dz


def _cotangent_of_weights(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> Array:
    """Cotangents of logarithmic class weights: sums of p (g_lse + g_mean (z - m)).

    Unlike a change of z, one of a weight changes only the distribution of the mean.
    """
    z, axis, g = tile.z, tile.class_axis, rows.cotangents
    if g.lse is None and g.mean_logit is None:
        return jnp.zeros(z.shape[axis], z.dtype)
    others = labels if options.exclude_labels else None
    p = _probabilities(tile, rows, modifiers, start, others)
    slopes = [] if g.lse is None else [over_rows(g.lse, axis)]
    if g.mean_logit is not None:
        assert rows.mean_logit is not None
        deviation = without_inf(z) - over_rows(rows.mean_logit, axis)
        slopes.append(over_rows(g.mean_logit, axis) * deviation)
    return select(p * sum(slopes), modifiers.class_where, 0, axis).sum(1 - axis)


def _probabilities(
    tile: Tile,
    rows: RowCotangents,
    modifiers: Modifiers,
    start: int | Int[Array, ""] = 0,
    excluded_labels: Int[Array, "rows L"] | None = None,
) -> Array:
    """Probabilities of a tile's classes; exactly 0 where a class is excluded."""
    assert rows.lse is not None
    return jnp.exp(log_probabilities(tile, rows.lse, modifiers, start, excluded_labels))


def log_probabilities(
    tile: Tile,
    lse: Float[Array, " rows"],
    modifiers: Modifiers,
    start: int | Int[Array, ""] = 0,
    excluded_labels: Int[Array, "rows L"] | None = None,
) -> Array:
    """Log-probabilities of a tile's classes; -inf where a class is excluded."""
    # An empty row has lse = -inf: there p must be 0, not exp(-inf + inf).
    offset = jnp.where(lse == -jnp.inf, 0, lse)
    present = select(tile.z, modifiers.class_where, -jnp.inf, tile.class_axis)
    if excluded_labels is not None:
        present = without_labels(present, excluded_labels, start, tile)
    present = weighted(present, modifiers, tile.class_axis)
    return present - over_rows(offset, tile.class_axis)


def _not_negligible(
    tile: Tile,
    start: int | Int[Array, ""],
    labels: Int[Array, "rows L"] | None,
    rows: RowCotangents,
    options: Options,
    modifiers: Modifiers,
) -> Bool[Array, "..."]:
    """Mask of the cotangents that a gradient filter keeps, in blocks of 128 x 128.

    A block is negligible if |p - onehot| < eps in all of its rows with a cotangent,
    where onehot is 1 at each of the row's labels. Tiles start at multiples of 128 in
    rows and classes, so that tiles of all sizes drop the same blocks.
    """
    z, axis = tile.z, tile.class_axis
    assert options.gradient_filter_eps is not None
    others = labels if options.exclude_labels else None
    distance = _probabilities(tile, rows, modifiers, start, others)
    if labels is not None:
        ones = jnp.ones(labels.shape, z.dtype)
        onehot = jnp.minimum(scattered(ones, labels - start, tile), 1)
        distance = jnp.abs(distance - onehot)
    active = jnp.zeros(z.shape[1 - axis], bool)
    for cotangent in jax.tree.leaves(rows.cotangents):
        some = cotangent != 0
        active = active | (some.any(1) if some.ndim > 1 else some)
    large = (distance >= options.gradient_filter_eps) & over_rows(active, axis)
    # NaN is kept.
    large = large | jnp.isnan(distance)

    first, second = (-(-length // FILTER_BLOCK) for length in z.shape)
    padded = jnp.pad(
        large,
        [
            (0, n * FILTER_BLOCK - length)
            for n, length in zip((first, second), z.shape, strict=True)
        ],
    )
    blocks = padded.reshape(first, FILTER_BLOCK, second, FILTER_BLOCK).any((1, 3))
    spread = jnp.repeat(jnp.repeat(blocks, FILTER_BLOCK, 0), FILTER_BLOCK, 1)
    return spread[: z.shape[0], : z.shape[1]]


def cast_like(operand: Any, gradient: Array | None) -> Array | None:
    """A gradient in the dtype of its operand; None for None."""
    if operand is None or gradient is None:
        return None
    return gradient.astype(operand.dtype)


def summed_like(operand: Any, per_row: Array | None) -> Array | None:
    """The gradient of a scalar, or of an array per row; None for None."""
    if operand is None or per_row is None:
        return None
    return cast_like(operand, per_row if operand.ndim else per_row.sum())


def modifiers_like(
    modifiers: Modifiers,
    bias: Array | None,
    scale: Array | None,
    temperature: Array | None,
    class_log_weights: Array | None,
) -> Modifiers:
    """Gradients per class and per row in the shapes and dtypes of the modifiers."""
    return Modifiers(
        cast_like(modifiers.bias, bias),
        summed_like(modifiers.scale, scale),
        summed_like(modifiers.temperature, temperature),
        None,
        cast_like(modifiers.class_log_weights, class_log_weights),
    )
