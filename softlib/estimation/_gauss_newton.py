"""Least squares by Gauss-Newton with damping, the iteration behind several fits."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Search(NamedTuple):
    """The state of the iteration."""

    x: Float[Array, " D"]
    loss: Float[Array, ""]
    norm: Float[Array, ""]
    damping: Float[Array, ""]
    iteration: Int[Array, ""]


def damped_gauss_newton(
    start: Float[Array, " D"],
    measure: Callable[[Array], tuple[Array, Array]],
    linearize: Callable[[Array], tuple[Array, Array]],
    *,
    max_steps: int,
    tolerance: float,
    l2: Array | float = 0.0,
    cancelled: Callable[[Array], Array] | None = None,
) -> Search:
    r"""Minimises a loss from where it starts; each step lowers it or is not taken.

    A step is the least-squares solution for linearised residuals with damping
    (Levenberg and Marquardt), from a QR factorisation. It ends at a gradient norm
    within `tolerance`, after `max_steps`, or where no step lowers the loss; an infinite
    or NaN loss ends the search, and never replaces a finite one.

    Args:
        start: Where to begin.
        measure: Gives the loss and the norm of its gradient.
        linearize: Gives the Jacobian (rows, D) and the residuals (rows,) whose
            Gauss-Newton step is taken.
        max_steps: Steps that are tried at most.
        tolerance: On the norm of the gradient.
        l2: Factor of $\tfrac12 |x|_2^2$ in the loss.
        cancelled: Gives the size of terms that cancel in the loss, which is rounded as
            they are. None: nothing does.
    """
    dtype, size = start.dtype, start.shape[0]
    eps = float(jnp.finfo(dtype).eps)

    def running(state: Search) -> Array:
        usable = (state.norm > tolerance) & jnp.isfinite(state.loss)
        return usable & (state.damping < 1 / eps) & (state.iteration < max_steps)

    def step(state: Search) -> Search:
        jacobian, residual = linearize(state.x)
        scale = (jacobian * jacobian).sum() / max(size, 1)
        ridge = l2 + state.damping * scale + jnp.finfo(dtype).tiny
        # argmin |J d + r|^2 + damping |d|^2 + l2 |x + d|^2, without squaring J.
        root = jnp.sqrt(ridge)
        rows = jnp.concatenate([jacobian, root * jnp.eye(size, dtype=dtype)])
        goal = jnp.concatenate([-residual, -l2 / root * state.x])
        q, r = jnp.linalg.qr(rows)
        change = _solve_triangular(r, jnp.matmul(q.T, goal, precision="highest"))
        x = state.x + change
        loss, norm = measure(x)
        # Where losses differ by rounding only, the gradient decides.
        rounded = jnp.abs(state.loss)
        if cancelled is not None:
            rounded += cancelled(state.x)
        level = loss <= state.loss + 4 * eps * rounded
        better = (loss < state.loss) | (level & (norm < state.norm))
        damping = jnp.where(better, state.damping / 10, state.damping * 4)
        return Search(
            jnp.where(better, x, state.x),
            jnp.where(better, loss, state.loss),
            jnp.where(better, norm, state.norm),
            jnp.maximum(damping, eps),
            state.iteration + 1,
        )

    first = Search(
        start,
        *measure(start),
        # Damped from the start: a full first step may end far outside.
        jnp.ones((), dtype),
        jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(running, step, first)


def _solve_triangular(r: Array, right: Array) -> Array:
    return lax.linalg.triangular_solve(r, right[:, None], left_side=True)[:, 0]
