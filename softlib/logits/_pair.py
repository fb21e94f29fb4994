"""Pairs of sources over one vocabulary, from which divergences are computed.

Arguments are checked here. Callers need not know whether the logits are formed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from softlib import _checks as checks
from softlib._dtypes import common_dtype
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import Scalar

from ._engine import pair_operations
from ._engine.operations import Given
from ._engine.pair_operations import GivenPair
from ._engine.pair_stream import Pair, PairOptions
from ._engine.pair_terms import Divergence
from ._labelled_rows import rows_that_count
from ._linear import LinearLogits
from ._source_rows import collapsed, collapsed_modifiers, label_rows
from ._sources import Logits, Source, source_of, with_temperature
from ._stored import StoredLogits


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """Two sources; the second is the target: a teacher or a reference."""

    own: Source
    target: Source

    @classmethod
    def of(
        cls,
        function: str,
        logits: Logits,
        teacher_logits: Logits,
        second: str = "teacher_logits",
    ) -> "SourcePair":
        """Checked sources; errors name `function`, and the target `second`."""
        own = source_of(function, logits)
        target = source_of(function, teacher_logits, second)
        _require_alike(own, target, second)
        return cls(own, target)

    def at_temperature(self, temperature: ArrayLike) -> "SourcePair":
        """The pair with the logits of both divided by a temperature."""
        own, target = (
            with_temperature(source, temperature) for source in (self.own, self.target)
        )
        return SourcePair(own, target)

    @property
    def function(self) -> str:
        return self.own.function

    def with_constant_target(self) -> "SourcePair":
        """The pair with a target that has no gradient.

        A temperature that `at_temperature` sets afterwards has one: both share it.
        """
        return dataclasses.replace(self, target=lax.stop_gradient(self.target))

    def divergence(
        self,
        divergence: Divergence,
        *,
        reverse: bool = False,
        mixture: Scalar | None = None,
        excluded_labels: Integer[Array, "..."] | None = None,
        where: ArrayLike | None = None,
    ) -> Float[Array, "*batch"]:
        """Divergence of the target from the first source, or the reverse, per row.

        Both are normalised over the classes other than the row's `excluded_labels`. It
        is 0 where `where` is False.
        """
        where = rows_that_count(self.own, where)
        own, target = self.own.masked(where), self.target.masked(where)
        first, second = (own, target) if reverse else (target, own)
        labels = excluded_labels
        if labels is not None:
            labels = _checked_exclusions(self.own, labels)
        exclude = lambda options: dataclasses.replace(
            options, exclude_labels=labels is not None
        )
        options = PairOptions(
            divergence,
            exclude(first.options),
            exclude(second.options),
            own.axis_name,
        )
        if mixture is not None:
            mixture = jnp.asarray(mixture, self._dtype)
        found = _call(options, first, second, labels, mixture)
        if options.axis_name is not None:
            found = lax.psum(found, options.axis_name)
        return found if where is None else jnp.where(where, found, 0)

    @property
    def _dtype(self) -> Any:
        return common_dtype(self.own.dtype, self.target.dtype)


def _call(
    options: PairOptions,
    first: Source,
    second: Source,
    labels: Array | None,
    mixture: Array | None,
) -> Float[Array, "*batch"]:
    batch, names = first.batch_shape, first.implementation
    if names is None:
        names = second.implementation
    first, second = first.prepared(), second.prepared()
    specs = lambda spec: PartitionSpec(*spec[: len(batch)])

    if isinstance(first, StoredLogits) and isinstance(second, StoredLogits):

        def of_logits(logits, modifiers, others, labels, mixture):
            def given(logits, modifiers):
                return Given(
                    collapsed(logits, batch),
                    label_rows(labels, batch),
                    collapsed_modifiers(modifiers, logits.shape),
                )

            pair = GivenPair(given(logits, modifiers), given(*others), mixture)
            pair = match_varying(pair)
            return pair_operations.given(names, options, pair).reshape(batch)

        others = (second.logits, second.modifiers)
        return in_auto_mode(
            of_logits, specs, first.logits, first.modifiers, others, labels, mixture
        )

    if labels is not None and isinstance(first, LinearLogits):
        labels = first.local_labels(labels)

    def streamed(_, first, second, labels, mixture):
        pair = Pair(first.operand(labels), second.operand(labels), mixture)
        pair = match_varying(pair)
        return pair_operations.linear(names, options, pair).reshape(batch)

    return in_auto_mode(streamed, specs, first.per_row, first, second, labels, mixture)


# ----------------------------------------------------------------------------- checking
def _require_alike(own: Source, target: Source, name: str) -> None:
    function = own.function
    if target.batch_shape != own.batch_shape:
        raise ValueError(
            f"{function}: `{name}` must have the batch shape {own.batch_shape}, "
            f"got {target.batch_shape}."
        )
    if target.num_classes != own.num_classes:
        raise ValueError(
            f"{function}: `{name}` must have {own.num_classes} classes, those of "
            f"`logits`, got {target.num_classes}."
        )
    if own.axis_name != target.axis_name:
        raise ValueError(
            f"{function}: `axis_name` of `{name}` must be that of `logits`, "
            f"{own.axis_name!r}, got {target.axis_name!r}: a device has the same "
            "classes of both."
        )


def _checked_exclusions(
    source: Source, labels: ArrayLike
) -> Integer[Array, "*batch L"]:
    """Ids (*batch, L); -1 for one outside the classes, which excludes nothing."""
    function, batch = source.function, source.batch_shape
    labels = jnp.asarray(labels)
    checks.require_integer(function, excluded_labels=labels)
    if labels.shape == batch:
        labels = labels[..., None]
    if labels.shape[:-1] != batch or labels.ndim != len(batch) + 1:
        raise ValueError(
            f"{function}: `excluded_labels` must have the batch shape {batch}, or one "
            f"more axis, got {labels.shape}."
        )
    return jax.lax.stop_gradient(labels_in_range(labels, source.num_classes))
