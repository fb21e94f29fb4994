r"""A linear head in factors, for losses that need no logit but the label's.

For a loss of the spherical family and plain gradient descent the step of a head
$W \in \mathbb{R}^{n \times D}$ is

$$W \leftarrow W M - 1 r^\top - P$$

with a $D \times D$ matrix $M$, one row $r$ for all classes, and rows of $P$ that are 0
but for the labels of the batch. So $W$ is kept as a product with a $D \times D$ matrix,
which takes $M$, plus one row; a step touches the rows of the labels only.

Everything is kept less the mean row: deviations are `rows[j] @ mixing + offset`, and
the class's own row of the head is that plus `mean`. The Gram matrix of deviations
gives the sum of squared deviations of the logits without cancellation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype, promoted
from softlib._ids import labels_in_range

from ._spherical_family import SphericalStatistics


class FactoredSphericalState(NamedTuple):
    r"""A head $W$ of $n$ classes and $D$ features as $1 m^\top + 1 o^\top + R U$.

    A pytree: donate it to the function that updates it (`jax.jit(...,
    donate_argnums=...)`). Otherwise every step copies the $n \times D$ rows, and takes
    time in proportion to the classes.

    Attributes:
        rows: $R$, in the basis of the last `factored_spherical_rebase`.
        mixing: $U$, the identity after a rebase.
        offset: $o$, zero after a rebase but for rounding.
        mean: $m$, the mean row of $W$.
        gram: $(W - 1 m^\top)^\top (W - 1 m^\top)$.

    Derivatives: none; a step is `factored_spherical_sgd_update`.
    Cost: the head, and $2 D^2$ numbers.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (1000, 8))
        >>> state = softlib.losses.factored_spherical_init(weight)
        >>> print(state.rows.shape, state.gram.shape)
        (1000, 8) (8, 8)
    """

    rows: Float[Array, "V D"]
    mixing: Float[Array, "D D"]
    offset: Float[Array, " D"]
    mean: Float[Array, " D"]
    gram: Float[Array, "D D"]


@array_arguments
def factored_spherical_init(weight: Float[Array, "V D"]) -> FactoredSphericalState:
    r"""A head in factors, whose exact step of SGD costs $O(D^2)$ whatever the classes.

    For the losses of the spherical family: `z_loss_from_statistics` and its siblings.
    The state is the head; its weight exists when `factored_spherical_weight` asks for
    it. Only plain SGD has such a step, with weight decay if wanted: no momentum, no
    Adam, no clipping by row. What is below the head is free to use any optimiser.

    ```python
    state = losses.factored_spherical_init(weight)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train(network, optimizer_state, state, x, labels):
        hidden, pull = jax.vjp(lambda network: apply(network, x), network)
        step = losses.factored_spherical_sgd_step(
            state, hidden, labels,
            lambda s: losses.z_loss_from_statistics(s, a=1.0, b=8.0).mean(),
            learning_rate=0.1,
        )
        (gradient,) = pull(step.hidden_cotangents)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        network = optax.apply_updates(network, updates)
        return network, optimizer_state, step.state, step.loss
    ```

    Now and then, in a jitted function of its own that donates the state,
    `state = losses.factored_spherical_rebase(state)`.

    Args:
        weight: One row per class, not all equal: with no deviations at all a Z-loss has
            no slope, or one of $1 / \sqrt\epsilon$.

    Returns:
        The state, float32 (float64 for float64).

    Raises:
        TypeError: `weight` is not floating.  ValueError: it is no matrix, or has no
            class.

    Derivatives: none are meant; training goes on from the state.
    Cost: $2 n D^2$ flop, once, and a copy of the weight.
    Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large
        Sparse Targets". Kept here are deviations from the mean row, so that large means
        cost no digits, and no inverse, which is solved for in each step.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (1000, 8))
        >>> state = softlib.losses.factored_spherical_init(weight)
        >>> again = softlib.losses.factored_spherical_weight(state)
        >>> print(bool(jnp.allclose(again, weight, atol=1e-5)))
        True
    """
    function = "factored_spherical_init"
    weight = jnp.asarray(weight)
    checks.require_floating(function, weight=weight)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{function}: `weight` must have shape (V, D) with at least one class, "
            f"got {weight.shape}."
        )
    weight = weight.astype(accumulator_dtype(weight))
    features = weight.shape[1]
    mean = weight.mean(0)
    identity = jnp.eye(features, dtype=weight.dtype)
    offset = jnp.zeros(features, weight.dtype)
    rows = weight - mean[None]
    # A rebase takes out what rounding left of the mean, and has the Gram matrix.
    state = FactoredSphericalState(rows, identity, offset, mean, identity)
    return factored_spherical_rebase(state)


def factored_spherical_weight(
    state: FactoredSphericalState,
) -> Float[Array, "V D"]:
    r"""The weight of a head in factors, one row per class: for evaluation and storage.

    Args:
        state: The head.

    Returns:
        The weight in the dtype of the state.

    Derivatives: forward and reverse mode, any order.
    Cost: $2 n D^2$ flop and memory for the result.
    Source: as `factored_spherical_init`.

    Example:
        >>> state = softlib.losses.factored_spherical_init(jnp.eye(3))
        >>> print(softlib.losses.factored_spherical_weight(state).round(4))
        [[1. 0. 0.]
         [0. 1. 0.]
         [0. 0. 1.]]
    """
    return product(state.rows, state.mixing) + (state.offset + state.mean)[None]


@array_arguments
def factored_spherical_statistics(
    state: FactoredSphericalState,
    hidden: Float[Array, "*batch D"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> SphericalStatistics:
    r"""What the losses of the spherical family see of a head in factors, per row.

    Args:
        state: The head.
        hidden: Inputs of the head.
        labels: Class ids in $[0, V)$. Outside, the deviation of the label, hence the
            loss, is NaN, and the row has no gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the numbers are those of `hidden` of zeros: leave such rows out of the loss,
            as `softlib.masked_mean` does.

    Returns:
        `SphericalStatistics` of the batch shape, float32 (float64 if an argument is
        float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.  ValueError: Shapes do not
            fit together.

    Derivatives: forward and reverse mode, any order, with respect to `hidden`; the
        state is a constant, since the gradient of its rows would be as large as they.
    Cost: $2 D^2$ flop per row for the squares and $2 D^2$ for the label; no memory or
        time that grows with the classes.
    Source: as `factored_spherical_init`.

    Example:
        >>> state = softlib.losses.factored_spherical_init(jnp.diag(jnp.arange(3.0)))
        >>> hidden, labels = jnp.ones((1, 3)), jnp.array([2])
        >>> s = softlib.losses.factored_spherical_statistics(state, hidden, labels)
        >>> print([x.round(2).tolist() for x in s[:3]])
        [[1.0], [1.0], [2.0]]
    """
    return statistics_of("factored_spherical_statistics", state, hidden, labels, where)


def statistics_of(
    function: str,
    state: FactoredSphericalState,
    hidden: Array,
    labels: Array,
    where: Array | None,
) -> SphericalStatistics:
    """`factored_spherical_statistics` under the name of a function that calls it."""
    state, hidden, labels, where = checked(function, state, hidden, labels, where)
    state = lax.stop_gradient(state)
    if where is not None:
        hidden = jnp.where(where[..., None], hidden, 0)
        labels = jnp.where(where, labels, 0)
    outside = labels < 0
    hidden = jnp.where(outside[..., None], lax.stop_gradient(hidden), hidden)
    own = label_deviations(state, labels).astype(hidden.dtype)
    deviation = jnp.where(outside, jnp.nan, (own * hidden).sum(-1))
    squares = (product(hidden, state.gram) * hidden).sum(-1)
    # Not negative but for rounding; its slope is right then, too.
    squares = squares + lax.stop_gradient(jnp.maximum(squares, 0) - squares)
    classes = jnp.asarray(state.rows.shape[0], squares.dtype)
    return SphericalStatistics(deviation, product(hidden, state.mean), squares, classes)


def factored_spherical_rebase(
    state: FactoredSphericalState,
) -> FactoredSphericalState:
    r"""The same head with the identity as its mixing matrix, and fresh sums.

    Steps multiply the mixing matrix, whose small singular values cost digits when rows
    are updated through its inverse, and add rounding errors to the Gram matrix. This
    writes the rows out in the basis of the head and computes mean and Gram matrix from
    them. A step of learning rate e moves the mixing matrix by
    $2 e \sum_i \nu_i h_i h_i^\top$, where $\nu$ is the cotangent of a row's
    `sum_squared_deviations`. In a Z-loss that is in proportion to $1 / n$, and so may
    the rebases be rare: every $\max(1000, n / 16)$ steps keep float32 to about five
    digits, and their share of the time does not grow with the classes. In the other
    losses it is not: every 100 steps, or fewer for learning rates near the largest at
    which training is stable.

    Args:
        state: The head. Donate it: the rows are then written in place.

    Returns:
        The same head up to rounding.

    Derivatives: none are meant.
    Cost: $4 n D^2$ flop; scratch of 2,048 rows where the state is donated.
    Source: as `factored_spherical_init`, whose public code moves single singular values
        and keeps the Gram matrix as it is.

    Example:
        >>> state = softlib.losses.factored_spherical_init(jnp.eye(3))
        >>> state = state._replace(mixing=2 * state.mixing)
        >>> state = softlib.losses.factored_spherical_rebase(state)
        >>> print(softlib.losses.factored_spherical_weight(state)[0].round(4))
        [ 1.6667 -0.3333 -0.3333]
    """
    return _rebased(state)


@compiled_once()
def _rebased(state: FactoredSphericalState) -> FactoredSphericalState:
    classes, features = state.rows.shape
    size = min(classes, 2048)

    def step(carry, start, size):
        rows, total, gram = carry
        part = lax.dynamic_slice_in_dim(rows, start, size)
        part = product(part, state.mixing) + state.offset[None]
        rows = lax.dynamic_update_slice_in_dim(rows, part, start, 0)
        return rows, total + part.sum(0), gram + product(part.T, part)

    zeros = jnp.zeros_like
    carry = (state.rows, zeros(state.mean), zeros(state.gram))
    # The short part first, as everywhere: padding would be classes.
    rest = classes % size
    if rest:
        carry = step(carry, 0, rest)
    whole = lambda i, carry: step(carry, rest + i * size, size)
    rows, total, gram = lax.fori_loop(0, classes // size, whole, carry)
    # What has gathered of a mean is of the size of rounding errors.
    drift = total / classes
    return FactoredSphericalState(
        rows,
        jnp.eye(features, dtype=rows.dtype),
        -drift,
        state.mean + drift,
        gram - classes * jnp.outer(drift, drift),
    )


# ------------------------------------------------------------------------------- shared
def checked(
    function: str,
    state: FactoredSphericalState,
    hidden: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
) -> tuple[FactoredSphericalState, Array, Array, Array | None]:
    """Arguments in the dtype of the sums, labels with -1 outside the vocabulary."""
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    checks.require_floating(function, hidden=hidden)
    checks.require_integer(function, labels=labels)
    checks.require_rank(function, "hidden", hidden, 1, "(..., D)")
    features, batch = state.rows.shape[1], hidden.shape[:-1]
    if hidden.shape[-1] != features:
        raise ValueError(
            f"{function}: `hidden` must have {features} features (those of `state`), "
            f"got shape {hidden.shape}."
        )
    checks.require_shape(function, "labels", labels, batch, "the batch shape")
    if where is not None:
        where = checks.checked_where(function, where, batch, "the batch shape")
    dtype = accumulator_dtype(state.rows, hidden)
    labels = labels_in_range(labels, state.rows.shape[0])
    return state, hidden.astype(dtype), labels, where


def label_deviations(
    state: FactoredSphericalState, labels: Array
) -> Float[Array, "*batch D"]:
    """Rows of the head less its mean row; anything for a label of -1."""
    rows = state.rows[jnp.maximum(labels, 0)]
    deviations = product(rows, state.mixing)
    offset = state.offset.astype(deviations.dtype)
    return deviations + jnp.broadcast_to(offset, deviations.shape)


def product(x: Array, y: Array) -> Array:
    return jnp.matmul(*promoted(x, y), precision=lax.Precision.HIGHEST)
