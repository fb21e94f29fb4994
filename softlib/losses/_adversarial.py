"""Adversarial training: a smooth comp-sum loss."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib._ids import labels_in_range
from softlib.logits import Logits
from softlib.logits._compose import log_probability_of_labels
from softlib.logits._labelled_rows import rows_that_count
from softlib.logits._sources import stored_source_of, with_temperature
from softlib.typing import Scalar

from ._comp_sum import comp_sum_from_log_prob


@array_arguments
def smooth_adversarial_comp_sum_loss(
    logits: Logits,
    adversarial_logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    tau: Scalar = 1.0,
    rho: Scalar = 1.0,
    nu: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Smooth adversarial comp-sum loss of logits at an input and at its adversary.

    With the margins $\Delta_k(x) = z_y(x) - z_k(x)$ of the other classes,

    $$L = \Phi^\tau\left(\sum_{k \neq y} e^{-\Delta_k(x) / \rho}\right) +
      \nu\, \lVert \Delta(x') - \Delta(x) \rVert_2 ,$$

    the comp-sum loss of $z / \rho$ at the clean input, and the distance by which the
    adversary moves the margins. For $\nu \geq \sqrt{n - 1} / \rho$ and the $x'$ of a
    ball that maximises the second term, it bounds the worst comp-sum loss over the
    ball, of margins clipped at $\rho$. So the adversary maximises the norm and not the
    label's loss: see `softlib.optim.projected_gradient_ascent`.

    Args:
        logits: At the clean inputs: an array, or `softlib.logits.StoredLogits`.
        adversarial_logits: At the adversaries, of the same kind; a constant added to a
            row changes nothing.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. For the label of an excluded class the loss is its limit for
            $p_y = 0$.
        tau: $\tau \geq 0$ of the comp-sum loss, 1 for cross-entropy; a number is
            static, an array traced and differentiable.
        rho: $\rho > 0$, the margin; a number or a traced scalar.
        nu: $\nu \geq 0$, the weight of robustness, usually tuned; a number or a traced
            scalar.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, an option is out of range, or the logits
            have a temperature, which is `rho`.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `comp_sum_loss`; the norm has gradient 0 where both logits agree,
        though it has a kink there: start an ascent from a random point.
    Cost: one pass over each array forward, one backward.
    Source: "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".

    Example:
        >>> clean, moved = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.5]])
        >>> loss = softlib.losses.smooth_adversarial_comp_sum_loss
        >>> print(loss(clean, moved, jnp.array([0]), nu=0.1).round(4))
        [0.2769]
    """
    function = "smooth_adversarial_comp_sum_loss"
    if isinstance(rho, int | float):
        checks.require_positive_number(function, "rho", rho)
    checks.require_scalar(function, "rho", rho, 0, math.inf)
    checks.require_scalar(function, "nu", nu, 0, math.inf)
    checks.require_scalar(function, "tau", tau, 0, math.inf)
    source = stored_source_of(function, logits)
    other = stored_source_of(function, adversarial_logits, "adversarial_logits")
    if other.shape != source.shape:
        raise ValueError(
            f"{function}: `adversarial_logits` must have shape {source.shape} (the "
            f"shape of `logits`), got {other.shape}."
        )
    if other.modifiers.temperature is not None:
        raise ValueError(
            f"{function}: `temperature` of the logits must be None: `rho` is it."
        )
    divided = with_temperature(source, rho)
    log_prob = log_probability_of_labels(divided, labels, where)
    clean = comp_sum_from_log_prob(log_prob, tau=tau)

    counts = rows_that_count(source, where)
    clean_logits, moved_logits = (
        each.masked(counts).materialize() for each in (source, other)
    )
    moved = _margin_distance(clean_logits, moved_logits, labels)
    # A row without a finite loss keeps it and has no gradient.
    usual = jnp.isfinite(clean)
    clean, moved, nu = promoted(clean, moved, nu)
    loss = jnp.where(usual, clean + nu * jnp.where(usual, moved, 0), clean)
    return loss if counts is None else jnp.where(counts, loss, 0)


def _margin_distance(clean: Array, moved: Array, labels: ArrayLike) -> Array:
    """The l2 norm of the changes of z_y - z_k; stores no n - 1 differences."""
    labels = labels_in_range(jnp.asarray(labels), clean.shape[-1])
    there = (clean > -jnp.inf) & (moved > -jnp.inf)
    change = jnp.where(there, moved, 0) - jnp.where(there, clean, 0)
    own = jnp.take_along_axis(change, jnp.maximum(labels, 0)[..., None], -1)
    squared = (jnp.where(there, own - change, 0) ** 2).sum(-1)
    # The norm has no derivative at 0 and JAX gives NaN: 0 is one of its subgradients.
    some = squared > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1)), 0)
