"""The loss of a model that says which edges a graph has."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype


@array_arguments
def edge_reconstruction_loss(
    edge_logits: Float[Array, "*edges"],
    labels: Float[Array, "*edges"] | Integer[Array, "*edges"] | Bool[Array, "*edges"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*edges"]:
    r"""Binary cross-entropy of the score of each edge.

    $\log(1 + e^z) - y z$ for a logit $z$ and the label $y$: 1 for an edge that was
    observed, 0 for one that was drawn (`softlib.numerics.sample_negative_edges`). After
    training $\sigma(-z)$ is how strange an edge is.

    Args:
        edge_logits: Scores of edges, of any shape.
        labels: 1 or True for edges that are there, 0 for others; numbers between are
            probabilities.
        where: True for the edges that count; broadcasts to the shape of the logits.

    Returns:
        The loss per edge, float32 (float64 if an argument is float64); 0 where `where`
        is False.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: any order; that of the logits is $\sigma(z) - y$.
    Cost: one pass.
    Source: "GLAD: Content-aware Dynamic Graphs For Log Anomaly Detection".

    Example:
        >>> logits, labels = jnp.array([2.0, 2.0]), jnp.array([1, 0])
        >>> print(softlib.losses.edge_reconstruction_loss(logits, labels).round(3))
        [0.127 2.127]
    """
    function = "edge_reconstruction_loss"
    checks.require_floating(function, edge_logits=edge_logits)
    shape = edge_logits.shape
    checks.require_shape(function, "labels", labels, shape, "one for each edge")
    counts = checks.checked_where(function, where, shape, "one for each edge")
    floating = jnp.issubdtype(labels.dtype, jnp.floating)
    dtype = accumulator_dtype(edge_logits, labels if floating else None)
    logits = jnp.where(counts, edge_logits.astype(dtype), 0)
    present = jnp.where(counts, labels.astype(dtype), 0)
    # Of both classes apart: no difference of large numbers, and no 0 times infinity.
    missed = jnp.where(present > 0, present * jax.nn.softplus(0 - logits), 0)
    invented = jnp.where(present < 1, (1 - present) * jax.nn.softplus(logits), 0)
    return jnp.where(counts, missed + invented, 0)
