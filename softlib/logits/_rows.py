"""Rows of logits with labels, for user-defined losses that obey all edge rules."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

from . import _compose
from ._engine.tile import STATISTICS, RowStatistics
from ._labelled_rows import Rows, prepare
from ._sources import Logits, Source, require_per_class, source_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledRows:
    r"""Numbers per row of logits with one label each, and masks of special rows.

    Compute a loss from the numbers as if every row were usual; `finish` sets the values
    of special rows. `softlib.logits.labelled_rows` makes it.

    Args:
        log_prob: $\log p_y$; in a row where it is undefined, finite and without a
            gradient.
        lse: Logsumexp; 0 in a row without a probability.
        statistics: The named `RowStatistics`.
        source: The logits, checked.
        rows: Masks of the rows with special values.

    Derivatives: as `row_statistics`.
    Cost: a few numbers per row.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 9])
        >>> rows = softlib.logits.labelled_rows(logits, labels)
        >>> print(rows.finish(-rows.log_prob + 0.1 * rows.lse**2).round(4))
        [0.5793    nan]
    """

    log_prob: Float[Array, "*batch"]
    lse: Float[Array, "*batch"]
    statistics: RowStatistics
    source: Source
    rows: Rows

    @array_arguments
    def at_labels(self, per_class: Float[Array, " V"]) -> Float[Array, "*batch"]:
        """Looks up a number per class at each label; 1 for a label outside the classes.

        Args:
            per_class: One number per class; of this device's classes if divided.
        """
        labels = self.rows.labels
        assert labels is not None
        require_per_class(self.source, "per_class", per_class)
        numbers = per_class.astype(accumulator_dtype(per_class))
        found = self.source.at_labels(numbers, labels)
        return jnp.where(labels >= 0, found, 1)

    @array_arguments
    def finish(self, values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        r"""Sets the values of special rows in a loss per row.

        The first of these that applies: 0 where `where` is False; NaN for a label
        outside $[0, V)$; 0 without classes; +inf for a label on an excluded class, or
        if no class has a probability. Such rows have no gradient.

        Args:
            values: The loss of each row, as computed from the numbers here.
        """
        impossible = self.rows.impossible
        return _compose.with_exceptions(self.rows, impossible, values, jnp.inf)


@array_arguments
def labelled_rows(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
    statistics: Sequence[str] = (),
) -> LabelledRows:
    r"""Prepares rows of logits for a user-defined loss.

    Rows that do not count are masked before any arithmetic, labels are checked, and the
    numbers come from one pass over the vocabulary. A loss composed of them obeys every
    edge rule, for arrays and heads.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$.
        where: True for the rows that count; broadcasts to the batch shape.
        statistics: Static names of fields of `RowStatistics`, in addition to the
            logsumexp and the label's logit.

    Returns:
        `LabelledRows`.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or a name is unknown.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `row_statistics`; with `where`, one masked copy of the rows.
    Source: a composition of `row_statistics`.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> rows = softlib.logits.labelled_rows(logits, jnp.array([0, 1]))
        >>> print(rows.finish(-rows.log_prob).round(4))
        [0.5514 0.2395]
    """
    source = source_of("labelled_rows", logits)
    if statistics:
        checks.require_names(source.function, "statistics", statistics, STATISTICS)
    names = sorted({*statistics, "lse", "label_logits"})
    rows = prepare(source, names, labels, where, distributions=False)
    assert rows.log_prob is not None
    return LabelledRows(rows.log_prob, rows.lse, rows.statistics, source, rows)
