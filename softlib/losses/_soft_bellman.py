"""Offline reinforcement learning by consistency with the soft Bellman equation."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._masked_mean import masked_mean
from softlib.typing import Scalar

type Level = Literal["token", "step", "response"]
LEVELS = ("token", "step", "response")


@array_arguments
def soft_bellman_residual(
    log_prob: Float[Array, "*batch T"],
    reference_log_prob: Float[Array, "*batch T"],
    values: Float[Array, "*batch T"],
    rewards: Float[Array, "*batch T"] | Float[Array, "*batch"],
    *,
    beta: Scalar,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch T"]:
    r"""Residual of the soft Bellman equation at each token of a trajectory.

    $$\delta_t = V_t - \sum_{i \geq t} r_i + \beta \sum_{i \geq t}
        \log \frac{\pi(a_i | s_i)}{\pi_{ref}(a_i | s_i)}$$

    It is 0 on all trajectories, drawn from any policy, exactly for the policy that
    maximises reward $- \beta\, \mathrm{KL}(\pi \| \pi_{ref})$ and its value.

    It is no loss, but what `oreo_policy_loss` and `oreo_value_loss` square, for reports
    and for weights of one's own.

    Args:
        log_prob: Log-probability of each token under the policy, in nats.
        reference_log_prob: The same under the frozen reference policy.
        values: $V_t$, the value of the state before token $t$.
        rewards: $r_t$ after each token, or one number for the whole trajectory, given
            at its end.
        beta: $\beta \geq 0$, the price of a nat; a number or a scalar array.
        where: True for the tokens that are actions; broadcasts to `log_prob`. The
            others (prompt, observations, padding) add neither reward nor log-ratio,
            whatever they hold.

    Returns:
        Residuals, float32 (float64 if an argument is float64); 0 where `where` is
        False.

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `beta` is out of range.

    Derivatives: any order, forward and reverse, with respect to every floating
        argument.
    Cost: two suffix sums over the tokens.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning".

    Example:
        >>> log_prob, reference = jnp.log(jnp.array([[0.5, 0.9], [0.5, 0.5]]))
        >>> reward, values = jnp.array(1.0), jnp.array([0.9, 0.9])
        >>> residual = softlib.losses.soft_bellman_residual
        >>> print(residual(log_prob, reference, values, reward, beta=0.1).round(4))
        [-0.0412 -0.0412]
    """
    function = "soft_bellman_residual"
    steps = _Trajectory(
        function, log_prob, reference_log_prob, values, rewards, beta, where
    )
    return steps.residual(_suffix_sum(steps.ratios))


@array_arguments(as_given=("segment_ids",))
def oreo_value_loss(
    values: Float[Array, "*batch T"],
    log_prob: Float[Array, "*batch T"],
    reference_log_prob: Float[Array, "*batch T"],
    rewards: Float[Array, "*batch T"] | Float[Array, "*batch"],
    *,
    beta: Scalar = 0.03,
    level: Level = "token",
    segment_ids: Integer[Array, "*batch T"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""OREO's loss of a value head: the mean squared soft Bellman residual.

    $L = \frac{1}{n} \sum_t \delta_t^2$ with the residual of `soft_bellman_residual` and
    the policy held fixed, so that $\partial L / \partial V_t = 2 \delta_t / n$. Its
    value is that of `oreo_policy_loss`.

    Args:
        values, log_prob, reference_log_prob: As in `soft_bellman_residual`.
        rewards, beta: As in `soft_bellman_residual`.
        level: Static; the states that count: before every token, before every step, or
            before the response. See `oreo_policy_loss`.
        segment_ids: The step of each token, for `level="step"`.
        where: True for the tokens that are actions; broadcasts to `log_prob`.

    Returns:
        The loss per trajectory, float32 (float64 if an argument is float64); 0 for one
        without an action.

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together, `beta` is out of range, `level` is
            unknown, or `segment_ids` are given without steps or missing with them.

    Derivatives: any order, with respect to `values`, `rewards` and `beta`; 0 for
        `log_prob` and `reference_log_prob`, by definition.
    Cost: as `soft_bellman_residual`.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning"; a value loss
        at the level of steps is ours, by the same rule.

    Example:
        >>> log_prob, values = jnp.log(jnp.array([0.5, 0.9])), jnp.array([0.9, 1.0])
        >>> loss = softlib.losses.oreo_value_loss
        >>> print(loss(values, log_prob, log_prob, jnp.array(1.0)).round(4))
        0.005
    """
    function = "oreo_value_loss"
    log_prob, reference_log_prob = lax.stop_gradient((log_prob, reference_log_prob))
    steps = _Trajectory(
        function, log_prob, reference_log_prob, values, rewards, beta, where
    )
    starts = _starts(function, steps, level, segment_ids)
    return masked_mean(steps.residual(_suffix_sum(steps.ratios)) ** 2, starts, axis=-1)


