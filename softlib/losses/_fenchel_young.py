r"""Losses of sparse and tempered distributions: Fenchel-Young and bi-tempered.

All are Bregman divergences of a negative Tsallis entropy, with $s = \alpha - 1$,

$$D(q, p) = \sum_i \frac{q_i^\alpha - p_i^\alpha - \alpha p_i^s (q_i - p_i)}
    {\alpha s},$$

whose terms are not negative. Each term is computed without cancellation from the
logarithms of p and q, for every s, 0 included.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import common_dtype
from softlib._entmax_rows import log_probability, solution, top_score
from softlib._ids import labels_in_range
from softlib._sharding import match_varying
from softlib.logits import Logits
from softlib.logits._labelled_rows import rows_that_count, without_classes
from softlib.logits._sources import array_source_of
from softlib.typing import PerRow, Scalar


@array_arguments
def sparsemax_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Float[Array, "*batch V"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""The loss whose gradient is `sparsemax` minus the label.

    With $p$ the sparsemax of the logits and $q$ the label,

    $$L = \tfrac12 |q|^2 - \tfrac12 |p|^2 + \langle p - q, z \rangle, \qquad
    \frac{\partial L}{\partial z} = p - q .$$

    It is 0, with gradient 0, once the label's logit exceeds all others by 1; the
    cross-entropy never is. It is `entmax_loss` with $\alpha = 2$.

    Args:
        logits: Scores as an array or `softlib.logits.StoredLogits`, in float32 or
            wider. The threshold depends on all classes of a row, so that logits of a
            head raise: `materialize()` forms them.
        labels: Integers are class ids in $[0, V)$: outside, the loss is NaN and the row
            has no gradient; an excluded class costs +inf, without gradient. Floating
            numbers of the shape of `logits` are distributions; a mass on an excluded
            class costs +inf. For other sums than 1 see `entmax_loss`.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64), never negative. A
        row without classes has loss 0 and gradient 0; one whose logits are all -inf
        costs +inf, with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or the logits are a head's.
        ValueError: Shapes do not fit together.

    Derivatives: as `entmax_loss`.
    Cost: that of the map, and two passes over its result.
    Source: "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
        Classification".

    Example:
        >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 0.5, -3.0]])
        >>> print(softlib.losses.sparsemax_loss(logits, jnp.array([0, 0])))
        [0.     0.5625]
    """
    return _fenchel_young("sparsemax_loss", logits, labels, 2.0, where)


