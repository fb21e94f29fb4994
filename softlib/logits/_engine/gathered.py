"""Final logits at some classes of each row: products of gathered rows of the weight.

It computes one logit per wanted class, forward and backward, where a stream computes
one per class of the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib._compiled_once import compiled_once

from . import chunks as _chunks, stream, tile as _tile
from .blocks import modifier_layout
from .chunks import Index
from .head import Head
from .tile import Modifiers, Options


@compiled_once(0)
def of_head(
    options: Options, head: Head, ids: Int[Array, "rows L"]
) -> Float[Array, "rows L"]:
    """Logits at ids in range; -inf at a class that is excluded."""
    rows, features = head.hidden.shape
    most = max(_chunks.BLOCK // max(ids.shape[1] * features, 1), 1)
    cut = _chunks.row_cut(rows, features, options.token_chunk or most)

    def of(group: Index | None) -> Float[Array, "rows L"]:
        mine = stream.rows_of(head, cut, group)

        def of_row(hidden, modifiers, ids):
            # Widened before it is gathered, so that gradients of a class that several
            # rows gather are summed in float32.
            weight = head.weight.astype(head.dtype)
            row = Head(
                hidden[None],
                jnp.take(weight, ids, options.vocab_axis),
                None,
                _modifiers_at(modifiers, ids),
            )
            z = stream.tile_of(row, options).z
            return _tile.select(z, row.modifiers.class_where, -jnp.inf)[0]

        axes = (0, _axes_of_rows(mine.modifiers), 0)
        operands = (mine.hidden, mine.modifiers, cut.take(ids, group))
        return jax.vmap(of_row, in_axes=axes)(*operands)

    # A loop would keep the gathered rows of all steps for the backward pass.
    visit = of if cut.whole else jax.checkpoint(of)
    return stream.by_rows(cut, visit, head.hidden)


@compiled_once(0)
def of_array(
    options: Options,
    raw: Float[Array, "rows V"],
    modifiers: Modifiers,
    ids: Int[Array, "rows L"],
) -> Float[Array, "rows L"]:
    """`of_head` for an array of logits."""

    def of_row(raw, modifiers, ids):
        modifiers = _modifiers_at(modifiers, ids)
        z = _tile.logits_of(jnp.take(raw, ids)[None], options, modifiers).z
        return _tile.select(z, modifiers.class_where, -jnp.inf)[0]

    axes = (0, _axes_of_rows(modifiers), 0)
    return jax.vmap(of_row, in_axes=axes)(raw, modifiers, ids)


def _axes_of_rows(modifiers: Modifiers) -> Any:
    """Axes for `vmap`: 0 for modifiers that have rows, None for the others."""
    layouts = modifier_layout(modifiers)
    return jax.tree.map(lambda layout: 0 if layout.rows else None, layouts)


def _modifiers_at(modifiers: Modifiers, ids: Int[Array, " L"]) -> Modifiers:
    """The modifiers of one row, gathered at these classes."""
    return modifiers.of_classes(lambda array, axis: jnp.take(array, ids, axis=axis))
