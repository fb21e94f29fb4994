"""Logits at some classes of each row."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode, match_varying

from ._engine import gathered
from ._engine.blocks import with_layout
from ._linear import LinearLogits
from ._source_rows import collapsed, collapsed_modifiers
from ._sources import Logits, Source, source_of
from ._stored import StoredLogits


@array_arguments
def gather(
    logits: Logits, class_ids: Integer[Array, "*batch L"] | Integer[Array, " L"]
) -> Float[Array, "..."]:
    r"""The final logits of each row at its own classes, or at the same ones of all.

    It is `jnp.take_along_axis(logits.materialize(), class_ids, -1)`, or
    `logits.materialize()[..., class_ids]` for ids of one axis. Use it for candidates of
    a row, contrasts with negatives, or a few probabilities (less `logsumexp`). A linear
    head computes only these logits.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; its
            `implementation` and `gradient_filter_eps` are ignored.
        class_ids: L ids in $[0, V)$ for each row, in any order, also repeated; or L ids
            for all rows.

    Returns:
        Logits, float32 (float64 if an argument is float64): NaN, without a gradient,
        for an id outside the range, -inf for a class that `class_where` excludes.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `class_ids` are not L per row, or L for all.

    Derivatives: forward and reverse mode, any order, with respect to every floating
        array in the logits.
    Cost: 2 N L D flop forward, 4 N L D backward, for N rows of D features, and the N L
        gathered rows of the weight, in blocks of at most 128 MiB. A weight narrower
        than float32 takes a float32 array of its size if its gradient is summed, or if
        there are several blocks. With the same ids for all rows it is one product with
        L gathered rows of the weight. With ids of each row, values other than those of
        a linear head or an array take a pass of `row_statistics` over the vocabulary;
        use that for label logits and the logsumexp of the same products.
    Source: the definition.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> print(softlib.logits.gather(logits, jnp.array([[0, 2], [1, 3]])))
        [[ 1.  0.]
         [ 2. nan]]
    """
    source = source_of("gather", logits)
    batch = source.batch_shape
    checks.require_integer(source.function, class_ids=class_ids)
    same = class_ids.ndim == 1
    if not same and class_ids.shape[:-1] != batch:
        axes = ", ".join(map(str, (*batch, "L")))
        raise ValueError(
            f"{source.function}: `class_ids` must have shape ({axes}), several per "
            f"row, or (L,), the same for all, got {class_ids.shape}."
        )
    ids = labels_in_range(class_ids, source.num_classes)
    if same and source.axis_name is not None:
        same, ids = False, jnp.broadcast_to(ids, (*batch, len(ids)))
    at = _at_same if same else _at
    return jnp.where(ids >= 0, at(source, jnp.maximum(ids, 0)), jnp.nan)


def _at_same(source: Source, ids: Array) -> Array:
    """The final logits of a value with these classes alone."""
    rows = lambda spec: PartitionSpec(*spec[: len(source.batch_shape)], None)

    def of_classes(_, source, ids):
        def taken(layout, array):
            axis = layout.class_axis
            return array if axis is None else jnp.take(array, ids, axis=axis)

        return with_layout(source, taken).materialize()

    return in_auto_mode(of_classes, rows, source.per_row, source, ids)


def _at(source: Source, ids: Array) -> Array:
    batch, options = source.batch_shape, source.options
    rows = lambda spec: PartitionSpec(*spec[: len(batch)], None)
    if isinstance(source, StoredLogits):

        def of_array(array, modifiers, ids):
            raw = collapsed(array.astype(source.dtype), batch)
            modifiers = collapsed_modifiers(modifiers, array.shape)
            found = gathered.of_array(options, raw, modifiers, collapsed(ids, batch))
            return found.reshape(ids.shape)

        return in_auto_mode(of_array, rows, source.logits, source.modifiers, ids)
    if not isinstance(source, LinearLogits):
        found = source.statistics(("label_logits",), ids).label_logits
        assert found is not None
        where = source.class_where
        if where is None:
            return found
        return jnp.where(source.at_labels(where, ids), found, -jnp.inf)
    local = source.local_labels(ids)
    inside = (local >= 0) & (local < source.own_classes)

    def of_head(_, source, ids):
        head = match_varying(source.operand())
        found = gathered.of_head(options, head, collapsed(ids, batch))
        return found.reshape(ids.shape)

    local = jnp.where(inside, local, 0)
    found = in_auto_mode(of_head, rows, source.per_row, source, local)
    if source.axis_name is None:
        return found
    return source.over_devices(jnp.where(inside, found, 0))
