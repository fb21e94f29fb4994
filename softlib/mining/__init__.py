"""Batches whose labels are hard negatives of each other.

- `ngame_batches`: of whole clusters, which `softlib.numerics.balanced_kmeans` finds.
- `draw_positives`: a positive of each point; `in_batch_positives`: which of those drawn
  are positives of which points, for `softlib.losses.in_batch_triplet_loss` and others.
- `hard_negative_recall`: how many of the hardest negatives such batches hold.
"""

from ._batches import (
    draw_positives as draw_positives,
    hard_negative_recall as hard_negative_recall,
    in_batch_positives as in_batch_positives,
    ngame_batches as ngame_batches,
)

__all__ = [
    "draw_positives",
    "hard_negative_recall",
    "in_batch_positives",
    "ngame_batches",
]
