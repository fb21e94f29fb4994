"""The loss that trains the SDM activation."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib.softmax import log_sdm


@array_arguments
def sdm_loss(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    similarity: ArrayLike,
    distance: ArrayLike,
    *,
    where: Bool[Array, "..."] | None = None,
    class_where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of `softlib.softmax.sdm`, to the base $2 + q$, per row.

    $$L = -\log_{2 + q} \operatorname{sdm}(z)_y = -d z_y + \frac{\operatorname{lse}(d
    \log(2 + q) z)}{\log(2 + q)}$$

    With $q = e - 2$ and $d = 1$ it is cross-entropy: train the first epoch so, then
    estimate $q$ and $d$ again after each epoch. A row out of distribution, $d = 0$,
    costs $\log_{2 + q} V$ and has gradient 0.

    Args:
        logits: Magnitudes $z$.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs +inf, without gradient.
        similarity: $q \geq 0$, a number or a value per row.
        distance: $d \geq 0$, a number or a value per row.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and the gradient are exactly 0, whatever `logits`, `labels`,
            `similarity` and `distance` hold.
        class_where: True for the classes that exist; broadcasts to `logits`.

    Returns:
        The loss per row, float32 (float64 if `logits` is). A row without classes has
        loss 0 and gradient 0; one whose logits are all -inf costs +inf, with gradient
        0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order, with respect to `logits`; the
        gradient of a row is $d\,(\operatorname{sdm}(z) - \text{one\_hot}(y))$.
        `similarity` and `distance` are statistics: their derivative is 0.
    Cost: a few passes over `logits`.
    Source: "Similarity-Distance-Magnitude Universal Verification".

    Example:
        >>> logits, labels = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0])
        >>> loss = softlib.losses.sdm_loss(logits, labels, 2, jnp.array([1.0, 0.0]))
        >>> print(loss.round(4))
        [0.161 0.5  ]
    """
    function = "sdm_loss"
    checks.require_floating(function, logits=logits)
    checks.require_rank(function, "logits", logits, 1, "(*batch, V)")
    checks.require_integer(function, labels=labels)
    *batch, classes = logits.shape
    batch = tuple(batch)
    checks.require_shape(function, "labels", labels, batch, "the batch shape")
    q, d = jnp.asarray(similarity), jnp.asarray(distance)
    for name, value in (("similarity", q), ("distance", d)):
        why = "a number, or one value per row"
        checks.require_broadcastable(function, name, value, batch, why)
    logits = logits.astype(accumulator_dtype(logits))
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_broadcastable(function, "where", where, batch, "the batch shape")
        where = _onto(where, batch)
        q, d = (jnp.where(where, _onto(value, batch), 0) for value in (q, d))
        logits = jnp.where(where[..., None], logits, 0)
    log_p = log_sdm(logits, q, d, base="similarity", where=class_where)
    labels = labels_in_range(labels, classes)
    outside = labels < 0
    if not classes:
        loss = jnp.zeros(batch, logits.dtype)
    else:
        index = jnp.where(outside, 0, labels)[..., None]
        loss = -jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
        loss = jnp.where((log_p == -jnp.inf).all(-1), jnp.inf, loss)
    if class_where is not None:
        exists = jnp.broadcast_to(class_where, logits.shape).any(-1)
        loss = jnp.where(exists, loss, 0)
    loss = jnp.where(outside, jnp.nan, loss)
    return loss if where is None else jnp.where(where, loss, 0)


def _onto(value: Array, shape: tuple[int, ...]) -> Array:
    padded = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    return jnp.broadcast_to(padded, shape)
