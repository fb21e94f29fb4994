"""Bandits whose arms pass once: explore in one pass, keep one arm, commit to it."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype

# Counts of more draws are not exact in float32, and the error of a normal variable in
# their place is below a millionth of the mean.
_MOST_DRAWS = 2**22
_RULES = ("uniform", "eps_best", "king")


class StreamResult(NamedTuple):
    """The result of `streaming_explore_then_commit`.

    Attributes:
        arm: The arm that is committed to.
        regret: Of all `horizon` pulls: the sum of the best mean minus that of the arm.
        pulls: Number of pulls before it commits, a whole number.
    """

    arm: Int[Array, ""]
    regret: Float[Array, ""]
    pulls: Float[Array, ""]


def uniform_exploration_size(num_arms: int, horizon: int) -> int:
    r"""Pulls of each arm by uniform exploration: $(T/K)^{2/3} \log^{1/3} T$, rounded.

    Args:
        num_arms: $K$, static.
        horizon: $T$, all pulls; static.

    Returns:
        Rounded down; at least 1, and at most $T/K$.

    Raises:
        TypeError: An argument is no Python int.
        ValueError: One is not positive.

    Source: "Tight Regret Bounds for Single-pass Streaming Multi-armed Bandits".

    Example:
        >>> print(softlib.bandits.uniform_exploration_size(50, 200_000))
        580
    """
    _require_sizes("uniform_exploration_size", num_arms, horizon)
    size = (horizon / num_arms) ** (2 / 3) * math.log(horizon) ** (1 / 3)
    return _clipped(size, num_arms, horizon)


def eps_best_size(num_arms: int, horizon: int) -> int:
    r"""Pulls of each arm that tell all arms apart to $\epsilon$: $\log(K)/\epsilon^2$.

    Args:
        num_arms: $K$, static.
        horizon: $T$, all pulls; static. $\epsilon = (K/T)^{1/3}$.

    Returns:
        Rounded down; at least 1, and at most $T/K$.

    Raises:
        TypeError: An argument is no Python int.
        ValueError: One is not positive.

    Source: "Tight Regret Bounds for Single-pass Streaming Multi-armed Bandits".

    Example:
        >>> print(softlib.bandits.eps_best_size(50, 200_000))
        985
    """
    _require_sizes("eps_best_size", num_arms, horizon)
    size = math.log(num_arms) * (horizon / num_arms) ** (2 / 3)
    return _clipped(size, num_arms, horizon)


@array_arguments
def streaming_explore_then_commit(
    key: Array | None,
    arm_means: Float[Array, " K"],
    *,
    horizon: int,
    rule: Literal["uniform", "eps_best", "king"] = "king",
    empirical_means: Float[Array, " K"] | None = None,
) -> StreamResult:
    r"""Regret of one pass over arms with memory for one, and of committing after it.

    Rewards are 0 or 1. With rule "uniform" each arm is pulled
    `uniform_exploration_size` times, with "eps_best" `eps_best_size` times, and the
    best mean is kept. With "king" an arm challenges the one that is kept in rounds of
    $2^l / \epsilon^2$ pulls, $\epsilon = (K/T)^{1/3}$, until its mean is at most that
    of the king minus $\epsilon / 5$. The king pays: it gets $1/\epsilon^2$ for each
    arrival, and a challenger that it cannot pay for is the next king, with $1.2 /
    \epsilon^2$ and the larger of the king's mean and one of $1/\epsilon^2$ pulls of its
    own. That takes $O(K/\epsilon^2)$ pulls in expectation; regret of order $K^{1/3}
    T^{2/3}$ cannot be avoided with memory for $o(K)$ arms.

    Args:
        key: Of `jax.random`; not read, and may be None, if means are given.
        arm_means: Expected rewards, in [0, 1], in the order of arrival.
        horizon: $T$, static; any size, such as $10^9$, for pulls are drawn by the
            batch. With fewer than $K$ pulls the last arms are not seen.
        rule: Static.
        empirical_means: Measured means to use instead of draws, by "uniform" and
            "eps_best".

    Returns:
        `StreamResult`. The first of equal means is kept.

    Raises:
        TypeError: An array is not floating, `horizon` is no Python int, or neither
            `key` nor means are given.
        ValueError: Shapes do not fit, an option is unknown, or the king is given means.

    Derivatives: none of the draws; that of the regret by `arm_means` holds them fixed.
    Cost: O(K) draws of binomials, however large `horizon` is; one after the other with
        "king". Counts above $2^{22}$ are drawn as rounded normals.
    Source: "Tight Regret Bounds for Single-pass Streaming Multi-armed Bandits".
        Deviations: the rule of the king knows nothing of the gaps between arms, the
        mean of a challenger is that of all its rounds, and pulls end at `horizon`.

    Example:
        >>> stream, means = softlib.bandits.streaming_explore_then_commit, [0.2, 0.9]
        >>> found = stream(jax.random.key(0), means, horizon=1000, rule="uniform")
        >>> print(found.arm, found.pulls, found.regret.round(1))
        1 238.0 83.3
    """
    function = "streaming_explore_then_commit"
    checks.require_floating(
        function, arm_means=arm_means, empirical_means=empirical_means
    )
    checks.require_rank(function, "arm_means", arm_means, 1, "(K,)")
    count = arm_means.shape[-1]
    checks.require_shape(function, "arm_means", arm_means, (count,), "vmap for more")
    if count == 0:
        raise ValueError(f"{function}: `arm_means` must hold an arm, got shape (0,).")
    checks.require_positive_integer(function, "horizon", horizon)
    checks.require_one_of(function, "rule", rule, _RULES)
    means = arm_means.astype(accumulator_dtype(arm_means))
    if empirical_means is None:
        if key is None:
            raise TypeError(
                f"{function}: `key` or `empirical_means` must be given, got None."
            )
        if rule == "king":
            return _king(key, means, horizon)
    elif rule == "king":
        raise ValueError(
            f"{function}: `empirical_means` must be None with rule='king', which pulls "
            "arms in rounds."
        )
    size = {"uniform": uniform_exploration_size, "eps_best": eps_best_size}[rule]
    batch = size(count, horizon)
    seen = min(count, horizon)
    if empirical_means is None:
        assert key is not None  # checked above, for every rule
        draws = jnp.asarray(float(batch), means.dtype)
        empirical_means = _binomial(key, draws, means) / draws
    checks.require_shape(
        function, "empirical_means", empirical_means, (count,), "that of `arm_means`"
    )
    arm = jnp.argmax(empirical_means[:seen]).astype(jnp.int32)
    gaps = means.max() - means
    pulls = batch * seen
    regret = float(batch) * gaps[:seen].sum() + float(horizon - pulls) * gaps[arm]
    return StreamResult(arm, regret, jnp.asarray(float(pulls), means.dtype))


def _require_sizes(function: str, num_arms: int, horizon: int) -> None:
    checks.require_positive_integer(function, "num_arms", num_arms)
    checks.require_positive_integer(function, "horizon", horizon)


def _clipped(size: float, num_arms: int, horizon: int) -> int:
    return max(min(int(size), horizon // num_arms), 1)


def _binomial(key: Array, count: Array, mean: Array) -> Array:
    """Successes among `count` draws, in the dtype of `mean`."""
    exact_key, normal_key = jax.random.split(key)
    dtype = mean.dtype
    few = jnp.minimum(count, float(_MOST_DRAWS))
    exact = jax.random.binomial(exact_key, few, mean, dtype=dtype)
    normal = jax.random.normal(normal_key, mean.shape, dtype)
    many = jnp.round(count * mean + jnp.sqrt(count * mean * (1 - mean)) * normal)
    return jnp.where(count <= _MOST_DRAWS, exact, jnp.clip(many, 0, count))


class _Reign(NamedTuple):
    """The one arm in memory, and what has been spent."""

    king: Array
    mean: Array
    budget: Array
    used: Array
    regret: Array


class _Challenge(NamedTuple):
    level: Array
    successes: Array
    count: Array
    beaten: Array
    budget: Array
    used: Array


@compiled_once(2)
def _king(key: Array, means: Array, horizon: int) -> StreamResult:
    dtype, count = means.dtype, means.shape[0]
    # Integers, so that sums of pulls are exact: float32 ends at 2^24. Where an int32
    # ends, they are floats, exact up to the size of a batch, which is a rounding.
    whole = jnp.int32 if horizon < 2**30 else dtype
    number = lambda value: jnp.asarray(value, whole)
    total = number(horizon)
    batch = max(int((horizon / count) ** (2 / 3)), 1)
    batch = min(batch, horizon)
    start_budget = number(6 * batch // 5)
    margin = (count / horizon) ** (1 / 3) / 5
    gaps = means.max() - means
    pull = functools.partial(_pull, means=means)

    def crowned(
        key: Array, arm: Array, mean: Any, used: Array, regret: Array
    ) -> _Reign:
        size = jnp.minimum(number(batch), total - used)
        own = pull(key, arm, size) / jnp.maximum(size, 1).astype(dtype)
        mean = jnp.where(size > 0, jnp.maximum(mean, own), mean)
        spent = size.astype(dtype) * gaps[arm]
        return _Reign(arm, mean, start_budget, used + size, regret + spent)

    def arrival(reign: _Reign, given: tuple[Array, Array]) -> tuple[_Reign, None]:
        arm, own_key = given
        round_key, crown_key = jax.random.split(own_key)

        def needed(challenge: _Challenge) -> Array:
            return number(batch) * jnp.left_shift(1, challenge.level).astype(whole)

        def goes_on(challenge: _Challenge) -> Array:
            paid = needed(challenge) <= challenge.budget
            return ~challenge.beaten & paid & (challenge.used < total)

        def fight(challenge: _Challenge) -> _Challenge:
            size = jnp.minimum(needed(challenge), total - challenge.used)
            drawn = pull(jax.random.fold_in(round_key, challenge.level), arm, size)
            successes = challenge.successes + drawn
            pulled = challenge.count + size
            beaten = successes / pulled.astype(dtype) <= reign.mean - margin
            return _Challenge(
                challenge.level + 1,
                successes,
                pulled,
                beaten,
                challenge.budget - size,
                challenge.used + size,
            )

        begin = _Challenge(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), dtype),
            number(0),
            jnp.zeros((), bool),
            reign.budget + number(batch),
            reign.used,
        )
        end = lax.while_loop(goes_on, fight, begin)
        regret = reign.regret + end.count.astype(dtype) * gaps[arm]
        stays = reign._replace(budget=end.budget, used=end.used, regret=regret)
        follows = crowned(crown_key, arm, reign.mean, end.used, regret)
        # An arm of which nothing was seen is no king.
        keep = end.beaten | (end.count == 0)
        return jax.tree.map(functools.partial(jnp.where, keep), stays, follows), None

    keys = jax.random.split(key, count)
    zero = jnp.zeros((), jnp.int32)
    first = crowned(keys[0], zero, -jnp.inf, number(0), jnp.zeros((), dtype))
    arms = jnp.arange(1, count, dtype=jnp.int32)
    reign, _ = lax.scan(arrival, first, (arms, keys[1:]))
    rest = (total - reign.used).astype(dtype)
    regret = reign.regret + rest * gaps[reign.king]
    return StreamResult(reign.king, regret, reign.used.astype(dtype))


def _pull(key: Array, arm: Array, size: Array, *, means: Array) -> Array:
    return _binomial(key, size.astype(means.dtype), means[arm])