@array_arguments(as_given=("segment_ids",))
def oreo_policy_loss(
    log_prob: Float[Array, "*batch T"],
    reference_log_prob: Float[Array, "*batch T"],
    values: Float[Array, "*batch T"],
    rewards: Float[Array, "*batch T"] | Float[Array, "*batch"],
    *,
    beta: Scalar = 0.03,
    level: Level = "token",
    segment_ids: Integer[Array, "*batch T"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""OREO's loss of a policy: each action is trained by the residual at its state.

    With $l$ the log-ratio of policy and reference, $A_t$ the tokens of the action that
    starts at $t$ and $R_t$ the rewards from $t$ on,

    $$L = \frac{1}{n} \sum_{t} \Bigl(V_t - R_t + \beta \sum_{i \in A_t} l_i
        + \mathrm{sg}\Bigl[\beta \sum_{i > A_t} l_i\Bigr]\Bigr)^2 ,$$

    the squared residuals of `soft_bellman_residual`, in which later actions and the
    values are constants: the gradient at a token is $2 \beta \delta_t / n$ with the
    residual where its action starts. Training adds a multiple of the divergence from
    the reference, over the whole vocabulary, which is a loss of its own.

    Args:
        log_prob, reference_log_prob, values: As in `soft_bellman_residual`.
        rewards, beta: As in `soft_bellman_residual`.
        level: Static; unit of an action: a `"token"`, a `"step"` of reasoning, or the
            whole `"response"`, whose only state is the first.
        segment_ids: The step of each token, for `level="step"`: a step is a run of
            equal ids among the tokens that count.
        where: True for the tokens that are actions; broadcasts to `log_prob`. The
            others add nothing, whatever they hold, and are not counted in $n$.

    Returns:
        The loss per trajectory, float32 (float64 if an argument is float64); 0 for one
        without an action. A token of probability 0 makes its trajectory infinite.

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together, `beta` is out of range, `level` is
            unknown, or `segment_ids` are given without steps or missing with them.

    Derivatives: any order, with respect to `log_prob`, `rewards` and `beta`; 0 for
        `values` and `reference_log_prob`, and across actions, by definition.
    Cost: as `soft_bellman_residual`, and a scan over the tokens for steps.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning". Its
        regulariser is not part of this number.

    Example:
        >>> log_prob, values = jnp.log(jnp.array([0.5, 0.9])), jnp.array([0.9, 1.0])
        >>> loss = lambda log_prob: softlib.losses.oreo_policy_loss(
        ...     log_prob, jax.lax.stop_gradient(log_prob), values, jnp.array(1.0),
        ...     beta=0.1)
        >>> print(jax.grad(loss)(log_prob).round(4))
        [-0.01  0.  ]
    """
    function = "oreo_policy_loss"
    values, reference_log_prob = lax.stop_gradient((values, reference_log_prob))
    steps = _Trajectory(
        function, log_prob, reference_log_prob, values, rewards, beta, where
    )
    starts = _starts(function, steps, level, segment_ids)
    if level == "token":
        own = steps.ratios
    elif level == "step":
        own = _sum_to_end_of_action(steps.ratios, starts)
    else:
        own = _suffix_sum(steps.ratios)
    # No difference of suffix sums makes `own`: gradients must not reach other actions.
    later = lax.stop_gradient(_suffix_sum(steps.ratios) - own)
    later = jnp.where(jnp.isinf(own), 0, later)  # not inf - inf
    return masked_mean(steps.residual(own + later) ** 2, starts, axis=-1)


class _Trajectory:
    """Checked arguments in the dtype of the result, 0 where they do not count."""

    def __init__(
        self,
        function: str,
        log_prob: Array,
        reference_log_prob: Array,
        values: Array,
        rewards: Array,
        beta: Scalar,
        where: Array | None,
    ):
        log_prob, reference_log_prob, values, rewards = map(
            jnp.asarray, (log_prob, reference_log_prob, values, rewards)
        )
        floating = {
            "log_prob": log_prob,
            "reference_log_prob": reference_log_prob,
            "values": values,
        }
        checks.require_floating(function, **floating, rewards=rewards)
        checks.require_rank(function, "log_prob", log_prob, 1, "(..., T)")
        shape = log_prob.shape
        for name in ("reference_log_prob", "values"):
            checks.require_shape(
                function, name, floating[name], shape, "that of log_prob"
            )
        shapes = (shape, shape[:-1])
        why = "one per token, or one per trajectory"
        checks.require_shape_in(function, "rewards", rewards, shapes, why)
        checks.require_scalar(function, "beta", beta, 0, jnp.inf)
        dtype = accumulator_dtype(log_prob, reference_log_prob, values, rewards)
        self.beta = jnp.asarray(beta, dtype)
        self.where = checks.checked_where(function, where, shape, "that of `log_prob`")
        counted = lambda array: jnp.where(self.where, array, 0).astype(dtype)
        self.values = counted(values)
        self.ratios = counted(log_prob) - counted(reference_log_prob)
        if rewards.ndim == len(shape):
            self.returns = _suffix_sum(counted(rewards))
        else:
            self.returns = rewards.astype(dtype)[..., None]

    def residual(self, ratios_to_come: Array) -> Array:
        delta = self.values - self.returns + self.beta * ratios_to_come
        return jnp.where(self.where, delta, 0)


def _starts(
    function: str, steps: _Trajectory, level: str, segment_ids: Array | None
) -> Bool[Array, "*batch T"]:
    """True for the first token of each action."""
    checks.require_one_of(function, "level", level, LEVELS)
    if (segment_ids is not None) != (level == "step"):
        raise ValueError(
            f"{function}: `segment_ids` must be given for level='step' and no other "
            f"level, got level={level!r} {'with' if level != 'step' else 'without'} "
            "them."
        )
    where = steps.where
    if level == "token":
        return where
    first = where & (jnp.cumsum(where, -1) == 1)
    if segment_ids is None:
        return first
    ids = jnp.asarray(segment_ids)
    checks.require_integer(function, segment_ids=ids)
    checks.require_shape(
        function, "segment_ids", ids, where.shape, "that of `log_prob`"
    )

    def latest(one, two):
        return jnp.where(two[1], two[0], one[0]), one[1] | two[1]

    # The id of the last token that counts: up to each token, then before it.
    known = _scan(latest, (ids, where))[0]
    before = jnp.concatenate([ids[..., :1], known[..., :-1]], -1)
    return first | (where & (ids != before))


def _sum_to_end_of_action(
    ratios: Float[Array, "*batch T"], starts: Bool[Array, "*batch T"]
) -> Float[Array, "*batch T"]:
    ends = jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], -1)

    def add(later, earlier):
        total = earlier[0] + jnp.where(earlier[1], 0, later[0])
        return total, later[1] | earlier[1]

    return _scan(add, (ratios, ends), reverse=True)[0]


def _scan(
    function: Callable[..., Any],
    elements: tuple[Array, Array],
    *,
    reverse: bool = False,
) -> tuple[Array, Array]:
    axis = elements[0].ndim - 1
    return lax.associative_scan(function, elements, axis=axis, reverse=reverse)


def _suffix_sum(values: Float[Array, "*batch T"]) -> Float[Array, "*batch T"]:
    """Sum of each element and all after it."""
    return lax.cumsum(values, axis=values.ndim - 1, reverse=True)
