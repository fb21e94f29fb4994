"""Log-probabilities of the same few labels at every position of a sequence.

A sequence of S labels reads S rows of the weight, once for all positions. Several
labels per row would make the engine compare each class with each label.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype
from softlib._sharding import in_auto_mode, match_varying

from ._blockwise import BlockwiseLogits
from ._engine.blocks import Layout, with_layout
from ._engine.vocabulary_parallel import first_class
from ._labelled_rows import without_classes
from ._sources import LinearLogits, Source, StoredLogits


def log_probs_of_shared_labels(
    source: Source, labels: Int[Array, "*lead S"]
) -> tuple[Float[Array, "*lead T S"], Bool[Array, "*lead T"]]:
    """Log p of every label at every position, and a mask of positions with a class.

    The batch of `source` is (*lead, T). Log p is -inf for a label on an excluded class,
    and if no class has a probability; arbitrary for the label -1 and at a position
    without classes.
    """
    if isinstance(source, LinearLogits):
        lse, logits = _of_linear_head(source, labels)
    elif isinstance(source, StoredLogits):
        lse, logits = _of_given_logits(source, labels)
    else:
        lse, logits = _of_blocks(source, labels)
    nothing = without_classes(source)
    some = True if nothing is None else ~nothing
    log_probs = logits - jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    return log_probs, jnp.broadcast_to(some, lse.shape)


def checked_targets(
    source: Source, labels: Array, label_where: Array | None
) -> tuple[Integer[Array, "*lead S"], Bool[Array, "*lead S"]]:
    """Targets of sequences, which need not be as long as these, and which count."""
    function, batch = source.function, source.batch_shape
    if not batch:
        raise ValueError(
            f"{function}: `logits` must have at least 2 axes, positions and classes, "
            "got 1."
        )
    labels = jnp.asarray(labels)
    checks.require_integer(function, labels=labels)
    if labels.shape[:-1] != batch[:-1] or not labels.ndim:
        axes = ", ".join(map(str, (*batch[:-1], "S")))
        raise ValueError(
            f"{function}: `labels` must have shape ({axes}) (a target for each "
            f"example), got {labels.shape}."
        )
    kept = jnp.asarray(True if label_where is None else label_where)
    checks.require_boolean(function, label_where=kept)
    why = "the shape of `labels`"
    checks.require_broadcastable(function, "label_where", kept, labels.shape, why)
    return labels, jnp.broadcast_to(kept, labels.shape)


def _of_given_logits(
    source: StoredLogits, labels: Int[Array, "*lead S"]
) -> tuple[Float[Array, "*lead T"], Float[Array, "*lead T S"]]:
    lse = source.statistics(("lse",)).lse
    assert lse is not None
    shape = (*source.batch_shape, labels.shape[-1])
    everywhere = jnp.broadcast_to(labels[..., None, :], shape)
    few = source.at_labels(source.logits, everywhere)

    def at_labels(per_class: Array | None) -> Array | None:
        if per_class is None:
            return None
        of_all = per_class.ndim == 1
        return source.at_labels(per_class, labels if of_all else everywhere)

    modifiers = source.modifiers._replace(
        bias=at_labels(source.modifiers.bias),
        class_where=at_labels(source.modifiers.class_where),
    )
    return lse, _logits_of_each(
        lambda logits, modifiers: source.replaced(logits=logits, modifiers=modifiers),
        (few, modifiers),
        labels.ndim - 1,
    )


def _of_linear_head(
    source: LinearLogits, labels: Int[Array, "*lead S"]
) -> tuple[Float[Array, "*lead T"], Float[Array, "*lead T S"]]:
    lead, options = labels.shape[:-1], source.options
    axis = options.vocab_axis

    def compute(hidden, weight, labels, modifiers):
        local = labels.reshape(-1)
        if source.axis_name is not None:
            local = local - first_class(source.axis_name, source.own_classes)
        if source.implementation == "reference":
            rows = _rows_at(weight, local, axis)
        else:
            weight, rows = _with_rows_at(axis, *match_varying((weight, local)))
        if source.axis_name is not None:
            rows = jax.lax.psum(rows, source.axis_name)
        head = source.replaced(hidden=hidden, weight=weight, modifiers=modifiers)
        lse = head.statistics(("lse",)).lse
        look_up = lambda per_class: (
            None if per_class is None else head.at_labels(per_class, labels)
        )
        bias, where = look_up(modifiers.bias), look_up(modifiers.class_where)
        where = None if where is None else where != 0
        own = modifiers._replace(bias=bias, class_where=where)
        rows = rows.reshape(*labels.shape, rows.shape[-1])
        few = functools.partial(
            head.replaced,
            options=dataclasses.replace(options, vocab_axis=0),
            axis_name=None,
        )
        logits = _logits_of_each(
            lambda hidden, rows, own: few(hidden=hidden, weight=rows, modifiers=own),
            (hidden, rows, own),
            len(lead),
        )
        return lse, logits

    specs = lambda spec: (
        PartitionSpec(*spec[: len(source.batch_shape)]),
        PartitionSpec(*spec[: len(source.batch_shape)], None),
    )
    arrays = (source.hidden, source.weight, labels, source.modifiers)
    return in_auto_mode(compute, specs, *arrays)


def _of_blocks(
    source: BlockwiseLogits, labels: Int[Array, "*lead S"]
) -> tuple[Float[Array, "*lead T"], Float[Array, "*lead T S"]]:
    value: Any = source.prepared()
    lse = value.statistics(("lse",)).lse

    def one(value: Any, labels: Array) -> Array:
        labels = jnp.where(labels < 0, 0, labels)

        def at_labels(layout: Layout, array: Array) -> Array:
            axis = layout.class_axis
            return array if axis is None else jnp.take(array, labels, axis=axis)

        return with_layout(value, at_labels).materialize()

    axes = value.batch_axes()
    for _ in labels.shape[:-1]:
        one = jax.vmap(one, in_axes=(axes, 0))
    return lse, one(value, labels)


def _logits_of_each(
    source_of: Callable[..., Source], arrays: Any, lead: int
) -> Float[Array, "*lead T S"]:
    """Final logits of sources made per sequence, whose classes are its labels.

    Scalars belong to all sequences.
    """
    one = lambda *arrays: source_of(*arrays).materialize()
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, arrays)
    for _ in range(lead):
        one = jax.vmap(one, in_axes=axes)
    return one(*arrays)


# ------------------------------------------------------------------- rows of the weight
def _rows_at(weight: Array, labels: Int[Array, " K"], axis: int) -> Float[Array, "K D"]:
    """Rows of the weight at the labels; zeros for a label out of range."""
    inside = (labels >= 0) & (labels < weight.shape[axis])
    rows = jnp.take(weight, jnp.where(inside, labels, 0), axis=axis)
    rows = rows if axis == 0 else rows.T
    return jnp.where(inside[:, None], rows, 0)


# The gather's own derivative would be another array of the weight's size beside the
# gradient of the stream. The stream gets the weight that this function returns, so that
# the rule below adds a few rows to the stream's gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_rows_at(
    axis: int, weight: Array, labels: Int[Array, " K"]
) -> tuple[Array, Float[Array, "K D"]]:
    return weight, _rows_at(weight, labels, axis)


def _with_rows_forward(axis: int, weight: Array, labels: Array):
    return (weight, _rows_at(weight, labels, axis)), labels


def _with_rows_backward(axis: int, labels: Array, cotangents: tuple[Array, Array]):
    of_weight, of_rows = cotangents
    count = of_weight.shape[axis]
    # Gradients of a repeated token are summed before they are rounded.
    order = jnp.argsort(labels)
    ids = labels[order]
    wide = accumulator_dtype(of_rows)
    first = jnp.concatenate([jnp.ones(min(1, len(ids)), bool), ids[1:] != ids[:-1]])
    runs = jnp.cumsum(first) - 1
    sums = jax.ops.segment_sum(
        of_rows[order].astype(wide), runs, len(ids), indices_are_sorted=True
    )
    # One row for each distinct label; the rest, and labels out of range, are dropped.
    inside = first & (ids >= 0) & (ids < count)
    classes = jnp.where(inside, ids, count)
    added = jnp.where(inside[:, None], sums[runs], 0)
    at = of_weight.at[classes] if axis == 0 else of_weight.at[:, classes]
    added = added if axis == 0 else added.T
    narrow = added.astype(of_weight.dtype)
    return at.add(narrow, mode="drop"), None


_with_rows_at.defvjp(_with_rows_forward, _with_rows_backward)
