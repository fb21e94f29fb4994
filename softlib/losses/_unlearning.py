"""Losses that make given sequences less likely, from their log-probabilities."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.typing import Scalar

from ._given_log_probs import counted, finite_part, log_probs_of_sequences


@array_arguments
def negative_preference_loss(
    log_prob: Float[Array, "*batch"],
    reference_log_prob: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Negative preference optimisation (NPO), per sequence to be forgotten.

    $$L = -\frac{2}{\beta} \log \sigma\Bigl(-\beta \log
        \frac{\pi(y)}{\pi_\mathrm{ref}(y)}\Bigr)
        = \frac{2}{\beta} \log\Bigl(1 + \Bigl(\frac{\pi(y)}{\pi_\mathrm{ref}(y)}
        \Bigr)^\beta\Bigr)$$

    It is `dpo_loss` of the rejected sequence alone. Its slope in $\log \pi$ is
    $2 \sigma(\beta \log (\pi / \pi_\mathrm{ref}))$: 1 at the start, as that of
    `gradient_ascent_loss`, and falling to 0 as the sequence is forgotten. So the model
    diverges logarithmically in time, not linearly. Usually it is added to a loss that
    retains the rest, such as cross-entropy on other text.

    Args:
        log_prob: $\log \pi(y)$, sums over tokens as from `sequence_log_probs` (a
            mean would be another method).
        reference_log_prob: $\log \pi_\mathrm{ref}(y)$, of the model before unlearning.
        beta: $\beta > 0$; a number is static, an array traced and differentiable.
            $\beta \to 0$ is gradient ascent up to the constant $2 \log 2 / \beta$,
            which costs digits of a float32 value, but not of its gradient;
            $\beta \to \infty$ the hinge $2 \max(\log (\pi / \pi_\mathrm{ref}), 0)$.
        where: True for the sequences that count; others cost 0, whatever they hold.

    Returns:
        The loss per sequence, positive, float32 (float64 if an argument is float64). A
        sequence without tokens costs $2 \log 2 / \beta$, an impossible one 0. There is
        no gradient where the log-ratio is infinite or NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or `beta` is out of range.

    Derivatives: forward and reverse, any order; 0 for `reference_log_prob`, which are
        fixed.
    Cost: a few operations for each sequence.
    Source: "Negative Preference Optimization: From Catastrophic Collapse to Effective
        Unlearning".

    Example:
        >>> log_prob, reference = jnp.array([[-10.0, -200.0], [-10.0, -10.0]])
        >>> loss = softlib.losses.negative_preference_loss(log_prob, reference)
        >>> print(loss.round(4))
        [13.8629  0.    ]
    """
    function = "negative_preference_loss"
    checks.require_positive_scalars(function, beta=beta)
    (log_prob, reference_log_prob), where = log_probs_of_sequences(
        function, where, log_prob=log_prob, reference_log_prob=reference_log_prob
    )
    # log(1 + ratio**beta) would overflow: log-ratios of sequences are hundreds of nats.
    log_ratio, limit = finite_part(log_prob - lax.stop_gradient(reference_log_prob))
    log_ratio, beta = promoted(log_ratio, beta)
    value = 2 / beta * jax.nn.softplus(beta * log_ratio)
    # A sequence that is already impossible, with -inf, costs nothing.
    return counted(where, jnp.where(limit == 0, value, jnp.maximum(limit, 0)))


@array_arguments
def gradient_ascent_loss(
    log_prob: Float[Array, "*batch"], *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "*batch"]:
    r"""$\log \pi(y)$ per sequence to be forgotten, without a lower bound.

    Descending on it ascends on cross-entropy. Its slope is 1 however unlikely the
    sequence has become, so that long training destroys everything else the model has
    learned. It is the baseline of `negative_preference_loss`.

    Args:
        log_prob: $\log \pi(y)$, sums over tokens as from `sequence_log_probs`.
        where: True for the sequences that count; others cost 0, whatever they hold.

    Returns:
        The loss per sequence, at most 0, float32 (float64 for float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `where` does not broadcast.

    Derivatives: 1.
    Cost: none.
    Source: the baseline of "Negative Preference Optimization: From Catastrophic
        Collapse to Effective Unlearning".

    Example:
        >>> print(softlib.losses.gradient_ascent_loss(jnp.array([-10.0, -200.0])))
        [ -10. -200.]
    """
    (log_prob,), where = log_probs_of_sequences(
        "gradient_ascent_loss", where, log_prob=log_prob
    )
    return counted(where, log_prob)
