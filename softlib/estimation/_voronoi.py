"""Distances of fitted experts from true ones, of which there may be fewer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, common_dtype

from ._gaussian_experts import SOFTMAX_GATE, ExpertGate, GaussianExperts


@array_arguments
def gauge_fixed_experts(
    experts: GaussianExperts,
    gate: ExpertGate = SOFTMAX_GATE,
    *,
    reference: int = -1,
) -> GaussianExperts:
    r"""The parameters of the same density that can be compared with others.

    Adding one number to every `gate_bias`, or one vector to every `gate_weight` of a
    gate without activation, does not change a gate; the reference expert gets 0 here.
    Without activation the temperature is divided out as well, and becomes 1.

    Args:
        experts: Parameters.
        gate: Static; the gate that they are of.
        reference: Static; the index of the expert.

    Returns:
        `GaussianExperts` with the same density, in the same dtypes.

    Raises:
        TypeError: `reference` is no int.
        ValueError: `reference` is no index of an expert.

    Derivatives: forward and reverse mode, any order.
    Cost: a few operations.
    Source: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts",
        which sets the last expert to 0.

    Example:
        >>> none, slopes = jnp.zeros(2), jnp.array([[3.0], [1.0]])
        >>> experts = softlib.estimation.GaussianExperts(
        ...     slopes, none, slopes, none, jnp.ones(2), jnp.float32(0.5)
        ... )
        >>> print(softlib.estimation.gauge_fixed_experts(experts).gate_weight)
        [[4.]
         [0.]]
    """
    function = "gauge_fixed_experts"
    count = experts.gate_bias.shape[0]
    if isinstance(reference, bool) or not isinstance(reference, int):
        raise TypeError(
            f"{function}: `reference` must be a Python int (it is static), "
            f"got {type(reference).__name__}."
        )
    if not -count <= reference < count:
        raise ValueError(
            f"{function}: `reference` must be an index of {count} experts, "
            f"got {reference}."
        )
    bias = experts.gate_bias - experts.gate_bias[reference]
    if gate.activation is not None:
        return experts._replace(gate_bias=bias)
    weight = experts.gate_weight - experts.gate_weight[reference][None]
    tau = jnp.asarray(experts.temperature, weight.dtype)
    if gate.bias_scaled_by_temperature:
        bias = bias / tau.astype(bias.dtype)
    return experts._replace(
        gate_weight=weight / tau, gate_bias=bias, temperature=jnp.ones_like(tau)
    )


def voronoi_cells(
    experts: GaussianExperts, true_experts: GaussianExperts
) -> Int[Array, " E"]:
    r"""Index of the true expert that each fitted expert belongs to.

    That is the nearest in $(\beta_1, a, b, \sigma)$ by the Euclidean distance; the
    first of equally near ones.

    Args:
        experts: Fitted parameters, E experts.
        true_experts: True parameters; usually fewer experts, in the same gauge (see
            `gauge_fixed_experts`).

    Returns:
        Indices, int32.

    Raises:
        TypeError: An array is not floating.
        ValueError: The numbers of features differ.

    Derivatives: none; the result is integer.
    Cost: O(E E* D).
    Source: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts".

    Example:
        >>> none, one, slopes = jnp.zeros(2), jnp.ones(2), jnp.array([[0.0], [1.0]])
        >>> true = softlib.estimation.GaussianExperts(slopes, none, slopes, none, one)
        >>> fitted = true._replace(mean_weight=jnp.array([[0.1], [0.2]]))
        >>> print(softlib.estimation.voronoi_cells(fitted, true))
        [0 1]
    """
    fitted, true = (
        _atoms("voronoi_cells", experts),
        _atoms("voronoi_cells", true_experts),
    )
    _require_equal_features("voronoi_cells", experts, true_experts)
    return _nearest(fitted, true)


@array_arguments
def voronoi_loss(
    experts: GaussianExperts,
    true_experts: GaussianExperts,
    *,
    top_k: int | None = None,
    over_specified: bool = False,
    orders: tuple[int, ...] = (4, 6),
) -> Float[Array, ""]:
    r"""Distance of parameters that is 0 exactly where the mixtures are the same.

    With the cells $C_j$ of `voronoi_cells` and the sum over the $K$ largest terms,
    which is the largest over sets of $K$ true experts,

    $$\sum_j \Big( \sum_{i \in C_j} e^{\beta_{0i}} \big(|\Delta \beta_1| + |\Delta a| +
      |\Delta b| + |\Delta \sigma|\big) + \Big| \sum_{i \in C_j} e^{\beta_{0i}} -
      e^{\beta_{0j}^*} \Big| \Big).$$

    With as many experts as there are, estimates have a loss of about $n^{-1/2}$. With
    more, several share a true one, and approach it slowly: `over_specified` takes
    $|\Delta \beta_1|^r + |\Delta a|^{r/2} + |\Delta b|^r + |\Delta \sigma|^{r/2}$ in
    cells of several, in which the loss is of that size again.

    Args:
        experts: Fitted parameters.
        true_experts: True parameters, in the same gauge (see `gauge_fixed_experts`).
        top_k: Static; $K$ of the gate, at most the number of true experts; None is all.
        over_specified: Static; see above.
        orders: Static; $r$ for cells of 2, 3, ... experts. The loss is NaN if a cell
            has more. Only 4 and 6 are known.

    Returns:
        The loss, float32 (float64 if an array is). $\sigma$ are standard deviations.

    Raises:
        TypeError: An array is not floating, or `top_k` is no int.
        ValueError: The numbers of features differ, or an option is out of range.

    Derivatives: forward and reverse mode for the cells as they are; 0 by what is equal
        to its true value.
    Cost: O(E E* D).
    Source: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts".

    Example:
        >>> none, one, slopes = jnp.zeros(2), jnp.ones(2), jnp.array([[0.0], [1.0]])
        >>> true = softlib.estimation.GaussianExperts(slopes, none, slopes, none, one)
        >>> fitted = true._replace(mean_bias=jnp.array([0.5, -0.25]))
        >>> loss = softlib.estimation.voronoi_loss
        >>> print(loss(fitted, true), loss(fitted, true, top_k=1))
        0.75 0.5
    """
    function = "voronoi_loss"
    fitted, true = _atoms(function, experts), _atoms(function, true_experts)
    _require_equal_features(function, experts, true_experts)
    count = true.shape[0]
    if top_k is not None:
        checks.require_positive_integer(function, "top_k", top_k)
        if top_k > count:
            raise ValueError(
                f"{function}: `top_k` must be at most the number of true experts, "
                f"{count}, got {top_k}."
            )
    if not orders or min(orders) < 1:
        raise ValueError(
            f"{function}: `orders` must hold positive numbers, got {orders}."
        )
    dtype = common_dtype(fitted.dtype, true.dtype)
    fitted, true = fitted.astype(dtype), true.astype(dtype)
    cells = _nearest(fitted, true)
    inside = jax.nn.one_hot(cells, count, dtype=dtype)
    apart = fitted - true[cells]
    features = experts.gate_weight.shape[1]
    distances = (
        _length(apart[:, :features]),
        _length(apart[:, features : 2 * features]),
        jnp.abs(apart[:, -2]),
        jnp.abs(apart[:, -1]),
    )
    if over_specified:
        sizes = inside.sum(0)[cells].astype(jnp.int32)
        known = jnp.array([1, *orders, jnp.nan], dtype)
        r = known[jnp.minimum(sizes - 1, len(orders) + 1)]
        half = jnp.where(sizes == 1, 1, r / 2)
        powers = (r, half, r, half)
        distances = [_power(d, p) for d, p in zip(distances, powers, strict=True)]
    weights = jnp.exp(experts.gate_bias.astype(dtype))
    true_weights = jnp.exp(true_experts.gate_bias.astype(dtype))
    share = lambda values: (inside * values[:, None]).sum(0)
    terms = share(weights * sum(distances)) + jnp.abs(share(weights) - true_weights)
    return jax.lax.top_k(terms, count if top_k is None else top_k)[0].sum()


def _atoms(function: str, experts: GaussianExperts) -> Array:
    """One row per expert, (E, 2 D + 2): gate slopes, slopes, intercept, scale."""
    fields = experts.gate_weight, experts.mean_weight, experts.mean_bias, experts.scale
    names = ("gate_weight", "mean_weight", "mean_bias", "scale")
    checks.require_floating(
        function, gate_bias=experts.gate_bias, **dict(zip(names, fields, strict=True))
    )
    dtype = accumulator_dtype(experts.gate_bias, *fields)
    count = experts.gate_bias.shape[0]
    columns = [each.astype(dtype).reshape(count, -1) for each in fields]
    return jnp.concatenate(columns, axis=1)


def _require_equal_features(
    function: str, experts: GaussianExperts, true_experts: GaussianExperts
) -> None:
    for name in ("gate_weight", "mean_weight"):
        array = getattr(experts, name)
        shape = (experts.gate_bias.shape[0], true_experts.gate_weight.shape[1])
        checks.require_shape(function, name, array, shape, "features of `true_experts`")


def _nearest(fitted: Array, true: Array) -> Array:
    squared = ((fitted[:, None] - true[None]) ** 2).sum(-1)
    return jnp.argmin(squared, axis=-1).astype(jnp.int32)


def _length(vectors: Array) -> Array:
    """Euclidean length, with derivative 0 at 0."""
    squared = (vectors * vectors).sum(-1)
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def _power(distance: Array, power: Array) -> Array:
    zero = distance == 0
    return jnp.where(zero, 0 * power, jnp.where(zero, 1, distance) ** power)