@array_arguments
def entmax_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Float[Array, "*batch V"],
    *,
    alpha: PerRow = 1.5,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""The loss whose gradient is `entmax` minus the label (Fenchel-Young).

    With $H_\alpha(p) = (1 - \sum_i p_i^\alpha) / (\alpha (\alpha - 1))$, $p$ the entmax
    of the logits and $q$ the label,

    $$L = H_\alpha(p) - H_\alpha(q) + \langle p - q, z \rangle, \qquad
    \frac{\partial L}{\partial z} = p - q .$$

    $\alpha = 1$ is cross-entropy (for a class id), 2 `sparsemax_loss`. For $\alpha > 1$
    it is exactly 0 as soon as the label's logit is above all others by
    $1 / (\alpha - 1)$.

    Args:
        logits, where: As in `sparsemax_loss`.
        labels: As in `sparsemax_loss`. For a label with another sum than 1 the level
            $z_i - (p_i^{\alpha - 1} - 1) / (\alpha - 1)$ of the support is subtracted
            from $z$: the loss is the Bregman divergence of $q$ from $p$, 0 only at
            $q = p$.
        alpha: $\alpha > 0$: a number (static), or an array that is a scalar or one
            value per row; traced and differentiable.

    Returns:
        As `sparsemax_loss`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or the logits are a head's.
        ValueError: Shapes do not fit together, or `alpha` is a number that is not
            positive.

    Derivatives: forward and reverse mode, any order where no logit is at the edge of
        the support; with respect to `logits`, floating `labels` and `alpha`. A mass of
        0 has the derivative 0 for $\alpha \leq 1$, where it would be infinite.
    Cost: that of the map, and two passes over its result.
    Source: "Learning with Fenchel-Young Losses" and "Sparse Sequence-to-Sequence
        Models".

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> loss = softlib.losses.entmax_loss(logits, labels)
        >>> print(jnp.round(1000 * loss).astype(int))
        [  0 391]
    """
    return _fenchel_young("entmax_loss", logits, labels, alpha, where)


@array_arguments
def bi_tempered_logistic_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Float[Array, "*batch V"],
    *,
    t1: Scalar,
    t2: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Logistic loss with two temperatures, robust to outliers and to wrong labels.

    With $p$ the `tempered_softmax` of the logits for $t_2$, $q$ the label and
    $\log_t x = (x^{1 - t} - 1) / (1 - t)$,

    $$L = \sum_i q_i (\log_{t_1} q_i - \log_{t_1} p_i)
        - \frac{q_i^{2 - t_1} - p_i^{2 - t_1}}{2 - t_1} .$$

    $t_1 < 1$ bounds the loss, so that an outlier far from the boundary does not move
    it; $t_2 > 1$ gives the probabilities heavy tails, so that a wrong label near it
    does little. $t_1 = t_2 = 1$ is cross-entropy (for a class id), and $t_1 = t_2$ is
    `entmax_loss` with $\alpha = 2 - t$ as long as every label is in the support.

    Args:
        logits, where: As in `sparsemax_loss`.
        labels: As in `sparsemax_loss`, but for another sum than 1.
        t1: $t_1 < 2$, usually in $[0, 1]$; a number is static, a scalar array traced
            and differentiable.
        t2: $t_2 < 2$, usually at least 1: a number (static), or an array that is a
            scalar or one value per row; traced and differentiable.

    Returns:
        As `sparsemax_loss`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or the logits are a head's.
        ValueError: Shapes do not fit together, or a temperature is a number that is not
            below 2.

    Derivatives: forward and reverse mode, any order where no logit is at the edge of
        the support; with respect to `logits`, floating `labels`, `t1` and `t2`. A label
        whose probability is 0 has no gradient.
    Cost: that of the map, and a few passes over its result.
    Source: "Robust Bi-Tempered Logistic Loss Based on Bregman Divergences", without its
        label smoothing. The exact normalisation of `tempered_softmax` replaces a fixed
        number of iterations.

    Example:
        >>> logits = jnp.array([[4.0, 0.0], [0.0, 0.0]])
        >>> loss = softlib.losses.bi_tempered_logistic_loss
        >>> loss = loss(logits, jnp.array([1, 1]), t1=0.5, t2=1.5)
        >>> print(jnp.round(1000 * loss).astype(int))
        [1265  391]
    """
    function = "bi_tempered_logistic_loss"
    for name, value in (("t1", t1), ("t2", t2)):
        if isinstance(value, int | float):
            checks.require_below(function, name, value, 2)
    checks.require_scalar(function, "t1", t1, -math.inf, 2)
    rows = _Rows.of(function, logits, labels, where)
    alpha = 2 - rows.per_row("t2", t2)
    p = solution(rows.z, alpha).p
    q = rows.labels
    if rows.are_ids:
        q = _at(rows.labels, p).astype(p.dtype)
    s = jnp.broadcast_to(1 - jnp.asarray(t1, p.dtype), p.shape[:-1])
    return rows.with_exceptions(_divergence(q, p, *match_varying((s,), p)))


def _fenchel_young(
    function: str,
    logits: Logits,
    labels: Array,
    alpha: PerRow,
    where: Array | None,
) -> Array:
    if isinstance(alpha, int | float):
        checks.require_positive_number(function, "alpha", alpha)
    rows = _Rows.of(function, logits, labels, where)
    value = rows.per_row("alpha", alpha)
    found = solution(rows.z, value)
    s = jnp.broadcast_to(jnp.asarray(value, rows.z.dtype) - 1, rows.z.shape[:-1])
    (s,) = match_varying((s,), rows.z)
    compute = _of_ids if rows.are_ids else _of_distributions
    return rows.with_exceptions(compute(rows.z, rows.labels, s, *found))


