"""Two sources over one vocabulary: what divergences are computed from.

As in `_sources`, arguments are checked here, and nobody else needs to know whether
logits exist.
"""

import dataclasses
from typing import Any, TypedDict

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
from softlib.typing import AxisName, Implementations, PerRow, Precision, Scalar

from ._engine import pair_operations
from ._engine.operations import Given
from ._engine.pair_operations import GivenPair
from ._engine.pair_stream import Pair, PairOptions
from ._engine.pair_terms import Divergence
from ._engine.stream import Head
from ._labelled_rows import rows_that_count
from ._options import require_known
from ._source_rows import collapsed, collapsed_modifiers, label_rows
from ._sources import GivenLogits, LinearHead


class LogitsPairOptions(TypedDict, total=False):
    """The options of two sources of logits; `target_` is of the second one alone."""

    bias: Array | None
    logit_scale: PerRow | None
    logit_softcap: float | None
    target_bias: Array | None
    target_logit_scale: PerRow | None
    target_logit_softcap: float | None
    temperature: PerRow | None  # of both
    class_where: Array | None  # of both
    implementation: Implementations


class HeadPairOptions(LogitsPairOptions, total=False):
    """The same of two linear heads, and how both are laid out, cut and divided."""

    vocab_axis: int
    target_vocab_axis: int
    vocab_chunk: int | None
    token_chunk: int | None
    axis_name: AxisName | None
    precision: Precision


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """The second source is the target: the teacher, the reference."""

    own: LinearHead | GivenLogits
    target: LinearHead | GivenLogits

    @classmethod
    def of_heads(
        cls,
        function: str,
        hidden: ArrayLike,
        weight: ArrayLike,
        target_hidden: ArrayLike,
        target_weight: ArrayLike,
        second: str = "target",
        **options: Any,
    ) -> "SourcePair":
        """Checked heads; errors call the second what the function's user does."""
        require_known(function, options, HeadPairOptions.__optional_keys__)
        own, target = _split(options)
        source = LinearHead.of(function, hidden, weight, **own)
        other = LinearHead.of(
            f"{function}, second head", target_hidden, target_weight, **target
        )
        _require_alike(source, other, f"{second}_hidden", f"{second}_weight")
        return cls(source, other)

    @classmethod
    def of_logits(
        cls,
        function: str,
        logits: ArrayLike,
        target_logits: ArrayLike,
        second: str = "target",
        **options: Any,
    ) -> "SourcePair":
        """Checked logits; errors call the second what the function's user does."""
        require_known(function, options, LogitsPairOptions.__optional_keys__)
        own, target = _split(options)
        source = GivenLogits.of(function, logits, **own)
        other = GivenLogits.of(f"{function}, second logits", target_logits, **target)
        _require_alike(source, other, f"{second}_logits", f"{second}_logits")
        return cls(source, other)

    @property
    def function(self) -> str:
        return self.own.function

    def with_constant_target(self) -> "SourcePair":
        """No gradient reaches what the target's logits come from.

        The temperature that divides them is no part of the target: it is shared.
        """
        target = self.target
        modifiers = lax.stop_gradient(target.modifiers)
        modifiers = modifiers._replace(temperature=target.modifiers.temperature)
        arrays: dict[str, Any] = {"modifiers": modifiers}
        for name in ("hidden", "weight", "logits"):
            if hasattr(target, name):
                arrays[name] = lax.stop_gradient(getattr(target, name))
        return dataclasses.replace(self, target=dataclasses.replace(target, **arrays))

    def divergence(
        self,
        divergence: Divergence,
        *,
        reverse: bool = False,
        mixture: Scalar | None = None,
        excluded_labels: Integer[Array, "..."] | None = None,
        where: ArrayLike | None = None,
    ) -> Float[Array, "*batch"]:
        """Of the target from the own distribution, or reversed; 0 where not `where`.

        Both are normalised over the classes other than the row's `excluded_labels`.
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
            getattr(own, "axis_name", None),
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
    first: LinearHead | GivenLogits,
    second: LinearHead | GivenLogits,
    labels: Array | None,
    mixture: Array | None,
) -> Float[Array, "*batch"]:
    batch, names = first.batch, first.implementation
    specs = lambda spec: PartitionSpec(*spec[: len(batch)])

    if isinstance(first, LinearHead) and isinstance(second, LinearHead):
        classes = first.weight.shape[first.options.vocab_axis]
        if labels is not None:
            labels = first.local_labels(labels)

        def of_heads(first, second, labels, mixture):
            def head(hidden, weight, modifiers):
                return Head(
                    collapsed(hidden, batch),
                    weight,
                    label_rows(labels, batch, classes),
                    collapsed_modifiers(modifiers, (*batch, classes)),
                )

            pair = match_varying(Pair(head(*first), head(*second), mixture))
            return pair_operations.linear(names, options, pair).reshape(batch)

        heads = [(s.hidden, s.weight, s.modifiers) for s in (first, second)]
        call = lambda hidden, rest, *others: of_heads((hidden, *rest), *others)
        (hidden, *rest), other = heads
        return in_auto_mode(call, specs, hidden, tuple(rest), other, labels, mixture)

    def of_logits(logits, modifiers, others, labels, mixture):
        def given(logits, modifiers):
            return Given(
                collapsed(logits, batch),
                label_rows(labels, batch, first.vocabulary),
                collapsed_modifiers(modifiers, logits.shape),
            )

        pair = GivenPair(given(logits, modifiers), given(*others), mixture)
        pair = match_varying(pair)
        return pair_operations.given(names, options, pair).reshape(batch)

    assert isinstance(first, GivenLogits)
    assert isinstance(second, GivenLogits)
    others = (second.logits, second.modifiers)
    return in_auto_mode(
        of_logits, specs, first.logits, first.modifiers, others, labels, mixture
    )


# ----------------------------------------------------------------------------- checking
_TARGET = "target_"


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of either source; what has no `target_` twin is of both."""
    own = {n: o for n, o in options.items() if not n.startswith(_TARGET)}
    twins = {n.removeprefix(_TARGET) for n in HeadPairOptions.__optional_keys__}
    twins = {n for n in twins if _TARGET + n in HeadPairOptions.__optional_keys__}
    shared = {n: o for n, o in own.items() if n not in twins}
    of_target = {
        n.removeprefix(_TARGET): o for n, o in options.items() if n.startswith(_TARGET)
    }
    return own, {**shared, **of_target}


def _require_alike(
    own: LinearHead | GivenLogits, target: LinearHead | GivenLogits, *names: str
) -> None:
    function = own.function
    if target.batch != own.batch:
        raise ValueError(
            f"{function}: `{names[0]}` must have the batch shape {own.batch}, "
            f"got {target.batch}."
        )
    if target.vocabulary != own.vocabulary:
        raise ValueError(
            f"{function}: `{names[1]}` must have {own.vocabulary} classes, those of "
            f"the first source, got {target.vocabulary}."
        )


def _checked_exclusions(
    source: LinearHead | GivenLogits, labels: ArrayLike
) -> Integer[Array, "*batch L"]:
    """Ids (*batch, L), -1 for one that is no class: nothing to exclude."""
    function, batch = source.function, source.batch
    labels = jnp.asarray(labels)
    checks.require_integer(function, excluded_labels=labels)
    if labels.shape == batch:
        labels = labels[..., None]
    if labels.shape[:-1] != batch or labels.ndim != len(batch) + 1:
        raise ValueError(
            f"{function}: `excluded_labels` must have the batch shape {batch}, or one "
            f"more axis, got {labels.shape}."
        )
    return jax.lax.stop_gradient(labels_in_range(labels, source.vocabulary))
