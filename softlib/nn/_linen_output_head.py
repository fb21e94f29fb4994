"""The output layer of a language model, for Flax linen."""

import jax.numpy as jnp
from flax import linen
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib.logits import LinearLogits
from softlib.typing import AxisName, GradientFilter, Implementations, PerRow, Precision

from ._head_calls import logits_of


class LinenOutputHead(linen.Module):
    r"""`OutputHead` for linen: its call gives logits as a value.

    Args:
        features: Size of the last axis of `hidden`.
        num_classes: Size of the vocabulary.
        embedding: A `linen.Embed` of the enclosing module to share the table with; None
            gives the head a parameter `kernel` (num_classes, features) of its own.
        use_bias: Whether the logits get a bias per class.
        scale: Multiplies the products, before the bias.
        softcap: Static positive number $c$; logits become $c\tanh(u / c)$.
        dtype: Dtype of the products; hidden and table are cast to it, which copies the
            table once a call. None uses the arrays as they are.
        param_dtype: Dtype of the parameters that the head owns.
        kernel_init: Initialiser of its own table.
        bias_init: Initialiser of the bias.

    Raises:
        ValueError: The embedding has another shape.

    Derivatives: as `softlib.logits.row_statistics`.
    Cost: nothing by itself.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> head = softlib.nn.LinenOutputHead(features=4, num_classes=10)
        >>> hidden, labels = jnp.ones((2, 4)), jnp.array([3, 7])
        >>> variables = head.init(jax.random.key(0), hidden)
        >>> logits = head.apply(variables, hidden)
        >>> print(softlib.losses.softmax_cross_entropy(logits, labels).shape)
        (2,)
    """

    features: int
    num_classes: int
    embedding: linen.Embed | None = None
    use_bias: bool = False
    scale: float | None = None
    softcap: float | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = initializers.variance_scaling(
        1.0, "fan_in", "normal", in_axis=1, out_axis=0
    )
    bias_init: Initializer = initializers.zeros_init()

    def setup(self) -> None:
        shape = (self.num_classes, self.features)
        if self.embedding is None:
            self.kernel = self.param(
                "kernel", self.kernel_init, shape, self.param_dtype
            )
        else:
            own = (self.embedding.num_embeddings, self.embedding.features)
            if own != shape:
                raise ValueError(
                    f"LinenOutputHead: `embedding` must have a table of shape {shape} "
                    f"(num_classes, features), got {own}."
                )
        self.bias = None
        if self.use_bias:
            self.bias = self.param(
                "bias", self.bias_init, (self.num_classes,), self.param_dtype
            )

    @array_arguments
    def __call__(
        self,
        hidden: Float[Array, "*batch D"],
        *,
        temperature: PerRow | None = None,
        class_where: Bool[Array, " V"] | None = None,
        axis_name: AxisName | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        gradient_filter_eps: GradientFilter = None,
        precision: Precision = None,
        implementation: Implementations = None,
    ) -> LinearLogits:
        """Returns the logits, as a value: nothing is computed.

        Args:
            hidden: Inputs of the head.
            temperature: As the other arguments, that of `softlib.LinearLogits`.
            class_where: The classes that exist.
            axis_name: The mesh axis over which the table is divided.
            vocab_chunk: Classes at a time.
            token_chunk: Rows at a time.
            gradient_filter_eps: Which gradients may be left out.
            precision: Precision of the products.
            implementation: Implementations in the order in which they are tried.
        """
        table = self.kernel if self.embedding is None else self.embedding.embedding
        own = (self.bias, self.scale, self.softcap, self.dtype)
        return logits_of(
            hidden,
            table,
            *own,
            temperature=temperature,
            class_where=class_where,
            axis_name=axis_name,
            vocab_chunk=vocab_chunk,
            token_chunk=token_chunk,
            gradient_filter_eps=gradient_filter_eps,
            precision=precision,
            implementation=implementation,
        )
