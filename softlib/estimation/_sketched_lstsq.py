"""Least squares on few mixed rows, with a bound on every coordinate's error."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar

from ._sketches import (
    CountSketch,
    GaussianSketch,
    HadamardSketch,
    Sketch,
    TensorHadamardSketch,
)

SKETCHES = (HadamardSketch, GaussianSketch, CountSketch, TensorHadamardSketch)


class SketchedLeastSquares(NamedTuple):
    r"""The solution of a sketched least-squares problem and how far it may be off.

    Attributes:
        solution: $x' = \arg\min \lVert S (A x - b) \rVert$.
        error_bound: No coordinate of $x'$ is further from that of the exact solution,
            with the probability asked for; see `sketched_lstsq`.
        residual_norm: $\lVert A x' - b \rVert$, of the whole problem.

    Derivatives: see `sketched_lstsq`.
    Cost: d + 2 numbers.

    Example:
        >>> a, b = jax.random.normal(jax.random.key(0), (512, 4)), jnp.ones(512)
        >>> draw = softlib.estimation.GaussianSketch.draw
        >>> sketch = draw(jax.random.key(1), num_inputs=512, num_rows=128)
        >>> found = softlib.estimation.sketched_lstsq(sketch, a, b, delta=0.01)
        >>> exact = jnp.linalg.lstsq(a, b)[0]
        >>> print(jnp.abs(found.solution - exact).max() < found.error_bound)
        True
    """

    solution: Float[Array, " d"]
    error_bound: Float[Array, ""]
    residual_norm: Float[Array, ""]


@array_arguments
def sketched_lstsq(
    sketch: Sketch,
    matrix: Float[Array, "n d"],
    target: Float[Array, " n"],
    *,
    delta: Scalar = 0.01,
) -> SketchedLeastSquares:
    r"""Solves a tall least-squares problem on few mixed rows, coordinate by coordinate.

    $x' = \arg\min \lVert S (A x - b) \rVert$. A dense sketch spreads the error evenly:
    with $x^*$ the exact solution and $R$ the triangular factor of $S A$

    $$\lVert x' - x^* \rVert_\infty \leq \lVert A x' - b \rVert\,
      \max_i \lVert e_i^T R^{-1} \rVert \sqrt{\tfrac2m \log \tfrac{d}{\delta}}$$

    with probability $1 - \delta$: about $\lVert A x^* - b \rVert \lVert A^+ \rVert /
    \sqrt m$, a factor $\sqrt d$ less than the bound of the error's length.

    Args:
        sketch: A map of the n rows to m, at least d, that was drawn without regard to
            the problem: a `HadamardSketch` or a `GaussianSketch`; the others too.
        matrix: $A$. Where $S A$ has not full column rank, results are inf or NaN: if
            $A$ has not, or by collisions in a `CountSketch`.
        target: $b$.
        delta: $\delta \in (0, 1)$; a number or a scalar array.

    Returns:
        `SketchedLeastSquares`, float32 (float64 if an argument is float64). Rounding
        aside, the bound is a theorem for Gaussian sketches. Hadamard sketches keep it
        up to logarithms in theory, and as it stands in experiments; for `CountSketch`
        it does not hold.

    Raises:
        TypeError: An array is not floating, or `sketch` is none.
        ValueError: Shapes do not fit together, there are fewer rows than columns, or
            `delta` is out of range.

    Derivatives: forward and reverse, any order.
    Cost: the sketch of d + 1 columns, the QR factorization of (m, d), and one product
        with $A$ for the residual.
    Source: "A Nearly-Optimal Bound for Fast Regression with ell_infty Guarantee".
        Deviation: the bound has its constants: given $S A$, the error under a Gaussian
        sketch is normal with covariance $\lVert A x^* - b \rVert^2 (R^T R)^{-1} / m$,
        and the exact residual is not longer than that of $x'$.

    Example:
        >>> a, b = jax.random.normal(jax.random.key(0), (512, 4)), jnp.ones(512)
        >>> draw = softlib.estimation.HadamardSketch.draw
        >>> sketch = draw(jax.random.key(1), num_inputs=512, num_rows=128)
        >>> found = softlib.estimation.sketched_lstsq(sketch, a, b)
        >>> print(found.solution.shape, found.error_bound < 0.5)
        (4,) True
    """
    function = "sketched_lstsq"
    matrix, target = jnp.asarray(matrix), jnp.asarray(target)
    checks.require_floating(function, matrix=matrix, target=target)
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(
            f"{function}: `matrix` must have shape (n, d) with d at least 1, "
            f"got {matrix.shape}."
        )
    n, d = matrix.shape
    checks.require_shape(function, "target", target, (n,), "one per row")
    if not isinstance(sketch, SKETCHES):
        raise TypeError(
            f"{function}: `sketch` must be a sketch, got {type(sketch).__name__}."
        )
    if sketch.num_inputs != n or sketch.num_rows < d:
        raise ValueError(
            f"{function}: `sketch` must map the {n} rows of `matrix` to at least {d}, "
            f"got one of {sketch.num_inputs} to {sketch.num_rows}."
        )
    checks.require_scalar(function, "delta", delta, 0, 1)
    dtype = accumulator_dtype(matrix, target)
    matrix, target = matrix.astype(dtype), target.astype(dtype)
    mapped = sketch(jnp.concatenate([matrix, target[:, None]], 1)).astype(dtype)
    failure = jnp.asarray(delta, dtype)
    return SketchedLeastSquares(*_solve(mapped, matrix, target, failure))


@compiled_once()
def _solve(
    mapped: Array, matrix: Array, target: Array, delta: Array
) -> tuple[Array, ...]:
    m, d = mapped.shape[0], matrix.shape[1]
    exact = lax.Precision.HIGHEST
    q, r = jnp.linalg.qr(mapped[:, :d])
    solution = solve_triangular(r, jnp.matmul(q.T, mapped[:, d], precision=exact))
    inverse = solve_triangular(r, jnp.eye(d, dtype=r.dtype))
    longest = jnp.sqrt((inverse**2).sum(1).max())
    residual = jnp.matmul(matrix, solution, precision=exact) - target
    norm = jnp.sqrt((residual**2).sum())
    quantile = jnp.sqrt(2 / m * jnp.log(d / delta))
    return solution, norm * longest * quantile, norm