# --------------------------------------------------------------------------------- rows
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Checked arguments, and masks of rows with special values."""

    function: str
    z: Float[Array, "*batch V"]  # in the dtype of the sums; -inf for no class
    labels: Array  # ids, -1 for one outside; or distributions
    where: Bool[Array, "*batch"] | None
    infinite: Bool[Array, "*batch"]  # mass on a class whose logit is -inf
    no_classes: Bool[Array, "..."] | None  # per row, or one for all rows

    @classmethod
    def of(
        cls,
        function: str,
        logits: Logits,
        labels: Array,
        where: Array | None,
    ) -> "_Rows":
        source = array_source_of(function, logits)
        where = rows_that_count(source, where)
        z = source.masked(where).materialize()
        no_classes = without_classes(source)
        labels = jnp.asarray(labels)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            why = "the shape of `logits`"
            checks.require_shape(function, "labels", labels, source.shape, why)
            z = z.astype(common_dtype(z.dtype, labels.dtype))
            labels = labels.astype(z.dtype)
            if where is not None:
                labels = jnp.where(where[..., None], labels, 0)
            infinite = ((labels != 0) & (z == -jnp.inf)).any(-1)
            return cls(function, z, labels, where, infinite, no_classes)
        checks.require_integer(function, labels=labels)
        checks.require_shape(
            function, "labels", labels, source.batch_shape, "the batch shape"
        )
        labels = labels_in_range(labels, source.num_classes)
        if where is not None:
            labels = jnp.where(where, labels, 0)
        infinite = (_at(labels, z) & (z == -jnp.inf)).any(-1)
        return cls(function, z, labels, where, infinite, no_classes)

    @property
    def are_ids(self) -> bool:
        return self.labels.ndim < self.z.ndim

    def per_row(self, name: str, value: PerRow) -> Any:
        """A Python number, or an array with a value for each row."""
        if isinstance(value, int | float):
            return float(value)
        value = jnp.asarray(value)
        batch = self.z.shape[:-1]
        checks.require_floating(self.function, **{name: value})
        why = "a scalar, or one per row"
        checks.require_shape_in(self.function, name, value, ((), batch), why)
        value = jnp.broadcast_to(value, batch).astype(self.z.dtype)
        return value if self.where is None else jnp.where(self.where, value, 1)

    def with_exceptions(self, loss: Array) -> Array:
        """The loss with its special values, in the same order as all losses."""
        loss = jnp.where((self.z == -jnp.inf).all(-1), 0, loss)
        loss = jnp.where(self.infinite, jnp.inf, loss)
        if self.no_classes is not None:
            loss = jnp.where(self.no_classes, 0, loss)
        if self.are_ids:
            loss = jnp.where(self.labels < 0, jnp.nan, loss)
        return loss if self.where is None else jnp.where(self.where, loss, 0)


def _at(labels: Integer[Array, "*batch"], z: Array) -> Bool[Array, "*batch V"]:
    """True at the label: a comparison shards like the logits, a gather does not."""
    classes = lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    return classes == labels[..., None]


# ----------------------------------------------------------------- Fenchel-Young losses
# The loss is a minimum over the threshold and p, so that their derivatives cancel: its
# derivative is p - q in the logits and that of the entropies in alpha. The rules below
# use that; differentiating term by term would leave rounding errors.
@jax.custom_jvp
def _of_ids(z: Array, labels: Array, s: Array, p: Array, log_top: Array) -> Array:
    is_label = _at(labels, z)
    rest = jnp.where(is_label, 0, p)
    others = rest.sum(-1)  # 1 - p_y without cancellation
    alpha = 1 + s
    tail = _power(rest, alpha[..., None]).sum(-1) / alpha
    # p_y = (1 - s b)^(1 / s) as long as the bracket is positive, b what is `below`.
    d = jnp.where(is_label, z - top_score(z), 0).sum(-1)
    below = jnp.maximum(_threshold(s, log_top) - d, 0)
    below = jnp.where(below == jnp.inf, 0, below)  # an excluded class
    edge = jnp.where(s > 0, 1 / jnp.where(s > 0, s, 1), jnp.inf)
    inside = jnp.minimum(below, edge)
    own = (inside - jnp.maximum(1 - s * inside, 0) * others) / alpha
    # For p_y near 1 that cancels: the integral of t (1 - t)^(s - 1) from 0 to 1 - p_y.
    near = others * jnp.maximum(1, s) < 0.1
    r, series = jnp.where(near, others, 0), jnp.zeros_like(others)
    for k in reversed(range(16)):
        series = 1 / (k + 2) + r * (k + 1 - s) / (k + 1) * series
    return tail + jnp.where(near, r * r * series, jnp.maximum(own, 0)) + below - inside


def _of_ids_jvp(primals, tangents):
    z, labels, s, p, _ = primals
    dz, _, ds, _, _ = tangents
    slope = jnp.where(_at(labels, z), p - 1, p)
    return _of_ids(*primals), _moved(z, s, p, slope, dz, ds)


_of_ids.defjvp(_of_ids_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _of_distributions(z: Array, q: Array, s: Array, p: Array, log_top: Array) -> Array:
    d, wide = z - top_score(z), s[..., None]
    # Not jnp.log(p): that is -inf where p underflows.
    log_p, on, _ = log_probability(d, wide, log_top[..., None])
    # Outside the support the distance to its edge is added.
    beyond = (q > 0) & ~on & (d > -jnp.inf)
    edge = 1 / jnp.where(wide > 0, wide, 1)
    distance = _threshold(s, log_top)[..., None] - jnp.where(beyond, d, 0) - edge
    terms = _terms(q, log_p, on, wide) + jnp.where(beyond, q * distance, 0)
    # A row with NaN has no support.
    return jnp.where(jnp.isnan(p).any(-1), jnp.nan, terms.sum(-1))


def _of_distributions_jvp(primals, tangents):
    z, q, s, p, _ = primals
    dz, dq, ds, _, _ = tangents
    # For a label with another sum than 1 logits count less the level of the row.
    excess = q.sum(-1) - 1
    share, level = _level(z, p, s)
    slope = p - q + excess[..., None] * share
    tangent = _moved(z, s, p, slope, dz, ds)
    if not isinstance(dq, SymbolicZero):
        wide = s[..., None]
        finite = (z > -jnp.inf) & ((q > 0) | (wide > 0))
        slope = _deformed_log(q, wide) + level(s)[..., None] - jnp.where(finite, z, 0)
        tangent = tangent + jnp.where(finite, slope * dq, 0).sum(-1)
    if not isinstance(ds, SymbolicZero):
        of_level = jax.jvp(lambda s: level(s) - 1 / (1 + s), (s,), (ds,))[1]
        tangent = tangent - _entropy_slope(q, s, ds) + excess * of_level
    return _of_distributions(*primals), tangent


_of_distributions.defjvp(_of_distributions_jvp, symbolic_zeros=True)


def _moved(z: Array, s: Array, p: Array, slope: Array, dz: Any, ds: Any) -> Array:
    """Tangent of the loss: slope times that of the logits, and of alpha's entropy."""
    tangent = jnp.zeros_like(s)
    if not isinstance(dz, SymbolicZero):
        tangent = tangent + jnp.where(z == -jnp.inf, 0, slope * dz).sum(-1)
    if not isinstance(ds, SymbolicZero):
        tangent = tangent + _entropy_slope(p, s, ds)
    return tangent


