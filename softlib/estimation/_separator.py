r"""Halfspaces that separate examples: logistic regression with large steps, perceptron.

Coefficients are divided by the step size $\gamma$, which leaves a step that is finite
for every $\gamma$: it adds a mean of $y_i x_i$ with weights $\sigma(-\gamma m_i)$, and
those of $\gamma = \infty$ are 1 where the margin $m_i$ is negative and 0 elsewhere.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.softmax import softmax
from softlib.typing import Scalar

_matmul = functools.partial(jnp.matmul, precision="highest")


class SeparatorFit(NamedTuple):
    r"""The result of `fit_separator`.

    Attributes:
        coefficients: $\theta / \gamma$, float32 or wider.
        num_steps: Steps that were taken, int32.
        separated: Whether every margin is positive.
        margin: The least $y x^T \theta / |\theta|_2$; positive if `separated`, -inf
            for coefficients of 0, NaN if an argument holds NaN, inf for no example.
        step_bound: What `num_steps` cannot exceed if `separated`, by
            `separation_step_bound` with this margin, which is at most the largest one;
            inf if not separated.
    """

    coefficients: Float[Array, "*batch D"]
    num_steps: Int[Array, "*batch"]
    separated: Bool[Array, "*batch"]
    margin: Float[Array, "*batch"]
    step_bound: Float[Array, "*batch"]


@array_arguments
def fit_separator(
    x: Float[Array, "n D"],
    signs: Num[Array, " n"],
    *,
    step_size: Scalar = math.inf,
    normalized: bool = True,
    max_steps: int = 1000,
    where: Bool[Array, " n"] | None = None,
) -> SeparatorFit:
    r"""Coefficients of a halfspace that separates two classes, by gradient descent.

    Descent from 0 on the mean logistic loss with step size $\gamma$,

    $$\theta \leftarrow \theta + \frac{\gamma \beta}{n} \sum_i \sigma(-m_i)\, y_i x_i,
      \qquad m_i = y_i\, x_i^T \theta,$$

    with $\beta = 1$, or normalized, $\beta = n / \sum_i \sigma(-m_i)$. It stops at the
    first $\theta$ with all $m_i > 0$. The limit of a large step is the batch
    perceptron: it adds $y_i x_i$ of the misclassified examples, divided by $n$ or,
    normalized, by their number. Only normalized steps are bounded independently of $n$.

    Args:
        x: The features, one example a row. There is no bias: append a column of ones.
        signs: $y_i$, +1 or -1 of any real dtype. Others make the result NaN.
        step_size: $\gamma > 0$, a number or a traced scalar. Infinity, the default, is
            the perceptron. Its first step from 0 has weights of 1/2, as the limit of
            $\sigma$ has; an example on the boundary counts as misclassified later.
        normalized: Static; whether $\beta$ normalizes the steps.
        max_steps: Static; where to stop at the latest, for nothing separates some
            examples.
        where: True for the examples that count; elsewhere `x` and `signs` may hold
            anything.

    Returns:
        `SeparatorFit`. Without any example to count the coefficients are 0.

    Raises:
        TypeError: `x` is not floating, `where` is not boolean, or `max_steps` is no
            Python int.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward mode, through the steps taken. Reverse mode raises JAX's error
        on `while_loop`.
    Cost: two products with `x` a step. `jax.vmap` runs until the slowest is done.
    Source: "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient
        Descent with Large Step Sizes". Deviation: coefficients are divided by
        $\gamma$, which changes no sign.

    Example:
        >>> x, signs = jnp.array([[1.0, -1.0], [-1.0, -4.0]]), jnp.array([1, -1])
        >>> fit = softlib.estimation.fit_separator(x, signs, normalized=False)
        >>> print(fit.coefficients, fit.num_steps, fit.separated)
        [1.   0.25] 2 True
    """
    function = "fit_separator"
    checks.require_floating(function, x=x)
    checks.require_rank(function, "x", x, 2, "(n, D)")
    count, features = x.shape[-2:]
    checks.require_shape(function, "x", x, (count, features), "vmap for more problems")
    checks.require_shape(function, "signs", signs, (count,), "rows of `x`")
    checks.require_positive_integer(function, "max_steps", max_steps)
    _require_positive(function, "step_size", step_size)
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_shape(function, "where", where, (count,), "rows of `x`")
    else:
        where = jnp.ones(count, bool)
    dtype = accumulator_dtype(x)
    y = signs.astype(dtype)
    y = jnp.where((y == 1) | (y == -1), y, jnp.nan)
    signed = jnp.where(where[:, None], y[:, None] * x.astype(dtype), 0)
    return _fit(signed, where, jnp.asarray(step_size, dtype), normalized, max_steps)


@array_arguments
def separation_step_bound(
    radius: Float[Array, "*batch"],
    margin: Float[Array, "*batch"],
    *,
    num_examples: int,
    step_size: Scalar = math.inf,
    normalized: bool = True,
) -> Float[Array, "*batch"]:
    r"""Number of steps after which `fit_separator` has separated the examples.

    For examples of norm at most $R$ that some halfspace separates with margin $\mu$,
    normalized steps are at most

    $$\frac{R^2}{\mu^2} + \frac{2 \log(2n - 1)}{\gamma \mu^2},$$

    and others at most $n$ times that with an infinite step size, where they are the
    batch perceptron's, and $2n$ times with a finite one.

    Args:
        radius: $R \geq 0$.
        margin: $\mu > 0$, of any halfspace that separates them; the largest gives the
            best bound. Others than positive ones: inf.
        num_examples: $n \geq 1$, static.
        step_size: $\gamma > 0$, a number or a traced scalar.
        normalized: Static; whether steps are normalized.

    Returns:
        The bound, a real number, float32 (float64 if an argument is).

    Raises:
        TypeError: An array is not floating, or `num_examples` is no Python int.
        ValueError: Shapes differ, or an option is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: O(1) per entry.
    Source: "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient
        Descent with Large Step Sizes" has the normalized bounds and the perceptron's.
        That of other steps follows in the same way: as long as an example is wrong,
        $\sum_i \sigma(-m_i)$ is at least 1/2, and $\sum_i \sigma(-m_i) m_i$ at most
        $\log(2n - 1)$ times it.

    Example:
        >>> bound = softlib.estimation.separation_step_bound
        >>> radius, margin = jnp.array(2.0), jnp.array(1.0)
        >>> print(bound(radius, margin, num_examples=1000))
        4.0
        >>> print(bound(radius, margin, num_examples=1000, normalized=False))
        4000.0
    """
    function = "separation_step_bound"
    checks.require_floating(function, radius=radius, margin=margin)
    checks.require_shape(function, "margin", margin, radius.shape, "that of `radius`")
    checks.require_positive_integer(function, "num_examples", num_examples)
    _require_positive(function, "step_size", step_size)
    dtype = accumulator_dtype(radius, margin)
    radius, margin = radius.astype(dtype), margin.astype(dtype)
    return _bound(
        radius, margin, num_examples, jnp.asarray(step_size, dtype), normalized
    )


def _require_positive(function: str, name: str, value: Scalar) -> None:
    checks.require_scalar(function, name, value, 0, math.inf)
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{function}: `{name}` must be positive, got {value}.")


def _bound(
    radius: Array,
    margin: Array,
    count: int | Array,
    step_size: Array,
    normalized: bool,
) -> Array:
    square = lambda x: x * x
    positive = margin > 0
    inverse = 1 / jnp.where(positive, margin, 1)
    n = jnp.asarray(count, margin.dtype)
    bound = square(radius * inverse)
    bound += 2 * jnp.log(jnp.maximum(2 * n - 1, 1)) / step_size * square(inverse)
    if not normalized:
        bound *= n * jnp.where(step_size == jnp.inf, 1, 2)
    return jnp.where(positive, bound, jnp.where(margin <= 0, jnp.inf, jnp.nan))


@compiled_once(3, 4)
def _fit(
    signed: Array, where: Array, step_size: Array, normalized: bool, max_steps: int
) -> SeparatorFit:
    dtype = signed.dtype
    counted = where.sum(dtype=dtype)

    def log_weights(margins: Array, is_first: Array) -> Array:
        """Returns log sigmoid(-step_size * margin), and its limit."""
        is_limit = step_size == jnp.inf
        finite = jax.nn.log_sigmoid(jnp.where(is_limit, 0, -step_size) * margins)
        wrong = jnp.where(is_first, -math.log(2), 0)
        return jnp.where(
            is_limit, jnp.where(margins <= 0, wrong, -jnp.inf), finite
        ).astype(dtype)

    def running(state: tuple[Array, Array, Array]) -> Array:
        _, margins, num_steps = state
        wrong = (where & (margins <= 0)).any() & jnp.isfinite(margins).all()
        return wrong & (num_steps < max_steps)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        theta, margins, num_steps = state
        logs = log_weights(margins, num_steps == 0)
        # The softmax is right where all weights underflow, which no quotient is.
        weights = softmax(logs, where=where) if normalized else jnp.exp(logs) / counted
        theta = theta + _matmul(jnp.where(where, weights, 0), signed)
        return theta, _matmul(signed, theta), num_steps + 1

    start = jnp.zeros_like(signed, shape=signed.shape[1:])
    state = (start, _matmul(signed, start), jnp.zeros((), jnp.int32))
    theta, margins, num_steps = lax.while_loop(running, step, state)
    theta = jnp.where(jnp.isfinite(margins).all(), theta, jnp.nan)
    least = jnp.where(where, margins, jnp.inf).min(initial=jnp.inf)
    length = jnp.linalg.norm(theta)
    margin = jnp.where(length == 0, -jnp.inf, least / jnp.where(length == 0, 1, length))
    margin = jnp.where(counted == 0, jnp.inf, margin).astype(dtype)
    radius = jnp.sqrt((signed * signed).sum(-1).max(initial=0))
    return SeparatorFit(
        theta,
        num_steps,
        margin > 0,
        margin,
        _bound(radius, margin, counted, step_size, normalized),
    )
