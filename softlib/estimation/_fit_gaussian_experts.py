"""Maximum likelihood for Gaussian mixtures of experts, by EM or Newton's method."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.softmax import logsumexp, softmax
from softlib.typing import Scalar

from ._gaussian_experts import (
    SOFTMAX_GATE,
    ExpertGate,
    GaussianExperts,
    checked,
    counting,
    log_gate,
    log_joint,
    m_step,
)


class GaussianExpertsFit(NamedTuple):
    """The result of `fit_gaussian_experts`; of several starts the best.

    Attributes:
        experts: The parameters, float32 or wider.
        log_likelihood: Mean log-density of the sample, in nats.
        gradient_norm: Largest slope of `log_likelihood` by a parameter (scales and
            temperature by their logarithm), without those that the least scale holds.
        num_steps: Steps that were tried, int32.
        converged: Whether `gradient_norm` is within the tolerance.
        history: `log_likelihood` before each iteration, the last value repeated.
        starts: `log_likelihood` that each start reached; one value for a single start.
    """

    experts: GaussianExperts
    log_likelihood: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]
    history: Float[Array, "*batch steps"]
    starts: Float[Array, "*batch R"]


@array_arguments
def draw_gaussian_experts(
    key: Array,
    x: Float[Array, "n D"],
    y: Float[Array, " n"],
    num_experts: int,
    *,
    num_starts: int | None = None,
    temperature: Scalar = 1.0,
    where: Bool[Array, " n"] | None = None,
) -> GaussianExperts:
    r"""Random parameters to start a fit from, in the units of the data.

    Each expert gets the line through the examples that are nearest to one of
    `num_experts` random examples, with a small share of all others; the gate gets
    random slopes through the mean of the features.

    Args:
        key: Of `jax.random`.
        x: Features of n examples.
        y: Values.
        num_experts: Static; E, at most n.
        num_starts: Static; R, for a leading axis of different starts. None: one start
            without that axis.
        temperature: Of the gate, positive; a number is static, an array traced.
        where: True for the examples that count; others may hold anything.

    Returns:
        `GaussianExperts`, float32 (float64 if an array is), each field with a leading
        axis R if `num_starts` is given.

    Raises:
        TypeError: An array is not floating, `where` is not boolean, or a count is no
            int.
        ValueError: Shapes do not fit together, or a number is out of range.

    Derivatives: not useful; the draws are steps.
    Cost: O(R n E D).
    Source: softlib's own.

    Example:
        >>> x, y = jnp.arange(8.0)[:, None], jnp.arange(8.0)
        >>> draw = softlib.estimation.draw_gaussian_experts
        >>> starts = draw(jax.random.key(0), x, y, 2, num_starts=5)
        >>> print(starts.mean_weight.shape)
        (5, 2, 1)
    """
    function = "draw_gaussian_experts"
    checks.require_positive_integer(function, "num_experts", num_experts)
    if num_starts is not None:
        checks.require_positive_integer(function, "num_starts", num_starts)
    if isinstance(temperature, int | float):
        checks.require_positive_number(function, "temperature", temperature)
    data = _Data.of(function, x, y, where)
    if num_experts > data.y.size:
        raise ValueError(
            f"{function}: `num_experts` must be at most the number of examples, "
            f"{data.y.size}, got {num_experts}."
        )
    draw = functools.partial(_draw, data, num_experts, temperature)
    if num_starts is None:
        return draw(key)
    return jax.vmap(draw)(jax.random.split(key, num_starts))


@array_arguments
def fit_gaussian_experts(
    x: Float[Array, "n D"],
    y: Float[Array, " n"],
    initial: GaussianExperts,
    gate: ExpertGate = SOFTMAX_GATE,
    *,
    method: Literal["em", "newton"] = "em",
    learn_temperature: bool = False,
    min_scale: Scalar | None = None,
    max_steps: int = 500,
    tolerance: float | None = None,
    where: Bool[Array, " n"] | None = None,
) -> GaussianExpertsFit:
    r"""Parameters that maximise the mean of `GaussianExperts.log_prob`.

    - `method="em"`: responsibilities, then `GaussianExperts.m_step` for the experts
      and one damped Fisher step for the gate, kept if it raises its part of the
      expected log-likelihood. The likelihood never falls. Convergence is linear, slow
      where experts overlap.
    - `method="newton"`: damped Newton steps on all parameters, with the absolute values
      of the eigenvalues of the Hessian, kept if the likelihood rises. Convergence is
      quadratic near an optimum.

    Both stop at a stationary point, which need not be the best: give several starts.
    The likelihood has no maximum without a least scale, because one expert may fit one
    example exactly.

    With `top_k`, EM lets no example leave an expert that is responsible for it, so that
    hardly a selection ever changes; Newton changes one where that raises the likelihood
    at once. Starts matter more there.

    Args:
        x: Features of n examples.
        y: Values.
        initial: Where to start, as from `draw_gaussian_experts`. If its fields have a
            leading axis of R starts, all are fitted at once and the best is returned.
        gate, method: Static.
        learn_temperature: Static; whether $\tau$ is estimated too. Without an
            activation it cannot be: it is one of many that are equally likely.
        min_scale: Least $\sigma$, positive; None is a thousandth of the standard
            deviation of `y`.
        max_steps: Static; per start.
        tolerance: Static; on `gradient_norm`. None is $\varepsilon^{1/2}$: 3e-4 in
            float32, 1.5e-8 in float64.
        where: True for the examples that count; others may hold anything.

    Returns:
        `GaussianExpertsFit`. Starts with a NaN likelihood are never the best; the fit
        of data with a NaN is NaN.

    Raises:
        TypeError: An array is not floating, `where` is not boolean, or an option has
            the wrong type.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward mode, through the iterations. Reverse mode raises JAX's error
        on `while_loop`.
    Cost: with P parameters O(n E P) memory and O(n E P^2 + P^3) time per iteration and
        start ("em": P of the gate). Starts run until the slowest is done, as problems
        under `jax.vmap` do.
    Source: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
        whose rates are of the maximum-likelihood estimate.

    Example:
        >>> x = jnp.linspace(-1.0, 1.0, 64)[:, None]
        >>> y = jnp.abs(x[:, 0])  # two lines
        >>> draw = softlib.estimation.draw_gaussian_experts
        >>> starts = draw(jax.random.key(0), x, y, 2, num_starts=4)
        >>> fit = softlib.estimation.fit_gaussian_experts(x, y, starts, min_scale=0.1)
        >>> print(jnp.sort(fit.experts.mean_weight[:, 0]).round(1))
        [-1.  1.]
    """
    function = "fit_gaussian_experts"
    checks.require_one_of(function, "method", method, ("em", "newton"))
    checks.require_positive_integer(function, "max_steps", max_steps)
    if tolerance is not None:
        checks.require_positive_number(function, "tolerance", tolerance)
    if isinstance(min_scale, int | float):
        checks.require_positive_number(function, "min_scale", min_scale)
    checks.require_rank(function, "initial.gate_bias", initial.gate_bias, 1, "(E,)")
    fields = dict(zip(initial._fields, initial[:5], strict=False))
    checks.require_floating(function, **fields)
    data = _Data.of(function, x, y, where, *fields.values())
    tau = jnp.broadcast_to(initial.temperature, initial.gate_bias.shape[:-1])
    initial = initial._replace(temperature=tau)
    initial = jax.tree.map(lambda field: field.astype(data.x.dtype), initial)
    if initial.gate_bias.ndim == 1:
        initial = jax.tree.map(lambda field: field[None], initial)
    if min_scale is None:
        least = 1e-3 * data.deviation_of_y()
    else:
        least = jnp.asarray(min_scale, data.x.dtype)
    bound = (
        float(jnp.finfo(data.x.dtype).eps) ** 0.5 if tolerance is None else tolerance
    )
    step = _em_step if method == "em" else _newton_step
    chosen = gate, learn_temperature, step, max_steps, bound
    fits, ends = _climb_from_each(chosen, data, least, initial)
    reached = ends.value
    best = jnp.argmax(jnp.where(jnp.isnan(reached), -jnp.inf, reached))
    experts, end = jax.tree.map(lambda field: field[best], (fits, ends))
    return GaussianExpertsFit(
        jax.tree.map(
            lambda field: jnp.where(jnp.isnan(end.value), jnp.nan, field), experts
        ),
        end.value,
        end.norm,
        end.iteration,
        end.norm <= bound,
        end.history,
        reached,
    )


# --------------------------------------------------------------------------------- data
class _Data(NamedTuple):
    """The sample in the dtype of the sums, 0 where an example does not count."""

    x: Array
    y: Array
    counts: Array

    @classmethod
    def of(
        cls, function: str, x: Array, y: Array, where: Array | None, *others: Array
    ) -> "_Data":
        checks.require_floating(function, x=x, y=y)
        checks.require_rank(function, "x", x, 2, "(n, D)")
        checks.require_shape(function, "x", x, x.shape[-2:], "(n, D); vmap for more")
        checks.require_shape(function, "y", y, x.shape[:1], "one per row of `x`")
        dtype = accumulator_dtype(x, y, *others)
        x, y = counting(function, where, x.astype(dtype), y.astype(dtype))
        counts = jnp.ones(y.shape, dtype) if where is None else where.astype(dtype)
        return cls(x, y, counts)

    def mean(self, values: Array) -> Array:
        """The mean over the leading axis, of the examples that count."""
        weights = self.counts / jnp.maximum(self.counts.sum(), 1)
        weights = weights.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(weights > 0, weights * values, 0).sum(0)

    def deviation_of_y(self) -> Array:
        return _deviation(self, self.y)


def _deviation(data: _Data, values: Array) -> Array:
    """The standard deviation, 1 where it is 0, so that one can divide by it."""
    variance = data.mean((values - data.mean(values)[None]) ** 2)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)


def _draw(data: _Data, count: int, temperature: Scalar, key: Array) -> GaussianExperts:
    dtype, (examples, features) = data.x.dtype, data.x.shape
    unit = _deviation(data, data.x)
    both = jnp.concatenate(
        [data.x / unit[None], (data.y / data.deviation_of_y())[:, None]], axis=1
    )
    centre_key, gate_key = jax.random.split(key)
    # Draws without replacement, examples that count first.
    order = jax.random.uniform(centre_key, (examples,)) + 2 * data.counts
    centres = both[lax.top_k(order, count)[1]]
    squared = ((both[:, None] - centres[None]) ** 2).sum(-1)
    nearest = jax.nn.one_hot(jnp.argmin(squared, axis=-1), count, dtype=dtype)
    shares = (0.9 * nearest + 0.1 / count) * data.counts[:, None]
    slopes = jax.random.normal(gate_key, (count, features), dtype) / unit[None]
    start = GaussianExperts(
        slopes,
        -(slopes * data.mean(data.x)[None]).sum(-1),
        jnp.zeros((count, features), dtype),
        jnp.zeros(count, dtype),
        jnp.ones(count, dtype),
        jnp.asarray(temperature, dtype),
    )
    least = 1e-2 * data.deviation_of_y()
    return m_step(data.x, data.y, shares, start, None, least)


# ------------------------------------------------------------------------- optimisation
class _Model(NamedTuple):
    """The data and options of an optimisation step, without its state."""

    data: _Data
    gate: ExpertGate
    learn_temperature: bool
    min_scale: Array

    def free(self, experts: GaussianExperts) -> tuple[Array, ...]:
        """Parameters on scales without bounds (logarithms), those of the gate first."""
        inner = experts.gate_weight, experts.gate_bias
        if self.learn_temperature:
            inner = *inner, jnp.log(experts.temperature)
        return *inner, experts.mean_weight, experts.mean_bias, jnp.log(experts.scale)

    def experts(
        self, free: tuple[Array, ...], like: GaussianExperts
    ) -> GaussianExperts:
        *inner, slopes, intercepts, log_scale = free
        return GaussianExperts(
            inner[0],
            inner[1],
            slopes,
            intercepts,
            # Exactly the least scale where that is the bound.
            jnp.maximum(jnp.exp(log_scale), self.min_scale),
            jnp.exp(inner[2]) if self.learn_temperature else like.temperature,
        )

    def value(self, free: tuple[Array, ...], like: GaussianExperts) -> Array:
        """Mean log-likelihood, without the bound on scales."""
        log_scale = free[-1]
        experts = self.experts(free, like)._replace(scale=jnp.exp(log_scale))
        joint = log_joint(self.data.x, self.data.y, experts, self.gate)
        return self.data.mean(logsumexp(joint))

    def held(self, free: tuple[Array, ...], slope: tuple[Array, ...]) -> Array:
        """True for scales at the lower bound whose slope points below it."""
        eps = jnp.finfo(self.min_scale.dtype).eps
        at_bound = free[-1] <= jnp.log(self.min_scale) + 4 * eps
        return at_bound & (slope[-1] < 0)


class _Search(NamedTuple):
    """The state of the optimisation."""

    free: Any
    value: Array
    slope: Any
    norm: Array
    damping: Array
    iteration: Array
    history: Array


type _Step = Callable[[_Model, GaussianExperts, _Search], tuple[Any, Array | None]]


@compiled_once(0)
def _climb_from_each(
    chosen: tuple[ExpertGate, bool, _Step, int, float],
    data: _Data,
    least: Array,
    starts: GaussianExperts,
) -> tuple[GaussianExperts, _Search]:
    gate, learn_temperature, step, count, bound = chosen
    model = _Model(data, gate, learn_temperature, least)

    def fit(start: GaussianExperts) -> tuple[GaussianExperts, _Search]:
        _, start = checked("fit_gaussian_experts", data.x, start)
        start = start._replace(scale=jnp.maximum(start.scale, least))
        return _climb(model, start, step, count, bound)

    return jax.vmap(fit)(starts)


def _climb(
    model: _Model, start: GaussianExperts, step: _Step, count: int, bound: float
) -> tuple[GaussianExperts, _Search]:
    dtype = start.scale.dtype
    eps = float(jnp.finfo(dtype).eps)

    def measure(free: Any) -> tuple[Array, Any, Array]:
        value, slope = jax.value_and_grad(model.value)(free, start)
        held = model.held(free, slope)
        moving = *slope[:-1], jnp.where(held, 0, slope[-1])
        largest = [jnp.abs(each).max(initial=0) for each in moving]
        return value, slope, functools.reduce(jnp.maximum, largest)

    def running(state: _Search) -> Array:
        usable = (state.norm > bound) & jnp.isfinite(state.value)
        return usable & (state.damping < 1 / eps) & (state.iteration < count)

    def advance(state: _Search) -> _Search:
        free, damping = step(model, start, state)
        value, slope, norm = measure(free)
        if damping is None:
            # Where likelihoods differ by rounding only, the slope decides.
            level = value >= state.value - 4 * eps * jnp.maximum(
                1, jnp.abs(state.value)
            )
            better = (value > state.value) | (level & (norm < state.norm))
            damping = _damped(better, state.damping)
        else:
            better = jnp.ones((), bool)
        keep = lambda new, old: jnp.where(better, new, old)
        value = keep(value, state.value)
        # Fills all later entries, so that the last value repeats.
        later = jnp.arange(count + 1) > state.iteration
        return _Search(
            jax.tree.map(keep, free, state.free),
            value,
            jax.tree.map(keep, slope, state.slope),
            keep(norm, state.norm),
            damping,
            state.iteration + 1,
            jnp.where(later, value, state.history),
        )

    free = model.free(start)
    value, slope, norm = measure(free)
    begin = _Search(
        free,
        value,
        slope,
        norm,
        jnp.ones((), dtype),
        jnp.zeros((), jnp.int32),
        jnp.full(count + 1, value),
    )
    end = lax.while_loop(running, advance, begin)
    return model.experts(end.free, start), end


def _damped(better: Array, damping: Array) -> Array:
    eps = jnp.finfo(damping.dtype).eps
    return jnp.maximum(jnp.where(better, damping / 10, damping * 4), eps)


def _newton_step(
    model: _Model, start: GaussianExperts, state: _Search
) -> tuple[Any, None]:
    """A Newton step with the absolute values of the Hessian's eigenvalues: uphill."""
    flat, restore = ravel_pytree(state.free)
    slope, _ = ravel_pytree(state.slope)
    hessian = jax.hessian(lambda flat: model.value(restore(flat), start))(flat)
    held = model.held(state.free, state.slope)
    still = jnp.zeros(flat.shape, bool).at[flat.size - held.size :].set(held)
    slope = jnp.where(still, 0, slope)
    hessian = jnp.where(still[:, None] | still[None], 0, hessian)
    *rest, log_scale = restore(flat + _damped_solution(hessian, slope, state.damping))
    return (*rest, jnp.maximum(log_scale, jnp.log(model.min_scale))), None