def _level(z: Array, p: Array, s: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Derivative of a row's level in its logits, and the level as a function of s.

    On the support the deformed logarithm of p is z less the level.
    """
    wide, on = s[..., None], p > 0
    log_p = jnp.log(jnp.where(on, p, 1))
    # Relative to the largest power, which for alpha > 2 is that of the smallest p.
    power = jnp.where(on, (1 - wide) * log_p, -jnp.inf)
    most = lax.stop_gradient(power.max(-1, keepdims=True, initial=-jnp.inf))
    power = jnp.exp(power - jnp.where(most == -jnp.inf, 0, most))
    total = power.sum(-1, keepdims=True)
    share = power / jnp.where(total == 0, 1, total)

    def level(s: Array) -> Array:
        above = jnp.where(on, z, 0) - _deformed_log(jnp.where(on, p, 1), s[..., None])
        # The share is constant: its derivative cancels.
        return (lax.stop_gradient(share) * jnp.where(on, above, 0)).sum(-1)

    return share, level


def _entropy_slope(p: Array, s: Array, ds: Array) -> Array:
    def entropy(s):
        return -(p * _deformed_log(p, s[..., None])).sum(-1) / (1 + s)

    return jax.jvp(entropy, (s,), (ds,))[1]


# ------------------------------------------------------------------ Bregman divergences
@jax.custom_jvp
def _divergence(q: Array, p: Array, s: Array) -> Array:
    on = p > 0
    terms = _terms(q, jnp.log(jnp.where(on, p, 1)), on, s[..., None])
    return jnp.where(jnp.isnan(p).any(-1), jnp.nan, terms.sum(-1))


def _divergence_jvp(primals, tangents):
    (q, p, s), (dq, dp, ds) = primals, tangents
    on, wide = p > 0, s[..., None]
    tangent = jnp.zeros_like(s)
    if not isinstance(dp, SymbolicZero):
        # p^(s - 1) (p - q), unbounded as p falls to 0.
        log_p = jnp.log(jnp.where(on, p, 1))
        most = math.log(float(jnp.finfo(p.dtype).max)) / 2
        of_label = q * jnp.exp(jnp.minimum((wide - 1) * log_p, most))
        slope = jnp.exp(wide * log_p) - of_label
        tangent = tangent + jnp.where(on, slope * dp, 0).sum(-1)
    if not isinstance(dq, SymbolicZero):
        finite = (q > 0) & on | (wide > 0)
        slope = _deformed_log(q, wide) - _deformed_log(p, wide)
        tangent = tangent + jnp.where(finite, slope * dq, 0).sum(-1)
    if not isinstance(ds, SymbolicZero):

        def in_s(s):
            alpha, wide = 1 + s, s[..., None]
            linear = q * (_deformed_log(q, wide) - _deformed_log(p, wide))
            powers = _power(q, 1 + wide) - _power(p, 1 + wide)
            return linear.sum(-1) - powers.sum(-1) / alpha

        tangent = tangent + jax.jvp(in_s, (s,), (ds,))[1]
    return _divergence(*primals), tangent


_divergence.defjvp(_divergence_jvp, symbolic_zeros=True)


def _terms(q: Array, log_p: Array, on: Array, s: Array) -> Array:
    """The terms of the divergence; `on` is True where p is not 0."""
    alpha, has = 1 + s, q > 0
    log_q = jnp.log(jnp.where(has, q, 1))
    log_p = jnp.where(on, log_p, 0)
    of_q = jnp.where(has, jnp.exp(alpha * log_q), 0)
    of_p = jnp.where(on, jnp.exp(alpha * log_p), 0)
    v = jnp.where(has & on, log_p - log_q, 0)
    near = jnp.abs(v) * jnp.maximum(alpha, 1) < 0.5

    # Relative to the larger of p and q, a power of which is a factor.
    down, up = jnp.where(v < 0, v, 0), jnp.where(v < 0, 0, -v)
    from_q = jnp.exp(s * down) * jnp.expm1(down) - down * _mean_exp(s * down)
    from_p = jnp.exp(up) * (up * _mean_exp(s * up) - 1) + 1
    far = jnp.where(v < 0, of_q * from_q, of_p * from_p) / alpha

    # Both forms cancel where p and q are close. The series in log(q / p) has the
    # coefficients (1 + alpha + ... + alpha^(k - 2)) / k!.
    u, series, factor = jnp.where(near, -v, 0), jnp.zeros_like(v), jnp.zeros_like(alpha)
    power = u
    for k in range(2, 18):
        factor, power = factor * alpha + 1, power * u / k
        series = series + factor * power
    both = jnp.where(near, of_p * series, far)

    without_p = jnp.where(s > 0, of_q / (alpha * jnp.where(s > 0, s, 1)), jnp.inf)
    without_q = of_p / alpha
    return jnp.where(has, jnp.where(on, both, without_p), jnp.where(on, without_q, 0))


def _threshold(s: Array, log_top: Array) -> Array:
    """Threshold of the deformed logarithm, less the largest score."""
    return -log_top * _mean_exp(s * log_top)


def _deformed_log(x: Array, s: Array) -> Array:
    """(x^s - 1) / s, log(x) for s = 0; 0 where it is infinite."""
    some = x > 0
    log_x = jnp.log(jnp.where(some, x, 1))
    at_zero = jnp.where(s > 0, -1 / jnp.where(s > 0, s, 1), 0)
    return jnp.where(some, log_x * _mean_exp(s * log_x), at_zero)


def _power(x: Array, exponent: Array) -> Array:
    """x^exponent for a positive exponent and x >= 0, with derivatives at 0."""
    some = x > 0
    return jnp.where(some, jnp.exp(exponent * jnp.log(jnp.where(some, x, 1))), 0)


def _mean_exp(y: Array) -> Array:
    """(e^y - 1) / y, with derivatives that do not cancel near 0."""
    near = jnp.abs(y) < 0.5
    u, series = jnp.where(near, y, 0), jnp.zeros_like(y)
    for n in reversed(range(16)):  # the next term is below 1e-19
        series = 1 / math.factorial(n + 1) + u * series
    far = jnp.where(near, 1, y)
    return jnp.where(near, series, jnp.expm1(far) / far)
