"""The logits of a linear head themselves, by the definition that the losses use."""

from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib.typing import PerRow, Precision

from ._sources import LinearHead


@array_arguments
def linear_logits(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, " V"] | None = None,
    precision: Precision = None,
) -> Float[Array, "*batch V"]:
    r"""Logits of a linear head, for the few rows whose whole distribution is needed.

    The $z$ of `linear_row_statistics`: for sampling and decoding, or to compare with.
    For a loss over many rows use the streaming functions, which never form these.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products, one number per class; -inf is legal.
        logit_scale: Multiplies the products; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist; the others become -inf.
        precision: Static precision of the product, as in `jax.lax.dot_general`.

    Returns:
        Logits, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: one product and memory for rows x vocabulary numbers.
    Source: the definition of `linear_row_statistics`.

    Example:
        >>> hidden, weight = jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [30.0, 0.0]])
        >>> print(softlib.losses.linear_logits(hidden, weight, logit_softcap=10.0))
        [[2.913126 9.950547]]
    """
    source = LinearHead.of(
        "linear_logits",
        hidden,
        weight,
        vocab_axis=vocab_axis,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        vocab_chunk=None,
        axis_name=None,
        precision=precision,
        implementation=None,
    )
    return source.final_logits()
