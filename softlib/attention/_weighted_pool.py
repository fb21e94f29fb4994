"""Attention by which few learned queries read many weighted tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import Implementations, Precision, Scalar

from ._dot_product import dot_product_attention


@array_arguments
def weighted_pool(
    queries: Float[Array, "P N H"],
    keys: Float[Array, "*batch T K H"],
    values: Float[Array, "*batch T K E"],
    *,
    weights: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    scale: Scalar | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch P N E"]:
    r"""Means of T tokens as P queries see them, each token with a weight of its own.

    $$s_p = \frac{\sum_t m_t\, e^{a \langle q_p, k_t \rangle} v_t}
        {\sum_t m_t\, e^{a \langle q_p, k_t \rangle}}$$

    With the weight 2 a token counts as if it stood there twice, with 0 it is not there:
    only proportions of weights matter. P vectors so learnt stand for a long context
    (see `softlib.nn.prepend_soft_prompt`).

    Args:
        queries: One set for all sequences, learnt as a rule.
        keys: Of the tokens; K key heads, of which query head n reads `n // (N // K)`.
        values: What is averaged; their feature size E may differ from H.
        weights: How much each token counts, at least 0, such as its surprisal; `T` for
            all sequences or `(*batch, T)`. None counts all alike.
        where: True for the tokens that exist, of the shapes of `weights`. What it drops
            is not read and may hold anything.
        scale: Multiplies the products; None for $1/\sqrt H$.
        precision: Of the matrix products, as in `jax.lax.dot_general`.
        implementation: As in `dot_product_attention`, which computes it.

    Returns:
        In the dtype of `queries`. 0 for a sequence without a token of positive weight,
        NaN for one with a negative or NaN weight.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `dot_product_attention`, in `weights` too, where those of a weight
        of exactly 0 are 0: a weight that is to be learnt starts above it.
    Cost: $2 B P T N (H + E)$ flop where attention among the tokens takes
        $2 B T^2 N (H + E)$.
    Source: "Adapting LLMs for Efficient Context Processing through Soft Prompt
        Compression". It gives no formula: this is the plain form of a weighting.

    Example:
        >>> tokens = jnp.array([[[1.0]], [[2.0]], [[6.0]]])
        >>> query, weights = jnp.zeros((1, 1, 1)), jnp.array([1.0, 3.0, 0.0])
        >>> pool = softlib.attention.weighted_pool
        >>> print(pool(query, tokens, tokens, weights=weights))
        [[[1.75]]]
    """
    function = "weighted_pool"
    checks.require_floating(function, queries=queries, keys=keys, values=values)
    checks.require_rank(function, "queries", queries, 3, "(P, N, H), of all sequences")
    if keys.ndim < 3 or keys.shape[-1] != queries.shape[-1]:
        raise ValueError(
            f"{function}: `keys` must have shape (*batch, T, K, {queries.shape[-1]}), "
            f"with the features of `queries`, got {keys.shape}."
        )
    if values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"{function}: `values` must have shape {(*keys.shape[:-1], 'E')}, that of "
            f"`keys` in all but the last axis, got {values.shape}."
        )
    if queries.shape[1] % keys.shape[-2]:
        raise ValueError(
            f"{function}: `queries` must have a multiple of the {keys.shape[-2]} heads "
            f"of `keys`, got {queries.shape[1]}."
        )
    *batch, tokens, _, _ = keys.shape
    shapes = ((tokens,), (*batch, tokens))
    bias, mask, valid = None, None, None
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_shape_in(function, "where", where, shapes, "one per token")
        mask = _over_pairs(where, batch)
        # What is dropped may be NaN, which times a weight of 0 is NaN.
        exists = where.reshape(
            *(1,) * (len(batch) + 1 - where.ndim), *where.shape, 1, 1
        )
        keys, values = jnp.where(exists, keys, 0), jnp.where(exists, values, 0)
    if weights is not None:
        checks.require_floating(function, weights=weights)
        checks.require_shape_in(function, "weights", weights, shapes, "one per token")
        weights = weights.astype(accumulator_dtype(weights))
        if where is not None:
            weights = jnp.where(where, weights, 0)
        some = weights > 0
        # Selected before and after: the logarithm of 0 has no derivative.
        logs = jnp.log(jnp.where(some, weights, 1))
        bias = _over_pairs(jnp.where(some, logs, -jnp.inf), batch)
        valid = (weights >= 0).all(-1)
    with checks.under_name(function, "dot_product_attention"):
        pooled = dot_product_attention(
            jnp.broadcast_to(queries, (*batch, *queries.shape)),
            keys,
            values,
            bias=bias,
            mask=mask,
            scale=scale,
            precision=precision,
            implementation=implementation,
        )
    if valid is None:
        return pooled
    return jnp.where(valid[..., None, None, None], pooled, jnp.nan)


def _over_pairs(of_tokens: Array, batch: list[int]) -> Array:
    """One number per token as one per (head, query, token)."""
    shape = of_tokens.shape if of_tokens.ndim > 1 else (*(1,) * len(batch), -1)
    return of_tokens.reshape(*shape[:-1], 1, 1, of_tokens.shape[-1])
