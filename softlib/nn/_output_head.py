"""The output layer of a language model, for Flax NNX."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.logits import TokenMetrics

from ._head_calls import loss_or_logits, operands, token_metrics


class OutputHead(nnx.Module):
    r"""A linear head whose call gives the loss, or the logits where labels are absent.

    `head(hidden, labels)` is `softlib.losses.linear_softmax_cross_entropy` on the
    head's own table, so the logits of a training step are never formed;
    `head(hidden)` gives the logits, by the same definition, for decoding.

    Tied: pass the model's `nnx.Embed` as `embedding`; the head then has no table of
    its own, and the gradients of both uses add up in the one parameter. Untied: leave
    it out and pass `rngs`.

    Args:
        features: Size of the last axis of `hidden`.
        num_classes: Size of the vocabulary.
        embedding: An `nnx.Embed` to share the table (num_classes, features) with.
        use_bias: Whether the logits get a bias per class.
        logit_scale: Multiplies the products, before the bias.
        logit_softcap: Static positive number $c$; logits become $c\tanh(u / c)$.
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

    Derivatives: as `softlib.losses.linear_row_statistics`.
    Cost: as `softlib.losses.linear_softmax_cross_entropy`; the logits, where asked for,
        cost memory for rows x vocabulary.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> embed = nnx.Embed(1000, 16, rngs=nnx.Rngs(0))
        >>> head = softlib.nn.OutputHead(16, 1000, embedding=embed)
        >>> tokens = jnp.array([[1, 2, 3, 4]])
        >>> loss = head(embed(tokens[:, :-1]), tokens[:, 1:])
        >>> print(loss.shape, head(embed(tokens)).shape)
        (1, 3) (1, 4, 1000)
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        embedding: nnx.Embed | None = None,
        use_bias: bool = False,
        logit_scale: float | None = None,
        logit_softcap: float | None = None,
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
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
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
        labels: Integer[Array, "*batch"] | None = None,
        **options: Any,
    ) -> Any:
        """Returns the loss per row for `labels`, or the logits without them.

        Args:
            hidden: Inputs of the head.
            labels: Class ids, see `softlib.losses.linear_softmax_cross_entropy`.
            **options: Further options of that function (`where`, `label_smoothing`,
                `return_lse`, ...), or of `softlib.losses.linear_logits`.
        """
        return loss_or_logits(*self._operands(hidden), labels, **options)

    @array_arguments
    def token_metrics(
        self,
        hidden: Float[Array, "*batch D"],
        labels: Integer[Array, "*batch"],
        **options: Any,
    ) -> TokenMetrics:
        """Several numbers per token in one pass over the vocabulary.

        Args:
            hidden: Inputs of the head.
            labels: Class ids.
            **options: Options of `softlib.losses.linear_token_metrics`.
        """
        return token_metrics(*self._operands(hidden), labels, **options)

    def _operands(self, hidden: Array) -> tuple[Array, Array, dict[str, Any]]:
        table = self.kernel if self.embedding is None else self.embedding.embedding
        assert table is not None
        bias = None if self.bias is None else self.bias[...]
        return operands(
            hidden, table[...], bias, self.logit_scale, self.logit_softcap, self.dtype
        )
