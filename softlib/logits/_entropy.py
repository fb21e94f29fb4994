"""Entropy of the predicted distribution, in nats."""

from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib.typing import AxisName, Implementations, PerRow, Precision

from . import _compose
from ._sources import GivenLogits, LinearHead


@array_arguments
def linear_entropy(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch"]:
    r"""Entropy of the softmax of a linear head, in nats per row, without its logits.

    $$H = -\sum_j p_j \log p_j = \mathrm{lse} - \sum_j p_j z_j$$

    Differentiable: an entropy bonus or a confidence penalty is this times a number.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel. Sliced in place, never copied.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products, one number per class; -inf is legal.
        logit_scale: Multiplies the products; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever `hidden` holds.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        axis_name: Static; the `jax.shard_map` axis over which `weight` (and `bias` and
            `class_where`) are divided by classes. Labels are global ids, and results
            are those of the whole vocabulary, the same on every device of the axis.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        The entropy per row, float32 (float64 if an argument is float64); 0 for a row
        without classes. It carries the rounding error of the logsumexp.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: as `linear_row_statistics`; with `where`, one masked copy of `hidden`.
    Source: a composition of `linear_row_statistics`.

    Example:
        >>> hidden, weight = jnp.zeros((1, 3)), jnp.ones((8, 3))
        >>> print(softlib.losses.linear_entropy(hidden, weight).round(4))
        [2.0794]
    """
    source = LinearHead.of(
        "linear_entropy",
        hidden,
        weight,
        vocab_axis=vocab_axis,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        vocab_chunk=vocab_chunk,
        token_chunk=token_chunk,
        axis_name=axis_name,
        precision=precision,
        implementation=implementation,
    )
    return _compose.entropy(
        _compose.prepare(source, ("lse", "mean_logit"), None, where)
    )


@array_arguments
def softmax_entropy(
    logits: Float[Array, "*batch V"],
    *,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch"]:
    r"""Entropy of the softmax of logits, in nats per row.

    The entropy of `linear_entropy` from logits that exist; a logit of -inf adds 0.

    Args:
        logits: Unnormalised log-probabilities.
        bias: Added to the scaled logits, one number per class; -inf is legal.
        logit_scale: Multiplies the logits; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist; broadcasts to `logits`.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever `logits` holds.
        implementation: Static; see `softlib.explain`.

    Returns:
        The entropy per row, float32 (float64 if an argument is float64); 0 for a row
        without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: one pass over `logits` forward, one backward that writes their gradient.
    Source: a composition of `row_statistics`.

    Example:
        >>> logits = jnp.array([[0.0, 0.0, -jnp.inf]])
        >>> print(softlib.losses.softmax_entropy(logits).round(4))
        [0.6931]
    """
    source = GivenLogits.of(
        "softmax_entropy",
        logits,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        implementation=implementation,
    )
    return _compose.entropy(
        _compose.prepare(source, ("lse", "mean_logit"), None, where)
    )
