"""Cross-entropy that is robust against reweighted classes.

The loss of a row is that of the worst distribution over classes within some divergence
of the uniform one. The dual variable of this constraint is a temperature per row.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.logits import Logits
from softlib.logits._compose import log_probability
from softlib.logits._labelled_rows import prepare
from softlib.logits._optimal_temperature import log_classes
from softlib.logits._sources import source_of, with_temperature
from softlib.typing import PerRow, Scalar


@array_arguments
def robust_softmax_cross_entropy(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    temperature: PerRow,
    rho: Scalar,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Robust cross-entropy, in nats per row.

    $$L = \tau\, \mathrm{CE}(z / \tau, y) + (\rho - \log V)\, \tau
        = \tau \log \frac{1}{V} \sum_j e^{(z_j - z_y) / \tau} + \rho\, \tau$$

    For the best $\tau \geq \tau_0$ this is, up to the constant $\rho \tau_0$, the
    largest mean of $z_j - z_y$ minus $\tau_0$ times the KL divergence from the uniform
    distribution, over all distributions of classes whose divergence is at most $\rho$.
    The gradient in the logits is $w - e_y$ with $w = \mathrm{softmax}(z / \tau)$,
    without a factor $1 / \tau$. That in $\tau$ is $\rho - \mathrm{KL}(w \,\|\, u)$: it
    lowers the temperature of flat rows and raises that of peaked ones. $L$ is convex in
    $\tau$, and at its minimum the divergence is $\rho$. With $\rho = \log V$ and
    $\tau = 1$ it is cross-entropy.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; NaN outside, +inf for that of an excluded class.
        temperature: $\tau > 0$; a number or an array that is a scalar or one value per
            row, differentiable. Divides the logits after bias and softcap.
            `softlib.nn.TempNet` predicts it, `optimal_temperature` finds the best.
        rho: $\rho \geq 0$ in nats; a number or a traced scalar.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64); it may be
        negative. A row without classes has loss 0 and gradient 0; one whose logits are
        all -inf costs +inf, with gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and in `temperature` and `rho`.
    Cost: as `softmax_cross_entropy`; a temperature that is differentiated adds
        two tiles of scratch where `row_statistics` says so.
    Source: "To Cool or not to Cool? Temperature Network Meets Large Foundation Models
        via DRO".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> robust = softlib.losses.robust_softmax_cross_entropy
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> loss = robust(logits, jnp.array([0, 1]), temperature=0.5, rho=0.1)
        >>> print(loss.round(4))
        [-0.3795 -0.4813]
    """
    function = "robust_softmax_cross_entropy"
    source = with_temperature(source_of(function, logits), temperature)
    checks.require_scalar(source.function, "rho", rho, 0, math.inf)
    names = ("lse", "label_logits")
    rows = prepare(source, names, labels, where, distributions=False)
    cost = 0 - log_probability(rows)
    tau = source.modifiers.temperature
    assert tau is not None
    tau = jnp.broadcast_to(tau.astype(source.dtype), source.batch_shape)
    cost, tau, rho = promoted(cost, rows.counted(tau, 1), rho)
    finite = jnp.isfinite(cost)
    loss = tau * (jnp.where(finite, cost, 0) + rho - log_classes(source))
    # Infinite costs and NaN of bad labels have no gradient; without classes it is 0.
    loss = jnp.where(finite & ~rows.massless, loss, lax.stop_gradient(cost))
    return rows.counted(loss)
