r"""Multi-class logistic regression, fitted by Newton's method.

The weights of all classes may be shifted by one vector, which softmax does not see.
They are therefore written in an orthonormal basis of the differences between classes,
whose coefficients are determined, and whose norm is that of the weights.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib.softmax import log_softmax
from softlib.typing import Scalar

from ._gauss_newton import damped_gauss_newton

_matmul = functools.partial(jnp.matmul, precision="highest")


class LogisticRegressionFit(NamedTuple):
    r"""The result of `fit_logistic_regression`.

    Attributes:
        weight: One row per class, float32 or wider; the rows sum to 0. Scores are
            `x @ weight.T + bias`, as of `softlib.LinearLogits(x, weight, bias=bias)`.
        bias: One number per class; they sum to 0.
        loss: Mean cross-entropy in nats, with the penalty.
        gradient_norm: Of the loss, by the coefficients of standardised features.
        num_steps: Steps that were tried, int32.
        converged: Whether `gradient_norm` is within the tolerance.
    """

    weight: Float[Array, "*batch K D"]
    bias: Float[Array, "*batch K"]
    loss: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


@array_arguments
def fit_logistic_regression(
    x: Float[Array, "n D"],
    labels: Integer[Array, " n"],
    *,
    num_classes: int,
    l2: Scalar = 0.0,
    max_steps: int = 100,
    tolerance: float | None = None,
    where: Bool[Array, " n"] | None = None,
) -> LogisticRegressionFit:
    r"""Linear head that minimises the mean cross-entropy, by Newton's method.

    $$\frac1n \sum_i \Big( \log \sum_k e^{z_{ik}} - z_{i y_i} \Big)
      + \frac\lambda2 \sum_k |W_k|_2^2, \qquad z_{ik} = W_k^T x_i + b_k .$$

    The problem is convex. Steps are damped, in features that are centred and scaled to
    a variance of 1, so that their units and origin do not matter to the search; the
    penalty is that of the formula.

    Args:
        x: Features, one example a row.
        labels: Classes in [0, K). Another one makes the result NaN.
        num_classes: Static; K.
        l2: $\lambda \geq 0$; a number is static, an array traced. The bias costs
            nothing. For two classes, the usual penalty of a single weight $w = W_1 -
            W_0$ with the factor $\lambda / 2$ is this one with the factor $\lambda$.
        max_steps: Static; steps that are tried at most.
        tolerance: Static; on the norm of the gradient. None is $\varepsilon^{3/4}$,
            that is 6e-6 in float32 and 2e-12 in float64.
        where: True for the examples that count; elsewhere `x` and `labels` may hold
            anything.

    Returns:
        `LogisticRegressionFit`. If the classes can be separated and $\lambda$ is 0,
        there is no minimum: coefficients grow until the gradient is small. So does the
        bias of a class without examples, downwards. Where the examples do not
        determine the coefficients (fewer than features, say) and $\lambda$ is 0, they
        are those of one of many minima. Without any example they are 0.

    Raises:
        TypeError: An array has the wrong kind of dtype, or an option the wrong type.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward mode, through the steps. Reverse mode raises JAX's error on
        `while_loop`.
    Cost: with $P = (K - 1)(D + 1)$ coefficients O(n K D + P^2) memory and O(n P^2 +
        P^3) time per step. `jax.vmap` over problems runs until the slowest is done.
    Source: "Revisiting Discriminative vs. Generative Classifiers: Theory and
        Implications" compares it with `naive_bayes_head`; the method is the textbook's.

    Example:
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> fit = softlib.estimation.fit_logistic_regression
        >>> head = fit(x, labels, num_classes=2)
        >>> print(head.weight[:, 0].round(1), head.bias.round(1), head.converged)
        [-0.5  0.5] [ 0.7 -0.7] True
    """
    function = "fit_logistic_regression"
    checks.require_floating(function, x=x)
    checks.require_integer(function, labels=labels)
    checks.require_rank(function, "x", x, 2, "(n, D)")
    count, features = x.shape[-2:]
    checks.require_shape(
        function, "x", x, (count, features), "one problem; vmap for more"
    )
    checks.require_shape(function, "labels", labels, (count,), "rows of `x`")
    checks.require_positive_integer(function, "num_classes", num_classes)
    checks.require_positive_integer(function, "max_steps", max_steps)
    checks.require_scalar(function, "l2", l2, 0, math.inf)
    if tolerance is not None:
        checks.require_positive_number(function, "tolerance", tolerance)
    keep = jnp.ones(count, bool) if where is None else where
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, (count,), "rows of `x`")
    dtype = accumulator_dtype(x)
    if tolerance is None:
        tolerance = float(jnp.finfo(dtype).eps) ** 0.75
    x = jnp.where(keep[:, None], x.astype(dtype), 0)
    known = jnp.where(keep, labels_in_range(labels, num_classes), 0)
    penalty = jnp.asarray(l2, dtype)
    return _fit(x, known, keep, penalty, num_classes, max_steps, tolerance)


@compiled_once(4, 5, 6)
def _fit(
    x: Array,
    labels: Array,
    keep: Array,
    l2: Array,
    classes: int,
    max_steps: int,
    tolerance: float,
) -> LogisticRegressionFit:
    dtype, features = x.dtype, x.shape[1]
    basis = jnp.asarray(_contrasts(classes), dtype)
    share = keep.astype(dtype) / jnp.maximum(keep.sum(dtype=dtype), 1)
    centre, scale, rows = _standardised(x, share)
    targets = jax.nn.one_hot(labels, classes, dtype=dtype)
    # In the units of standardised features; the last coefficient is the bias.
    penalty = jnp.append(l2 / (scale * scale), 0)
    shape = (classes - 1, features + 1)

    def log_probs(flat: Array) -> Array:
        return log_softmax(_matmul(_matmul(rows, flat.reshape(shape).T), basis.T))

    def slope(flat: Array, logs: Array) -> Array:
        residual = share[:, None] * (jnp.exp(logs) - targets)
        by_score = _matmul(_matmul(residual, basis).T, rows)
        return (by_score + penalty[None] * flat.reshape(shape)).ravel()

    def measure(flat: Array) -> tuple[Array, Array]:
        logs = log_probs(flat)
        cost = -(share * (targets * logs).sum(-1)).sum()
        cost += 0.5 * (penalty[None] * flat.reshape(shape) ** 2).sum()
        return cost, jnp.linalg.norm(slope(flat, logs))

    def linearize(flat: Array) -> tuple[Array, Array]:
        logs = log_probs(flat)
        hessian = _hessian(rows, share, jnp.exp(logs), basis)
        hessian += jnp.diag(jnp.tile(penalty, classes - 1))
        # Far from the data's support the Hessian is singular up to rounding; a
        # trifle on its diagonal changes the step, not where the steps end.
        size = flat.shape[0]
        trifle = 10 * jnp.finfo(dtype).eps * jnp.trace(hessian)
        hessian += (trifle + jnp.finfo(dtype).tiny) * jnp.eye(size, dtype=dtype)
        # A square root of the Hessian is the Jacobian whose Gauss-Newton step is
        # Newton's.
        root = jnp.linalg.cholesky(hessian)
        residual = lax.linalg.triangular_solve(
            root, slope(flat, logs)[:, None], left_side=True, lower=True
        )
        return root.T, residual[:, 0]

    start = jnp.zeros(shape[0] * shape[1], dtype)
    end = damped_gauss_newton(
        start, measure, linearize, max_steps=max_steps, tolerance=tolerance
    )
    known = jnp.isfinite(end.loss) & (jnp.where(keep, labels, 0) >= 0).all()
    coefficients = jnp.where(known, _matmul(basis, end.x.reshape(shape)), jnp.nan)
    weight = coefficients[:, :-1] / scale[None]
    return LogisticRegressionFit(
        weight,
        coefficients[:, -1] - _matmul(weight, centre),
        jnp.where(known, end.loss, jnp.nan),
        jnp.where(known, end.norm, jnp.nan),
        end.iteration,
        known & (end.norm <= tolerance),
    )


def _standardised(x: Array, share: Array) -> tuple[Array, Array, Array]:
    """Centre and scale of features, and the features so standardised, with a 1."""
    centre = _matmul(share, x)
    # Once more, for what the rounding of a long sum left.
    centre += _matmul(share, x - centre[None])
    moved = x - centre[None]
    variance = _matmul(share, moved * moved)
    # A feature that does not vary is the bias, which has no penalty; NaN stays.
    varies = ~(variance <= (4 * jnp.finfo(x.dtype).eps * centre) ** 2)
    scale = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 1)
    ones = jnp.ones((len(x), 1), x.dtype)
    rows = jnp.concatenate(
        [jnp.where(varies[None], moved, 0) / scale[None], ones], axis=1
    )
    return centre, scale, jnp.where(share[:, None] > 0, rows, 0)


def _hessian(rows: Array, share: Array, p: Array, basis: Array) -> Array:
    """The Hessian of the mean cross-entropy, by the coefficients in the basis."""
    projected = _matmul(p, basis)  # (n, K - 1)
    contrasts, width = basis.shape[1], rows.shape[1]

    if not contrasts:
        return jnp.zeros((0, 0), rows.dtype)

    def block(a: Array) -> Array:
        # Row a of B^T (diag p - p p^T) B, for each example.
        curved = _matmul(p * basis[:, a][None], basis)
        curved -= projected[:, a][:, None] * projected
        weighted = (share[:, None] * curved)[:, :, None] * rows[:, None, :]
        weighted = weighted.reshape(len(rows), contrasts * width)
        return _matmul(rows.T, weighted)

    blocks = lax.map(block, jnp.arange(contrasts))
    return blocks.reshape(contrasts * width, contrasts * width)


def _contrasts(classes: int) -> np.ndarray:
    """Orthonormal columns (K, K - 1), each with a sum of 0."""
    columns = np.zeros((classes, classes - 1))
    for j in range(classes - 1):
        columns[: j + 1, j] = -1
        columns[j + 1, j] = j + 1
    return columns / np.linalg.norm(columns, axis=0, keepdims=True).clip(1)
