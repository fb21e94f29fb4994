"""Logits of a linear head with a low-rank change of its weight, never added to it."""

from typing import Any

from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import Implementations, PerRow, Precision, Scalar

from ._blockwise import BlockwiseLogits
from ._engine.head import product
from ._engine.tile import Options
from ._linear import LinearLogits
from ._modifiers import checked_per_row


class LoRALogits(BlockwiseLogits):
    r"""Logits of a linear head with a low-rank change, which are never formed.

    Row by row, with $h$ the hidden features, $W$ the weight (V, D), $A$ (D, r) and $B$
    (r, V) the factors of the change and $a$ its scale, the raw logits are

    $$h W^\top + a\, (h A) B.$$

    Neither the change $A B$ nor its sum with the weight is formed, and $h A$ is
    computed once for each row. If only the factors and the hidden features are
    differentiated, no array of the weight's size is made: a frozen weight is only read.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or with `vocab_axis=1` one column per class.
        lora_a: The first factor (D, r), as `lora_a` of `flax.nnx.LoRA`.
        lora_b: The second factor (r, V), as `lora_b` of `flax.nnx.LoRA`.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        lora_scale: Multiplies the change; a number or a scalar array, differentiable.
            For an adapter with a number alpha it is alpha / r.
        bias: Added to the scaled logits, one number per class; -inf is legal.
        scale: Multiplies the sum of both products; a number, or an array that is a
            scalar or one value per row, differentiable.
        softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `scale` otherwise.
        class_where: True for the classes that exist; the others leave every sum and
            maximum.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number; or the value is used as if it were an array.
        ValueError: Shapes do not fit together, or an option is out of range.

    Attributes:
        hidden, weight, lora_a, lora_b, vocab_axis, precision: As given.
        lora_scale: As given, a number as an array.
        bias, scale, softcap, temperature, class_where: As given, numbers as arrays.

    Derivatives: those of the function that takes it, with respect to every floating
        array; see `row_statistics`.
    Cost: that of `LinearLogits` and of a product with r features; plain JAX on all
        platforms.
    Source: "LoRA: Low-Rank Adaptation of Large Language Models".

    Example:
        >>> hidden, table = jnp.eye(2), jnp.zeros((3, 2))
        >>> a, b = jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 2.0, 4.0]])
        >>> logits = softlib.logits.LoRALogits(hidden, table, a, b, lora_scale=0.5)
        >>> print(logits.materialize())
        [[0. 1. 2.]
         [0. 0. 0.]]
    """

    of_rows = ("hidden",)
    of_classes = ("weight", "lora_b")
    of_all = ("lora_a", "lora_scale")
    static_fields = ("vocab_axis", "precision")

    hidden: Array
    weight: Array
    lora_a: Array
    lora_b: Array
    lora_scale: Array
    vocab_axis: int
    precision: Precision

    @array_arguments
    def __init__(
        self,
        hidden: Float[Array, "*batch D"],
        weight: Float[Array, "V D"] | Float[Array, "D V"],
        lora_a: Float[Array, "D r"],
        lora_b: Float[Array, "r V"],
        *,
        vocab_axis: int = 0,
        lora_scale: Scalar = 1.0,
        bias: Float[Array, " V"] | None = None,
        scale: PerRow | None = None,
        softcap: float | None = None,
        temperature: PerRow | None = None,
        class_where: Bool[Array, " V"] | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        precision: Precision = None,
        implementation: Implementations = None,
    ) -> None:
        arrays: dict[str, Any] = {
            "hidden": hidden,
            "weight": weight,
            "lora_a": lora_a,
            "lora_b": lora_b,
        }
        _require_factors("LoRALogits", vocab_axis, **arrays)
        dtype = accumulator_dtype(*arrays.values())
        factor = checked_per_row("LoRALogits", "lora_scale", lora_scale, (), dtype)
        super().__init__(
            **arrays,
            lora_scale=factor,
            vocab_axis=vocab_axis,
            precision=precision,
            bias=bias,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            class_where=class_where,
            vocab_chunk=vocab_chunk,
            token_chunk=token_chunk,
            implementation=implementation,
        )

    def class_axis(self, name: str) -> int:
        return self.vocab_axis if name == "weight" else 1

    def block(self) -> Array:
        return self.prepared().block()

    def prepared(self) -> "_Reduced":
        options = Options((), precision=self.precision)
        contract = (self.hidden.ndim - 1, 0)
        reduced = product(self.hidden, self.lora_a, contract, options, self.dtype)
        value: Any = object.__new__(_Reduced)
        return value.replaced(
            function=self.function,
            hidden=self.hidden,
            reduced=self.lora_scale.astype(self.dtype) * reduced,
            weight=self.weight,
            lora_b=self.lora_b,
            vocab_axis=self.vocab_axis,
            precision=self.precision,
            modifiers=self.modifiers,
            options=self.options,
            implementation=self.implementation,
        )


class _Reduced(BlockwiseLogits):
    """`LoRALogits` with the product of hidden and the first factor computed."""

    of_rows, of_classes = ("hidden", "reduced"), ("weight", "lora_b")
    static_fields = ("vocab_axis", "precision")

    hidden: Array
    reduced: Array  # scaled
    weight: Array
    lora_b: Array
    vocab_axis: int
    precision: Precision

    def class_axis(self, name: str) -> int:
        return self.vocab_axis if name == "weight" else 1

    def block(self) -> Array:
        options = Options((), precision=self.precision)
        of_weight = (1, 1 - self.vocab_axis)
        whole = product(self.hidden, self.weight, of_weight, options, self.dtype)
        return whole + product(self.reduced, self.lora_b, (1, 0), options, self.dtype)


def _require_factors(
    name: str,
    vocab_axis: int,
    *,
    hidden: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
) -> None:
    """Requires two factors whose product has the shape (D, V) of the weight."""
    LinearLogits.of(name, hidden, weight, vocab_axis=vocab_axis)  # raises
    checks.require_floating(name, lora_a=lora_a, lora_b=lora_b)
    features = hidden.shape[-1]
    if lora_a.ndim != 2 or lora_a.shape[0] != features:
        raise ValueError(
            f"{name}: `lora_a` must have shape (D, r) with D = {features} (the last "
            f"axis of `hidden`), got {lora_a.shape}."
        )
    rank, classes = lora_a.shape[1], weight.shape[vocab_axis]
    why = "(r, V) of `lora_a` and `weight`"
    checks.require_shape(name, "lora_b", lora_b, (rank, classes), why)
