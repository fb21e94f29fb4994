"""The differential information of two distributions: what turns one into the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib.typing import Scalar


@array_arguments
def differential_information(
    log_probs: Float[Array, "*shape"],
    reference_log_probs: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Log-probabilities of the differential information distribution, in nats.

    $$\log q(y) = \log \frac{\pi(y)}{\pi_\mathrm{ref}(y)}
        - \log \sum_{y'} \frac{\pi(y')}{\pi_\mathrm{ref}(y')}$$

    The evidence that Bayes' rule needs to turn the prior $\pi_\mathrm{ref}$ into
    $\pi \propto \pi_\mathrm{ref}\, q$. It is not the integrand of a divergence: a rare
    $y$ with a large ratio has most of it.

    Args:
        log_probs: $\log \pi$ over a finite space. A constant added along `axis` does
            not matter, so unnormalised logits will do.
        reference_log_probs: $\log \pi_\mathrm{ref}$, likewise.
        axis: Static; the axis of the space.
        where: True for the members of the space; broadcasts to `log_probs`. Others may
            hold anything.

    Returns:
        $\log q$, float32 (float64 if an argument is float64): -inf outside of the space
        and where $\pi = 0$, also if $\pi_\mathrm{ref} = 0$ too. NaN, without a
        gradient, for a row in which $\pi > 0$ where $\pi_\mathrm{ref} = 0$: there is
        no $q$.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, `where` does not broadcast, or there is no such axis.

    Derivatives: forward and reverse, any order.
    Cost: a few passes over the arrays.
    Source: "Differential Information: An Information-Theoretic Perspective on
        Preference Optimization".

    Example:
        >>> ref, policy = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
        >>> log_q = softlib.information.differential_information(policy, ref)
        >>> print(jnp.exp(log_q).round(2))
        [0.14 0.29 0.57]
    """
    function = "differential_information"
    space = _Space.of(
        function,
        axis,
        where,
        log_probs=log_probs,
        reference_log_probs=reference_log_probs,
    )
    return space.normalized(_log_ratio(space))


