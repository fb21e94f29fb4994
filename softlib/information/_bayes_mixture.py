"""Bayesian mixtures of hypotheses under the logarithmic loss, and their guarantees."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._log_domain import log_add, log_sum
from softlib._sharding import match_varying
from softlib.typing import Scalar


class SequentialMixture(NamedTuple):
    r"""Predictions of a mixture, observation by observation.

    Attributes:
        log_predictive: $\log Q(x_t | x^{t-1})$ in nats; their sum is $\log Q(x^T)$.
        log_posterior: $\log w_{i|t}$ after every observation.
        regret: $\log P_i(x^T) - \log Q(x^T)$, by how much the mixture's loss exceeds
            that of each hypothesis; -inf for one that the sequence excludes.
        regret_bound: $-\log w_i$ of the normalised prior, which no sequence exceeds.

    Derivatives: see `sequential_mixture`.
    Cost: T M numbers.

    Example:
        >>> heads = jnp.log(jnp.array([[0.5, 0.9], [0.5, 0.9]]))  # two fair or not
        >>> found = softlib.information.sequential_mixture(heads, jnp.zeros(2))
        >>> print(np.exp(found.log_predictive).round(3), found.regret_bound.round(3))
        [0.7   0.757] [0.693 0.693]
    """

    log_predictive: Float[Array, "*batch T"]
    log_posterior: Float[Array, "*batch T M"]
    regret: Float[Array, "*batch M"]
    regret_bound: Float[Array, " M"]


class RedundancyBound(NamedTuple):
    r"""A prior's guarantee about the expected loss of its mixture.

    Attributes:
        bound: $\min_r (r - \frac1n \log W(r))$ in nats per observation.
        radius: The divergence $r$ at which the minimum is.
        log_weight: $\log W(r)$, the prior weight within this divergence of the truth.
        mixture_bound: $-\frac1n \log \sum_i w_i e^{-n \mathrm{KL}_i}$, which counts all
            hypotheses and is never above `bound`.

    Derivatives: see `redundancy_bound`.
    Cost: four numbers.

    Example:
        >>> kl, prior = jnp.array([0.0, 0.1]), jnp.log(jnp.array([0.01, 0.99]))
        >>> bound = softlib.information.redundancy_bound
        >>> for n in (10, 1000):  # the simple hypothesis first, later the true one
        ...     print(bound(kl, prior, num_samples=n).radius.round(3))
        0.1
        0.0
    """

    bound: Float[Array, ""]
    radius: Float[Array, ""]
    log_weight: Float[Array, ""]
    mixture_bound: Float[Array, ""]


@array_arguments
def sequential_mixture(
    log_likelihoods: Float[Array, "*batch T M"],
    log_prior: Float[Array, " M"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> SequentialMixture:
    r"""Predicts by a mixture of hypotheses, whose weights follow the observations.

    $$\log Q(x_t | x^{t-1}) = \log \sum_i w_{i|t-1} P_i(x_t | x^{t-1}), \qquad
      w_{i|t} = w_{i|t-1} \frac{P_i(x_t | x^{t-1})}{Q(x_t | x^{t-1})} .$$

    Whatever the sequence, the loss exceeds that of hypothesis $i$ by at most
    $-\log w_i$: a rich class costs nothing but the weight that the prior takes from the
    hypotheses that turn out well. Predictions are averaged, parameters are not.

    Args:
        log_likelihoods: $\log P_i(x_t | x^{t-1})$ in nats; -inf where a hypothesis
            excludes an observation, after which its weight stays 0.
        log_prior: Up to a constant: it is normalised. -inf is a weight of 0.
        where: True for the observations that count; broadcasts to (*batch, T). The
            others may hold anything, are predicted with 0 nats and change no weight.

    Returns:
        `SequentialMixture`, float32 (float64 if an argument is float64). Once every
        hypothesis of positive weight has excluded an observation, predictions and
        weights are -inf. A prior without weight makes everything NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse, any order.
    Cost: T steps of M exponentials; weights are normalised in each, so that their
        rounding errors do not grow with T.
    Source: "The Universality Lens: Why Even Highly Over-Parametrized Models Learn
        Well".

    Example:
        >>> heads = jnp.log(jnp.array([[0.5, 0.9], [0.5, 0.9]]))  # two fair or not
        >>> found = softlib.information.sequential_mixture(heads, jnp.zeros(2))
        >>> print((found.regret <= found.regret_bound).all())
        True
    """
    function = "sequential_mixture"
    values, prior = jnp.asarray(log_likelihoods), jnp.asarray(log_prior)
    checks.require_floating(function, log_likelihoods=values, log_prior=prior)
    checks.require_rank(function, "log_likelihoods", values, 2, "(..., T, M)")
    _check_prior(function, prior, values.shape[-1:])
    counts = checks.checked_where(function, where, values.shape[:-1], "(..., T)")
    dtype = accumulator_dtype(values, prior)
    return SequentialMixture(
        *_sequential(values.astype(dtype), prior.astype(dtype), counts)
    )


@array_arguments
def redundancy_bound(
    divergences: Float[Array, " M"],
    log_prior: Float[Array, " M"],
    *,
    num_samples: Scalar,
) -> RedundancyBound:
    r"""Bounds the expected loss of a mixture above that of the truth, per observation.

    With $\mathrm{KL}_i$ the divergence of hypothesis $i$ from the truth in nats per
    observation, and $W(r)$ the prior weight of those with $\mathrm{KL}_i \leq r$, the
    expected redundancy of $n$ observations is at most
    $n \min_r (r - \frac1n \log W(r))$. What counts is the weight near the truth, not
    the size of the class.

    Args:
        divergences: $\mathrm{KL}(P^* \| P_i) \geq 0$; inf for a hypothesis that
            excludes what the truth allows.
        log_prior: Up to a constant: it is normalised. -inf is a weight of 0.
        num_samples: $n > 0$; a number or a scalar array.

    Returns:
        `RedundancyBound`, float32 (float64 if an argument is float64); inf if no
        hypothesis of positive weight has a finite divergence. A negative divergence
        makes everything NaN.

    Raises:
        TypeError: An argument is not floating.
        ValueError: Shapes do not fit together, or `num_samples` is not positive.

    Derivatives: forward and reverse, in divergences and prior, where the minimum is at
        one radius.
    Cost: sorting M numbers.
    Source: "The Universality Lens: Why Even Highly Over-Parametrized Models Learn
        Well". `mixture_bound` is softlib's own, by the convexity of log-sum-exp.

    Example:
        >>> kl, prior = jnp.array([0.0, 0.1]), jnp.log(jnp.array([0.01, 0.99]))
        >>> bound = softlib.information.redundancy_bound
        >>> for n in (10, 1000):
        ...     print(f"{bound(kl, prior, num_samples=n).bound:.4f}")
        0.1000
        0.0046
    """
    function = "redundancy_bound"
    divergences, prior = jnp.asarray(divergences), jnp.asarray(log_prior)
    checks.require_floating(function, divergences=divergences, log_prior=prior)
    _check_prior(function, prior, divergences.shape)
    checks.require_positive_scalars(function, num_samples=num_samples)
    dtype = accumulator_dtype(divergences, prior)
    n = jnp.asarray(num_samples, dtype)
    return RedundancyBound(
        *_redundancy(divergences.astype(dtype), prior.astype(dtype), n)
    )


def _check_prior(function: str, prior: Array, shape: tuple[int, ...]) -> None:
    if prior.ndim != 1 or not prior.size:
        raise ValueError(
            f"{function}: `log_prior` must have shape (M,) with M at least 1, "
            f"got {prior.shape}."
        )
    checks.require_shape(function, "log_prior", prior, shape, "one per hypothesis")


def _normalised(log_prior: Float[Array, " M"]) -> Float[Array, " M"]:
    return log_prior - log_sum(log_prior)


@compiled_once()
def _sequential(
    values: Float[Array, "*batch T M"],
    log_prior: Float[Array, " M"],
    counts: Bool[Array, "*batch T"],
) -> tuple[Array, ...]:
    prior = _normalised(log_prior)
    # 0 is the likelihood of an observation that does not count.
    values = jnp.where(counts[..., None], values, 0)

    def step(
        weights: Array, at: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        value, counted = at
        joint = weights + value
        total = log_sum(joint)
        possible = total > -jnp.inf
        after = joint - jnp.where(possible, total, 0)[..., None]
        after = jnp.where(counted[..., None], after, weights)
        predicted = jnp.where(counted, total, 0)
        return after, (predicted, after)

    start = jnp.broadcast_to(prior, (*values.shape[:-2], values.shape[-1]))
    steps = (jnp.moveaxis(values, -2, 0), jnp.moveaxis(counts, -1, 0))
    start, *steps = match_varying((start, *steps))
    _, (predictive, posterior) = lax.scan(step, start, tuple(steps))
    predictive = jnp.moveaxis(predictive, 0, -1)
    total, own = predictive.sum(-1), values.sum(-2)
    excluded = own == -jnp.inf
    regret = jnp.where(excluded, 0, own) - jnp.where(excluded, 0, total[..., None])
    regret = jnp.where(excluded, -jnp.inf, regret)
    return predictive, jnp.moveaxis(posterior, 0, -2), regret, 0 - prior


@compiled_once()
def _redundancy(
    divergences: Float[Array, " M"], log_prior: Float[Array, " M"], n: Float[Array, ""]
) -> tuple[Array, ...]:
    prior = _normalised(log_prior)
    order = jnp.argsort(divergences)
    radii, weights = divergences[order], prior[order]
    # Of equal radii the last has the weight of all, and so the least bound.
    log_weights = jnp.minimum(lax.associative_scan(log_add, weights), 0)
    bounds = radii - log_weights / n
    bad = ~(divergences >= 0).all() | ~(n > 0)
    bounds = jnp.where(bad, jnp.nan, bounds)
    best = jnp.argmin(bounds)
    of_all = log_sum(prior - n * divergences)
    mixture = jnp.where(bad, jnp.nan, 0 - jnp.minimum(of_all, 0) / n)
    return bounds[best], radii[best], log_weights[best], mixture
