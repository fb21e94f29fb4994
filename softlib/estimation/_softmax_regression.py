r"""Softmax regression: fit a softmax of linear scores to a vector by least squares.

With $f = \operatorname{softmax}(A x)$, $c = f - b$ and the rows of $A$ centred by the
weights $f$, $\tilde A = A - 1 f^T A$, the derivative of $f$ is
$\operatorname{diag}(f) \tilde A$, and all second derivatives are weighted Gram
matrices of $\tilde A$.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.softmax import softmax
from softlib.typing import Scalar

from ._gauss_newton import damped_gauss_newton

# The models are small, and bfloat16 products are too coarse for the promised accuracy.
_matmul = functools.partial(jnp.matmul, precision="highest")


class SoftmaxRegressionFit(NamedTuple):
    """The result of `fit_softmax_regression`.

    Attributes:
        coefficients: $x$, float32 or wider; NaN if an argument holds NaN.
        loss: Of `SoftmaxRegression`, with the penalty.
        gradient_norm: Euclidean norm of the gradient of `loss` at `coefficients`.
        num_steps: Steps that were tried, int32.
        converged: Whether `gradient_norm` is within the tolerance.
    """

    coefficients: Float[Array, "*batch D"]
    loss: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class LabelShift(NamedTuple):
    """The result of `in_context_label_shift`.

    Attributes:
        target: $b'$, the labels that make up for the change.
        distance: $|b' - b|_2$.
        bound: What `distance` cannot exceed, up to rounding.
    """

    target: Float[Array, "*batch rows"]
    distance: Float[Array, "*batch"]
    bound: Float[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxRegression:
    r"""Half the squared distance of a softmax of linear scores to a vector; a pytree.

    $$L(x) = \tfrac12 |f(x) - b|_2^2, \qquad f(x) = \operatorname{softmax}(A x)$$

    It is not convex; `fit_softmax_regression` looks for a minimum. Its derivatives by
    the coefficients $x$ are methods, in closed form and without a graph. With $c = f -
    b$, $\tilde A = A - 1 f^T A$ and $w = f \odot (f + c - \langle f, c \rangle)$,

    $$\nabla L = A^T \big(f \odot (c - \langle f, c \rangle)\big), \qquad
      \nabla^2 L = \tilde A^T \operatorname{diag}(w)\, \tilde A .$$

    `jax.vmap` takes several problems. Methods raise if shapes do not fit together.

    Args:
        design: $A$, one row per entry of the softmax.
        target: $b$, a probability vector in the usual case; any vector is allowed.
        where: True for the rows that count. Elsewhere $f$ is 0, and `design` and
            `target` may hold anything, NaN included.

    Derivatives: forward and reverse mode, any order, with respect to all arrays.
    Cost: products with `design`, in full precision on every device: one for the loss,
        two for the gradient, three for a product with the Hessian.
    Source: "The Closeness of In-Context Learning and Weight Shifting for Softmax
        Regression", whose loss is the norm; its square has the same minima. There the
        Hessian is $A^T B A$ with a matrix $B$ of diagonal plus low rank.

    Example:
        >>> design, target = jnp.array([[4.0], [0.0]]), jnp.array([1.0, 0.0])
        >>> problem = softlib.estimation.SoftmaxRegression(design, target)
        >>> x = jnp.zeros(1)
        >>> print(problem.loss(x), problem.gradient(x), problem.hessian(x))
        0.25 [-1.] [[2.]]
    """

    design: Float[Array, "rows D"]
    target: Float[Array, " rows"]
    where: Bool[Array, " rows"] | None = None

    @array_arguments
    def loss(self, coefficients: Float[Array, " D"]) -> Float[Array, ""]:
        """Computes the loss, float32 (float64 if an argument is).

        At most 1 for a `target` that is a probability vector; 0 if no row counts.

        Args:
            coefficients: $x$.
        """
        problem = self._at("SoftmaxRegression.loss", coefficients)
        return problem.loss(problem.x)

    @array_arguments
    def gradient(self, coefficients: Float[Array, " D"]) -> Float[Array, " D"]:
        r"""Computes the gradient, in the dtype of `coefficients`.

        Its norm is at most $\tfrac12 |A|_2 |c|_2$, and $|c|_2 \leq \sqrt2$ for a
        `target` that is a probability vector.

        Args:
            coefficients: $x$.
        """
        problem = self._at("SoftmaxRegression.gradient", coefficients)
        return problem.gradient(problem.x).astype(coefficients.dtype)

    @array_arguments
    def hessian(self, coefficients: Float[Array, " D"]) -> Float[Array, "D D"]:
        """Computes the Hessian, symmetric, float32 (float64 if an argument is).

        Some of the weights $w$ may be negative: the loss is not convex. With $f^2$ for
        $w$ it is the Gauss-Newton matrix, which has no negative eigenvalue and is the
        Hessian where $f = b$. Both are singular if a combination of the columns of $A$
        is constant over the rows, because softmax does not see it. O(rows D^2) time.

        Args:
            coefficients: $x$.
        """
        problem = self._at("SoftmaxRegression.hessian", coefficients)
        f = problem.prediction(problem.x)
        centred = problem.centred(f)
        return _matmul(centred.T, problem.hessian_weights(f)[:, None] * centred)

    @array_arguments
    def hessian_vector_product(
        self, coefficients: Float[Array, " D"], vector: Float[Array, " D"]
    ) -> Float[Array, " D"]:
        """Computes the Hessian times a vector, in its dtype, without the Hessian.

        Args:
            coefficients: $x$.
            vector: $v$.
        """
        function = "SoftmaxRegression.hessian_vector_product"
        problem = self._at(function, coefficients)
        checks.require_floating(function, vector=vector)
        shape, why = coefficients.shape, "that of `coefficients`"
        checks.require_shape(function, "vector", vector, shape, why)
        f = problem.prediction(problem.x)
        along = _matmul(problem.design, vector.astype(f.dtype))
        along = problem.hessian_weights(f) * (along - (f * along).sum())
        product = _matmul(problem.design.T, along - f * along.sum())
        return product.astype(vector.dtype)

    def _at(self, function: str, coefficients: Array) -> "_Problem":
        design, target = jnp.asarray(self.design), jnp.asarray(self.target)
        return _Problem.of(function, coefficients, design, target, self.where)


@array_arguments
def fit_softmax_regression(
    design: Float[Array, "rows D"],
    target: Float[Array, " rows"],
    *,
    initial: Float[Array, " D"] | None = None,
    l2: Scalar = 0.0,
    max_steps: int = 100,
    tolerance: float | None = None,
    where: Bool[Array, " rows"] | None = None,
) -> SoftmaxRegressionFit:
    r"""Coefficients that minimise $L(x) + \tfrac\lambda2 |x|_2^2$, by Gauss-Newton.

    With the loss of `SoftmaxRegression`. Each step is the least-squares solution
    for the linearised softmax with damping (Levenberg and Marquardt), taken from a QR
    factorisation, and is kept only if the loss falls. If the target is a softmax of
    linear scores the convergence is quadratic, and the coefficients are recovered as
    far as they are identifiable: where a combination of the columns of `design` is
    constant over the rows, softmax does not see it, and the result has in that
    direction what `initial` had. For other targets it is a stationary point, found at a
    linear rate.

    Args:
        design: $A$.
        target: $b$.
        initial: Where to start; None is 0.
        l2: $\lambda \geq 0$; a number is static, an array traced.
        max_steps: Static; steps that are tried at most.
        tolerance: Static; on the norm of the gradient. None is
            $\varepsilon^{3/4}$, that is 6e-6 in float32 and 2e-12 in float64.
        where: True for the rows that count, as in the loss.

    Returns:
        `SoftmaxRegressionFit`. The gradient norm certifies a stationary point, whatever
        `converged` says.

    Raises:
        TypeError: An array is not floating, `where` is not boolean, or an option has
            the wrong type.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward mode, through the steps. Reverse mode raises JAX's error on
        `while_loop`.
    Cost: O(rows D^2) per step. `jax.vmap` over problems runs until the slowest is done.
    Source: "The Closeness of In-Context Learning and Weight Shifting for Softmax
        Regression" has the problem; the method is the textbook's.

    Example:
        >>> design = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> target = softlib.softmax.softmax(design @ jnp.array([1.0, -2.0]))
        >>> fit = softlib.estimation.fit_softmax_regression(design, target)
        >>> print(fit.coefficients.round(3), fit.converged)
        [ 1. -2.] True
    """
    function = "fit_softmax_regression"
    checks.require_positive_integer(function, "max_steps", max_steps)
    checks.require_scalar(function, "l2", l2, 0, math.inf)
    if tolerance is not None:
        checks.require_positive_number(function, "tolerance", tolerance)
    checks.require_floating(function, design=design, target=target)
    checks.require_rank(function, "design", design, 2, "(rows, D)")
    if initial is None:
        initial = jnp.zeros_like(design, shape=design.shape[-1:])
    problem = _Problem.of(function, initial, design, target, where)
    dtype = problem.x.dtype
    if tolerance is None:
        tolerance = float(jnp.finfo(dtype).eps) ** 0.75
    return _fit(problem, jnp.asarray(l2, dtype), max_steps, tolerance)


@array_arguments
def in_context_label_shift(
    coefficients: Float[Array, " D"],
    design: Float[Array, "rows D"],
    target: Float[Array, " rows"],
    *,
    next_coefficients: Float[Array, " D"] | None = None,
    next_design: Float[Array, "rows D"] | None = None,
    where: Bool[Array, " rows"] | None = None,
) -> LabelShift:
    r"""The change of labels that equals a change of the weights, or of the context.

    A step of gradient descent moves the coefficients, $x \to x'$; a layer of
    self-attention moves the data, $A \to A'$. To the residual of softmax regression
    either is the same as other labels for what was there before:

    $$f(A' x') - b = f(A x) - b', \qquad b' = b + f(A x) - f(A' x')$$

    and, because the Jacobian of softmax has a norm of at most 1/2, the labels move by
    no more than

    $$|b' - b|_2 \leq \tfrac12 \big(|A|_2 |x' - x|_2 + |A' - A|_2 |x'|_2\big).$$

    Args:
        coefficients: $x$.
        design: $A$.
        target: $b$.
        next_coefficients: $x'$; None: $x$, so that only the data move.
        next_design: $A'$; None: $A$, so that only the coefficients move.
        where: True for the rows that count, as in the loss. Elsewhere $b'$ is 0.

    Returns:
        `LabelShift`, float32 (float64 if an argument is). The identity holds to the
        rounding of one addition.

    Raises:
        TypeError: An array is not floating, or `where` is not boolean.
        ValueError: Shapes do not fit together, or nothing moves.

    Derivatives: `target` in forward and reverse mode, any order, with respect to all
        arrays; `distance` and `bound` have none, they certify.
    Cost: two products with `design`, and its largest singular value.
    Source: "The Closeness of In-Context Learning and Weight Shifting for Softmax
        Regression", with constants that are sharp instead of exponential in the norms.

    Example:
        >>> design, target = jnp.array([[4.0], [0.0]]), jnp.array([1.0, 0.0])
        >>> x, far = jnp.zeros(1), jnp.array([90.0])
        >>> shift = softlib.estimation.in_context_label_shift
        >>> print(shift(x, design, target, next_coefficients=far).target)
        [0.5 0.5]
    """
    function = "in_context_label_shift"
    if next_coefficients is None and next_design is None:
        raise ValueError(
            f"{function}: `next_coefficients` or `next_design` must be given, got None "
            "for both."
        )
    x = coefficients if next_coefficients is None else next_coefficients
    data = design if next_design is None else next_design
    checks.require_floating(function, next_coefficients=x, next_design=data)
    same = "that of `coefficients`", "that of `design`"
    checks.require_shape(function, "next_coefficients", x, coefficients.shape, same[0])
    checks.require_shape(function, "next_design", data, design.shape, same[1])
    dtype = accumulator_dtype(coefficients, design, target, x, data)
    old = _Problem.of(function, coefficients, design, target, where, dtype)
    new = _Problem.of(function, x, data, target, where, dtype)
    change = old.prediction(old.x) - new.prediction(new.x)
    moved = jnp.linalg.norm(change)
    bound = _largest_singular_value(old.design) * jnp.linalg.norm(new.x - old.x)
    if next_design is not None:
        bound += _largest_singular_value(new.design - old.design) * (
            jnp.linalg.norm(new.x)
        )
    return LabelShift(
        old.target + change, lax.stop_gradient(moved), lax.stop_gradient(bound / 2)
    )


class _Problem(NamedTuple):
    """The checked arguments in the dtype of the sums; 0 in rows that do not count."""

    x: Array
    design: Array
    target: Array
    where: Array | None

    @classmethod
    def of(
        cls,
        function: str,
        coefficients: Array,
        design: Array,
        target: Array,
        where: Array | None,
        dtype: Any = None,
    ) -> "_Problem":
        checks.require_floating(
            function, coefficients=coefficients, design=design, target=target
        )
        checks.require_rank(function, "design", design, 2, "(rows, D)")
        rows, features = design.shape[-2:]
        checks.require_shape(
            function, "design", design, (rows, features), "one problem; vmap for more"
        )
        checks.require_shape(
            function, "coefficients", coefficients, (features,), "columns of `design`"
        )
        checks.require_shape(function, "target", target, (rows,), "rows of `design`")
        if dtype is None:
            dtype = accumulator_dtype(coefficients, design, target)
        design, target = design.astype(dtype), target.astype(dtype)
        if where is not None:
            checks.require_boolean(function, where=where)
            checks.require_shape(function, "where", where, (rows,), "rows of `design`")
            design = jnp.where(where[:, None], design, 0)
            target = jnp.where(where, target, 0)
        return cls(coefficients.astype(dtype), design, target, where)

    def prediction(self, x: Array) -> Array:
        return softmax(_matmul(self.design, x), where=self.where)

    def residual(self, f: Array) -> Array:
        return f - self.target  # both are 0 where nothing counts

    def loss(self, x: Array) -> Array:
        c = self.residual(self.prediction(x))
        return (c * c).sum() / 2

    def gradient(self, x: Array) -> Array:
        f = self.prediction(x)
        c = self.residual(f)
        return _matmul(self.design.T, f * (c - (f * c).sum()))

    def centred(self, f: Array) -> Array:
        return self.design - _matmul(f, self.design)[None]

    def hessian_weights(self, f: Array) -> Array:
        c = self.residual(f)
        return f * (f + c - (f * c).sum())


@compiled_once(2, 3)
def _fit(
    problem: _Problem, l2: Array, max_steps: int, bound: float
) -> SoftmaxRegressionFit:
    def measure(x: Array) -> tuple[Array, Array]:
        gradient = problem.gradient(x) + l2 * x
        return problem.loss(x) + l2 / 2 * (x * x).sum(), jnp.linalg.norm(gradient)

    def linearize(x: Array) -> tuple[Array, Array]:
        f = problem.prediction(x)
        return f[:, None] * problem.centred(f), problem.residual(f)

    end = damped_gauss_newton(
        problem.x, measure, linearize, max_steps=max_steps, tolerance=bound, l2=l2
    )
    return SoftmaxRegressionFit(
        # With NaN in an argument the start would be returned.
        jnp.where(jnp.isfinite(end.loss), end.x, jnp.nan),
        end.loss,
        end.norm,
        end.iteration,
        end.norm <= bound,
    )


def _largest_singular_value(matrix: Array) -> Array:
    # initial: a matrix without rows or columns has none.
    return jnp.linalg.svd(matrix, compute_uv=False).max(initial=0)
