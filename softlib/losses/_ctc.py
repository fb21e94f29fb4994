"""Connectionist temporal classification: labels at unknown times."""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._ids import labels_in_range
from softlib._log_domain import log_add
from softlib._sharding import in_auto_mode, match_varying
from softlib.logits import Logits
from softlib.logits._labelled_rows import rows_that_count
from softlib.logits._shared_labels import checked_targets, log_probs_of_shared_labels
from softlib.logits._sources import Source, source_of


@array_arguments
def ctc_loss(
    logits: Logits,
    labels: Integer[Array, "*batch S"],
    *,
    blank_id: int = 0,
    where: Bool[Array, "..."] | None = None,
    label_where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Connectionist temporal classification (CTC), for labels without times.

    $$L = -\log \sum_{a:\, B(a) = y} \prod_t p_t(a_t)$$

    over all sequences $a$ of a class or the blank for each frame $t$ that become the
    labels $y$ when repetitions are merged and then blanks are removed. Used for speech
    and handwriting, where labels are in order and fewer than frames. Of a linear head
    only the logits of the sequence's own labels and the logsumexp are computed.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per frame.
        labels: The S labels of each sequence, class ids in $[0, V)$ without the blank.
            Another id, if `label_where` keeps it, makes its sequence NaN without
            gradient.
        blank_id: Static; the class of the blank.
        where: True for the frames that count; broadcasts to the batch shape of
            `logits`. The others may hold anything, and stand wherever they like.
        label_where: True for the labels that count; broadcasts to `labels`.

    Returns:
        The loss per sequence in nats, float32 (float64 if an argument is float64). It
        is not divided by the number of labels. +inf, without a gradient, where there
        are too few frames: fewer than labels plus equal neighbours among them. 0 for a
        sequence without frames and labels.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `blank_id` is no class.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: the stream of `row_statistics`, a product of $T$ by $S$ by $D$ for each
        sequence, and a loop over the frames that keeps $2 S + 1$ numbers of each for
        the backward pass. Nothing has the size of frames times classes.
    Source: "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data
        with Recurrent Neural Networks".

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.4, 0.1], [0.2, 0.3, 0.5]]))
        >>> print(softlib.losses.ctc_loss(logits, jnp.array([1])).round(2))
        1.05
    """
    source = source_of("ctc_loss", logits)
    labels, counts = checked_targets(source, labels, label_where)
    _check_blank(source, blank_id)
    where = rows_that_count(source, where)
    source = source.masked(where)
    # Labels that count to the front, so that neighbours are neighbours.
    order = jnp.argsort(~counts, axis=-1, stable=True)
    labels = jnp.take_along_axis(labels, order, -1)
    counts = jnp.take_along_axis(counts, order, -1)
    labels = jnp.where(counts, labels_in_range(labels, source.num_classes), -1)
    bad = counts & ((labels < 0) | (labels == blank_id))
    labels = jnp.where(bad, -1, labels)
    blank = jnp.full((*labels.shape[:-1], 1), blank_id, labels.dtype)
    ids = jnp.concatenate([blank, labels], -1)
    log_probs, some = log_probs_of_shared_labels(source, ids)
    frames = some if where is None else some & where
    known = (ids >= 0)[..., None, :] & frames[..., None]
    log_probs = jnp.where(known, log_probs, -jnp.inf)
    lead = labels.ndim - 1
    spec_of = lambda spec: PartitionSpec(*spec[:lead])
    found = in_auto_mode(_forward, spec_of, log_probs, frames, labels, counts)
    return jnp.where(bad.any(-1), jnp.nan, 0 - found)


@compiled_once()
def _forward(
    log_probs: Float[Array, "*batch T S1"],
    frames: Bool[Array, "*batch T"],
    labels: Int[Array, "*batch S"],
    counts: Bool[Array, "*batch S"],
) -> Float[Array, "*batch"]:
    """Log of the sum over alignments.

    The state is the logarithm of the probability of all beginnings that end in each
    label, and of those that end in the blank before, between and after the labels.
    """
    lead, size = labels.shape[:-1], labels.shape[-1]
    never = jnp.full((*lead, size + 1), -jnp.inf, log_probs.dtype)
    # Before the first frame, all is at the first blank.
    start = never.at[..., 0].set(0)
    log_probs, frames, labels, counts, start, never = match_varying(
        (log_probs, frames, labels, counts, start, never)
    )
    # A label may follow its neighbour at once, without a blank, if they differ.
    differs = labels != jnp.roll(labels, 1, -1)

    def step(state, frame):
        in_blank, in_label = state
        own, exists = frame
        before = jnp.concatenate([never[..., :1], in_label], -1)
        skipped = jnp.where(differs, before[..., :-1], -jnp.inf)
        to_label = log_add(log_add(in_label, in_blank[..., :-1]), skipped)
        new = log_add(in_blank, before) + own[..., :1], to_label + own[..., 1:]
        kept = lambda new, old: jnp.where(exists[..., None], new, old)
        return (kept(new[0], in_blank), kept(new[1], in_label)), None

    steps = jnp.moveaxis(log_probs, -2, 0), jnp.moveaxis(frames, -1, 0)
    (in_blank, in_label), _ = lax.scan(step, (start, never[..., 1:]), steps)
    last = counts.sum(-1, dtype=jnp.int32)[..., None]
    after = jnp.take_along_axis(in_blank, last, -1)[..., 0]
    at_end = jnp.concatenate([never[..., :1], in_label], -1)
    return log_add(after, jnp.take_along_axis(at_end, last, -1)[..., 0])


def _check_blank(source: Source, blank_id: int) -> None:
    checks.require_integer_from(source.function, "blank_id", blank_id, 0)
    if blank_id >= source.num_classes:
        raise ValueError(
            f"{source.function}: `blank_id` must be below the number of classes "
            f"{source.num_classes}, got {blank_id}."
        )
