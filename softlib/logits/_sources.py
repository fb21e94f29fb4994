"""Where logits come from: a linear head or an array. Losses are written on either.

A source has checked its arguments, knows its batch shape and vocabulary, and gives
`RowStatistics`; nobody else needs to know which of the two it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._sharding import in_auto_mode, match_varying, per_shard
from softlib._symbolic import is_symbolic
from softlib.typing import AxisName, GradientFilter, Implementations, Precision

from ._engine import operations, sum_with_gradients
from ._engine.stream import Head, product, top_classes
from ._engine.tile import FILTER_BLOCK, Modifiers, Options, RowStatistics, only
from ._engine.vocabulary_parallel import first_class, merged
from ._options import LinearHeadOptions, LogitsOptions, require_known
from ._source_rows import (
    Shape,
    collapsed,
    collapsed_modifiers,
    final_logits,
    label_rows,
    masked_modifiers,
    modifier_specs,
    of_rows_with_classes,
    ranked_rows,
    row_specs,
    shaped,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "weight", "modifiers"),
    meta_fields=("function", "options", "implementation", "axis_name"),
)
@dataclasses.dataclass(frozen=True)
class LinearHead:
    """Logits `hidden @ weight`, which are never formed."""

    function: str
    hidden: Array
    weight: Array
    modifiers: Modifiers
    options: Options
    implementation: Implementations
    axis_name: AxisName | None  # over which the vocabulary is divided

    @classmethod
    def of(
        cls,
        function: str,
        hidden: ArrayLike,
        weight: ArrayLike,
        *,
        vocab_axis: int = 0,
        logit_softcap: float | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        gradient_filter_eps: GradientFilter = None,
        axis_name: AxisName | None = None,
        precision: Precision = None,
        implementation: Implementations = None,
        weight_name: str = "weight",
        **modifiers: Any,
    ) -> "LinearHead":
        """A checked head; errors call the weight what the function's user does."""
        require_known(function, modifiers, LinearHeadOptions.__optional_keys__)
        hidden, weight = jnp.asarray(hidden), jnp.asarray(weight)
        checks.require_floating(function, **{"hidden": hidden, weight_name: weight})
        checks.require_rank(function, "hidden", hidden, 1, "(..., D)")
        checks.require_one_of(function, "vocab_axis", vocab_axis, (0, 1))
        features = hidden.shape[-1]
        if weight.ndim != 2 or weight.shape[1 - vocab_axis] != features:
            layout = "(V, D)" if vocab_axis == 0 else "(D, V)"
            raise ValueError(
                f"{function}: `{weight_name}` must have shape {layout} with "
                f"D = {features} "
                f"(the last axis of `hidden`) for vocab_axis={vocab_axis}, "
                f"got {weight.shape}."
                + _layout_hint(weight.shape, features, vocab_axis)
            )
        if vocab_chunk is not None:
            checks.require_positive_integer(function, "vocab_chunk", vocab_chunk)
        if token_chunk is not None:
            checks.require_positive_integer(function, "token_chunk", token_chunk)
            if is_symbolic(*hidden.shape[:-1]):
                raise ValueError(
                    f"{function}: `token_chunk` must be None where the number of rows "
                    f"is symbolic (jax.export), got {token_chunk}."
                )
        vocabulary = weight.shape[vocab_axis]
        _check_vocabulary(function, weight_name, vocabulary, weight.shape)
        if axis_name is not None:
            _check_axis(function, axis_name)
            if gradient_filter_eps is not None:
                raise ValueError(
                    f"{function}: `gradient_filter_eps` must be None with `axis_name`, "
                    f"got {gradient_filter_eps!r}: a device knows the probabilities "
                    "among its own classes only."
                )
        if implementation is not None and not isinstance(implementation, str):
            implementation = tuple(implementation)  # which compares by value
        batch = hidden.shape[:-1]
        dtype = accumulator_dtype(hidden, weight)
        options = dataclasses.replace(
            _options(function, logit_softcap),
            vocab_axis=vocab_axis,
            vocab_chunk=vocab_chunk,
            token_chunk=token_chunk,
            gradient_filter_eps=_filter(
                function,
                gradient_filter_eps,
                common_dtype(hidden.dtype, weight.dtype),
                vocab_chunk=vocab_chunk,
                token_chunk=token_chunk,
            ),
            precision=precision,
        )
        checks.require_implementation(function, operations.LINEAR, implementation)
        return cls(
            function,
            hidden,
            weight,
            _modifiers(function, batch, vocabulary, dtype, (vocabulary,), **modifiers),
            options,
            implementation,
            axis_name,
        )

    def counting(self, class_log_weights: Array) -> "LinearHead":
        """The same, with classes that stand for e^w each in every sum over p."""
        modifiers = self.modifiers._replace(class_log_weights=class_log_weights)
        return dataclasses.replace(self, modifiers=modifiers)

    @property
    def batch(self) -> Shape:
        return self.hidden.shape[:-1]

    @property
    def vocabulary(self) -> int:
        """All classes, on whatever device."""
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        return self._own_classes * devices

    @property
    def _own_classes(self) -> int:
        return self.weight.shape[self.options.vocab_axis]

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(self.hidden, self.weight, *self.modifiers.floating)

    def masked(self, where: Bool[Array, "*batch"] | None) -> "LinearHead":
        """Rows that do not count become zeros before any arithmetic: 0 * NaN is NaN."""
        if where is None:
            return self
        return dataclasses.replace(
            self,
            hidden=jnp.where(where[..., None], self.hidden, 0),
            modifiers=masked_modifiers(self.modifiers, where),
        )

    def statistics(
        self, names: Sequence[str], labels: Array | None = None
    ) -> RowStatistics:
        return self.statistics_in_turn(names, labels, in_turn=False)[0]

    def statistics_in_turn(
        self, names: Sequence[str], labels: Array | None = None, *, in_turn: bool = True
    ) -> tuple[RowStatistics, "LinearHead"]:
        """The statistics, and the same head for the next term of a loss.

        Terms that use the returned head share one gradient of the weight with this one.
        """
        _check_filtered(self.function, names, self.options)
        weight = self.weight

        def stream(
            names: Sequence[str], labels: Array | None, label_logits: Array | None
        ) -> RowStatistics:
            nonlocal weight
            found, weight = self._merged_statistics(
                names, labels, label_logits, in_turn
            )
            return found

        found = _statistics(self, stream, names, labels)
        return found, dataclasses.replace(self, weight=weight)

    def without_labels(self) -> "LinearHead":
        """The same, but lse, mean_logit and sum_softplus leave the labels out."""
        options = dataclasses.replace(self.options, exclude_labels=True)
        return dataclasses.replace(self, options=options)

    def _merged_statistics(
        self,
        names: Sequence[str],
        labels: Array | None,
        label_logits: Array | None,
        in_turn: bool,
    ) -> tuple[RowStatistics, Array]:
        if self.axis_name is None:
            return self._own_statistics(names, labels, label_logits, in_turn)
        local = set(names)
        if "mean_logit" in names:
            local.add("lse")
        if "argmax" in names:
            local.add("max_logit")
        offset = first_class(self.axis_name, self._own_classes)
        if labels is not None:
            labels = self.local_labels(labels)
        found, weight = self._own_statistics(
            sorted(local), labels, label_logits, in_turn
        )
        found = merged(found, self.axis_name, offset)
        return only(found, self.options.including(*names)), weight

    def local_labels(self, labels: Array) -> Array:
        """Ids among this device's classes; one of another device is out of range."""
        if self.axis_name is None:
            return labels
        return labels - first_class(self.axis_name, self._own_classes)

    def at_labels(self, per_class: Array, labels: Array) -> Array:
        """A number per class at each label; anything for a label out of range."""
        local = self.local_labels(labels)

        def look_up(local, per_class):
            inside = (local >= 0) & (local < self._own_classes)
            return jnp.where(inside, per_class[jnp.where(inside, local, 0)], 0)

        found = in_auto_mode(look_up, lambda spec: spec, local, per_class)
        return found if self.axis_name is None else lax.psum(found, self.axis_name)

    def count_classes(self) -> ArrayLike:
        """How many classes are selected, an array in the dtype of the sums."""
        where = self.modifiers.class_where
        if where is None:
            return self.vocabulary
        count = where.sum(-1, dtype=jnp.int32)  # exact, unlike a sum of floats
        if self.axis_name is not None:
            count = lax.psum(count, self.axis_name)
        return count.astype(self.dtype)

    def _own_statistics(
        self,
        names: Sequence[str],
        labels: Array | None,
        label_logits: Array | None,
        in_turn: bool,
    ) -> tuple[RowStatistics, Array]:
        vocabulary = self._own_classes
        options = self.options.including(*names)

        def engine(hidden, weight, labels, label_logits, modifiers):
            batch = hidden.shape[:-1]  # of the device's own part
            head = Head(
                collapsed(hidden, batch),
                weight,
                label_rows(labels, batch, vocabulary),
                collapsed_modifiers(modifiers, (*batch, vocabulary)),
                ranked_rows(labels, label_logits, batch),
            )
            names, head = self.implementation, match_varying(head)
            if in_turn:
                found, weight = operations.linear_in_turn(names, options, head)
                return shaped(found, batch, labels), weight
            return shaped(operations.linear(names, options, head), batch, labels), None

        of_weight = jax.typeof(self.weight).sharding.spec if in_turn else None
        specs = lambda spec: (row_specs(options, self.batch, labels, spec), of_weight)
        arrays = (self.hidden, self.weight, labels, label_logits, self.modifiers)
        features = jax.typeof(self.weight).sharding.spec[1 - options.vocab_axis :][:1]
        if in_turn or any(features):
            # The weight is a result, for all devices; or its features are divided: then
            # the compiler gathers slices, and no device ever holds all of it.
            found, weight = in_auto_mode(engine, specs, *arrays)
        else:
            of_arrays = functools.partial(_of_own_rows, arrays)
            found, weight = per_shard(engine, of_arrays, specs, *arrays)
        return found, self.weight if weight is None else weight

    def total(
        self,
        names: Sequence[str],
        labels: Array,
        loss: sum_with_gradients.RowLoss,
        terms: sum_with_gradients.RowTerms,
    ) -> Array:
        """The sum over all rows of a loss, with gradients in the forward pass.

        In `loss` and `terms` the batch is one axis of rows, and `label_logits` have one
        more.
        """
        _check_filtered(self.function, names, self.options)
        known = of_rows_with_classes(
            labels, self.count_classes(), self.batch, self.vocabulary
        )
        batch, vocabulary = self.batch, self._own_classes
        options = self.options.including(*names)

        def engine(hidden, weight, labels, modifiers, terms):
            head = Head(
                collapsed(hidden, batch),
                weight,
                label_rows(labels, batch, vocabulary),
                collapsed_modifiers(modifiers, (*batch, vocabulary)),
            )
            flat = lambda tree: jax.tree.map(
                lambda a: collapsed(jnp.asarray(a), batch), tree
            )
            terms = sum_with_gradients.RowTerms(
                flat(terms.factors), terms.scalars, flat(terms.marks)
            )
            operands = match_varying(sum_with_gradients.SumOperands(head, terms))
            return sum_with_gradients.total(
                self.implementation, options, loss, operands
            )

        arrays = (self.hidden, self.weight, known, self.modifiers, terms)
        return in_auto_mode(engine, lambda spec: PartitionSpec(), *arrays)

    def top_classes(self, count: int) -> tuple[Array, Array]:
        """The greatest logits of this device's classes, and these; no gradient."""
        batch, vocabulary, options = self.batch, self._own_classes, self.options

        def engine(hidden, weight, modifiers):
            rows, inputs = collapsed(hidden, batch), (*batch, vocabulary)
            modifiers = collapsed_modifiers(modifiers, inputs)
            head = match_varying(Head(rows, weight, None, modifiers))
            found = top_classes(options, lax.stop_gradient(head), count)
            return tuple(array.reshape(*batch, count) for array in found)

        rows = lambda spec: PartitionSpec(*spec[: len(batch)], None)
        specs = lambda spec: (rows(spec), rows(spec))
        return in_auto_mode(engine, specs, self.hidden, self.weight, self.modifiers)

    def final_logits(self) -> Array:
        """The logits themselves, where rows x vocabulary is small."""
        batch, options, dtype = self.batch, self.options, self.dtype

        def engine(hidden, weight, modifiers):
            rows = collapsed(hidden, batch)
            raw = product(rows, weight, (1, 1 - options.vocab_axis), options, dtype)
            raw = raw.reshape(*batch, self._own_classes)
            return final_logits(raw, batch, options, modifiers)

        specs = lambda spec: PartitionSpec(*spec[: len(batch)], None)
        return in_auto_mode(engine, specs, self.hidden, self.weight, self.modifiers)


