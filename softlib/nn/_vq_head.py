"""An output layer whose tokens share codes, for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int, Integer

from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.logits import LinearLogits, VQLogits
from softlib.quantize import assign_codes, kmeans

from ._codebook import (
    CodebookState,
    codebook_ema_update,
    codebook_state,
    straight_through_codes,
)
from ._vq_logits import vq_sample


class CodebookVariable(nnx.Variable):
    """Arrays of a codebook head that no optimizer moves.

    `nnx.state(head, CodebookVariable)` selects the mapping, and the moving averages of
    a head that learns it; optimizers and gradients select `nnx.Param` and leave it out.

    Args:
        value: The array.
        metadata: As in `nnx.Variable`.

    Example:
        >>> head = softlib.nn.VQLogitsHead(4, 9, 3, rngs=nnx.Rngs(0))
        >>> state = nnx.state(head, softlib.nn.CodebookVariable)
        >>> print(jnp.bincount(state["mapping"][...]))
        [3 3 3]
    """

    def __init__(self, value: Array, **metadata: Any):
        super().__init__(value, **metadata)


class VQLogitsHead(nnx.Module):
    r"""A linear head of K codes for V tokens; its call gives the logits as a value.

    `losses.softmax_cross_entropy(head(hidden), labels)` is the exact cross-entropy over
    all tokens from K logits; `head(hidden).materialize()` is the array of V. K D
    parameters and V integers instead of V D parameters.

    The price is in the definition: tokens of one code are equally likely up to
    `token_bias`, so the loss of a token is at least the logarithm of the size of its
    code without a bias. Give frequent tokens codes of their own
    (`frequency_mapping`), or take the codes from a head that exists (`from_table`).

    With `learn_mapping` the mapping follows a table of embeddings (V, D) that is
    trained along: the loss is that of a head with the table
    `straight_through_codes(embedding, codebook, mapping)`, whose gradient goes to the
    embeddings; `commitment_loss` pulls them to their codes; `update_codebook`, called
    every few steps, moves the codes to the embeddings and assigns anew. That training
    costs what a head with V rows costs; `fixed` then gives the small head.

    Args:
        features: Size of the last axis of `hidden`.
        num_classes: Number of tokens V.
        num_codes: Number of codes K.
        mapping: Code of each token; None deals the tokens to the codes at random, as
            evenly as possible.
        learn_mapping: Whether a table of embeddings is trained along.
        use_token_bias: Whether the logits get a bias per token, which starts at 0.
        scale: Multiplies the logits of codes, before the softcap.
        softcap: Static positive number $c$; logits of codes become
            $c\tanh(u / c)$.
        dtype: Dtype of the products; hidden and tables are cast to it. None uses the
            arrays as they are.
        param_dtype: Dtype of the parameters.
        kernel_init: Initialiser of the codebook, and of the embeddings.
        rngs: Key source.

    Raises:
        ValueError: `mapping` has another shape or leaves its range.

    Attributes:
        codebook: The codes (K, D): a parameter, or with `learn_mapping` a
            `CodebookVariable`.
        mapping: The code of each token (V,), a `CodebookVariable`.
        token_bias: The bias (V,), None without.
        embedding: The embeddings (V, D) of a head that learns its mapping, or None.

    Derivatives: as `softlib.logits.VQLogits`; with `learn_mapping`
        straight through: the embeddings get the gradient of their code's row.
    Cost: as `softlib.logits.VQLogits`; with `learn_mapping` as
        `softlib.LinearLogits` with V rows, and one more table.
    Source: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
        Vector Quantized Logits". Its learned variant is not public in detail; this one
        is that of "Neural Discrete Representation Learning".

    Example:
        >>> head = softlib.nn.VQLogitsHead(16, 1000, 50, rngs=nnx.Rngs(0))
        >>> hidden, labels = jnp.ones((2, 16)), jnp.array([3, 4])
        >>> loss = softlib.losses.softmax_cross_entropy(head(hidden), labels)
        >>> print(loss.shape, head(hidden).shape)
        (2,) (2, 1000)
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        num_codes: int,
        *,
        mapping: Integer[Array, " V"] | None = None,
        learn_mapping: bool = False,
        use_token_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=1, out_axis=0
        ),
        rngs: nnx.Rngs,
    ):
        if mapping is None:
            dealt = jnp.arange(num_classes, dtype=jnp.int32) % num_codes
            mapping = jax.random.permutation(rngs.params(), dealt)
        mapping = jnp.asarray(mapping)
        if mapping.shape != (num_classes,):
            raise ValueError(
                f"VQLogitsHead: `mapping` must have shape ({num_classes},), one code "
                f"per class, got {mapping.shape}."
            )
        VQLogits.token_counts(mapping, num_codes)  # raises if out of range
        self.num_codes = num_codes
        self.scale = scale
        self.softcap = softcap
        self.dtype = dtype
        self.mapping = CodebookVariable(mapping)
        bias = jnp.zeros(num_classes, param_dtype)
        self.token_bias = nnx.Param(bias) if use_token_bias else None
        codebook = kernel_init(rngs.params(), (num_codes, features), param_dtype)
        if learn_mapping:
            table = kernel_init(rngs.params(), (num_classes, features), param_dtype)
            state = codebook_state(codebook)
            self.embedding = nnx.Param(table)
            self.codebook = CodebookVariable(codebook)
            self.moving_counts = CodebookVariable(state.counts)
            self.moving_sums = CodebookVariable(state.sums)
        else:
            self.embedding = self.moving_counts = self.moving_sums = None
            self.codebook = nnx.Param(codebook)

    @classmethod
    def from_table(
        cls,
        table: Float[Array, "V D"],
        num_codes: int,
        *,
        weights: Float[Array, " V"] | Integer[Array, " V"] | None = None,
        num_steps: int = 20,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "VQLogitsHead":
        """A head whose codes are the k-means centroids of a trained head's rows.

        Args:
            table: The rows (V, D) of the head that exists.
            num_codes: Number of codes.
            weights: How much each token counts in k-means, e.g. its frequency.
            num_steps: Of k-means.
            rngs: Key source.
            **options: Those of `VQLogitsHead` but `mapping`. With `learn_mapping` the
                table becomes the embeddings.
        """
        found = kmeans(
            table,
            num_codes,
            key=rngs.params(),
            weights=weights,
            num_steps=num_steps,
        )
        classes, features = table.shape
        head = cls(
            features, classes, num_codes, mapping=found.mapping, rngs=rngs, **options
        )
        head.codebook[...] = found.codebook.astype(head.codebook[...].dtype)
        if head.embedding is not None:
            head.embedding[...] = table.astype(head.embedding[...].dtype)
            counts = VQLogits.token_counts(found.mapping, num_codes)
            head._keep(codebook_state(head.codebook[...], jnp.float32(counts)))
        return head

    @array_arguments
    def __call__(self, hidden: Float[Array, "*batch D"]) -> LinearLogits | VQLogits:
        """Returns the logits as a value, which losses take in the place of an array.

        `softlib.logits.VQLogits`; of a head that learns its mapping without a bias,
        `softlib.LinearLogits` of V rows.

        Args:
            hidden: Inputs of the head.
        """
        hidden, bias = self._cast(hidden), self._bias()
        mapping, table = self.mapping[...], self.codebook[...]
        if self.embedding is not None:
            table = straight_through_codes(self.embedding[...], table, mapping)
            if bias is None:
                return LinearLogits(hidden, self._cast(table), **self._own())
            mapping = jnp.arange(len(mapping), dtype=mapping.dtype)
        return VQLogits(
            hidden, self._cast(table), mapping, token_bias=bias, **self._own()
        )

    @array_arguments
    def sample(
        self,
        key: Array,
        hidden: Float[Array, "*batch D"],
        **options: Any,
    ) -> Int[Array, "*batch"]:
        """Draws a token per row.

        Args:
            key: A key of `jax.random`.
            hidden: Inputs of the head.
            **options: `temperature` and `precision` of `vq_sample`.
        """
        return vq_sample(
            key,
            self._cast(hidden),
            self._cast(self.codebook[...]),
            self.mapping[...],
            token_bias=self._bias(),
            scale=self.scale,
            softcap=self.softcap,
            **options,
        )

    def commitment_loss(self) -> Float[Array, ""]:
        """Mean squared distance of the embeddings to their codes, per feature.

        A scalar, of tokens and not of rows; times a number such as 0.25 it is added to
        the reduced loss. Its gradient goes to the embeddings alone.
        """
        embedding = self._embedding("commitment_loss")
        codes = jax.lax.stop_gradient(self.codebook[...][self.mapping[...]])
        wide = accumulator_dtype(embedding)
        return jnp.mean(jnp.square(embedding.astype(wide) - codes.astype(wide)))

    @array_arguments
    def update_codebook(
        self,
        *,
        decay: float = 0.99,
        weights: Float[Array, " V"] | Integer[Array, " V"] | None = None,
    ) -> None:
        """Assigns each token to its nearest code, then moves the codes to their tokens.

        Args:
            decay: Of the moving averages; 0 takes the means of the tokens at once.
            weights: How much each token counts, e.g. its frequency.
        """
        embedding = self._embedding("update_codebook")
        codebook = self.codebook[...]
        mapping = assign_codes(embedding, codebook)
        assert self.moving_counts is not None
        assert self.moving_sums is not None
        state = CodebookState(codebook, self.moving_counts[...], self.moving_sums[...])
        self._keep(
            codebook_ema_update(state, embedding, mapping, decay=decay, weights=weights)
        )
        self.mapping[...] = mapping.astype(self.mapping[...].dtype)

    def fixed(self) -> "VQLogitsHead":
        """The head with the mapping of now and a codebook to train, without a table."""
        num_codes, features = self.codebook[...].shape
        head = VQLogitsHead(
            features,
            len(self.mapping[...]),
            num_codes,
            mapping=self.mapping[...],
            use_token_bias=self.token_bias is not None,
            scale=self.scale,
            softcap=self.softcap,
            dtype=self.dtype,
            param_dtype=self.codebook[...].dtype,
            kernel_init=initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
        head.codebook[...] = self.codebook[...]
        if self.token_bias is not None:
            assert head.token_bias is not None
            head.token_bias[...] = self.token_bias[...]
        return head

    def _keep(self, state: CodebookState) -> None:
        assert self.moving_counts is not None
        assert self.moving_sums is not None
        self.codebook[...] = state.codebook.astype(self.codebook[...].dtype)
        self.moving_counts[...] = state.counts
        self.moving_sums[...] = state.sums

    def _embedding(self, method: str) -> Float[Array, "V D"]:
        if self.embedding is None:
            raise ValueError(
                f"VQLogitsHead.{method}: `learn_mapping` must be True, got False: "
                "there are no embeddings to follow."
            )
        return self.embedding[...]

    def _bias(self) -> Float[Array, " V"] | None:
        return None if self.token_bias is None else self.token_bias[...]

    def _cast(self, array: Array) -> Array:
        return array if self.dtype is None else array.astype(self.dtype)

    def _own(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}