@array_arguments
def differential_information_entropy(
    log_probs: Float[Array, "*shape"],
    reference_log_probs: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Entropy of the differential information distribution, in nats.

    $H(q)$ of the $q$ of `differential_information`. Low, where an update reinforces a
    few responses; high, where it spreads: training towards such a target lowers the
    log-probability of chosen and rejected responses alike.

    Args:
        log_probs: $\log \pi$ over a finite space, up to a constant along `axis`.
        reference_log_probs: $\log \pi_\mathrm{ref}$, likewise.
        axis: Static; the axis of the space, which the result lacks.
        where: True for the members of the space; broadcasts to `log_probs`. Others may
            hold anything.

    Returns:
        From 0 to the logarithm of the size of the space, float32 (float64 if an
        argument is float64); 0 for an empty space, NaN where $q$ is.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, `where` does not broadcast, or there is no such axis.

    Derivatives: forward and reverse, any order.
    Cost: a few passes over the arrays.
    Source: "Differential Information: An Information-Theoretic Perspective on
        Preference Optimization".

    Example:
        >>> ref, policy = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
        >>> entropy = softlib.information.differential_information_entropy
        >>> print(entropy(policy, ref).round(4), entropy(ref, ref).round(4))
        0.9557 1.0986
    """
    function = "differential_information_entropy"
    space = _Space.of(
        function,
        axis,
        where,
        log_probs=log_probs,
        reference_log_probs=reference_log_probs,
    )
    log_q = space.normalized(_log_ratio(space))
    present = log_q != -jnp.inf  # True for NaN
    finite = jnp.where(present, log_q, 0)
    # 0 - x and not -x: a single member has entropy 0, not -0.
    return 0 - jnp.where(present, jnp.exp(finite) * finite, 0).sum(axis)


@array_arguments
def dpo_optimal_policy(
    reference_log_probs: Float[Array, "*shape"],
    chosen_log_probs: Float[Array, "*shape"],
    rejected_log_probs: Float[Array, "*shape"],
    *,
    beta: Scalar,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Log-probabilities of the policy at which the population DPO loss is least.

    For pairs drawn independently, $y_w \sim \pi_w$ and $y_l \sim \pi_l$, the expected
    `softlib.losses.dpo_loss` is least for

    $$\pi^* \propto \pi_\mathrm{ref} \Bigl(\frac{\pi_w}{\pi_l}\Bigr)^{1 / \beta} :$$

    its differential information is the one from $\pi_l$ to $\pi_w$ to the power
    $1 / \beta$.

    Args:
        reference_log_probs: $\log \pi_\mathrm{ref}$ over a finite space, up to a
            constant.
        chosen_log_probs: $\log \pi_w$, likewise.
        rejected_log_probs: $\log \pi_l$, likewise.
        beta: $\beta > 0$ of the loss; a number is static, an array traced and
            differentiable.
        axis: Static; the axis of the space.
        where: True for the members of the space; broadcasts to `reference_log_probs`.
            Others may hold anything.

    Returns:
        $\log \pi^*$, float32 (float64 if an argument is float64): -inf outside of the
        space and where $\pi_\mathrm{ref}$ or $\pi_w$ is 0. NaN, without a gradient, for
        a row with a member that is never rejected ($\pi_l = 0$) and that
        $\pi_\mathrm{ref}$ allows: the loss has no minimum.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, `where` does not broadcast, there is no such axis, or
            `beta` is out of range.

    Derivatives: forward and reverse, any order.
    Cost: a few passes over the arrays.
    Source: "Differential Information: An Information-Theoretic Perspective on
        Preference Optimization".

    Example:
        >>> ref = jnp.log(jnp.array([0.5, 0.5]))
        >>> chosen, rejected = jnp.log(jnp.array([[0.6, 0.4], [0.4, 0.6]]))
        >>> optimal = softlib.information.dpo_optimal_policy
        >>> print(jnp.exp(optimal(ref, chosen, rejected, beta=0.5)).round(2))
        [0.84 0.16]
    """
    function = "dpo_optimal_policy"
    checks.require_positive_scalars(function, beta=beta)
    space = _Space.of(
        function,
        axis,
        where,
        reference_log_probs=reference_log_probs,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
    )
    ref, chosen, rejected = space.arrays
    # Where the reference has no mass the policy has none, whatever the ratio is.
    space = space.within(ref != -jnp.inf)
    ref, chosen, rejected, beta = promoted(ref, chosen, rejected, beta)
    return space.normalized(ref + space.kept(chosen - rejected) / beta)


@array_arguments
def optimal_rejected_distribution(
    reference_log_probs: Float[Array, "*shape"],
    target_log_probs: Float[Array, "*shape"],
    *,
    beta: Scalar,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Log-probabilities of the rejected responses that make DPO learn a target.

    $$\pi_l \propto \pi_\mathrm{ref}
        \Bigl(\frac{\pi_\mathrm{ref}}{\pi^*}\Bigr)^\beta$$

    With chosen responses drawn from the reference and rejected ones from this, the
    optimum of the population DPO loss is the target: `dpo_optimal_policy(ref, ref,
    this)` gives it back.

    Args:
        reference_log_probs: $\log \pi_\mathrm{ref}$ over a finite space, up to a
            constant.
        target_log_probs: $\log \pi^*$, the policy to learn, likewise.
        beta: $\beta > 0$ of the loss; a number is static, an array traced and
            differentiable.
        axis: Static; the axis of the space.
        where: True for the members of the space; broadcasts to `reference_log_probs`.
            Others may hold anything.

    Returns:
        $\log \pi_l$, float32 (float64 if an argument is float64): -inf outside of the
        space and where $\pi_\mathrm{ref} = 0$. NaN, without a gradient, for a row in
        which the target is 0 where the reference is not: no distribution teaches that.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, `where` does not broadcast, there is no such axis, or
            `beta` is out of range.

    Derivatives: forward and reverse, any order.
    Cost: a few passes over the arrays.
    Source: "Differential Information: An Information-Theoretic Perspective on
        Preference Optimization".

    Example:
        >>> ref, target = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
        >>> rejected = softlib.information.optimal_rejected_distribution
        >>> print(jnp.exp(rejected(ref, target, beta=0.5)).round(4))
        [0.3333 0.6667]
    """
    function = "optimal_rejected_distribution"
    checks.require_positive_scalars(function, beta=beta)
    space = _Space.of(
        function,
        axis,
        where,
        reference_log_probs=reference_log_probs,
        target_log_probs=target_log_probs,
    )
    ref, target = space.arrays
    space = space.within(ref != -jnp.inf)
    ref, target, beta = promoted(ref, target, beta)
    return space.normalized(ref + beta * space.kept(ref - target))


class SampledEntropy(NamedTuple):
    r"""An entropy estimated from a sample, with what the estimate rests on.

    Attributes:
        entropy: The estimate of $H(q)$, in nats.
        log_normalizer: The estimate of $\log \sum_y \pi(y) / \pi_\mathrm{ref}(y)$.
        effective_sample_size: $(\sum w)^2 / \sum w^2$ of the importance weights, from 1
            (one draw has all the weight, and the estimate means little) to their count.

    Derivatives: see `sampled_differential_information`.
    Cost: three numbers per row.

    Example:
        >>> log_prob, reference = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.25]]))
        >>> estimate = softlib.information.sampled_differential_information
        >>> print(estimate(log_prob, reference).effective_sample_size)
        2.0
    """

    entropy: Float[Array, "..."]
    log_normalizer: Float[Array, "..."]
    effective_sample_size: Float[Array, "..."]


@array_arguments
def sampled_differential_information(
    log_prob: Float[Array, "*shape"],
    reference_log_prob: Float[Array, "*shape"],
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> SampledEntropy:
    r"""Entropy of the differential information, from sequences drawn from the policy.

    With $d = \log \pi - \log \pi_\mathrm{ref}$ and $w = 1 / \pi_\mathrm{ref}$ of draws
    $y \sim \pi$,

    $$H(q) \approx \log \Bigl(\frac{1}{S} \sum_s w_s\Bigr)
        - \frac{\sum_s w_s d_s}{\sum_s w_s},$$

    for spaces that cannot be enumerated, such as sentences. The weights span hundreds
    of nats and are heavy-tailed: the estimate is off until the draws hold what is rare
    under the reference, so read it beside the effective sample size.

    Args:
        log_prob: $\log \pi$ of the draws, sums over tokens, normalised: here a constant
            does matter.
        reference_log_prob: $\log \pi_\mathrm{ref}$ of the same draws, likewise.
        axis: Static; the axis of the draws, which the results lack.
        where: True for the draws that count; broadcasts to `log_prob`. Others may hold
            anything.

    Returns:
        Estimates, float32 (float64 if an argument is float64). Without draws the
        entropy and the effective sample size are 0 and the normalizer -inf; NaN for a
        row with a draw that one of the two does not allow.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, `where` does not broadcast, or there is no such axis.

    Derivatives: forward and reverse, of the formula at fixed draws. That is not the
        gradient of the entropy: the draws depend on the policy too.
    Cost: a few passes over the arrays.
    Source: "Differential Information: An Information-Theoretic Perspective on
        Preference Optimization"; the estimator is softlib's.

    Example:
        >>> log_prob, reference_log_prob = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.5]]))
        >>> estimate = softlib.information.sampled_differential_information
        >>> print(estimate(log_prob, reference_log_prob).entropy.round(4))
        0.6365
    """
    function = "sampled_differential_information"
    space = _Space.of(
        function, axis, where, log_prob=log_prob, reference_log_prob=reference_log_prob
    )
    policy, reference = space.arrays
    possible = jnp.isfinite(policy) & jnp.isfinite(reference)
    log_w = jnp.where(possible, -reference, jnp.nan)
    log_share = space.normalized(log_w)
    # Of the weight: 0 for other draws, and for all of a bad row.
    share = jnp.exp(jnp.where(jnp.isnan(log_share), -jnp.inf, log_share))
    count = space.members.sum(axis)
    some = count > 0
    log_count = jnp.log(jnp.where(some, count, 1).astype(share.dtype))
    log_sum, bad = space.logsumexp(log_w)
    log_normalizer = jnp.where(some, log_sum - log_count, -jnp.inf)
    d = jnp.where(possible, policy - reference, 0)
    mean = jnp.where(share > 0, share * d, 0).sum(axis)
    squares = (share * share).sum(axis)
    size = jnp.where(some, 1 / jnp.where(squares > 0, squares, 1), 0)
    entropy = jnp.where(some, jnp.where(some, log_normalizer, 0) - mean, 0)
    nan = lambda x: jnp.where(bad, jnp.nan, x)
    return SampledEntropy(nan(entropy), nan(log_normalizer), nan(size))


class _Space(NamedTuple):
    """Checked arrays over a finite space, 0 outside it."""

    arrays: list[Array]
    members: Array
    axis: int

    @classmethod
    def of(
        cls, function: str, axis: int, where: ArrayLike | None, **arrays: ArrayLike
    ) -> "_Space":
        found = {name: jnp.asarray(array) for name, array in arrays.items()}
        checks.require_floating(function, **found)
        first = next(iter(found))
        shape = found[first].shape
        for name, array in found.items():
            checks.require_shape(
                function, name, array, shape, f"the shape of `{first}`"
            )
        checks.require_axes(function, "axis", axis, len(shape))
        if where is None:
            members = jnp.ones(shape, bool)
        else:
            members = jnp.asarray(where)
            checks.require_boolean(function, where=members)
            checks.require_broadcastable(
                function, "where", members, shape, f"the shape of `{first}`"
            )
            members = jnp.broadcast_to(members, shape)
        dtype = accumulator_dtype(*found.values())
        wide = [jnp.where(members, a.astype(dtype), 0) for a in found.values()]
        return cls(wide, members, axis)

    def within(self, members: Array) -> "_Space":
        return self._replace(members=self.members & members)

    def kept(self, x: Array) -> Array:
        """`x`, 0 outside the space."""
        return jnp.where(self.members, x, 0)

    def logsumexp(self, x: Array) -> tuple[Array, Array]:
        """The logsumexp of the members (-inf for none), and True for NaN or +inf."""
        bad = (self.members & (jnp.isnan(x) | (x == jnp.inf))).any(self.axis)
        present = self._present(x, bad)
        scores = jnp.where(present, x, -jnp.inf)
        some = present.any(self.axis, keepdims=True)
        lse = jax.nn.logsumexp(jnp.where(some, scores, 0), self.axis, keepdims=True)
        lse = jnp.where(some, lse, -jnp.inf)
        return lax.squeeze(lse, (self.axis % x.ndim,)), bad

    def normalized(self, x: Array) -> Array:
        """`x` minus its logsumexp; -inf outside, NaN for a row with NaN or +inf."""
        lse, bad = self.logsumexp(x)
        lse, wide_bad = (jnp.expand_dims(a, self.axis) for a in (lse, bad))
        present = self._present(x, bad)
        finite = jnp.where(present, x, 0)
        result = jnp.where(present, finite - jnp.where(present, lse, 0), -jnp.inf)
        return jnp.where(wide_bad, jnp.nan, result)

    def _present(self, x: Array, bad: Array) -> Array:
        wide_bad = jnp.expand_dims(bad, self.axis)
        return self.members & (x != -jnp.inf) & ~wide_bad


def _log_ratio(space: _Space) -> Array:
    policy, reference = space.arrays
    possible = policy != -jnp.inf
    # Where the policy is 0 so is q, also where the reference is 0.
    difference = jnp.where(possible, policy, 0) - jnp.where(possible, reference, 0)
    return jnp.where(possible, difference, -jnp.inf)