@dataclasses.dataclass(frozen=True)
class GivenLogits:
    """Logits that exist as an array."""

    function: str
    logits: Array
    modifiers: Modifiers
    options: Options
    implementation: Implementations

    @classmethod
    def of(
        cls,
        function: str,
        logits: ArrayLike,
        *,
        logit_softcap: float | None = None,
        implementation: Implementations = None,
        name: str = "logits",
        **modifiers: Any,
    ) -> "GivenLogits":
        """Checked logits; errors call them what the function's user does."""
        require_known(function, modifiers, LogitsOptions.__optional_keys__)
        logits = jnp.asarray(logits)
        checks.require_floating(function, **{name: logits})
        checks.require_rank(function, name, logits, 1, "(..., V)")
        batch, vocabulary = logits.shape[:-1], logits.shape[-1]
        _check_vocabulary(function, name, vocabulary, logits.shape)
        dtype = accumulator_dtype(logits)
        checks.require_implementation(function, operations.GIVEN, implementation)
        return cls(
            function,
            logits,
            _modifiers(function, batch, vocabulary, dtype, logits.shape, **modifiers),
            _options(function, logit_softcap),
            implementation,
        )

    @property
    def batch(self) -> Shape:
        return self.logits.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(self.logits, *self.modifiers.floating)

    def masked(self, where: Bool[Array, "*batch"] | None) -> "GivenLogits":
        if where is None:
            return self
        return dataclasses.replace(
            self,
            logits=jnp.where(where[..., None], self.logits, 0),
            modifiers=masked_modifiers(self.modifiers, where),
        )

    def statistics(
        self, names: Sequence[str], labels: Array | None = None
    ) -> RowStatistics:
        return _statistics(self, self._own_statistics, names, labels)

    def without_labels(self) -> "GivenLogits":
        """The same, but lse, mean_logit and sum_softplus leave the labels out."""
        options = dataclasses.replace(self.options, exclude_labels=True)
        return dataclasses.replace(self, options=options)

    def _own_statistics(
        self, names: Sequence[str], labels: Array | None, label_logits: Array | None
    ) -> RowStatistics:
        batch, vocabulary = self.batch, self.vocabulary
        options = self.options.including(*names)

        def engine(logits, labels, label_logits, modifiers):
            given = operations.Given(
                collapsed(logits, batch),
                label_rows(labels, batch, vocabulary),
                collapsed_modifiers(modifiers, logits.shape),
                ranked_rows(labels, label_logits, batch),
            )
            found = operations.given(self.implementation, options, match_varying(given))
            return shaped(found, batch, labels)

        specs = functools.partial(row_specs, options, batch, labels)
        arrays = (self.logits, labels, label_logits, self.modifiers)
        return in_auto_mode(engine, specs, *arrays)

    def at_labels(self, per_class: Array, labels: Array) -> Array:
        """A number per class at each label; anything for a label out of range."""

        def look_up(labels, per_class):
            labels = jnp.where(labels < 0, 0, labels)
            if per_class.ndim == 1:
                return per_class[labels]
            per_row = jnp.broadcast_to(per_class, self.logits.shape)
            if labels.ndim == per_row.ndim:  # several labels per row
                return jnp.take_along_axis(per_row, labels, -1)
            return jnp.take_along_axis(per_row, labels[..., None], -1)[..., 0]

        return in_auto_mode(look_up, lambda spec: spec, labels, per_class)

    def count_classes(self) -> ArrayLike:
        """How many classes are selected, for all rows or for each."""
        where = self.modifiers.class_where
        if where is None:
            return self.vocabulary
        if where.ndim > 1:
            where = jnp.broadcast_to(where, self.logits.shape)
        return where.sum(-1, dtype=jnp.int32).astype(self.dtype)

    def final_logits(self) -> Array:
        """The logits themselves, for losses that need more than statistics."""
        raw = self.logits.astype(self.dtype)
        return final_logits(raw, self.batch, self.options, self.modifiers)


