"""The picture of a mask in a notebook: a small drawing beside the expression."""

import html
from typing import Any

import jax
import numpy as np

_LENGTHS = (32, 128, 512)
_PIXELS = 160


def picture(mask: Any) -> str | None:
    """HTML with the first queries and keys; None for a mask that is traced."""
    leaves = jax.tree.leaves(mask)
    if any(isinstance(leaf, jax.core.Tracer) or leaf.size == 0 for leaf in leaves):
        return None
    # Arrays over positions say how many there are.
    known = [
        leaf.shape[-1]
        for leaf, rank in zip(leaves, mask._leaf_ranks(), strict=True)
        if rank
    ]
    attends = _informative(mask, min(known) if known else None)
    size = attends.shape[-1]
    title = html.escape(repr(mask))
    return (
        f'<figure style="margin:0"><svg role="img" aria-label="{title}" '
        f'width="{_PIXELS}" height="{_PIXELS}" viewBox="0 0 {size} {size}" '
        'shape-rendering="crispEdges" style="border:1px solid #b8b8b8;background:#fff">'
        f'<path fill="#1f4e79" d="{_path(attends)}"/></svg>'
        f"<figcaption><code>{title}</code>: queries 0 to {size - 1} downwards, as many "
        "keys to the right</figcaption></figure>"
    )


def _informative(mask: Any, most: int | None) -> np.ndarray:
    """Pairs of the shortest length at which it is not merely causal, full or empty."""
    first = None
    for length in _LENGTHS:
        length = length if most is None else min(length, most)
        attends = np.asarray(mask.materialize(length))
        attends = attends.reshape(-1, length, length)[0]  # one entry of a batch
        first = attends if first is None else first
        plain = np.tril(np.ones_like(attends))
        if not any((attends == p).all() for p in (plain, True, False)):
            return attends
    assert first is not None
    return first


def _path(attends: np.ndarray) -> str:
    """A rectangle for each run of keys that a query attends to."""
    edges = np.diff(np.pad(attends.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    return "".join(
        f"M{start} {row}h{stop - start}v1h{start - stop}z"
        for row, start, stop in zip(rows, starts, stops, strict=True)
    )
