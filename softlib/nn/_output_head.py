"""The output layer of a language model, for Flax NNX."""

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib.logits import LinearLogits
from softlib.typing import AxisName, GradientFilter, Implementations, PerRow, Precision

from ._head_calls import logits_of


class OutputHead(nnx.Module):
    r"""A linear head whose call gives logits as a value, which are never formed.

    `logits = head(hidden)` is `softlib.LinearLogits` of the head's own table: give it
    to a loss, such as `softlib.losses.softmax_cross_entropy(logits, labels)`, or to a
    function of `softlib.logits`. A model that returned an array of logits returns this
    in its place; `logits.materialize()` is that array, for decoding.

    Tied: pass the model's `nnx.Embed` as `embedding`; the head then has no table of
    its own, and the gradients of both uses add up in the one parameter. Untied: leave
    it out and pass `rngs`.

    Args:
        features: Size of the last axis of `hidden`.
        num_classes: Size of the vocabulary.
        embedding: An `nnx.Embed` to share the table (num_classes, features) with.
        use_bias: Whether the logits get a bias per class.
        scale: Multiplies the products, before the bias.
        softcap: Static positive number $c$; logits become $c\tanh(u / c)$.
        dtype: Dtype of the products; hidden and table are cast to it, which copies the
            table once a call. None uses the arrays as they are.
        param_dtype: Dtype of the parameters that the head owns.
        kernel_init: Initialiser of its own table.
        bias_init: Initialiser of the bias.
        rngs: Key source, for an untied head or a bias.

    Raises:
        ValueError: The embedding has another shape, or `rngs` is missing.

    Attributes:
        kernel: The table of an untied head, None otherwise.
        bias: The bias, None without.

    Derivatives: as `softlib.logits.row_statistics`.
    Cost: nothing by itself.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> embed = nnx.Embed(1000, 16, rngs=nnx.Rngs(0))
        >>> head = softlib.nn.OutputHead(16, 1000, embedding=embed)
        >>> tokens = jnp.array([[1, 2, 3, 4]])
        >>> logits = head(embed(tokens))
        >>> loss = softlib.losses.softmax_cross_entropy(logits[:, :-1], tokens[:, 1:])
        >>> print(logits.shape, loss.shape)
        (1, 4, 1000) (1, 3)
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        embedding: nnx.Embed | None = None,
        use_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=1, out_axis=0
        ),
        bias_init: Initializer = initializers.zeros_init(),
        rngs: nnx.Rngs | None = None,
    ):
        shape = (num_classes, features)
        if embedding is not None and embedding.embedding.shape != shape:
            raise ValueError(
                f"OutputHead: `embedding` must have a table of shape {shape} "
                f"(num_classes, features), got {embedding.embedding.shape}."
            )
        if rngs is None and (embedding is None or use_bias):
            raise ValueError(
                "OutputHead: `rngs` must be given to initialise an untied head or a "
                "bias, got None."
            )
        self.scale = scale
        self.softcap = softcap
        self.dtype = dtype
        self.embedding = embedding

        def parameter(wanted: bool, init: Initializer, *shape: int):
            if not wanted:
                return None
            assert rngs is not None
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        self.kernel = parameter(embedding is None, kernel_init, *shape)
        self.bias = parameter(use_bias, bias_init, num_classes)

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
        assert table is not None
        bias = None if self.bias is None else self.bias[...]
        own = (bias, self.scale, self.softcap, self.dtype)
        return logits_of(
            hidden,
            table[...],
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