type Source = LinearHead | GivenLogits


def _statistics(
    source: Source,
    stream: Callable[[Sequence[str], Array | None, Array | None], RowStatistics],
    names: Sequence[str],
    labels: Array | None,
) -> RowStatistics:
    labels = of_rows_with_classes(
        labels, source.count_classes(), source.batch, source.vocabulary
    )
    if "label_rank" not in names:
        return stream(names, labels, None)
    # To count what comes before a label, a second stream must know its logit.
    assert labels is not None
    others = [name for name in names if name != "label_rank"]
    found = stream([*others, "label_logits"], labels, None)
    assert found.label_logits is not None
    logits = lax.stop_gradient(found.label_logits)
    rank = stream(["label_rank"], labels, logits).label_rank
    assert rank is not None
    selected = labels >= 0
    if source.modifiers.class_where is not None:
        at = source.at_labels(source.modifiers.class_where, labels) != 0
        selected = selected & at
    found = found._replace(label_rank=jnp.where(selected, rank, source.vocabulary))
    return only(found, source.options.including(*names))


def require_per_class(source: Source, name: str, array: Array | None) -> None:
    """One floating number per class, of this device's classes if they are divided."""
    linear = isinstance(source, LinearHead)
    classes = source._own_classes if linear else source.vocabulary
    checks.require_floating(source.function, **{name: array})
    checks.require_shape(source.function, name, array, (classes,), "one per class")


