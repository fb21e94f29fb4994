"""Benchmark items in the training data, found by the order of their options."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar


def option_permutations(num_options: int) -> Int[np.ndarray, "P n"]:
    """All orders of the options of a question, the published order first.

    Args:
        num_options: Static number $n$ of options, 1 to 8.

    Returns:
        int32 (n!, n), a constant of NumPy: row i lists which option stands at each
        place. In lexicographic order, so that row 0 is the order as published.

    Raises:
        TypeError: `num_options` is no Python int.
        ValueError: It is not from 1 to 8.

    Derivatives: none, the result is integer.
    Cost: n! rows.
    Source: "Training on the Benchmark Is Not All You Need".

    Example:
        >>> print(softlib.scoring.option_permutations(3)[:3].tolist())
        [[0, 1, 2], [0, 2, 1], [1, 0, 2]]
    """
    function = "option_permutations"
    checks.require_positive_integer(function, "num_options", num_options)
    if num_options > 8:
        raise ValueError(
            f"{function}: `num_options` must be at most 8, which has 40,320 orders, "
            f"got {num_options}."
        )
    return np.array([*itertools.permutations(range(num_options))], np.int32)


@array_arguments
def isolation_decision(
    values: Float[Array, "*batch P"], *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "*batch P"]:
    r"""Decision value of an isolation forest of infinitely many trees, of numbers.

    $$\frac12 - 2^{-E[h] / c(P)}, \qquad
        c(n) = 2 (\log(n - 1) + \gamma) - \frac{2 (n - 1)}{n}$$

    with $h$ the depth at which random cuts of the range isolate a value from the others
    and $c(2) = 1$, $c(1) = 0$. Negative values are outliers. In one dimension a cut
    falls into a gap between neighbours with a probability in proportion to its width,
    so that the expected depth is a finite sum over intervals. The decision of a forest
    of 100 trees differs by 0.01 from one seed to the next, this one has none.

    Args:
        values: Numbers, at most 128 on the last axis.
        where: True for the numbers that exist; broadcasts to `values`. Others may hold
            anything.

    Returns:
        A number in $(-1/2, 1/2)$ for each value, float32 (float64 for float64); 0 where
        `where` is False, and where all values are equal. NaN in a row with a value that
        is not finite.

    Raises:
        TypeError: `values` are not floating, or `where` is not boolean.
        ValueError: There is no axis, or more than 128 values on it, or `where` does not
            broadcast.

    Derivatives: forward and reverse, where no two values are equal.
    Cost: time $O(P^3 \log P)$ per row, memory $O(P^3)$ for one row at a time.
    Source: the isolation forest of "Training on the Benchmark Is Not All You Need",
        whose trees take all P values and stop at the depth $\lceil \log_2 P \rceil$:
        its expectation instead of a draw of trees.

    Example:
        >>> values = jnp.array([0.0, 0.1, 0.2, 0.3, 5.0])
        >>> print((100 * softlib.scoring.isolation_decision(values)).round())
        [  6.  14.  15.   7. -23.]
    """
    function = "isolation_decision"
    x, where = _checked(function, "values", values, where)
    if not x.shape[-1]:
        return x
    rows, exists = (a.reshape(-1, a.shape[-1]) for a in (x, where))
    found = _decisions_of_rows(rows, exists)
    return jnp.where(where, found.reshape(x.shape), 0)


class Leak(NamedTuple):
    """Whether items look as if a model was trained on them.

    Attributes:
        leaked: True for items that look so.
        decision: Isolation decision of the likeliest order; below 0 it stands apart.
        most_likely: Index of the likeliest order, int32, the first one on ties.
        margin: Log-probability of the published order (index 0) less the greatest of
            the others.

    Derivatives: see `benchmark_leakage`.
    Cost: four numbers per item.

    Example:
        >>> log_probs = jnp.array([[-3.0, -9.0, -9.5, -8.9, -9.2, -9.1]])
        >>> leak = softlib.scoring.benchmark_leakage(log_probs, scenario="published")
        >>> print(leak.leaked, leak.margin.round(1))
        [ True] [5.9]
    """

    leaked: Bool[Array, "*batch"]
    decision: Float[Array, "*batch"]
    most_likely: Int[Array, "*batch"]
    margin: Float[Array, "*batch"]


@array_arguments
def benchmark_leakage(
    log_probs: Float[Array, "*batch P"],
    *,
    scenario: str,
    threshold: Scalar = -0.2,
    where: Bool[Array, "..."] | None = None,
) -> Leak:
    r"""Whether a multiple-choice item was in the training data, by orders of options.

    A model that has seen an item knows the order of its options, which otherwise is as
    good as any: one order is then much likelier than the others. Compare sums of
    log-probabilities, not means: the texts are the same in another order. (Check that
    the numbers of tokens are equal: tokens must not reach from one option into the
    next.)

    Args:
        log_probs: Log-probability of the item's options in each order, from the first
            option's marker on and given the question: `softlib.logits
            .sequence_log_probs` of texts in the orders of `option_permutations`. The
            published order is index 0.
        scenario: Static. "published": an item is leaked if the published order is the
            likeliest, also if it shares the maximum. Of the items that are not leaked a
            share 1/P is found. "shuffled", where the order in the training data is not
            known: an item is leaked if the isolation decision of its likeliest order
            is below `threshold`. Orders that are unusually unlikely do not matter.
        threshold: Of the scenario "shuffled"; the paper takes -0.2, -0.17 and -0.15. A
            number or a scalar array.
        where: True for the orders that were scored; broadcasts to `log_probs`. Others
            may hold anything.

    Returns:
        `Leak`, floats in float32 (float64 for float64). An item without orders is not
        leaked and has decision 0; one with a single order has margin +inf, one without
        the published order -inf. An item with a log-probability that is not finite is
        not leaked, its decision and margin are NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: There is no order on the last axis or more than 40,320, `where` does
            not broadcast, or `scenario` is neither of its two values.

    Derivatives: of margin and decision, forward and reverse.
    Cost: a sort of each item's orders, and $O(P \log P)$ for the likeliest.
    Source: "Training on the Benchmark Is Not All You Need". Deviation: the decision is
        the expectation over isolation trees instead of a draw of 100, see
        `isolation_decision`.

    Example:
        >>> log_probs = jnp.array([[-9.0, -8.9, -9.5, -3.0, -9.2, -9.1]])
        >>> leak = softlib.scoring.benchmark_leakage(log_probs, scenario="shuffled")
        >>> print(leak.leaked, leak.most_likely, leak.decision < -0.2)
        [ True] [3] [ True]
    """
    function = "benchmark_leakage"
    checks.require_one_of(function, "scenario", scenario, ("published", "shuffled"))
    checks.require_scalar(function, "threshold", threshold, -math.inf, math.inf)
    x, where = _checked(function, "log_probs", log_probs, where, most=math.factorial(8))
    if not x.shape[-1]:
        raise ValueError(
            f"{function}: `log_probs` must have at least one order on the last axis, "
            f"got shape {x.shape}."
        )
    present = jnp.where(where, x, -jnp.inf)
    most_likely = jnp.argmax(present, axis=-1).astype(jnp.int32)
    published, others = present[..., 0], present[..., 1:]
    greatest = others.max(-1, initial=-jnp.inf)
    bad = (where & ~jnp.isfinite(x)).any(-1)
    none = jnp.isneginf(published) & jnp.isneginf(greatest)
    known = lambda a: jnp.where(bad | none, 0, a)
    margin = known(published) - known(greatest)

    # Only intervals that hold the maximum matter: those that end with it.
    ordered, count = _ordered(jnp.where(bad[..., None], 0, x), where)
    flat = ordered.reshape(-1, ordered.shape[-1])
    depth = _depths_of_greatest(flat, count.reshape(-1)).reshape(count.shape)
    decision = jnp.where(bad, jnp.nan, _decision(depth, count))
    if scenario == "published":
        leaked = (published >= greatest) & ~bad & where[..., 0]
    else:
        leaked = decision < jnp.asarray(threshold, decision.dtype)
    return Leak(leaked, decision, most_likely, jnp.where(bad, jnp.nan, margin))


def _checked(
    function: str, name: str, values: Array, where: Array | None, most: int = 128
) -> tuple[Array, Array]:
    checks.require_floating(function, **{name: values})
    checks.require_rank(function, name, values, 1, "(..., P)")
    count = values.shape[-1]
    if count > most:
        raise ValueError(
            f"{function}: `{name}` must have at most {most} values on the last axis, "
            f"got {count}."
        )
    why = f"the shape of `{name}`"
    where = checks.checked_where(function, where, values.shape, why)
    return values.astype(accumulator_dtype(values)), where


# ---------------------------------------------------------------------- isolation depth
def _decision(depth: Array, count: Array) -> Array:
    """The decision value of an expected depth among `count` values; 0 for one."""
    usual = _path_length(count, depth.dtype)
    several = count > 1
    ratio = jnp.where(several, depth / jnp.where(several, usual, 1), 1)
    return 0.5 - jnp.exp2(-ratio)


def _path_length(count: Array, dtype: jnp.dtype) -> Array:
    """c(n), the mean depth of a search that fails in a random tree of n values."""
    n = jnp.maximum(count, 3).astype(dtype)
    many = 2 * (jnp.log(n - 1) + np.euler_gamma) - 2 * (n - 1) / n
    return jnp.where(count > 2, many, jnp.where(count == 2, 1, 0).astype(dtype))


def _depth_limit(count: Array) -> Array:
    """The least k with 2^k >= n."""
    powers = jnp.asarray(2 ** np.arange(31), jnp.int32)
    return jnp.searchsorted(powers, jnp.maximum(count, 1), method="compare_all")


def _ordered(x: Array, where: Array) -> tuple[Array, Array]:
    """Sorted values in units of their range, and their number.

    Values that do not exist come first and equal the least that does: no gap is next to
    them.
    """
    count = where.sum(-1)
    some = (count > 0)[..., None]
    low = jnp.where(where, x, jnp.inf).min(-1, keepdims=True)
    low = jnp.where(some, low, 0)
    x = jnp.where(where, x, low) - low
    span = x.max(-1, keepdims=True)
    return jnp.sort(x / jnp.where(span > 0, span, 1), axis=-1), count


@compiled_once()
def _depths_of_greatest(ordered: Float[Array, "rows P"], counts: Array) -> Array:
    return jax.vmap(_depth_of_greatest)(ordered, counts)


def _depth_of_greatest(s: Float[Array, " P"], count: Array) -> Array:
    """Expected depth of the greatest value; the first values, but `count`, are none."""
    size = s.shape[0]
    gaps = s[1:] - s[:-1]
    span = s[-1] - s
    lengths = size - jnp.arange(size)
    limit = _depth_limit(count)
    alone = _path_length(lengths, s.dtype)
    wide = jnp.where(span > 0, span, 1)

    def shallower(depth_of: Array, k: Array) -> tuple[Array, None]:
        # Cut at gap g, the interval [i, P) becomes [g + 1, P).
        terms = jnp.append(gaps * depth_of[1:], 0)
        mean = jnp.cumsum(terms[::-1])[::-1] / wide
        stopped = (span == 0) | (k >= limit)
        return jnp.where(stopped, k.astype(s.dtype) + alone, mean), None

    deepest = math.ceil(math.log2(size)) if size > 1 else 0
    start = jnp.zeros_like(s)
    depths, _ = lax.scan(shallower, start, jnp.arange(deepest, -1, -1))
    return depths[jnp.minimum(size - count, size - 1)]


@compiled_once()
def _decisions_of_rows(
    rows: Float[Array, "rows P"], exists: Bool[Array, "rows P"]
) -> Float[Array, "rows P"]:
    return lax.map(lambda row: _decisions(*row), (rows, exists))


def _decisions(x: Float[Array, " P"], where: Bool[Array, " P"]) -> Array:
    """Decision values of one row, for every value."""
    size = x.shape[0]
    bad = (where & ~jnp.isfinite(x)).any()
    x = jnp.where(bad, 0, x)
    s, count = _ordered(x, where)
    gaps = jnp.append(s[1:] - s[:-1], 0)
    place = jnp.arange(size)
    t, i, j = place[:, None, None], place[None, :, None], place[None, None, :]
    span = s[None, :] - s[:, None]  # of the interval [i, j]
    wide = jnp.where(span > 0, span, 1)
    alone = _path_length(jnp.maximum(place[None, :] - place[:, None] + 1, 1), s.dtype)
    limit = _depth_limit(count)
    above, below = (j >= t) & (i <= t), (i < t) & (j >= t)

    def shallower(depth_of: Array, k: Array) -> tuple[Array, None]:
        """Expected depths [t, i, j] of value t, from depth k in the interval [i, j]."""
        # A cut at gap g leaves t in [i, g] for g >= t and in [g + 1, j] for g < t.
        right = jnp.where(above, gaps[None, None, :] * depth_of, 0)
        right = jnp.cumsum(right, axis=2) - right  # gaps t to j - 1
        shifted = jnp.roll(depth_of, -1, axis=1) * gaps[None, :, None]
        left = jnp.cumsum(jnp.where(below, shifted, 0)[:, ::-1], axis=1)[:, ::-1]
        mean = (right + left) / wide[None]
        stopped = ((span <= 0) | (k >= limit))[None]
        return jnp.where(stopped, (k.astype(s.dtype) + alone)[None], mean), None

    deepest = math.ceil(math.log2(size)) if size > 1 else 0
    start = jnp.zeros((size, size, size), s.dtype)
    depths, _ = lax.scan(shallower, start, jnp.arange(deepest, -1, -1))
    first = jnp.minimum(size - count, size - 1)
    decisions = _decision(depths[:, first, size - 1], count)
    # Back from places in the order to the values.
    order = jnp.argsort(jnp.where(where, x, -jnp.inf), stable=True)
    found = jnp.zeros_like(s).at[order].set(decisions)
    return jnp.where(bad, jnp.nan, found)
