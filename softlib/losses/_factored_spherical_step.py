r"""The exact step of plain gradient descent of a head in factors.

With cotangents $\alpha_i$ of the label's deviation, $\beta_i$ of the mean logit and
$\nu_i$ of the sum of squared deviations, learning rate $e$, and $w_j$ the row of class
$j$ less the mean row $m$:

    M = I - 2 e sum_i nu_i h_i h_i^T        P_j = e sum over labels j of alpha_i h_i
    m <- m - (e / n) sum_i beta_i h_i       w_j <- M w_j - P_j + mean of P

from which mean and Gram matrix of the deviations follow, since the w_j add up to 0.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.typing import Scalar

from ._factored_spherical import (
    FactoredSphericalState,
    checked,
    label_deviations,
    product,
    statistics_of,
)
from ._spherical_family import SphericalStatistics


class FactoredSphericalStep(NamedTuple):
    """What a step of a head in factors leaves.

    Attributes:
        loss: Before the step.
        hidden_cotangents: Of the loss with respect to `hidden`, before the step too.
        state: The head after it.

    Derivatives: none.
    Cost: the state, and an array like `hidden`.

    Example:
        >>> state = softlib.losses.factored_spherical_init(jnp.eye(3))
        >>> step = softlib.losses.factored_spherical_sgd_step(
        ...     state, jnp.ones((1, 3)), jnp.array([0]), learning_rate=0.1,
        ...     loss=lambda s: s.sum_squared_deviations.sum())
        >>> print(step.hidden_cotangents.shape, step.state.rows.shape)
        (1, 3) (3, 3)
    """

    loss: Float[Array, ""]
    hidden_cotangents: Float[Array, "*batch D"]
    state: FactoredSphericalState


@array_arguments(as_given=("learning_rate", "weight_decay"))
def factored_spherical_sgd_step(
    state: FactoredSphericalState,
    hidden: Float[Array, "*batch D"],
    labels: Integer[Array, "*batch"],
    loss: Callable[[SphericalStatistics], Array],
    *,
    learning_rate: Scalar,
    weight_decay: Scalar = 0.0,
    where: Bool[Array, "..."] | None = None,
) -> FactoredSphericalStep:
    r"""Loss, gradient for what is below, and an exact step of SGD of a head in factors.

    What `factored_spherical_statistics`, the derivative of `loss`, and
    `factored_spherical_sgd_update` give one after the other; the place of it in a
    training step is shown in `factored_spherical_init`. The head takes plain SGD and
    nothing else; any optimiser may take `hidden_cotangents` further down.

    Args:
        state: The head; donate it to the jitted function that calls this.
        hidden: Inputs of the head.
        labels: Class ids in $[0, V)$. Outside, the statistics of the row hold NaN, and
            nothing of it reaches head or cotangents.
        loss: From `SphericalStatistics` to a scalar, such as the mean of a Z-loss.
        learning_rate: Static or traced, the same for all classes. A schedule is called
            by the user.
        weight_decay: $\lambda$ of $W \leftarrow W - e\,(\nabla L + \lambda W)$; static
            or traced.
        where: True for the rows that count; broadcasts to the batch shape. `loss` still
            sees all rows and has to leave the others out itself.

    Returns:
        `FactoredSphericalStep`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or `learning_rate` is an
            optimiser.  ValueError: Shapes do not fit together, or `loss` gives no
            scalar.

    Derivatives: none are meant through the step.
    Cost: as `factored_spherical_sgd_update`, and $8 D^2$ flop per row.
    Source: as `factored_spherical_init`.

    Example:
        >>> state = softlib.losses.factored_spherical_init(jnp.eye(3))
        >>> step = softlib.losses.factored_spherical_sgd_step(
        ...     state, jnp.eye(1, 3), jnp.array([0]), learning_rate=0.1,
        ...     loss=lambda s: s.sum_squared_deviations.sum())
        >>> weight = softlib.losses.factored_spherical_weight(step.state)
        >>> print((100 * weight[:, 0]).round())
        [87.  7.  7.]
    """
    function = "factored_spherical_sgd_step"
    _require_plain_sgd(function, learning_rate, weight_decay)

    def value(hidden: Array, cotangents: SphericalStatistics) -> Array:
        found = statistics_of(function, state, hidden, labels, where)
        # Added zeros, whose cotangents are those of the statistics.
        found = jax.tree.map(jnp.add, found, cotangents)
        total = loss(found)
        if jnp.shape(total) != ():
            raise ValueError(
                f"{function}: `loss` must give a scalar, got shape {jnp.shape(total)}."
            )
        return total

    shapes = jax.eval_shape(
        lambda h: statistics_of(function, state, h, labels, where), hidden
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, (of_hidden, cotangents) = jax.value_and_grad(value, (0, 1))(
        jnp.asarray(hidden), zeros
    )
    state = factored_spherical_sgd_update(
        state,
        hidden,
        labels,
        cotangents,
        learning_rate,
        weight_decay=weight_decay,
        where=where,
    )
    return FactoredSphericalStep(total, of_hidden, state)


@array_arguments(as_given=("learning_rate", "weight_decay"))
def factored_spherical_sgd_update(
    state: FactoredSphericalState,
    hidden: Float[Array, "*batch D"],
    labels: Integer[Array, "*batch"],
    cotangents: SphericalStatistics,
    learning_rate: Scalar,
    *,
    weight_decay: Scalar = 0.0,
    where: Bool[Array, "..."] | None = None,
) -> FactoredSphericalState:
    r"""The head after $W \leftarrow W - e\,(\nabla L + \lambda W)$: $O(D^2)$ a row.

    The same numbers, up to rounding, as the step of a stored weight, although only the
    rows of the labels are touched. A label that occurs several times is moved by the
    sum.

    Args:
        state: The head; donate it to the jitted function that calls this.
        hidden: Inputs of the head.
        labels: Class ids in $[0, V)$. Rows with others move nothing.
        cotangents: Of the loss with respect to the statistics of these rows; that of
            `classes` is not used.
        learning_rate: $e$, static or traced, the same for all classes.
        weight_decay: $\lambda$, static or traced.
        where: True for the rows that count; broadcasts to the batch shape. Others move
            nothing, whatever they hold.

    Returns:
        The new state, in the dtype of the old.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or `learning_rate` is an
            optimiser.  ValueError: Shapes do not fit together.

    Derivatives: none are meant through the step.
    Cost: about $14 D^2$ flop per row and $8 D^3$ for the batch; no time or memory that
        grows with the classes if the state is donated, else a copy of its rows. A step
        that makes $I - 2 e \sum_i \nu_i h_i h_i^\top$ singular has no such form: it
        gives infinities or NaN, and rows lose digits close to it.
    Source: as `factored_spherical_init`.

    Example:
        >>> losses = softlib.losses
        >>> state = losses.factored_spherical_init(jnp.eye(2))
        >>> one, zero = jnp.ones(1), jnp.zeros(1)
        >>> g = losses.SphericalStatistics(one, zero, zero, jnp.zeros(()))
        >>> args = (state, jnp.array([[1.0, 0.0]]), jnp.array([1]), g, 0.5)
        >>> state = losses.factored_spherical_sgd_update(*args)
    """
    function = "factored_spherical_sgd_update"
    _require_plain_sgd(function, learning_rate, weight_decay)
    state, hidden, labels, where = checked(function, state, hidden, labels, where)
    for name, value in zip(cotangents._fields[:3], cotangents[:3], strict=True):
        why = f"the batch shape, as `cotangents.{name}`"
        checks.require_shape(function, "cotangents", value, labels.shape, why)
    dtype, (classes, features) = state.rows.dtype, state.rows.shape
    counts = labels >= 0 if where is None else (labels >= 0) & where
    flat = lambda x: jnp.where(counts, x, 0).astype(dtype).reshape(-1)
    h = jnp.where(counts[..., None], hidden, 0).astype(dtype).reshape(-1, features)
    of_label, of_mean, of_squares = map(flat, cotangents[:3])
    labels = jnp.where(counts, labels, classes).reshape(-1)  # that is dropped

    e = jnp.asarray(learning_rate, dtype)
    keep = 1 - e * jnp.asarray(weight_decay, dtype)
    step = keep * jnp.eye(features, dtype=dtype)
    step = step - 2 * e * product(h.T, of_squares[:, None] * h)
    moved = e * of_label[:, None] * h  # a row of P for each example
    mean_moved = moved.sum(0) / classes

    own = label_deviations(state, jnp.where(labels < classes, labels, 0))
    mixing = product(state.mixing, step)
    through = jnp.linalg.solve(mixing.T, moved.T).T
    # Rows are read before they are written: otherwise XLA copies them all.
    through, own = lax.optimization_barrier((through, own))

    cross = product(step, product(own.T, moved))
    by_class = _sum_by_label(moved, labels)
    gram = product(step, product(state.gram, step)) - cross - cross.T
    gram = gram + product(by_class.T, by_class)
    gram = gram - classes * jnp.outer(mean_moved, mean_moved)
    return FactoredSphericalState(
        state.rows.at[labels].add(-through, mode="drop"),
        mixing,
        product(step, state.offset) + mean_moved,
        keep * state.mean - e * product(of_mean, h) / classes,
        (gram + gram.T) / 2,
    )


def _sum_by_label(values: Array, labels: Array) -> Array:
    """Rows of one label added up; as many rows as before, the rest of them 0."""
    order = jnp.argsort(labels)
    values, labels = values[order], labels[order]
    first = jnp.concatenate([jnp.zeros(1, bool), labels[1:] != labels[:-1]])
    groups = jnp.cumsum(first)
    return jnp.zeros_like(values).at[groups].add(values, indices_are_sorted=True)


def _require_plain_sgd(function: str, learning_rate: Any, weight_decay: Any) -> None:
    for name, value in (
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
    ):
        if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            raise TypeError(
                f"{function}: `{name}` must be a number or a scalar array, "
                f"got {type(value).__name__}: a head in factors takes plain SGD only."
            )
        checks.require_scalar(function, name, value, 0, math.inf)
