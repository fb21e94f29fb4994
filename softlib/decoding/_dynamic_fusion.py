"""A large model steered by small ones, as far as they have moved themselves."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._sharding import in_auto_mode
from softlib.logits import AbstractLogits, FusedLogits, Logits
from softlib.logits._fused import tilted_moments
from softlib.logits._sources import source_of


class DynamicFusion(NamedTuple):
    """Logits of a large model that experts steer, and how far.

    Attributes:
        logits: The combination, as a value that is never formed.
        expert_weights: The weight of each expert's change per row.
        objective: What the weights minimise, in squared nats per row.

    Derivatives: see `dynamic_logit_fusion`.
    Cost: the arguments, and a few numbers per row.

    Example:
        >>> large, small = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]])
        >>> fused = softlib.decoding.dynamic_logit_fusion(large, [small], small)
        >>> print(fused.expert_weights, fused.logits.materialize())
        [[0.]] [[2. 0.]]
    """

    logits: FusedLogits
    expert_weights: Float[Array, "*batch experts"]
    objective: Float[Array, "*batch"]


@array_arguments
def dynamic_logit_fusion(
    logits: Logits,
    expert_logits: Sequence[Logits],
    small_logits: Logits,
    *,
    bounds: tuple[float, float] = (0.0, 2.0),
    num_candidates: int = 21,
    num_refinements: int = 0,
    experts: Literal["one_active", "each"] = "one_active",
) -> DynamicFusion:
    r"""Steers a large model as far, at each step, as small experts have moved.

    $$\tilde P = \operatorname{softmax}\Big(M_L + \sum_t \alpha_t (M_t - M_S)\Big)$$

    Experts $M_t$ are fine-tuned copies of a small model $M_S$; the large model $M_L$ is
    not tuned. With $P, Q, Q_t$ the softmax of $M_L, M_S, M_t$, the fusion shall be as
    far from the large model as the experts are from the small one, in both directions:

    $$\alpha = \arg\min_\alpha \sum_t
        \big(\mathrm{KL}(\tilde P \,\|\, P) - \mathrm{KL}(Q_t \,\|\, Q)\big)^2
        + \big(\mathrm{KL}(P \,\|\, \tilde P) - \mathrm{KL}(Q \,\|\, Q_t)\big)^2$$

    A constant weight of 1 is `softlib.logits.FusedLogits` with the weights 1, 1, -1.

    A class that one model excludes is excluded in all of them, which are renormalised.

    Args:
        logits: $M_L$ of the next token; an array, or a value such as
            `softlib.LinearLogits`.
        expert_logits: $M_t$, one or several, with the same rows and classes.
        small_logits: $M_S$.
        bounds: Static; the least and the greatest weight.
        num_candidates: Static number of weights that are tried per expert, evenly
            between the bounds. Of equally good ones the least is taken.
        num_refinements: Static number of further searches, each of as many weights
            between the neighbours of the best one.
        experts: Static. "one_active": one expert per row has a weight, the best one,
            and the others 0. "each": all have weights, found one after the other with
            those before held fixed and those behind at the least.

    Returns:
        `DynamicFusion`; weights and objective in float32 (float64 if an argument is
        float64). A row without classes has the least weights and objective 0; one with
        a NaN has NaN for both.

    Raises:
        TypeError: An argument has the wrong kind, or `expert_logits` is no sequence.
        ValueError: Rows or classes differ, an option is out of range, or logits have an
            option that a combination has not.

    Derivatives: of the fused logits, with respect to all models, with the weights held
        fixed. Weights and objective have none.
    Cost: one forward pass over all models for all candidates, in which a head is
        multiplied once; per candidate an exponential for each row and class. A pass
        more for each refinement and, with "each", for each further expert. Scratch of a
        tile of each model: no logits of a head are formed.
    Source: "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion".
        Divergences follow from the logsumexp and its derivative by the weight, to about
        1e-6 in float32; negative ones are 0.

    Example:
        >>> large = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
        >>> small = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> expert = jnp.array([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> fused = softlib.decoding.dynamic_logit_fusion(large, [expert], small)
        >>> print((10 * fused.expert_weights[:, 0]).round())
        [ 9. 10.]
    """
    function = "dynamic_logit_fusion"
    if isinstance(expert_logits, AbstractLogits) or not isinstance(
        expert_logits, list | tuple
    ):
        raise TypeError(
            f"{function}: `expert_logits` must be a list or tuple of logits, got "
            f"{type(expert_logits).__name__}."
        )
    count = len(expert_logits)
    if not count:
        raise ValueError(f"{function}: `expert_logits` must hold at least one.")
    large = source_of(function, logits)
    named = [("small_logits", small_logits)]
    named += [("expert_logits", expert) for expert in expert_logits]
    others = [source_of(function, each, name) for name, each in named]
    for (name, _), other in zip(named, others, strict=True):
        if other.shape != large.shape:
            raise ValueError(
                f"{function}: `{name}` must have the rows and classes of `logits`, "
                f"{large.shape}, got {other.shape}."
            )
    least, most = _checked_bounds(function, bounds)
    checks.require_positive_integer(function, "num_candidates", num_candidates)
    _check_count(function, num_refinements)
    checks.require_one_of(function, "experts", experts, ("one_active", "each"))
    with checks.under_name(function, "FusedLogits"):
        # Its weights do not matter for the search.
        members = FusedLogits([large, *others], [0.0] * (2 + count))

    def searched(_: Array, members: FusedLogits) -> tuple[Array, Array]:
        search = _Search(members, least, most, num_candidates, num_refinements)
        return search.of_one() if experts == "one_active" else search.of_each()

    def specs(spec: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
        rows = spec[: len(large.batch_shape)]
        return PartitionSpec(*rows, None), PartitionSpec(*rows)

    constant = lax.stop_gradient(members)
    weights, objective = in_auto_mode(searched, specs, constant.per_row, constant)
    one = jnp.ones_like(objective)[..., None]
    of_members = [one, -weights.sum(-1, keepdims=True), weights]
    with checks.under_name(function, "FusedLogits"):
        fused = FusedLogits([large, *others], jnp.concatenate(of_members, axis=-1))
    return DynamicFusion(fused, weights, objective)


class _Search:
    """The search of weights, of one expert or of each."""

    def __init__(
        self,
        members: FusedLogits,
        least: float,
        most: float,
        num_candidates: int,
        num_refinements: int,
    ) -> None:
        self._members = members
        self._batch, self._dtype = members.batch_shape, members.dtype
        self._count = len(members.members) - 2
        self._least, self._most = least, most
        self._num, self._refinements = num_candidates, num_refinements

    def of_one(self) -> tuple[Array, Array]:
        grid = self._grid()
        axes = jnp.eye(self._count, dtype=self._dtype)
        # Expert after expert, each with all its weights.
        alphas = axes[:, None, :] * grid[None, :, None]
        alphas = alphas.reshape(-1, self._count)
        best, place, objective = self._best(self._per_row(alphas))
        chosen = (place // self._num)[..., None]
        axis = (_iota((*self._batch, self._count)) == chosen).astype(self._dtype)
        value = best.sum(-1)
        for number in range(self._refinements):
            around = self._around(value, number)
            alphas = axis[..., None, :] * around[..., None]
            best, place, objective = self._best(alphas)
            value = jnp.take_along_axis(around, place[..., None], -1)[..., 0]
        return best, objective

    def of_each(self) -> tuple[Array, Array]:
        best = jnp.full((*self._batch, self._count), self._least, self._dtype)
        objective = jnp.zeros(self._batch, self._dtype)
        for number in range(self._refinements + 1):
            for expert in range(self._count):
                grid = jnp.broadcast_to(self._grid(), (*self._batch, self._num))
                if number:
                    grid = self._around(best[..., expert], number - 1)
                own = _iota((*self._batch, self._num, self._count)) == expert
                alphas = jnp.where(own, grid[..., None], best[..., None, :])
                best, _, objective = self._best(alphas)
        return best, objective

    def _grid(self) -> Float[Array, " n"]:
        return jnp.linspace(self._least, self._most, self._num, dtype=self._dtype)

    def _around(self, value: Array, number: int) -> Float[Array, "*batch n"]:
        """Weights between the neighbours of the best one, within the bounds."""
        step = (self._most - self._least) / max(self._num - 1, 1)
        step *= (2 / max(self._num - 1, 2)) ** number
        low = jnp.maximum(value - step, self._least)[..., None]
        high = jnp.minimum(value + step, self._most)[..., None]
        share = jnp.linspace(0, 1, self._num, dtype=self._dtype)
        return low + (high - low) * share.reshape((1,) * value.ndim + share.shape)

    def _per_row(self, alphas: Array) -> Array:
        return jnp.broadcast_to(alphas, (*self._batch, *alphas.shape))

    def _best(self, alphas: Float[Array, "*batch n T"]) -> tuple[Array, Array, Array]:
        """The first of the best candidates of each row, its place and objective."""
        objective = self._objective(alphas)
        place = jnp.argmin(objective, axis=-1)[..., None]
        least = jnp.take_along_axis(objective, place, -1)[..., 0]
        best = jnp.take_along_axis(alphas, place[..., None], -2)[..., 0, :]
        best = jnp.where(jnp.isnan(least)[..., None], jnp.nan, best)
        return best, place[..., 0], least

    def _objective(self, alphas: Float[Array, "*batch n T"]) -> Float[Array, "..."]:
        count = self._count
        # Beside the candidates, the large model, the small one, and the experts.
        known = jnp.eye(count, dtype=self._dtype)
        known = jnp.concatenate([jnp.zeros((2, count), self._dtype), known])
        from_second = jnp.arange(alphas.shape[-2] + 2 + count) > alphas.shape[-2]
        weights = jnp.concatenate([alphas, self._per_row(known)], axis=-2)
        lse, mean = tilted_moments(self._members, self._per_row(from_second), weights)
        # A row without classes: all is 0.
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        n = alphas.shape[-2]
        toward, away = _divergences(
            alphas, lse[..., :n], mean[..., :n, :], lse[..., n], mean[..., n, :]
        )
        wanted = _divergences(
            self._per_row(known[2:]),
            lse[..., n + 2 :],
            mean[..., n + 2 :, :],
            lse[..., n + 1],
            mean[..., n + 1, :],
        )
        squared = lambda ours, theirs: jnp.square(
            ours[..., None] - theirs[..., None, :]
        ).sum(-1)
        return squared(toward, wanted[0]) + squared(away, wanted[1])


def _iota(shape: tuple[int, ...]) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _divergences(
    alphas: Float[Array, "*batch n T"],
    lse: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n T"],
    lse_at_0: Float[Array, "*batch"],
    mean_at_0: Float[Array, "*batch T"],
) -> tuple[Array, Array]:
    """KL of each tilted distribution from that at weight 0, and the reverse.

    With A the logsumexp as a function of the weights, whose gradient is the mean
    direction: <a, grad A(a)> - A(a) + A(0), and A(a) - A(0) - <a, grad A(0)>.
    """
    rise = lse - lse_at_0[..., None]
    toward = (alphas * mean).sum(-1) - rise
    away = rise - (alphas * mean_at_0[..., None, :]).sum(-1)
    # Below 0 by rounding only.
    return jnp.maximum(toward, 0), jnp.maximum(away, 0)


def _checked_bounds(function: str, bounds: tuple[float, float]) -> tuple[float, float]:
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    is_pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not (is_pair and all(map(number, bounds))):
        raise TypeError(
            f"{function}: `bounds` must be two Python numbers (they are static), got "
            f"{bounds!r}."
        )
    least, most = bounds
    if not (-math.inf < least <= most < math.inf):
        raise ValueError(
            f"{function}: `bounds` must be finite and in order, got {bounds}."
        )
    return float(least), float(most)


def _check_count(function: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{function}: `num_refinements` must be a Python int (it is static), got "
            f"{type(value).__name__}."
        )
    if value < 0:
        raise ValueError(
            f"{function}: `num_refinements` must be at least 0, got {value}."
        )
