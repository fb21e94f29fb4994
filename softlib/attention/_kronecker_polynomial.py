"""Kronecker (tensor) attention with a polynomial for exp: near-linear in the length."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import Precision, Scalar

from ._arguments import tuple_shapes
from ._polynomial import exp_polynomial, monomials
from ._polynomial.exp_polynomial import Basis

# Far beyond any certified degree; factorials up to here are in the range of doubles.
LARGEST_DEGREE = 100


class PolynomialAttentionResult(NamedTuple):
    """Attention by a polynomial, and how far its scores may be from 0.

    Attributes:
        output: What the call without `return_bound` returns.
        bound: An upper bound of the absolute scores of a row, float32 (or float64).
    """

    output: Float[Array, "*batch T N E"]
    bound: Float[Array, "*batch T N"]


# For type checkers, as in `dot_product_attention`.
class _Options(TypedDict, total=False):
    scale: Scalar | None
    logit_bound: float | None
    rtol: float | None
    degree: int | None
    basis: Basis
    is_causal: bool
    precision: Precision


@overload
# pyrefly: ignore[inconsistent-overload]
def kronecker_attention_polynomial(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    *,
    return_bound: Literal[True],
    **options: Unpack[_Options],
) -> PolynomialAttentionResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def kronecker_attention_polynomial(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    *,
    return_bound: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def kronecker_attention_polynomial(
    query: Float[Array, "*batch T N H"],
    keys: Sequence[Float[Array, "*batch _S K H"]],
    values: Sequence[Float[Array, "*batch _S K E"]],
    *,
    scale: Scalar | None = None,
    logit_bound: float | None = None,
    rtol: float | None = None,
    degree: int | None = None,
    basis: Basis = "chebyshev",
    is_causal: bool = False,
    return_bound: bool = False,
    precision: Precision = None,
) -> Float[Array, "*batch T N E"] | PolynomialAttentionResult:
    r"""Kronecker attention with bounded scores, in time linear in the length.

    Attention to tuples of keys, one of each of m axes, in which a polynomial $P$ of
    degree $g$ stands for the exponential:

    $$o_i = \frac{\sum_{j_1 \ldots j_m} P(s_{i j_1 \ldots j_m})\,
      v^1_{j_1} \cdots v^m_{j_m}}{\sum_{j_1 \ldots j_m} P(s_{i j_1 \ldots j_m})}, \qquad
      s_{i j_1 \ldots j_m} = \mathrm{scale} \sum_c q_{ic}\, k^1_{j_1 c} \cdots
      k^m_{j_m c},$$

    products of values elementwise. m = 1 is ordinary attention, m = 2 attention to
    pairs (order 3), m = 3 to triples. A monomial of a score is a product of monomials
    of its vectors, so each axis is summed for itself: once per monomial, of which there
    are $r = \binom{g + H}{g}$.

    With $|s| \leq R$ and $|P(x) - e^x| \leq \varepsilon e^x$ on $[-R, R]$ no entry of
    the output is further from exact attention than $\frac{2 \varepsilon}{1 -
    \varepsilon} \prod_t \max |v^t|$. For short heads and small logits: r grows like
    $H^g$, and $g$ with $R$ (4 at $R = 1$, 9 at 3.4 for $\varepsilon = 10^{-2}$).

    Args:
        query: Any leading batch axes, or none.
        keys: One array or more, one per axis; their lengths may differ. Query head n
            reads key head `n // (N // K)`.
        values: As many, each as long as its keys. E is common to all.
        scale: Factor of the scores; None is 1 / H. Static, or traced and
            differentiable.
        logit_bound: Static $R$, up to 18. A row whose own bound is larger by more than
            rounding (H + 16 units in the last place) is NaN; nothing is clipped.
        rtol: Static $\varepsilon$, below 1; None is 0.01. It chooses the degree, as
            `exp_polynomial` does, and must be None if `degree` is given.
        degree: Static $g$, up to 100, in place of `rtol`. Without `logit_bound` the
            polynomial of every row is the one for the bound of that row;
            `exp_polynomial_error` of the bound and the degree is the $\varepsilon$ of
            the row. The Taylor polynomial does not depend on the bound.
        basis: Static; "chebyshev" or "taylor", see `exp_polynomial`.
        is_causal: Static; True lets query i see key i of each axis and those before it.
            All lengths must be that of the query.
        return_bound: Static; returns `PolynomialAttentionResult`, with the bound of
            every row.
        precision: Of the matrix products, as in `jax.lax.dot_general`. Accelerators
            round float32 factors by default; the error below is then larger.

    Returns:
        The output in the dtype of `query`, and the bounds if asked for, float32 (or
        float64). The bound of a row is scale times the least of several upper bounds of
        $\sum_c |q_c k^1_c \cdots k^m_c|$ over the keys that it sees: by features, and
        by Hölder's inequality from the norms of its query and the largest norms of
        the keys.

        0 where an axis has no keys. NaN where the bound exceeds `logit_bound`, or 18,
        where the row sees a NaN, and where the denominator is not positive: that takes
        an $\varepsilon$ of 1 or more, possible with a given `degree` only, or rounding.

        Rounding: sums are float32 or wider, but monomials of negative scores cancel,
        and lose up to the order of $e^{2R}$ units in the last place. The largest errors
        measured in float32, relative to $\prod \max |v^t|$, are 4e-7 at $R = 1$, 2e-5
        at 3.4 and 4e-4 at 5 if all scores of a row are within a few percent of $-R$,
        and 2e-7, 8e-7 and 3e-6 for independent uniform entries.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, an option is out of range, neither
            `logit_bound` nor `degree` is given, or there are more than a million
            monomials.

    Derivatives: forward and reverse mode, any order, with respect to `query`, `keys`,
        `values` and `scale`: those of the polynomial. Bounds are constants, also where
        they choose the polynomial of a row. A row beyond its bound, or without a
        positive denominator, has gradient 0.
    Cost: with F = E + 1 and S the sum of the lengths, about $2 r F (N T + K S)$
        operations, and $\min(g, H)$ reads per monomial and token. Memory: a few copies
        of the arguments, g + 1 numbers per query without `logit_bound`, and tiles of
        $2^{18}$ numbers, or of 32 tokens for many heads; the rank enters only by tables
        of a few bytes per monomial. The backward pass makes the monomials again.
    Source: "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
        Attention to Kronecker Computation". The rank given there is larger; the powers
        of a score need only the $\binom{g + H}{g}$ monomials of a sum over features.
        The certified polynomials, bounds from norms, orders other than 3 and the causal
        form are additions.

    Example:
        >>> x = jax.random.uniform(jax.random.key(0), (5, 40, 1, 3), minval=-1.0)
        >>> out, bound = softlib.attention.kronecker_attention_polynomial(
        ...     x[0], (x[1], x[2]), (x[3], x[4]), logit_bound=1.0, return_bound=True)
        >>> print(out.shape, bound.shape, bool((bound <= 1).all()))
        (40, 1, 3) (40, 1) True
    """
    function = "kronecker_attention_polynomial"
    shapes = tuple_shapes(function, query, keys, values)
    for axis, own in enumerate(shapes):
        if is_causal and own.key_length != own.query_length:
            raise ValueError(
                f"{function}: `keys[{axis}]` must be as long as `query` "
                f"({own.query_length}) if `is_causal`, got {own.key_length}."
            )
    width = query.shape[-1]
    polynomial = _polynomial(function, logit_bound, rtol, degree, basis, width)
    dtype = accumulator_dtype(query, *keys, *values)
    factor = _scale(function, scale, width, dtype)
    arrays = tuple(
        tuple(array.astype(dtype) for array in shapes[0].flat(*group))
        for group in (keys, values)
    )

    def call(query: Array, factor: Array, arrays: Any) -> tuple[Array, Array]:
        query, factor, (keys, values) = match_varying((query, factor, arrays))
        query = query.astype(dtype) * factor
        return _attend(query, keys, values, polynomial, is_causal, precision)

    specs = lambda spec: (spec, PartitionSpec(*spec[:3]))
    (flat,) = shapes[0].flat(query)
    out, bound = in_auto_mode(call, specs, flat, factor, arrays)
    out = shapes[0].unflat(out).astype(query.dtype)
    if not return_bound:
        return out
    return PolynomialAttentionResult(out, shapes[0].unflat(bound))


class _Polynomial(NamedTuple):
    degree: int
    limit: float  # largest bound of a row
    factors: np.ndarray | None  # of `taylor_factors`; None: from each row's bound


def _attend(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    polynomial: _Polynomial,
    is_causal: bool,
    precision: Precision,
) -> tuple[Array, Array]:
    """The output and the bounds of rows; one batch axis, one dtype, scaled queries."""
    batch, length, heads, width = query.shape
    key_heads, features = keys[0].shape[2], values[0].shape[-1]
    dtype = query.dtype
    per_key = heads // key_heads
    query = query.reshape(batch, length, key_heads, per_key, width)
    bound = _bound(lax.stop_gradient(query), lax.stop_gradient(keys), is_causal)
    by_head = lambda row: row.reshape(batch, length, heads, *row.shape[4:])
    if 0 in (batch, length, heads, *(key.shape[1] for key in keys)):
        out = jnp.zeros((batch, length, heads, features), dtype)
        return match_varying(out, query), by_head(bound)

    # Layout (batch and key heads, features, tokens); queries by position, then head.
    groups = batch * key_heads
    columns = (groups, width, length * per_key)
    query_columns = query.transpose(0, 2, 4, 1, 3).reshape(columns)
    bounds = bound.transpose(0, 2, 1, 3).reshape(groups, -1)
    limit = polynomial.limit * (1 + (width + 16) * float(jnp.finfo(dtype).eps))
    inside = bounds <= limit
    # Selected before taking powers: 0 * inf in a gradient would be NaN for all keys.
    bounds = jnp.where(inside, bounds, 0)
    query_columns = jnp.where(inside[:, None], query_columns, 0)
    key_columns = [
        key.transpose(0, 2, 3, 1).reshape(groups, width, key.shape[1]) for key in keys
    ]
    for t, key in enumerate(key_columns):
        unit = _unit(lax.stop_gradient(key), is_causal)
        query_columns, key_columns[t] = query_columns * unit, key / unit
    with_ones = tuple(
        jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        .transpose(0, 2, 1, 3)
        .reshape(groups, value.shape[1], features + 1)
        for value in values
    )

    factors = polynomial.factors
    if factors is None:
        factors = exp_polynomial.taylor_factors_by_row(bounds, polynomial.degree)
    sums = monomials.attend(
        query_columns,
        tuple(key_columns),
        with_ones,
        factors,
        is_causal=is_causal,
        precision=precision,
    )
    numerator, denominator = sums[:, :-1], sums[:, -1:]
    known = inside[:, None] & (denominator > 0)
    # Selected before the division as well, so that a NaN has gradient 0, not NaN.
    out = numerator / jnp.where(known, denominator, 1)
    out = jnp.where(known, out, jnp.nan)
    out = out.reshape(batch, key_heads, features, length, per_key)
    return by_head(out.transpose(0, 3, 1, 4, 2)), by_head(bound)


def _bound(query: Array, keys: tuple[Array, ...], is_causal: bool) -> Array:
    """An upper bound of every |score| of a row, (b, T, K, N/K); keys (b, S, K, H)."""

    def largest(array: Array) -> Array:
        if is_causal:
            return lax.cummax(array, axis=1)
        # Starts from 0, the bound where there are no keys.
        return array.max(1, keepdims=True, initial=0)

    sizes = [jnp.abs(query), *(jnp.abs(key)[:, :, :, None] for key in keys)]
    by_feature = sizes[0]
    for size in sizes[1:]:
        by_feature = by_feature * largest(size)
    found = by_feature.sum(-1)

    norms = [_norms(size) for size in sizes]
    norms[1:] = [[largest(norm) for norm in of_axis] for of_axis in norms[1:]]
    # Hölder: one vector in the 1-norm or two in the 2-norm, the others in the max-norm.
    for i in range(len(norms)):
        for j in range(i, len(norms)):
            product = norms[i][0] if i == j else norms[i][1] * norms[j][1]
            for t, (_, _, top) in enumerate(norms):
                if t not in (i, j):
                    product = product * top
            found = jnp.minimum(found, product)
    return found


def _norms(size: Array) -> list[Array]:
    """The 1-, 2- and max-norm over the last axis; entries are not negative."""
    top = size.max(-1, initial=0)
    # Scaled, since squares may underflow, and a bound of 0 would be wrong.
    safe = jnp.where(top > 0, top, 1)[..., None]
    return [size.sum(-1), top * jnp.sqrt(jnp.square(size / safe).sum(-1)), top]


def _unit(key: Array, is_causal: bool) -> Array:
    """Powers of two by which keys are divided to be near 1, per group (and feature).

    The query is multiplied by them instead: so no product of powers leaves the range of
    floats if scores are moderate. For causal attention only the first token decides,
    since results must not depend on later tokens.
    """
    seen = jnp.abs(key[..., :1] if is_causal else key)
    top = seen.max((1, 2) if is_causal else 2, keepdims=True, initial=0)
    top = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    return jnp.ldexp(jnp.ones_like(top), jnp.frexp(top)[1])


def _polynomial(
    function: str,
    logit_bound: float | None,
    rtol: float | None,
    degree: int | None,
    basis: Basis,
    width: int,
) -> _Polynomial:
    _checks.require_one_of(function, "basis", basis, exp_polynomial.BASES)
    if degree is not None:
        exp_polynomial.require_degree(function, degree, LARGEST_DEGREE)
        if rtol is not None:
            raise ValueError(
                f"{function}: `rtol` must be None if `degree` is given, got {rtol}."
            )
        if logit_bound is not None:
            exp_polynomial.require_bound(function, "logit_bound", logit_bound)
    elif logit_bound is None:
        raise ValueError(
            f"{function}: `logit_bound` or `degree` must be given (the degree is "
            "static, bounds of arrays are not), got None for both."
        )
    else:
        degree = exp_polynomial.certified_degree(
            function, logit_bound, 1e-2 if rtol is None else rtol, basis, "logit_bound"
        )
    rank = math.comb(width + degree, degree)
    if rank > monomials.LARGEST_RANK:
        raise ValueError(
            f"{function}: `degree` must make at most {monomials.LARGEST_RANK} "
            f"monomials of the features, got {rank} for degree {degree} and heads of "
            f"size {width}; take shorter heads, a larger `rtol` or a smaller "
            "`logit_bound`."
        )
    if logit_bound is None and basis == "chebyshev":
        return _Polynomial(degree, exp_polynomial.LARGEST_BOUND, None)
    limit = float(exp_polynomial.LARGEST_BOUND if logit_bound is None else logit_bound)
    factors = exp_polynomial.taylor_factors(limit, degree, basis)
    return _Polynomial(degree, limit, factors)


def _scale(function: str, scale: Scalar | None, width: int, dtype: DTypeLike) -> Array:
    scale = jnp.asarray(1 / max(width, 1) if scale is None else scale)
    if not jnp.issubdtype(scale.dtype, jnp.integer):
        _checks.require_floating(function, scale=scale)
    why = "a number or a scalar array"
    _checks.require_shape(function, "scale", scale, (), why)
    return scale.astype(dtype)
