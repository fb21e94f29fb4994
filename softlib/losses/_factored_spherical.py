r"""A linear head in factors, for losses of the label's logit and sums of all logits.

For a loss of the spherical family and plain gradient descent the step of a head
$W \in \mathbb{R}^{n \times D}$ is

$$W \leftarrow W M - 1 r^\top - P$$

with a $D \times D$ matrix $M$, one row $r$ for all classes, and rows of $P$ that are 0
except for labels of the batch. So $W$ is stored as a product with a $D \times D$
matrix, into which $M$ is multiplied, plus one row. A step writes only the rows of the
labels.

The mean row is stored apart: deviations from it are `rows[j] @ mixing + offset`, and
row j of the head is that plus `mean`. The Gram matrix of deviations gives the sum of
squared deviations of the logits without cancellation.

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
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype, promoted
from softlib._ids import labels_in_range
from softlib.logits import BlockwiseLogits
from softlib.typing import Scalar

from ._spherical_family import SphericalStatistics


class FactoredSphericalState(NamedTuple):
    r"""A head $W$ of $n$ classes and $D$ features as $1 m^\top + 1 o^\top + R U$.

    An exact step of SGD costs $O(D^2)$ per row for any number of classes, for losses of
    the spherical family, which are methods of `SphericalStatistics`. The state is the
    head; its weight is formed by `weight` only. Only plain SGD has such a step, perhaps
    with weight decay: no momentum, no Adam, no clipping by row. The layers below the
    head may use any optimiser.

    ```python
    state = losses.FactoredSphericalState.init(weight)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train(network, optimizer_state, state, x, labels):
        hidden, pull = jax.vjp(lambda network: apply(network, x), network)
        step = state.sgd_step(
            hidden, labels, lambda s: s.z_loss(a=1.0, b=8.0).mean(), learning_rate=0.1
        )
        (gradient,) = pull(step.hidden_cotangents)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        network = optax.apply_updates(network, updates)
        return network, optimizer_state, step.state, step.loss
    ```

    Now and then call `state = state.rebase()`, in another jitted function that donates
    the state.

    The state is a pytree: donate it to the function that updates it (`jax.jit(...,
    donate_argnums=...)`). Otherwise every step copies the $n \times D$ rows, which
    takes time in proportion to the classes.

    Attributes:
        rows: $R$, in the basis of the last `rebase`.
        mixing: $U$, the identity after a rebase.
        offset: $o$, zero after a rebase but for rounding.
        mean: $m$, the mean row of $W$.
        gram: $(W - 1 m^\top)^\top (W - 1 m^\top)$.

    Derivatives: `statistics` has those with respect to `hidden`, `logits` and `weight`
        have all; steps are not meant to be differentiated.
    Cost: the head, and $2 D^2$ numbers.
    Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large
        Sparse Targets". Deviations: rows are stored less their mean, so that large
        means cost no digits, and no inverse is stored, each step solves instead. Its
        public code corrects single singular values and keeps the Gram matrix, while
        `rebase` computes everything again.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (1000, 8))
        >>> state = softlib.losses.FactoredSphericalState.init(weight)
        >>> print(state.rows.shape, state.gram.shape)
        (1000, 8) (8, 8)
        >>> print(bool(jnp.allclose(state.weight(), weight, atol=1e-5)))
        True
    """

    rows: Float[Array, "V D"]
    mixing: Float[Array, "D D"]
    offset: Float[Array, " D"]
    mean: Float[Array, " D"]
    gram: Float[Array, "D D"]

    @classmethod
    @array_arguments
    def init(cls, weight: Float[Array, "V D"]) -> "FactoredSphericalState":
        r"""Puts a weight into factors, float32 (float64 for float64).

        It costs $2 n D^2$ flop, once, and a copy of the weight.

        Args:
            weight: One row per class, not all equal: without deviations the slope of a
                Z-loss is 0 or $1 / \sqrt\epsilon$.
        """
        function = "FactoredSphericalState.init"
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
        # A rebase subtracts what rounding left of the mean and forms the Gram matrix.
        return cls(rows, identity, offset, mean, identity).rebase()

    def weight(self) -> Float[Array, "V D"]:
        """Forms the weight, one row per class: for evaluation and storage.

        It costs $2 n D^2$ flop.
        """
        return _product(self.rows, self.mixing) + (self.offset + self.mean)[None]

    @array_arguments
    def logits(self, hidden: Float[Array, "*batch D"]) -> BlockwiseLogits:
        r"""Makes the logits of this head as a value, without its weight.

        For whatever the spherical family leaves open: the best classes, samples, ranks,
        cross-entropy, a teacher. With $h$ the hidden features a row's logits are $R\,(U
        h) + h \cdot (o + m)$: a stream over the rows as they are stored, and $2 D^2$
        flop per row beside. Differentiable with respect to `hidden` and, unlike
        `statistics`, the head.

        Args:
            hidden: Inputs of the head.

        Example:
            >>> state = softlib.losses.FactoredSphericalState.init(jnp.eye(3))
            >>> hidden = jnp.array([[0.0, 2.0, 1.0]])
            >>> print(softlib.logits.top_k(state.logits(hidden), k=2).classes)
            [[1 2]]
        """
        function = "FactoredSphericalState.logits"
        hidden = _checked_hidden(function, self, hidden)
        level = _product(hidden, self.offset + self.mean)
        return _FactoredLogits(
            turned=_product(hidden, self.mixing.T),
            level=level[..., None],
            rows=self.rows,
        )

    @array_arguments
    def statistics(
        self,
        hidden: Float[Array, "*batch D"],
        labels: Integer[Array, "*batch"],
        *,
        where: Bool[Array, "..."] | None = None,
    ) -> SphericalStatistics:
        r"""Computes the statistics of each row that spherical losses take.

        Differentiable with respect to `hidden`, any order. The state is a constant,
        because the gradient of its rows would be as large as the rows. It costs
        $4 D^2$ flop per row.

        Args:
            hidden: Inputs of the head.
            labels: Class ids in $[0, V)$. Outside, the deviation of the label, hence
                the loss, is NaN, and the row has no gradient.
            where: True for the rows that count; broadcasts to the batch shape.
                Elsewhere `hidden` counts as zeros: leave such rows out of the loss, as
                `softlib.masked_mean` does.
        """
        function = "FactoredSphericalState.statistics"
        return _statistics(function, self, hidden, labels, where)

    @array_arguments(as_given=("learning_rate", "weight_decay"))
    def sgd_step(
        self,
        hidden: Float[Array, "*batch D"],
        labels: Integer[Array, "*batch"],
        loss: Callable[[SphericalStatistics], Array],
        *,
        learning_rate: Scalar,
        weight_decay: Scalar = 0.0,
        where: Bool[Array, "..."] | None = None,
    ) -> "FactoredSphericalStep":
        r"""Takes an exact step of SGD, and returns the gradient for the layers below.

        It calls `statistics`, differentiates `loss` and calls `sgd_update`. The head
        takes plain SGD; the layers below may use `hidden_cotangents` with any
        optimiser.

        Args:
            hidden: Inputs of the head.
            labels: Class ids in $[0, V)$. Outside, the statistics of the row hold NaN,
                and the row changes neither head nor cotangents.
            loss: Function of `SphericalStatistics` that returns a scalar, such as the
                mean of a Z-loss.
            learning_rate: $e$, static or traced, the same for all classes. A schedule
                is called by the user.
            weight_decay: $\lambda$ of $W \leftarrow W - e\,(\nabla L + \lambda W)$;
                static or traced.
            where: True for the rows that count; broadcasts to the batch shape. `loss`
                still sees all rows and has to leave the others out itself.
        """
        function = "FactoredSphericalState.sgd_step"
        _require_plain_sgd(function, learning_rate, weight_decay)

        def value(hidden: Array, cotangents: SphericalStatistics) -> Array:
            found = _statistics(function, self, hidden, labels, where)
            # The cotangents of these added zeros are those of the statistics.
            found = jax.tree.map(jnp.add, found, cotangents)
            total = loss(found)
            shape = jnp.shape(total)
            if shape != ():
                raise ValueError(
                    f"{function}: `loss` must give a scalar, got shape {shape}."
                )
            return total

        shapes = jax.eval_shape(
            lambda h: _statistics(function, self, h, labels, where), hidden
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, (of_hidden, cotangents) = jax.value_and_grad(value, (0, 1))(
            hidden, zeros
        )
        state = self.sgd_update(
            hidden,
            labels,
            cotangents,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            where=where,
        )
        return FactoredSphericalStep(total, of_hidden, state)

    @array_arguments(as_given=("learning_rate", "weight_decay"))
    def sgd_update(
        self,
        hidden: Float[Array, "*batch D"],
        labels: Integer[Array, "*batch"],
        cotangents: SphericalStatistics,
        *,
        learning_rate: Scalar,
        weight_decay: Scalar = 0.0,
        where: Bool[Array, "..."] | None = None,
    ) -> "FactoredSphericalState":
        r"""Takes a step of SGD with given cotangents of the statistics.

        The result is that of a stored weight up to rounding, although only the rows of
        the labels are written. A label that occurs several times is moved by the sum.
        It costs about $14 D^2$ flop per row and $8 D^3$ for the batch. If the state is
        donated, neither time nor memory grows with the classes; otherwise its rows are
        copied. A step that makes $I - 2 e \sum_i \nu_i h_i h_i^\top$ singular gives
        infinities or NaN, and near that rows lose digits.

        Args:
            hidden: Inputs of the head.
            labels: Class ids in $[0, V)$. Rows with other labels change nothing.
            cotangents: Cotangents of the statistics of these rows; that of `classes` is
                not used.
            learning_rate: $e$, static or traced, the same for all classes.
            weight_decay: $\lambda$, static or traced.
            where: True for the rows that count; broadcasts to the batch shape. Others
                change nothing, whatever they hold.
        """
        function = "FactoredSphericalState.sgd_update"
        _require_plain_sgd(function, learning_rate, weight_decay)
        hidden, labels, where = _checked(function, self, hidden, labels, where)
        for name, value in zip(cotangents._fields[:3], cotangents[:3], strict=True):
            why = f"the batch shape, as `cotangents.{name}`"
            checks.require_shape(function, "cotangents", value, labels.shape, why)
        dtype, (classes, features) = self.rows.dtype, self.rows.shape
        counts = labels >= 0 if where is None else (labels >= 0) & where
        flat = lambda x: jnp.where(counts, x, 0).astype(dtype).reshape(-1)
        h = jnp.where(counts[..., None], hidden, 0).astype(dtype).reshape(-1, features)
        of_label, of_mean, of_squares = map(flat, cotangents[:3])
        labels = jnp.where(counts, labels, classes).reshape(-1)  # `classes` is dropped

        e = jnp.asarray(learning_rate, dtype)
        keep = 1 - e * jnp.asarray(weight_decay, dtype)
        step = keep * jnp.eye(features, dtype=dtype)
        step = step - 2 * e * _product(h.T, of_squares[:, None] * h)
        moved = e * of_label[:, None] * h  # a row of P for each example
        mean_moved = moved.sum(0) / classes

        own = _label_deviations(self, jnp.where(labels < classes, labels, 0))
        mixing = _product(self.mixing, step)
        through = jnp.linalg.solve(mixing.T, moved.T).T
        # Rows are read before they are written: otherwise XLA copies them all.
        through, own = lax.optimization_barrier((through, own))

        cross = _product(step, _product(own.T, moved))
        by_class = _sum_by_label(moved, labels)
        gram = _product(step, _product(self.gram, step)) - cross - cross.T
        gram = gram + _product(by_class.T, by_class)
        gram = gram - classes * jnp.outer(mean_moved, mean_moved)
        return FactoredSphericalState(
            self.rows.at[labels].add(-through, mode="drop"),
            mixing,
            _product(step, self.offset) + mean_moved,
            keep * self.mean - e * _product(of_mean, h) / classes,
            (gram + gram.T) / 2,
        )

    def rebase(self) -> "FactoredSphericalState":
        r"""Returns the same head with the identity as mixing matrix, and fresh sums.

        Steps shrink singular values of the mixing matrix, so that rows updated through
        its inverse lose digits, and add rounding errors to the Gram matrix. A rebase
        multiplies the rows by the mixing matrix and computes mean and Gram matrix from
        them. A step with learning rate e changes the mixing matrix by
        $2 e \sum_i \nu_i h_i h_i^\top$, where $\nu$ is the cotangent of a row's
        `sum_squared_deviations`. For a Z-loss that is proportional to $1 / n$ and
        rebases may be rare: one in $\max(1000, n / 16)$ steps keeps float32 to about
        five digits, and its share of the time does not grow with the classes. For the
        other losses it is not: rebase every 100 steps, more often with learning rates
        near the largest at which training is stable.

        It costs $4 n D^2$ flop, and scratch of 2,048 rows if the state is donated.
        """
        return _rebased(self)


class _FactoredLogits(BlockwiseLogits):
    """Logits of features that have met the matrix and the row of all classes."""

    of_rows, of_classes = ("turned", "level"), ("rows",)

    turned: Array
    level: Array  # one number per row
    rows: Array

    def block(self) -> Float[Array, "rows classes"]:
        return _product(self.turned, self.rows.T) + self.level


class FactoredSphericalStep(NamedTuple):
    """The result of a step of a head in factors.

    Attributes:
        loss: The loss before the step.
        hidden_cotangents: Gradient of this loss with respect to `hidden`.
        state: The head after the step.

    Derivatives: none.
    Cost: the state, and an array like `hidden`.

    Example:
        >>> state = softlib.losses.FactoredSphericalState.init(jnp.eye(3))
        >>> step = state.sgd_step(
        ...     jnp.eye(1, 3), jnp.array([0]), learning_rate=0.1,
        ...     loss=lambda s: s.sum_squared_deviations.sum())
        >>> print((100 * step.state.weight()[:, 0]).round())
        [87.  7.  7.]
    """

    loss: Float[Array, ""]
    hidden_cotangents: Float[Array, "*batch D"]
    state: FactoredSphericalState


def _statistics(
    function: str,
    state: FactoredSphericalState,
    hidden: Array,
    labels: Array,
    where: Array | None,
) -> SphericalStatistics:
    hidden, labels, where = _checked(function, state, hidden, labels, where)
    state = lax.stop_gradient(state)
    if where is not None:
        hidden = jnp.where(where[..., None], hidden, 0)
        labels = jnp.where(where, labels, 0)
    outside = labels < 0
    hidden = jnp.where(outside[..., None], lax.stop_gradient(hidden), hidden)
    own = _label_deviations(state, labels).astype(hidden.dtype)
    deviation = jnp.where(outside, jnp.nan, (own * hidden).sum(-1))
    squares = (_product(hidden, state.gram) * hidden).sum(-1)
    # Only rounding makes it negative; keep the slope where it is clipped.
    squares = squares + lax.stop_gradient(jnp.maximum(squares, 0) - squares)
    classes = jnp.asarray(state.rows.shape[0], squares.dtype)
    return SphericalStatistics(
        deviation, _product(hidden, state.mean), squares, classes
    )


@compiled_once()
def _rebased(state: FactoredSphericalState) -> FactoredSphericalState:
    classes, features = state.rows.shape
    size = min(classes, 2048)

    def step(carry, start, size):
        rows, total, gram = carry
        block = lax.dynamic_slice_in_dim(rows, start, size)
        block = _product(block, state.mixing) + state.offset[None]
        rows = lax.dynamic_update_slice_in_dim(rows, block, start, 0)
        return rows, total + block.sum(0), gram + _product(block.T, block)

    zeros = jnp.zeros_like
    carry = (state.rows, zeros(state.mean), zeros(state.gram))
    # A short block comes first: padding would count as classes.
    rest = classes % size
    if rest:
        carry = step(carry, 0, rest)
    whole = lambda i, carry: step(carry, rest + i * size, size)
    rows, total, gram = lax.fori_loop(0, classes // size, whole, carry)
    # The mean of the deviations is 0 but for rounding errors.
    drift = total / classes
    return FactoredSphericalState(
        rows,
        jnp.eye(features, dtype=rows.dtype),
        -drift,
        state.mean + drift,
        gram - classes * jnp.outer(drift, drift),
    )


def _checked(
    function: str,
    state: FactoredSphericalState,
    hidden: Array,
    labels: Array,
    where: Array | None,
) -> tuple[Array, Array, Array | None]:
    """Arguments in the dtype of the sums, and labels: -1 outside the vocabulary."""
    hidden = _checked_hidden(function, state, hidden)
    checks.require_integer(function, labels=labels)
    batch = hidden.shape[:-1]
    checks.require_shape(function, "labels", labels, batch, "the batch shape")
    if where is not None:
        where = checks.checked_where(function, where, batch, "the batch shape")
    labels = labels_in_range(labels, state.rows.shape[0])
    return hidden, labels, where


def _checked_hidden(
    function: str, state: FactoredSphericalState, hidden: Array
) -> Float[Array, "*batch D"]:
    """The features in the dtype of the sums."""
    checks.require_floating(function, hidden=hidden)
    checks.require_rank(function, "hidden", hidden, 1, "(..., D)")
    features = state.rows.shape[1]
    if hidden.shape[-1] != features:
        raise ValueError(
            f"{function}: `hidden` must have {features} features (those of `state`), "
            f"got shape {hidden.shape}."
        )
    return hidden.astype(accumulator_dtype(state.rows, hidden))


def _label_deviations(
    state: FactoredSphericalState, labels: Array
) -> Float[Array, "*batch D"]:
    """Rows of the head less its mean row; arbitrary for a label of -1."""
    rows = state.rows[jnp.maximum(labels, 0)]
    deviations = _product(rows, state.mixing)
    offset = state.offset.astype(deviations.dtype)
    return deviations + jnp.broadcast_to(offset, deviations.shape)


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(*promoted(x, y), precision=lax.Precision.HIGHEST)


def _sum_by_label(values: Array, labels: Array) -> Array:
    """Sums of the rows of each label; as many rows as before, the others 0."""
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
