"""Logits that are stored as an array."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._largest import largest
from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import Implementations, PerRow

from ._engine import operations
from ._engine.blocks import Blocks, Layout, modifier_layout
from ._engine.tile import RowStatistics
from ._modified import ModifiedLogits, blocks_of
from ._modifiers import (
    checked_implementation,
    checked_modifiers,
    checked_options,
    require_classes,
    shown_modifiers,
)
from ._source_rows import (
    Shape,
    collapsed,
    collapsed_modifiers,
    final_logits,
    label_rows,
    masked_modifiers,
    ranked_rows,
    row_specs,
    shaped,
)


class StoredLogits(ModifiedLogits):
    r"""Logits that are stored as an array, with options that turn them into final ones.

    Give it to any function that takes an array of logits: it carries the options that
    an array cannot. With $x$ the array, in float32 or wider,

    $$u = s\, x + b, \qquad z = \frac{c \tanh(u / c)}{T}$$

    with scale $s$, bias $b$, softcap $c$ and temperature $T$, each left out if None. It
    is a pytree, as `LinearLogits`.

    Args:
        logits: Unnormalised log-probabilities, of any floating dtype; -inf is legal.
        bias: Added to the scaled logits, one number per class; -inf is legal.
        scale: Multiplies the logits; a number, or an array that is a scalar or one
            value per row, differentiable.
        softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `scale` otherwise.
        class_where: True for the classes that exist; broadcasts to `logits`.
        implementation: Static; see `softlib.explain`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number; or the value is used as if it were an array.
        ValueError: Shapes do not fit together, or an option is out of range.

    Attributes:
        logits: As given.
        bias, scale, softcap, temperature, class_where: As given, numbers as arrays.

    Derivatives: those of the function that takes it; see `row_statistics`.
    Cost: nothing by itself.
    Source: the final logits of `LinearLogits`, for an array.

    Example:
        >>> array = jnp.array([[2.0, 0.0]])
        >>> logits = softlib.logits.StoredLogits(array, temperature=2.0)
        >>> print(logits.materialize())
        [[1. 0.]]
    """

    array_fields = ("logits", "modifiers")
    static_fields = ("function", "options", "implementation")

    logits: Array
    implementation: Implementations

    @array_arguments
    def __init__(
        self,
        logits: Float[Array, "*batch V"],
        *,
        bias: Float[Array, " V"] | None = None,
        scale: PerRow | None = None,
        softcap: float | None = None,
        temperature: PerRow | None = None,
        class_where: Bool[Array, "..."] | None = None,
        implementation: Implementations = None,
    ) -> None:
        checked = type(self).of(
            "StoredLogits",
            logits,
            bias=bias,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            class_where=class_where,
            implementation=implementation,
        )
        vars(self).update(vars(checked))

    @classmethod
    def of(
        cls,
        function: str,
        logits: ArrayLike,
        *,
        softcap: float | None = None,
        implementation: Implementations = None,
        name: str = "logits",
        **modifiers: Any,
    ) -> "StoredLogits":
        """Checked logits; errors name `function`, and the logits `name`."""
        logits = jnp.asarray(logits)
        checks.require_floating(function, **{name: logits})
        checks.require_rank(function, name, logits, 1, "(..., V)")
        batch, vocabulary = logits.shape[:-1], logits.shape[-1]
        require_classes(function, name, vocabulary, logits.shape)
        dtype = accumulator_dtype(logits)
        implementation = checked_implementation(
            function, operations.GIVEN, implementation
        )
        checked = checked_modifiers(
            function, batch, vocabulary, dtype, logits.shape, **modifiers
        )
        return object.__new__(cls).replaced(
            function=function,
            logits=logits,
            modifiers=checked,
            options=checked_options(function, softcap),
            implementation=implementation,
        )

    @property
    def batch_shape(self) -> Shape:
        return self.logits.shape[:-1]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return accumulator_dtype(self.logits, *self.modifiers.floating)

    def layout(self) -> "StoredLogits":
        return self.replaced(
            logits=Layout(rows=True, class_axis=-1),
            modifiers=modifier_layout(self.modifiers),
        )

    def block(self) -> Array:
        return self.logits.astype(self.dtype)

    def operand(
        self, labels: Array | None = None, label_logits: Array | None = None
    ) -> Blocks:
        return blocks_of(self, labels, label_logits)

    def shown(self) -> dict[str, Any]:
        own = {"logits": self.logits, "implementation": self.implementation}
        return {**own, **shown_modifiers(self.modifiers, self.options)}

    def masked(self, where: Bool[Array, "*batch"] | None) -> "StoredLogits":
        if where is None:
            return self
        return self.replaced(
            logits=jnp.where(where[..., None], self.logits, 0),
            modifiers=masked_modifiers(self.modifiers, where),
        )

    def statistics(
        self,
        names: Sequence[str],
        labels: Array | None = None,
        label_logits: Array | None = None,
    ) -> RowStatistics:
        batch = self.batch_shape
        options = self.options.including(*names)

        def engine(logits, labels, label_logits, modifiers):
            given = operations.Given(
                collapsed(logits, batch),
                label_rows(labels, batch),
                collapsed_modifiers(modifiers, logits.shape),
                ranked_rows(labels, label_logits, batch),
            )
            found = operations.given(self.implementation, options, match_varying(given))
            return shaped(found, batch, labels)

        specs = functools.partial(row_specs, options, batch, labels)
        arrays = (self.logits, labels, label_logits, self.modifiers)
        return in_auto_mode(engine, specs, *arrays)

    def top_classes(self, count: int) -> tuple[Array, Array]:
        """The greatest logits of each row and their classes; no gradient."""

        def search(logits: Array) -> tuple[Array, Array]:
            values, classes = largest(logits, count)
            return values, jnp.where(values == -jnp.inf, -1, classes)

        rows = lambda spec: PartitionSpec(*spec[: len(self.batch_shape)], None)
        specs = lambda spec: (rows(spec), rows(spec))
        return in_auto_mode(search, specs, lax.stop_gradient(self.materialize()))

    def finite_classes(self) -> Bool[Array, "*batch V"]:
        return self.materialize() != -jnp.inf

    def materialize(self) -> Array:
        """Computes the final logits: rows x classes numbers in memory."""
        raw = self.logits.astype(self.dtype)
        return final_logits(raw, self.batch_shape, self.options, self.modifiers)
