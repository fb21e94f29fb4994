"""Logits of a linear head whose weight is held in few bits and decoded by slices."""

from typing import Any

from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.quantize import QuantizedArray
from softlib.typing import Implementations, PerRow, Precision

from ._blockwise import BlockwiseLogits
from ._engine.blocks import Layout
from ._engine.head import product
from ._engine.tile import Options


class QuantizedLogits(BlockwiseLogits):
    r"""Logits of a linear head with a quantized weight, which is never decoded whole.

    They are those of `LinearLogits` with the weight `weight.decode()`. A slice of the
    classes is decoded where it is visited, forward and backward, so that memory holds
    the bits of the weight and one slice in floats. Every loss and every function of
    `softlib.logits` takes the value.

    A gradient with respect to the value holds that of hidden, of the scales, zeros and
    the codebook of the weight, and of the modifiers; codes have none. If the weight is
    frozen its part costs nothing. `softlib.logits.LinearLogits` of `weight.decode()` is
    for a head that is learned as floats, for kernels, and for a vocabulary that is
    divided over devices.

    Args:
        hidden: Inputs of the head.
        weight: One row per class (V, D); of `softlib.quantize.quantize_groups`,
            `softlib.quantize.quantize_vectors` or codes of a checkpoint. Products are
            in the common dtype of `hidden` and `weight.dtype`: for those of 16 bits
            give it `weight.astype(jnp.bfloat16)`.
        bias: Added to the scaled products, one number per class; -inf is legal.
        scale: Multiplies the products; a number, or an array that is a scalar or one
            value per row, differentiable.
        softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `scale` otherwise.
        class_where: True for the classes that exist; the others leave every sum and
            maximum.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`. There is no kernel.

    Raises:
        TypeError: An argument has the wrong kind of dtype, `weight` is no
            `QuantizedArray`, or the value is used as if it were an array.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: The named implementation is a kernel.

    Attributes:
        hidden, weight, precision: As given.
        bias, scale, softcap, temperature, class_where: As given, numbers as arrays.

    Derivatives: those of the function that takes it, with respect to every floating
        array; see `row_statistics`.
    Cost: that of `LinearLogits`, and of decoding the weight once in each visit of its
        slices: once forward, once backward, for each group of rows. Plain JAX on all
        platforms.
    Source: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression"
        and "Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM
        Inference with Transferable Prompt" have such weights; the head is softlib's.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
        >>> weight = softlib.quantize.quantize_groups(table, bits=2, group_size=2)
        >>> logits = softlib.logits.QuantizedLogits(jnp.eye(2), weight)
        >>> loss = softlib.losses.softmax_cross_entropy(logits, jnp.array([2, 1]))
        >>> print(logits.shape, np.asarray(loss).round(2))
        (2, 3) [0.41 0.35]
    """

    of_rows, of_classes = ("hidden",), ("weight",)
    static_fields = ("precision",)

    hidden: Array
    weight: QuantizedArray
    precision: Precision

    @array_arguments
    def __init__(
        self,
        hidden: Float[Array, "*batch D"],
        weight: QuantizedArray,
        *,
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
        name = "QuantizedLogits"
        checks.require_floating(name, hidden=hidden)
        checks.require_rank(name, "hidden", hidden, 1, "(..., D)")
        what = "a softlib.quantize.QuantizedArray"
        checks.require_instance(name, "weight", weight, QuantizedArray, what)
        features = hidden.shape[-1]
        if weight.ndim != 2 or weight.shape[1] != features:
            raise ValueError(
                f"{name}: `weight` must have shape (V, D) with D = {features} (the "
                f"last axis of `hidden`), got {weight.shape}."
            )
        super().__init__(
            hidden=hidden,
            weight=weight,
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

    @property
    def numbers_per_class(self) -> int:
        return self.weight.size  # decoded

    def layout(self) -> "QuantizedLogits":
        layouts: Any = super().layout()
        # Every class may have any code of the codebook.
        weight = self.weight.over_leaves(
            lambda name, _: Layout(class_axis=None if name == "codebook" else 0)
        )
        return layouts.replaced(weight=weight)

    def block(self) -> Float[Array, "rows classes"]:
        options = Options((), precision=self.precision)
        weight = self.weight.decode()
        return product(self.hidden, weight, (1, 1), options, self.dtype)