def _em_step(
    model: _Model, start: GaussianExperts, state: _Search
) -> tuple[Any, Array]:
    """Experts in closed form; a damped Fisher step of the gate, if it is better."""
    data = model.data
    experts = model.experts(state.free, start)
    shares = softmax(log_joint(data.x, data.y, experts, model.gate))
    weighted = shares * data.counts[:, None]
    new = m_step(data.x, data.y, weighted, experts, None, model.min_scale)

    inner = state.free[:-3]
    flat, restore = ravel_pytree(inner)

    def log_gates(flat: Array) -> Array:
        moved = model.experts((*restore(flat), *state.free[-3:]), start)
        return log_gate(data.x, moved, model.gate)

    def expected(log: Array) -> Array:
        # An expert that is not selected and not responsible: 0 * -inf is 0.
        return data.mean(jnp.where(shares > 0, shares * log, 0).sum(-1))

    old = log_gates(flat)
    slopes = jax.jacfwd(log_gates)(flat)
    uphill = data.mean((shares[..., None] * slopes).sum(1))
    root = jnp.sqrt(
        data.counts[:, None] * jnp.exp(old) / jnp.maximum(data.counts.sum(), 1)
    )
    rows = (root[..., None] * slopes).reshape(-1, flat.size)
    fisher = jnp.matmul(rows.T, rows, precision="highest")
    moved = flat + _damped_solution(fisher, uphill, state.damping)
    before, after = expected(old), expected(log_gates(moved))
    eps = jnp.finfo(flat.dtype).eps
    better = after >= before - 4 * eps * jnp.abs(before)
    inner = restore(jnp.where(better, moved, flat))
    damping = jnp.minimum(_damped(better, state.damping), 1 / jnp.sqrt(eps))
    return (*inner, *model.free(new)[-3:]), damping


def _damped_solution(curvature: Array, slope: Array, damping: Array) -> Array:
    """(|H| + damping diag H)^-1 slope, with H scaled to a diagonal of 1."""
    size = jnp.abs(jnp.diagonal(curvature))
    tiny = jnp.finfo(slope.dtype).tiny
    least = jnp.finfo(slope.dtype).eps * size.max(initial=0) + tiny
    unit = 1 / jnp.sqrt(jnp.maximum(size, least))
    values, vectors = jnp.linalg.eigh(curvature * unit[:, None] * unit[None])
    along = jnp.matmul(vectors.T, unit * slope, precision="highest")
    along = along / (jnp.abs(values) + damping)
    return unit * jnp.matmul(vectors, along, precision="highest")
