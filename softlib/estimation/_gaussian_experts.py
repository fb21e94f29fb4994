"""Gaussian mixtures of linear experts: parameters, gates, density, one step of EM."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._threshold import first_of_largest
from softlib.softmax import log_softmax, logsumexp, softmax
from softlib.typing import Scalar

# The models are small, and bfloat16 products are too coarse for estimates.
matmul = functools.partial(jnp.matmul, precision="highest")


@dataclasses.dataclass(frozen=True)
class ExpertGate:
    r"""Options of the gate of a mixture of experts; static.

    With scores $s_i = \sigma(\beta_{1i} x)$ it is the softmax of
    $(s_i + \beta_{0i}) / \tau$ over the experts that are selected:

    - softmax: no options, and the temperature 1;
    - top-K, as in the statistical theory: `top_k=2`;
    - dense-to-sparse: no options, and another temperature;
    - dense-to-sparse with activation: `activation=jax.nn.sigmoid`.

    Without an `activation` the density is the same for $(c \beta_1, c \beta_0, c \tau)$
    with any $c > 0$, so that a temperature cannot be learned from data.

    Args:
        top_k: Select the experts with so many largest scores, of equal ones those with
            the lower index; None selects all.
        bias_in: What the bias takes part in, "weights", "selection" or "both", as in
            `softlib.softmax.top_k_softmax`. Without `top_k` all are selected.
        activation: $\sigma$, element by element; None is the identity. It must be
            curved over the scores that occur, or it changes nothing.
        bias_scaled_by_temperature: Without it $s_i / \tau + \beta_{0i}$.

    Raises:
        TypeError: `top_k` is no int.  ValueError: `top_k` is below 1, or `bias_in`
            unknown.

    Example:
        >>> softlib.estimation.ExpertGate(top_k=2).top_k
        2
    """

    top_k: int | None = None
    bias_in: Literal["weights", "selection", "both"] = "weights"
    activation: Callable[[Array], Array] | None = None
    bias_scaled_by_temperature: bool = True

    def __post_init__(self):
        if self.top_k is not None:
            checks.require_positive_integer("ExpertGate", "top_k", self.top_k)
        choices = ("weights", "selection", "both")
        checks.require_one_of("ExpertGate", "bias_in", self.bias_in, choices)


SOFTMAX_GATE = ExpertGate()


class GaussianExperts(NamedTuple):
    r"""Parameters of $p(y \mid x) = \sum_i g_i(x)\, N(y \mid a_i x + b_i, \sigma_i^2)$.

    E experts for D features. What the gate $g$ makes of its three is said by an
    `ExpertGate`.

    The methods give float32 (float64 if an argument is), NaN where an argument holds
    NaN, and everywhere if a scale or the temperature is not positive. Their `gate` is
    static.

    Attributes:
        gate_weight: $\beta_{1i}$, of the scores of the gate.
        gate_bias: $\beta_{0i}$, beside the scores.
        mean_weight: $a_i$, slopes of the means.
        mean_bias: $b_i$, where the means start.
        scale: $\sigma_i > 0$, standard deviations.
        temperature: $\tau > 0$ of the gate, a scalar.

    Derivatives: forward and reverse mode, any order that the activation has. With
        `top_k` they are those of the selection as it is; the density jumps where it
        changes.
    Cost: two products with weights; O(batch E) memory.
    Source: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?"
        and "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts".

    Example:
        >>> slopes, one, none = jnp.zeros((2, 1)), jnp.ones(2), jnp.zeros(2)
        >>> parameters = slopes, none, slopes, jnp.array([0.0, 50.0]), one
        >>> experts = softlib.estimation.GaussianExperts(*parameters)
        >>> x, y = jnp.ones((2, 1)), jnp.array([25.0, 50.0])
        >>> print(experts.log_prob(x, y).round(4))
        [-313.419    -1.6121]
        >>> print(experts.responsibilities(x, y))
        [[0.5 0.5]
         [0.  1. ]]
    """

    gate_weight: Float[Array, "*batch E D"]
    gate_bias: Float[Array, "*batch E"]
    mean_weight: Float[Array, "*batch E D"]
    mean_bias: Float[Array, "*batch E"]
    scale: Float[Array, "*batch E"]
    temperature: Float[Array, "*batch"] | float = 1.0

    @array_arguments
    def log_gate(
        self, x: Float[Array, "*batch D"], gate: ExpertGate = SOFTMAX_GATE
    ) -> Float[Array, "*batch E"]:
        r"""Computes $\log g_i(x)$; -inf for an expert that is not selected.

        Differences of scores divided by the temperature must be finite.

        Args:
            x: Features.
            gate: Which gate the mixture has.
        """
        x, experts = checked("GaussianExperts.log_gate", x, self)
        rows = log_gate(x.reshape(-1, x.shape[-1]), experts, gate)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    @array_arguments
    def log_prob(
        self,
        x: Float[Array, "*batch D"],
        y: Float[Array, "*batch"],
        gate: ExpertGate = SOFTMAX_GATE,
    ) -> Float[Array, "*batch"]:
        r"""Computes the logarithm of $p(y \mid x)$ in nats per example.

        $$\log \sum_i
          \exp\big(\log g_i(x) + \log N(y \mid a_i x + b_i, \sigma_i^2)\big)$$

        The sum is taken of logarithms, so that a value far from all experts has a
        finite log-density with a gradient. Its mean over a sample is what
        `fit_gaussian_experts` maximises.

        Args:
            x: Features.
            y: Values.
            gate: Which gate the mixture has.
        """
        function = "GaussianExperts.log_prob"
        rows, y, experts = _checked_rows(function, x, y, self)
        joint = log_joint(rows, y, experts, gate)
        return logsumexp(joint).reshape(x.shape[:-1])

    @array_arguments
    def responsibilities(
        self,
        x: Float[Array, "*batch D"],
        y: Float[Array, "*batch"],
        gate: ExpertGate = SOFTMAX_GATE,
    ) -> Float[Array, "*batch E"]:
        r"""Computes the probability that each expert produced the value: the E-step.

        $r_i = g_i(x)\, N(y \mid a_i x + b_i, \sigma_i^2) / p(y \mid x)$; 0 for an
        expert that is not selected.

        Args:
            x: Features.
            y: Values.
            gate: Which gate the mixture has.
        """
        function = "GaussianExperts.responsibilities"
        rows, y, experts = _checked_rows(function, x, y, self)
        shares = softmax(log_joint(rows, y, experts, gate))
        return shares.reshape(*x.shape[:-1], shares.shape[-1])

    @array_arguments
    def m_step(
        self,
        x: Float[Array, "n D"],
        y: Float[Array, " n"],
        responsibilities: Float[Array, "n E"],
        *,
        ridge: Scalar | None = None,
        min_scale: Scalar = 0.0,
        where: Bool[Array, " n"] | None = None,
    ) -> "GaussianExperts":
        r"""Fits experts to what they are responsible for: weighted least squares.

        $a_i, b_i$ minimise $\sum_n r_{ni} (y_n - a_i x_n - b_i)^2$ and $\sigma_i^2$ is
        the weighted mean of what is left. The gate has no closed form and stays. Among
        directions that the data of an expert do not determine, its slopes move as
        little as possible: the quadratic form has $\rho |a_i - a_i^{old}|^2$ added, so
        that the expected log-likelihood can only rise, whatever $\rho$. An expert with
        responsibilities of 0 keeps its parameters. O(n E D^2 + E D^3) time, O(n E)
        memory.

        Args:
            x: Features of n examples.
            y: Values.
            responsibilities: $r$, not negative.
            ridge: $\rho$ relative to the mean variance of the features, at least 0.
                None is ten roundings.
            min_scale: Least $\sigma$, at least 0. Without one, an expert that fits some
                examples exactly has $\sigma = 0$.
            where: True for the examples that count; others may hold anything.
        """
        function = "GaussianExperts.m_step"
        checks.require_rank(function, "x", x, 2, "(n, D)")
        _require_one_batch_axis(function, x)
        rows, y, experts = _checked_rows(function, x, y, self, responsibilities)
        checks.require_floating(function, responsibilities=responsibilities)
        shape = (rows.shape[0], experts.scale.shape[0])
        checks.require_shape(
            function, "responsibilities", responsibilities, shape, "(n, E)"
        )
        if ridge is not None:
            checks.require_scalar(function, "ridge", ridge, 0, math.inf)
        checks.require_scalar(function, "min_scale", min_scale, 0, math.inf)
        shares = responsibilities.astype(rows.dtype)
        rows, y, shares = counting(function, where, rows, y, shares)
        return m_step(rows, y, shares, experts, ridge, min_scale)

    @array_arguments
    def hellinger_distance(
        self,
        other: "GaussianExperts",
        x: Float[Array, "*batch D"],
        points: Float[Array, " G"],
        gate: ExpertGate = SOFTMAX_GATE,
        *,
        other_gate: ExpertGate | None = None,
    ) -> Float[Array, "*batch"]:
        r"""Computes the Hellinger distance to another mixture at each `x`, in $[0, 1]$.

        $$\Big(\tfrac12 \int \big(\sqrt{p(y \mid x)} - \sqrt{q(y \mid x)}\big)^2
          dy\Big)^{1/2}$$

        by the trapezoid rule. Its mean over features drawn from their distribution is
        what the estimates of densities converge in, at the rate $n^{-1/2}$ up to a
        logarithm, even where the parameters converge slowly or not at all. The
        difference is taken before the square: equal densities have the distance 0, and
        derivatives of 0. O(batch G E) time and memory.

        Args:
            other: Parameters of $q$; the number of experts may differ.
            x: Features.
            points: Values of $y$, rising. They must cover both densities, with several
                points per scale; the rule then converges faster than any power.
            gate: Which gate the mixture has.
            other_gate: That of `other`, None for the same.
        """
        function = "GaussianExperts.hellinger_distance"
        _, first = checked(function, x, self)
        _, second = checked(function, x, other)
        checks.require_floating(function, points=points)
        checks.require_shape(function, "points", points, (points.size,), "one axis")
        arrays = [jnp.asarray(each) for each in (*first, *second)]
        dtype = accumulator_dtype(x, points, *arrays)
        first, second = (
            jax.tree.map(lambda a: a.astype(dtype), e) for e in (first, second)
        )
        rows = x.astype(dtype).reshape(-1, x.shape[-1])
        places = points.astype(dtype)

        def root(experts: GaussianExperts, gate: ExpertGate) -> Array:
            joint = log_gate(rows, experts, gate)[:, None] + _log_normal(
                places[None, :, None], _means(rows, experts)[:, None], experts.scale
            )
            return jnp.exp(logsumexp(joint) / 2)

        apart = root(first, gate) - root(
            second, gate if other_gate is None else other_gate
        )
        squared = jnp.trapezoid(apart * apart, places[None], axis=-1) / 2
        zero = squared <= 0  # NaN is not
        distance = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))
        return distance.reshape(x.shape[:-1])


# ------------------------------------------------------------- shared with other files
def checked(
    function: str, x: Array, experts: GaussianExperts, *others: Array
) -> tuple[Array, GaussianExperts]:
    """Features and parameters in one dtype, NaN for scales that are not positive."""
    checks.require_rank(function, "x", x, 1, "(*batch, D)")
    arrays = {k: v for k, v in experts._asdict().items() if not isinstance(v, float)}
    checks.require_floating(function, x=x, **arrays)
    checks.require_rank(function, "gate_bias", experts.gate_bias, 1, "(E,)")
    count, features = experts.gate_bias.shape[-1], x.shape[-1]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(arrays, (count,))
    shapes |= {
        "gate_weight": (count, features),
        "mean_weight": (count, features),
        "temperature": (),
    }
    for name, array in arrays.items():
        why = "E experts, D features"
        checks.require_shape(function, name, array, shapes[name], why)
    # A Python number passed through jit is weakly typed and decides no dtype either.
    strong = [v for v in arrays.values() if not getattr(v, "weak_type", False)]
    dtype = accumulator_dtype(x, *strong, *others)
    experts = GaussianExperts(*(jnp.asarray(each, dtype) for each in experts))
    positive = lambda value: jnp.where(value > 0, value, jnp.nan)
    experts = experts._replace(
        scale=positive(experts.scale), temperature=positive(experts.temperature)
    )
    return x.astype(dtype), experts


def counting(
    function: str, where: Array | None, x: Array, y: Array, *weights: Array
) -> tuple[Array, ...]:
    """The arrays, 0 for examples that do not count."""
    if where is None:
        return x, y, *weights
    checks.require_boolean(function, where=where)
    checks.require_shape(function, "where", where, y.shape, "one per example")
    rows = lambda array: jnp.where(where[:, None], array, 0)
    return rows(x), jnp.where(where, y, 0), *map(rows, weights)


def log_gate(x: Array, experts: GaussianExperts, gate: ExpertGate) -> Array:
    """Logarithms of the gate, (n, E), of checked arguments."""
    tau = experts.temperature
    scores = matmul(x, experts.gate_weight.T)
    if gate.activation is not None:
        scores = gate.activation(scores)
    scaled = gate.bias_scaled_by_temperature
    bias = experts.gate_bias if scaled else tau * experts.gate_bias
    biased = scores + bias[None]
    kept = None
    if gate.top_k is not None:
        selection = scores if gate.bias_in == "weights" else biased
        selection = jnp.where(jnp.isnan(selection), 0, selection)
        kept = first_of_largest(selection, gate.top_k)
    weights = scores if gate.bias_in == "selection" else biased
    # Subtracts before dividing: at a low temperature the quotients are large.
    top = lax.stop_gradient(weights.max(-1, keepdims=True))
    return log_softmax((weights - top) / tau, where=kept)


def log_joint(x: Array, y: Array, experts: GaussianExperts, gate: ExpertGate) -> Array:
    """Log of gate times normal density, (n, E)."""
    normal = _log_normal(y[:, None], _means(x, experts), experts.scale)
    return log_gate(x, experts, gate) + normal


def m_step(
    x: Array,
    y: Array,
    shares: Array,
    experts: GaussianExperts,
    ridge: Scalar | None,
    min_scale: Scalar,
) -> GaussianExperts:
    """The M-step of checked arguments; `shares` is 0 for examples that do not count."""
    dtype, features = x.dtype, x.shape[-1]
    mass = shares.sum(0)
    empty = mass <= jnp.finfo(dtype).eps
    weights = shares / jnp.where(empty, 1, mass)[None]
    # Fits the change of the slopes: residuals keep more digits.
    left = y[:, None] - matmul(x, experts.mean_weight.T)
    centre, level = matmul(weights.T, x), (weights * left).sum(0)
    apart = x[None] - centre[:, None]
    weighted = weights.T[:, :, None] * apart
    covariance = matmul(jnp.swapaxes(weighted, 1, 2), apart)
    along = jnp.einsum("end,ne->ed", weighted, left - level[None], precision="highest")
    variances, axes = jnp.linalg.eigh(covariance)
    rho = 10 * jnp.finfo(dtype).eps if ridge is None else jnp.asarray(ridge, dtype)
    floor = rho * variances.sum(-1, keepdims=True) / max(features, 1)
    variances = jnp.maximum(variances, 0) + floor + jnp.finfo(dtype).tiny
    rotated = jnp.einsum("edk,ed->ek", axes, along, precision="highest") / variances
    change = jnp.einsum("edk,ek->ed", axes, rotated, precision="highest")
    slopes = experts.mean_weight + change
    intercepts = level - (change * centre).sum(-1)
    rest = left - matmul(x, change.T) - intercepts[None]
    scale = jnp.sqrt((weights * rest * rest).sum(0))
    scale = jnp.maximum(scale, jnp.asarray(min_scale, dtype))
    keep = lambda old, new: jnp.where(
        empty.reshape(-1, *[1] * (old.ndim - 1)), old, new
    )
    return experts._replace(
        mean_weight=keep(experts.mean_weight, slopes),
        mean_bias=keep(experts.mean_bias, intercepts),
        scale=keep(experts.scale, scale),
    )


# ------------------------------------------------------------------------------ private
def _checked_rows(
    function: str, x: Array, y: Array, experts: GaussianExperts, *others: Array
) -> tuple[Array, Array, GaussianExperts]:
    """Features as (n, D), values as (n,), parameters; in one dtype."""
    wide, experts = checked(function, x, experts, y, *others)
    checks.require_floating(function, y=y)
    checks.require_shape(function, "y", y, x.shape[:-1], "one per row of `x`")
    return wide.reshape(-1, x.shape[-1]), y.astype(wide.dtype).reshape(-1), experts


def _require_one_batch_axis(function: str, x: Array) -> None:
    checks.require_shape(function, "x", x, x.shape[-2:], "(n, D); vmap for more")


def _means(x: Array, experts: GaussianExperts) -> Array:
    return matmul(x, experts.mean_weight.T) + experts.mean_bias[None]


def _log_normal(y: Array, mean: Array, scale: Array) -> Array:
    scale = scale.reshape((1,) * (mean.ndim - 1) + scale.shape)
    z = (y - mean) / scale
    return -z * z / 2 - jnp.log(scale) - math.log(2 * math.pi) / 2
