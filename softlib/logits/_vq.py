r"""Logits of a codebook head: V tokens that share the logits of K codes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks, _codes
from softlib._array_arguments import array_arguments
from softlib._ids import labels_in_range
from softlib._look_up import look_up
from softlib.typing import Implementations, PerRow, Precision

from ._blockwise import BlockwiseLogits
from ._engine.blocks import Layout, with_layout
from ._engine.tile import NO_MODIFIERS, Options, RowStatistics, logits_of
from ._linear import LinearLogits
from ._source_rows import Shape, all_of


class VQLogits(BlockwiseLogits):
    r"""Logits of V tokens that share K codes, as a value for losses.

    Token $i$ has the final logit $z_i = l_{M(i)} + b_i$, with $M$ the `mapping`, $b$
    the `token_bias` and $l$ the final logits of `hidden` and `codebook`, as in
    `LinearLogits`. Cross-entropy, and every loss of only the logsumexp and label
    logits, costs a softmax over codes, each counted as often as it has tokens,
    $\log \sum_j n_j e^{l_j}$: exactly the softmax over all tokens, without their array.
    Every other loss streams over tokens.

    Without `token_bias` the tokens of a code are equally likely, so that the
    cross-entropy of token $y$ is at least $\log n_{M(y)}$: with 50,257 tokens spread
    evenly over 1,024 codes at least 3.89 nats. A bias learns the frequencies within the
    codes. The model cannot tell tokens of one code apart by their context.

    Args:
        hidden: Inputs of the head.
        codebook: One row per code, or one column with `vocab_axis=1`.
        mapping: Code of each token. An entry outside $[0, K)$ raises where its value is
            known; in a traced array that token has no probability, and as a label it
            makes the loss NaN or infinite.
        token_bias: One number per token, added after softcap and temperature. -inf
            excludes a token from the cross-entropy: as a label it costs +inf.
        counts: `VQLogits.token_counts(mapping, K)`, to save counting in every step.
            Data, without a gradient; must be the counts of `mapping`, unchecked. Not
            together with `token_bias` or `class_where`.
        vocab_axis: Static; the axis of codes of `codebook`, 0 or 1.
        scale: Multiplies the products; a number, or an array that is a scalar or one
            value per row, differentiable.
        softcap: Static positive number $c$: logits of codes become $c\tanh(u / c)$.
        temperature: Divides the capped logits of codes, not `token_bias`; positive, as
            `scale` otherwise.
        class_where: True for the tokens that exist.
        vocab_chunk: Static number of codes, or tokens, per step; None chooses.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, an option is out of range, or `mapping`
            is known to leave $[0, K)$.

    Attributes:
        codes: The logits of the codes, `LinearLogits`.
        mapping, token_bias, counts: As given.

    Derivatives: as `row_statistics`, and with respect to `token_bias`. `mapping` and
        `counts` have none. A code without tokens has gradient 0.
    Cost: cross-entropy as that of K classes, and a count over V integers without
        `counts`; with `token_bias` a few arrays of V numbers. Other statistics as a
        head of V classes whose rows are gathered, and one more product with K for the
        gradient of the codebook.
    Source: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
        Vector Quantized Logits". The bias per token is softlib's addition.

    Example:
        >>> hidden, codebook = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> logits = softlib.logits.VQLogits(hidden, codebook, jnp.array([0, 0, 1, 0]))
        >>> loss = softlib.losses.softmax_cross_entropy(logits, jnp.array([3, 2]))
        >>> print(logits.shape, np.asarray(loss).round(2))
        (2, 4) [1.21 0.34]
    """

    of_classes = ("mapping", "token_bias")
    of_all = ("codes", "counts")

    codes: LinearLogits
    mapping: Array
    token_bias: Array | None
    counts: Array | None

    @array_arguments(as_given=("counts",))
    def __init__(
        self,
        hidden: Float[Array, "*batch D"],
        codebook: Float[Array, "K D"] | Float[Array, "D K"],
        mapping: Integer[Array, " V"],
        *,
        token_bias: Float[Array, " V"] | None = None,
        counts: Integer[Array, " K"] | Float[Array, " K"] | None = None,
        vocab_axis: int = 0,
        scale: PerRow | None = None,
        softcap: float | None = None,
        temperature: PerRow | None = None,
        class_where: Bool[Array, " V"] | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        precision: Precision = None,
        implementation: Implementations = None,
    ) -> None:
        name = "VQLogits"
        codes = LinearLogits.of(
            name,
            hidden,
            codebook,
            weight_name="codebook",
            vocab_axis=vocab_axis,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            vocab_chunk=vocab_chunk,
            token_chunk=token_chunk,
            precision=precision,
            implementation=implementation,
        )
        mapping = jnp.asarray(mapping)
        _codes.require_mapping(name, mapping, codes.num_classes)
        token_bias = None if token_bias is None else jnp.asarray(token_bias)
        _codes.require_token_bias(name, token_bias, mapping)
        where = None if class_where is None else jnp.asarray(class_where)
        checks.require_boolean(name, class_where=where)
        checks.require_shape(name, "class_where", where, mapping.shape, "one per token")
        if counts is not None:
            if token_bias is not None or where is not None:
                raise ValueError(
                    f"{name}: `counts` must be None with `token_bias` or "
                    "`class_where`, got an array: with these each token counts by "
                    "itself."
                )
            counts = _codes.checked_counts(name, counts, codes.num_classes)
        chunks = {"vocab_chunk": vocab_chunk, "token_chunk": token_chunk}
        vars(self).update(
            codes=codes,
            mapping=mapping,
            token_bias=token_bias,
            counts=counts,
            function=name,
            modifiers=NO_MODIFIERS._replace(class_where=where),
            options=Options((), **chunks),
            implementation=implementation,
        )

    @staticmethod
    def token_counts(mapping: Integer[Array, " V"], num_codes: int) -> Int[Array, " K"]:
        """Counts the tokens of each code.

        Args:
            mapping: Code of each token; an entry outside [0, num_codes) raises where
                its value is known, and is not counted in a traced array.
            num_codes: Static size of the codebook.

        Returns:
            Counts, int32; their sum is the number of tokens.

        Raises:
            TypeError: `mapping` does not hold integers.
            ValueError: `mapping` is not one number per token, is empty, or is known to
                leave its range; `num_codes` is not a positive integer.

        Example:
            >>> mapping = jnp.array([0, 2, 2, 0, 0])
            >>> print(softlib.logits.VQLogits.token_counts(mapping, 4))
            [3 0 2 0]
        """
        return _codes.token_counts("VQLogits.token_counts", mapping, num_codes)

    @property
    def batch_shape(self) -> Shape:
        return self.codes.batch_shape

    @property
    def scale(self) -> Float[Array, "..."] | None:
        return self.codes.scale

    @property
    def softcap(self) -> float | None:
        return self.codes.softcap

    @property
    def temperature(self) -> Float[Array, "..."] | None:
        return self.codes.temperature

    def layout(self) -> "VQLogits":
        # A class may have any code, so that every block gets all codes.
        rows = jax.tree.map(lambda each: Layout(rows=each.rows), self.codes.layout())
        bare = self.replaced(codes=None)
        others: Any = BlockwiseLogits.layout(bare)
        return others.replaced(codes=rows)

    def shown(self) -> dict[str, Any]:
        codes = self.codes.shown()
        codes["codebook"] = codes.pop("weight")
        names = ("mapping", "token_bias", "counts", "class_where")
        return {**codes, **{name: getattr(self, name) for name in names}}

    def prepared(self) -> "VQLogits":
        """The logits with tokens excluded whose code is out of range."""
        num_codes = self.codes.num_classes
        where = _codes.in_range(self.mapping, num_codes) < num_codes
        if self.modifiers.class_where is not None:
            where = where & self.modifiers.class_where
        return self.replaced(modifiers=self.modifiers._replace(class_where=where))

    def finite_classes(self) -> Bool[Array, " V"] | None:
        finite = None if self.token_bias is None else self.token_bias != -jnp.inf
        return all_of([self.prepared().class_where, finite])

    def block(self) -> Float[Array, "rows classes"]:
        num_codes = self.codes.num_classes
        codes = _codes.in_range(self.mapping, num_codes)
        codes = jnp.where(codes < num_codes, codes, 0)

        def at_codes(layout: Layout, array: Array) -> Array:
            axis = layout.class_axis
            return array if axis is None else look_up(array, codes, axis)

        few = with_layout(self.codes, at_codes)
        operand = few.operand()
        z = logits_of(operand.raw(few.options), few.options, operand.modifiers).z
        if self.token_bias is None:
            return z
        return z + self.token_bias[None].astype(z.dtype)

    def statistics(
        self,
        names: Sequence[str],
        labels: Array | None = None,
        label_logits: Array | None = None,
    ) -> RowStatistics:
        if self._codes_suffice(names):
            return self._statistics_of_codes(names, labels)
        return super().statistics(names, labels, label_logits)

    def _codes_suffice(self, names: Sequence[str]) -> bool:
        """Whether the statistics follow from logits of codes and counts of tokens."""
        changed = (*self.modifiers.floating, self.modifiers.centre)
        if self.options.exclude_labels or any(x is not None for x in changed):
            return False
        suffice = {"lse", "label_logits"}
        if self.token_bias is None:  # else the mean of the codes' logits leaves it out
            suffice.add("mean_logit")
        return {*names} <= suffice

    def _statistics_of_codes(
        self, names: Sequence[str], labels: Array | None
    ) -> RowStatistics:
        num_codes = self.codes.num_classes
        where = self.modifiers.class_where
        mapping = self.mapping
        if where is not None:
            mapping = jnp.where(where, mapping, num_codes)
        log_weights = _codes.log_weights_of(
            mapping, num_codes, self.counts, self.token_bias, self.codes.dtype
        )
        source = self.codes.counting(log_weights)
        if labels is None:
            return source.statistics(names)
        at_labels = functools.partial(self.at_labels, labels=labels)
        codes = jnp.where(labels < 0, -1, at_labels(self.mapping))
        found = source.statistics(names, labels_in_range(codes, num_codes))
        if found.label_logits is None:
            return found
        logits = found.label_logits
        if self.token_bias is not None:
            own = at_labels(self.token_bias.astype(logits.dtype))
            logits = logits + jnp.where(labels < 0, 0, own)
        no_code = (labels >= 0) & ((codes < 0) | (codes >= num_codes))
        return found._replace(label_logits=jnp.where(no_code, jnp.nan, logits))
