"""The positives of a row among many classes: a mask over the classes, or ids.

Both become the same numbers per row: logits and weights of the positives, and
statistics of the other classes. These are separate from the start, because a sum over
all classes would lose the digits on which a loss near 0 depends.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._dtypes import common_dtype
from softlib._ids import PADDING, labels_in_range, require_ids

from ._engine.tile import RowStatistics
from ._labelled_rows import rows_that_count, without_classes
from ._sources import Source, StoredLogits


@dataclasses.dataclass(frozen=True)
class Positives:
    """Entries per class or per id of a list; `present` is True for positives.

    A row that `where` drops has none.
    """

    present: Bool[Array, "*batch M"]
    ids: Int[Array, "*batch M"] | None  # None: the entries are the classes
    outside: Bool[Array, "*batch"] | None  # an id that is no class
    where: Bool[Array, "*batch"] | None

    @classmethod
    def of(
        cls,
        source: Source,
        positives: ArrayLike,
        where: ArrayLike | None,
        *,
        required: bool,
    ) -> "Positives":
        """Checked positives; with `required` rows without positives do not count."""
        function, batch = source.function, source.batch_shape
        positives = jnp.asarray(positives)
        where = rows_that_count(source, where)
        if positives.dtype == jnp.bool_ and isinstance(source, StoredLogits):
            shape = source.logits.shape
            why = "the shape of `scores`"
            checks.require_shape(function, "positives", positives, shape, why)
            where = _of_some(positives, where) if required else where
            if where is not None:
                positives = positives & where[..., None]
            return cls(positives, None, None, where)
        require_ids(function, positives, batch, masks=isinstance(source, StoredLogits))
        present = positives != PADDING
        where = _of_some(present, where) if required else where
        if where is not None:
            present = present & where[..., None]
        ids = jnp.where(
            present, labels_in_range(positives, source.num_classes), PADDING
        )
        outside = (present & (ids < 0)).any(-1)
        return cls(present, ids, outside, where)

    def weights(
        self, source: Source, weights: ArrayLike | None, *, total: bool = False
    ) -> Float[Array, "*batch M"]:
        """The given weights, or equal ones of sum 1 or, if `total`, each 1."""
        if weights is None:
            ones = self.present.astype(source.dtype)
            if total:
                return ones
            return ones / jnp.maximum(self.count[..., None], 1).astype(ones.dtype)
        weights = jnp.asarray(weights)
        checks.require_floating(source.function, weights=weights)
        shape, why = self.present.shape, "the shape of `positives`"
        checks.require_shape(source.function, "weights", weights, shape, why)
        wide = common_dtype(weights.dtype, source.dtype)
        return jnp.where(self.present, weights, 0).astype(wide)

    @property
    def count(self) -> Int[Array, "*batch"]:
        return self.present.sum(-1, dtype=jnp.int32)

    def statistics(
        self, source: Source, names: Sequence[str]
    ) -> tuple[RowStatistics, Float[Array, "*batch M"]]:
        """Statistics of the classes that are not positives; logits of the positives.

        The logit of a positive on an excluded class is -inf, that of an entry that is
        not a positive 0. +inf becomes NaN.
        """
        source = source.masked(self.where)
        classes = source.modifiers.class_where
        if self.ids is not None:
            known = [*names, "label_logits"]
            found = source.without_labels().statistics(known, self.ids)
            logits = found.label_logits
            assert logits is not None
            if classes is not None:
                excluded = (source.at_labels(classes, self.ids) == 0) & (self.ids >= 0)
                logits = jnp.where(excluded, -jnp.inf, logits)
            return found, jnp.where(logits == jnp.inf, jnp.nan, logits)
        assert isinstance(source, StoredLogits)
        logits = jnp.where(self.present, source.materialize(), 0)
        others = ~self.present
        if classes is not None:
            others = others & jnp.broadcast_to(classes, others.shape)
        modifiers = source.modifiers._replace(class_where=others)
        source = source.replaced(modifiers=modifiers)
        found = source.statistics(names)
        return found, jnp.where(logits == jnp.inf, jnp.nan, logits)

    def of_some_class(self, source: Source) -> Bool[Array, "*batch M"]:
        """True for positives in rows that have a class."""
        nothing = without_classes(source)
        if nothing is None:
            return self.present
        return self.present & ~(nothing[..., None] if nothing.ndim else nothing)

    def sum(self, weights: Array, costs: Array) -> Float[Array, "*batch"]:
        """Weighted sum of the positives' costs, which may be +inf or NaN."""
        # A row of infinite cost has no gradient. An infinite cost of weight 0 is 0.
        infinite = costs == jnp.inf
        used = self.present & (weights != 0)
        # A finite cost of weight 0 is kept: it is the derivative in the weight. A NaN
        # of weight 0 is dropped.
        finite = self.present & ~infinite & (used | ~jnp.isnan(costs))
        terms = jnp.where(finite, weights, 0) * jnp.where(finite, costs, 0)
        loss = terms.sum(-1)
        signs = lax.stop_gradient(jnp.sign(weights))
        limit = jnp.where(used & infinite, signs, 0).sum(-1)
        return jnp.where(limit == 0, loss, jnp.copysign(jnp.inf, limit))

    def exceptions(self, loss: Array) -> Float[Array, "*batch"]:
        """The loss with NaN for an id outside the classes, 0 where `where` is False."""
        if self.outside is not None:
            loss = jnp.where(self.outside, jnp.nan, loss)
        return loss if self.where is None else jnp.where(self.where, loss, 0)


def _of_some(present: Array, where: Array | None) -> Bool[Array, "*batch"]:
    some = present.any(-1)
    return some if where is None else where & some
