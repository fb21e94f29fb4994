"""Logits of a linear head, which are never formed."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode, match_varying, per_shard
from softlib._symbolic import is_symbolic
from softlib.typing import (
    AxisName,
    GradientFilter,
    Implementations,
    PerRow,
    Precision,
)

from ._engine import operations, sum_with_gradients
from ._engine.blocks import Layout, modifier_layout
from ._engine.head import Head, product
from ._engine.tile import FILTER_BLOCK, Options, RowStatistics, only
from ._engine.vocabulary_parallel import first_class, merged
from ._modified import ModifiedLogits
from ._modifiers import (
    checked_implementation,
    checked_modifiers,
    checked_options,
    require_classes,
    shown_modifiers,
)
from ._options import LinearHeadOptions, require_known
from ._source_rows import (
    Shape,
    collapsed,
    collapsed_modifiers,
    final_logits,
    label_rows,
    masked_modifiers,
    modifier_specs,
    ranked_rows,
    row_specs,
    shaped,
)


class LinearLogits(ModifiedLogits):
    r"""Logits of a linear head as a value for losses, without forming their array.

    Row by row, with $h$ the hidden features and $W$ the weight, the final logits are

    $$u = s\, h W^\top + b, \qquad z = \frac{c \tanh(u / c)}{T}$$

    with scale $s$, bias $b$, softcap $c$ and temperature $T$, each left out if None.
    Losses and functions visit $z$ in slices of the vocabulary: memory does not grow
    with rows x classes, forward or backward. A model returns this value instead of an
    array of logits, and its losses do not change.

    The value is a pytree: arrays are leaves, all else is static. It passes through
    `jax.jit`, `jax.grad` (whose result holds the gradients of hidden, weight and bias),
    `jax.checkpoint` and `jax.shard_map`. For `jax.vmap` over rows give
    `in_axes=logits.batch_axes()`, which does not map the weight. Batch axes may be
    indexed and reshaped: `logits[:, :-1]` leaves out the last token. `materialize()`
    forms the array.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel. Sliced in place, never copied.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products, one number per class; -inf is legal: such a
            class has probability 0 (after a softcap it is the smallest logit instead:
            exclude classes by `class_where`).
        scale: Multiplies the products; a number, or an array that is a scalar or one
            value per row, differentiable.
        softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `scale` otherwise.
        class_where: True for the classes that exist; the others leave every sum and
            maximum.
        axis_name: Static; the `jax.shard_map` axis over which `weight` (and `bias` and
            `class_where`) are divided by classes. Labels are global ids, and results
            are those of the whole vocabulary, the same on every device of the axis.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        gradient_filter_eps: Static positive threshold, or "auto"; None is exact. Drops
            negligible blocks of the backward products, see `row_statistics`. Saves time
            only in kernels; not with `axis_name`.
        precision: Static precision of the products, as in `jax.lax.dot_general`. By
            default the kernel for Hopper rounds a float32 `weight` beside 16-bit
            `hidden`, at most 128 MiB of copies at a time; "highest" keeps float32.
        implementation: Static; see `softlib.explain`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number; or the value is used as if it were an array.
        ValueError: Shapes do not fit together, or an option is out of range.

    Attributes:
        hidden, weight: As given.
        bias, scale, softcap, temperature, class_where: As given, numbers as arrays.

    Derivatives: those of the function that takes it; see `row_statistics`.
    Cost: nothing by itself.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(hidden, table, softcap=30.0)
        >>> print(logits, logits.shape)
        LinearLogits(hidden=float32[2,2], weight=float32[3,2], softcap=30.0) (2, 3)
    """

    array_fields = ("hidden", "weight", "modifiers")
    static_fields = ("function", "options", "implementation", "axis_name")

    hidden: Array
    weight: Array
    implementation: Implementations
    axis_name: AxisName | None  # over which the vocabulary is divided

    @array_arguments
    def __init__(
        self,
        hidden: Float[Array, "*batch D"],
        weight: Float[Array, "V D"] | Float[Array, "D V"],
        *,
        vocab_axis: int = 0,
        bias: Float[Array, " V"] | None = None,
        scale: PerRow | None = None,
        softcap: float | None = None,
        temperature: PerRow | None = None,
        class_where: Bool[Array, " V"] | None = None,
        axis_name: AxisName | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        gradient_filter_eps: GradientFilter = None,
        precision: Precision = None,
        implementation: Implementations = None,
    ) -> None:
        checked = type(self).of(
            "LinearLogits",
            hidden,
            weight,
            vocab_axis=vocab_axis,
            bias=bias,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            class_where=class_where,
            axis_name=axis_name,
            vocab_chunk=vocab_chunk,
            token_chunk=token_chunk,
            gradient_filter_eps=gradient_filter_eps,
            precision=precision,
            implementation=implementation,
        )
        vars(self).update(vars(checked))

    @classmethod
    def of(
        cls,
        function: str,
        hidden: ArrayLike,
        weight: ArrayLike,
        *,
        vocab_axis: int = 0,
        softcap: float | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        gradient_filter_eps: GradientFilter = None,
        axis_name: AxisName | None = None,
        precision: Precision = None,
        implementation: Implementations = None,
        weight_name: str = "weight",
        **modifiers: Any,
    ) -> "LinearLogits":
        """Checked logits of a head; errors name `function` and `weight_name`."""
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
        require_classes(function, weight_name, vocabulary, weight.shape)
        if axis_name is not None:
            _require_axis(function, axis_name)
            if gradient_filter_eps is not None:
                raise ValueError(
                    f"{function}: `gradient_filter_eps` must be None with `axis_name`, "
                    f"got {gradient_filter_eps!r}: a device knows the probabilities "
                    "among its own classes only."
                )
        batch = hidden.shape[:-1]
        dtype = accumulator_dtype(hidden, weight)
        options = dataclasses.replace(
            checked_options(function, softcap),
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
        implementation = checked_implementation(
            function, operations.LINEAR, implementation
        )
        checked = checked_modifiers(
            function, batch, vocabulary, dtype, (vocabulary,), **modifiers
        )
        return object.__new__(cls).replaced(
            function=function,
            hidden=hidden,
            weight=weight,
            modifiers=checked,
            options=options,
            implementation=implementation,
            axis_name=axis_name,
        )

    def counting(self, class_log_weights: Array) -> "LinearLogits":
        """The logits with each class counted e^w times in every sum over p."""
        modifiers = self.modifiers._replace(class_log_weights=class_log_weights)
        return self.replaced(modifiers=modifiers)

    @property
    def batch_shape(self) -> Shape:
        return self.hidden.shape[:-1]

    @property
    def num_classes(self) -> int:
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        return self.own_classes * devices

    @property
    def own_classes(self) -> int:
        """Number of classes on this device."""
        if self.weight.ndim != 2:
            raise ValueError(
                f"{self.function}: `weight` must have 2 axes, got shape "
                f"{self.weight.shape}. Did jax.vmap map it? Over rows alone: "
                "`in_axes=logits.batch_axes()`."
            )
        return self.weight.shape[self.options.vocab_axis]

    @property
    def dtype(self) -> jnp.dtype:
        return accumulator_dtype(self.hidden, self.weight, *self.modifiers.floating)

    def layout(self) -> "LinearLogits":
        return self.replaced(
            hidden=Layout(rows=True),
            weight=Layout(class_axis=self.options.vocab_axis),
            modifiers=modifier_layout(self.modifiers),
        )

    def block(self) -> Array:
        return self.operand().raw(self.options)

    def operand(
        self, labels: Array | None = None, label_logits: Array | None = None
    ) -> Head:
        batch, classes = self.batch_shape, self.own_classes
        own = labels
        if labels is not None and self.axis_name is not None:
            own = labels_in_range(labels, classes)  # others are another device's
        return Head(
            collapsed(self.hidden, batch),
            self.weight,
            label_rows(own, batch),
            collapsed_modifiers(self.modifiers, (*batch, classes)),
            ranked_rows(labels, label_logits, batch),
        )

    def shown(self) -> dict[str, Any]:
        static = dataclasses.asdict(self.options)
        names = ("vocab_axis", "vocab_chunk", "token_chunk", "gradient_filter_eps")
        named = {n: static[n] for n in (*names, "precision")}
        own = {"hidden": self.hidden, "weight": self.weight, **named}
        own |= {"axis_name": self.axis_name, "implementation": self.implementation}
        own["vocab_axis"] = self.options.vocab_axis or None
        return {**own, **shown_modifiers(self.modifiers, self.options)}

    def masked(self, where: Bool[Array, "*batch"] | None) -> "LinearLogits":
        """The logits with rows of zeros that do not count: 0 * NaN would be NaN."""
        if where is None:
            return self
        return self.replaced(
            hidden=jnp.where(where[..., None], self.hidden, 0),
            modifiers=masked_modifiers(self.modifiers, where),
        )

    def statistics(
        self,
        names: Sequence[str],
        labels: Array | None = None,
        label_logits: Array | None = None,
    ) -> RowStatistics:
        options, labels = self._asked_of_device(names, labels)
        arrays = (self.hidden, self.weight, labels, label_logits, self.modifiers)

        def engine(hidden, weight, labels, label_logits, modifiers):
            own = self.replaced(hidden=hidden, weight=weight, modifiers=modifiers)
            head = match_varying(own.operand(labels, label_logits))
            found = operations.linear(self.implementation, options, head)
            return shaped(found, hidden.shape[:-1], labels)

        def of_rows(spec: PartitionSpec) -> tuple[Any, ...] | None:
            if any(jax.typeof(self.weight).sharding.spec[1 - options.vocab_axis :][:1]):
                # Features are sharded: the compiler gathers slices of the weight, and
                # no device holds all of it.
                return None
            return _of_own_rows(arrays, spec)

        specs = functools.partial(row_specs, options, self.batch_shape, labels)
        found = per_shard(engine, of_rows, specs, *arrays)
        return self._of_all_devices(found, names)

    def chained_statistics(
        self, names: Sequence[str], labels: Array | None = None
    ) -> tuple[RowStatistics, "LinearLogits"]:
        options, labels = self._asked_of_device(names, labels)

        def engine(hidden, weight, labels, modifiers):
            own = self.replaced(hidden=hidden, weight=weight, modifiers=modifiers)
            head = match_varying(own.operand(labels))
            found, weight = operations.chained_linear(
                self.implementation, options, head
            )
            return shaped(found, hidden.shape[:-1], labels), weight

        def specs(spec: PartitionSpec) -> Any:
            of_weight = jax.typeof(self.weight).sharding.spec
            return row_specs(options, self.batch_shape, labels, spec), of_weight

        # The weight is returned for all devices, not for the rows of one.
        arrays = (self.hidden, self.weight, labels, self.modifiers)
        found, weight = in_auto_mode(engine, specs, *arrays)
        return self._of_all_devices(found, names), self.replaced(weight=weight)

    def _asked_of_device(
        self, names: Sequence[str], labels: Array | None
    ) -> tuple[Options, Array | None]:
        """Options for the classes of this device, and labels as ids among these."""
        _check_filtered(self.function, names, self.options)
        if self.axis_name is None:
            return self.options.including(*names), labels
        local = set(names)
        if "mean_logit" in names:
            local.add("lse")
        if "argmax" in names:
            local.add("max_logit")
        labels = None if labels is None else self.local_labels(labels)
        return self.options.including(*sorted(local)), labels

    def _of_all_devices(
        self, found: RowStatistics, names: Sequence[str]
    ) -> RowStatistics:
        if self.axis_name is None:
            return found
        offset = first_class(self.axis_name, self.own_classes)
        found = merged(found, self.axis_name, offset)
        return only(found, self.options.including(*names))

    def local_labels(self, labels: Array) -> Array:
        """Labels as ids among this device's classes; others are out of range."""
        if self.axis_name is None:
            return labels
        return labels - first_class(self.axis_name, self.own_classes)

    def at_labels(self, per_class: Array, labels: Array) -> Array:
        local = self.local_labels(labels)
        if per_class.dtype == jnp.bool_:
            per_class = per_class.astype(jnp.int32)  # may be summed over devices

        def look_up(local, per_class):
            inside = (local >= 0) & (local < self.own_classes)
            return jnp.where(inside, per_class[jnp.where(inside, local, 0)], 0)

        found = in_auto_mode(look_up, lambda spec: spec, local, per_class)
        return self.over_devices(found)

    def over_devices(self, sums: Array) -> Array:
        return sums if self.axis_name is None else lax.psum(sums, self.axis_name)

    def total(
        self,
        names: Sequence[str],
        labels: Array,
        loss: sum_with_gradients.RowLoss,
        terms: sum_with_gradients.RowTerms,
    ) -> Array:
        """Sum of a loss over all rows, with gradients computed in the forward pass.

        In `loss` and `terms` the batch is one axis of rows; `label_logits` have one
        axis more.
        """
        _check_filtered(self.function, names, self.options)
        batch, options = self.batch_shape, self.options.including(*names)

        def engine(hidden, weight, labels, modifiers, terms):
            own = self.replaced(hidden=hidden, weight=weight, modifiers=modifiers)
            head = own.operand(labels)
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

        arrays = (self.hidden, self.weight, labels, self.modifiers, terms)
        return in_auto_mode(engine, lambda spec: PartitionSpec(), *arrays)

    def materialize(self) -> Array:
        """Forms the logits: rows x classes numbers in memory."""
        batch, options, dtype = self.batch_shape, self.options, self.dtype

        def engine(hidden, weight, modifiers):
            rows = collapsed(hidden, batch)
            raw = product(rows, weight, (1, 1 - options.vocab_axis), options, dtype)
            raw = raw.reshape(*batch, self.own_classes)
            return final_logits(raw, batch, options, modifiers)

        specs = lambda spec: PartitionSpec(*spec[: len(batch)], None)
        return in_auto_mode(engine, specs, self.hidden, self.weight, self.modifiers)


def _require_axis(function: str, axis_name: AxisName) -> None:
    try:
        lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{function}: `axis_name` must name an axis of an enclosing jax.shard_map, "
            f"got {axis_name!r}."
        ) from None


def _of_own_rows(arrays: tuple[Any, ...], spec: PartitionSpec) -> tuple[Any, ...]:
    """Specs that divide hidden, and arrays per row, by rows only."""
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