# ----------------------------------------------------------------------------- checking
def _check_axis(function: str, axis_name: AxisName) -> None:
    try:
        lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{function}: `axis_name` must name an axis of an enclosing jax.shard_map, "
            f"got {axis_name!r}."
        ) from None


def _of_own_rows(arrays: tuple[Any, ...], spec: PartitionSpec) -> tuple[Any, ...]:
    """Specs that divide hidden, and what there is per row, by rows alone."""
    hidden, _, labels, label_logits, modifiers = arrays
    rows = PartitionSpec(*spec[: hidden.ndim - 1])
    per_row = functools.partial(jax.tree.map, lambda _: rows)
    return (
        rows,
        PartitionSpec(),
        per_row(labels),
        per_row(label_logits),
        modifier_specs(modifiers, rows),
    )


def _check_filtered(function: str, names: Sequence[str], options: Options) -> None:
    if options.gradient_filter_eps is None:
        return
    for name in ("mean_logit", "sum_logits", "sum_squared_logits", "sum_softplus"):
        if name in names:
            raise ValueError(
                f"{function}: `gradient_filter_eps` must be None where the gradient of "
                f"{name} is needed (smoothing, entropy): classes of small probability "
                f"have a part in it. Got {options.gradient_filter_eps}."
            )


def _layout_hint(shape: Shape, features: int, vocab_axis: int) -> str:
    if len(shape) == 2 and shape[vocab_axis] == features:
        return f" Did you mean vocab_axis={1 - vocab_axis}?"
    return ""


