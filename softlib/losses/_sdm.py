"""The loss that trains the SDM activation."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._compose import log_probability
from softlib.logits._labelled_rows import prepare
from softlib.logits._sources import Source, source_of, with_temperature


@array_arguments
def sdm_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    similarity: ArrayLike,
    distance: ArrayLike,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of `softlib.softmax.sdm`, to the base $2 + q$, per row.

    $$L = -\log_{2 + q} \operatorname{sdm}(z)_y = -d z_y + \frac{\operatorname{lse}(d
    \log(2 + q) z)}{\log(2 + q)}$$

    With $q = e - 2$ and $d = 1$ it is cross-entropy: train the first epoch so, then
    estimate $q$ and $d$ again after each epoch. A row out of distribution, $d = 0$,
    costs $\log_{2 + q} V$ and has gradient 0.

    Args:
        logits: Magnitudes $z$, as an array or a value such as `softlib.LinearLogits`.
            A temperature of their own raises: $q$ and $d$ are one.
        labels: Class ids in $[0, V)$; NaN outside, +inf for that of an excluded class.
        similarity: $q \geq 0$, a number or a value per row.
        distance: $d \geq 0$, a number or a value per row.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if `logits` is): 0 without classes, +inf if
        all logits are -inf, both with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: as `softmax_cross_entropy`, with respect to `logits`; the gradient of
        a row is $d\,(\operatorname{sdm}(z) - \text{one\_hot}(y))$.
        `similarity` and `distance` are statistics: their derivative is 0.
    Cost: as `softmax_cross_entropy` with a temperature per row.
    Source: "Similarity-Distance-Magnitude Universal Verification".

    Example:
        >>> logits, labels = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0])
        >>> loss = softlib.losses.sdm_loss(logits, labels, 2, jnp.array([1.0, 0.0]))
        >>> print(loss.round(4))
        [0.161 0.5  ]
    """
    source = source_of("sdm_loss", logits)
    similarity = _statistic(source, "similarity", similarity)
    distance = _statistic(source, "distance", distance)
    log_base = jnp.log(2 + similarity)
    # The temperature of distance 0 is finite and leaves nothing of a finite logit.
    sharpness = jnp.maximum(distance * log_base, jnp.finfo(source.dtype).tiny)
    source = with_temperature(source, 1 / sharpness)
    names = ("lse", "label_logits")
    rows = prepare(source, names, labels, where, distributions=False)
    loss = (0 - log_probability(rows)) / rows.counted(log_base, 1)
    return jnp.where(distance == 0, lax.stop_gradient(loss), loss)


def _statistic(source: Source, name: str, value: ArrayLike) -> Float[Array, "*batch"]:
    """A constant per row, in the dtype of the logits' sums; counts may be integers."""
    value = jnp.asarray(value)
    why = "a number, or one value per row"
    batch = source.batch_shape
    checks.require_broadcastable(source.function, name, value, batch, why)
    value = lax.stop_gradient(value.astype(source.dtype))
    return jnp.broadcast_to(value, batch)