def _check_vocabulary(function: str, name: str, vocabulary: int, shape: Shape) -> None:
    if vocabulary == 0:
        raise ValueError(
            f"{function}: `{name}` must have at least one class, got shape {shape}."
        )


def _modifiers(
    function: str,
    batch: Shape,
    vocabulary: int,
    dtype: Any,
    classes: Shape,
    *,
    bias: ArrayLike | None = None,
    logit_scale: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
) -> Modifiers:
    bias = None if bias is None else jnp.asarray(bias)
    checks.require_floating(function, bias=bias)
    checks.require_shape(function, "bias", bias, (vocabulary,), "one per class")

    def per_row(name: str, value: ArrayLike | None) -> Array | None:
        if value is None:
            return None
        if isinstance(value, bool):
            raise TypeError(
                f"{function}: `{name}` must be a number or a floating array, got bool."
            )
        if isinstance(value, int | float):
            if name == "temperature" and not value > 0:
                raise ValueError(
                    f"{function}: `temperature` must be positive, got {value}."
                )
            return jnp.asarray(value, dtype)
        value = jnp.asarray(value)
        checks.require_floating(function, **{name: value})
        why = "a scalar, or one per row"
        checks.require_shape_in(function, name, value, ((), batch), why)
        return value

    where = None if class_where is None else jnp.asarray(class_where)
    checks.require_boolean(function, class_where=where)
    if len(classes) == 1:
        checks.require_shape(function, "class_where", where, classes, "one per class")
    else:
        why = "the shape of `logits`"
        checks.require_broadcastable(function, "class_where", where, classes, why)
        if where is not None and where.ndim <= 1:
            where = jnp.broadcast_to(where, (vocabulary,))
    return Modifiers(
        bias,
        per_row("logit_scale", logit_scale),
        per_row("temperature", temperature),
        where,
    )


def _options(function: str, logit_softcap: float | None) -> Options:
    if logit_softcap is not None:
        checks.require_positive_number(function, "logit_softcap", logit_softcap)
        logit_softcap = float(logit_softcap)
    return Options((), logit_softcap)


def _filter(
    function: str, eps: GradientFilter, dtype: Any, **chunks: int | None
) -> float | None:
    """The threshold of the gradient filter as a number."""
    if eps is None:
        return None
    for name, size in chunks.items():
        if size is not None and size % FILTER_BLOCK:
            raise ValueError(
                f"{function}: `{name}` must be a multiple of {FILTER_BLOCK} with "
                f"`gradient_filter_eps`, got {size}."
            )
    if eps == "auto":
        return float(jnp.finfo(dtype).eps) / 32
    if isinstance(eps, str):
        raise ValueError(
            f"{function}: `gradient_filter_eps` must be a positive number, 'auto' or "
            f"None, got {eps!r}."
        )
    checks.require_positive_number(function, "gradient_filter_eps", eps)
    return float(eps)
