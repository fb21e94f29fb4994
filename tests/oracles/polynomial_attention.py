"""Attention to tuples of keys with any function for exp, score by score, in float64."""

import math
import string

import numpy as np


def attention(
    query, keys, values, function, *, scale=None, is_causal=False, bound=None
):
    """Layout (B, T, N, H); `function(scores, bound of the row)` replaces exp."""
    query = np.asarray(query, np.float64)
    keys, values = ([np.asarray(x, np.float64) for x in xs] for xs in (keys, values))
    batch, length, heads, width = query.shape
    per_key = heads // keys[0].shape[2]
    scale = 1 / width if scale is None else scale
    out = np.zeros((batch, length, heads, values[0].shape[-1]))
    for b, i, n in np.ndindex(batch, length, heads):
        seen = slice(0, i + 1 if is_causal else None)
        scores = scale * outer([x[b, seen, n // per_key] for x in keys], query[b, i, n])
        weights = function(scores, None if bound is None else bound[b, i, n])
        products = [x[b, seen, n // per_key] for x in values]
        axes = string.ascii_lowercase[: len(keys)]
        terms = ",".join([axes, *(f"{a}z" for a in axes)])
        total = weights.sum()
        if total:
            out[b, i, n] = np.einsum(f"{terms}->z", weights, *products) / total
    return out


def outer(vectors, query):
    """sum_c query_c prod_t vectors_t[j_t, c], an axis for each of `vectors`."""
    axes = string.ascii_lowercase[: len(vectors)]
    terms = ",".join(["z", *(f"{a}z" for a in axes)])
    return np.einsum(f"{terms}->{axes}", query, *vectors)


def exp(scores, bound=None):
    return np.exp(scores)


def polynomial(basis, degree, bound=None):
    """Of the given bound, or of that of the row."""

    def taylor(scores, _):
        return sum(scores**k / math.factorial(k) for k in range(degree + 1))

    def chebyshev(scores, of_row):
        radius = of_row if bound is None else bound
        if not radius:
            return np.ones_like(scores)
        return np.polynomial.chebyshev.chebval(scores / radius, series(radius, degree))

    return {"taylor": taylor, "chebyshev": chebyshev}[basis]


def series(radius, degree):
    """Chebyshev coefficients of exp(radius y), by the cosine sum of 200 nodes."""
    angles = np.pi * (np.arange(200) + 0.5) / 200
    orders = np.arange(degree + 1)
    found = 2 * (np.exp(radius * np.cos(angles)) * np.cos(np.outer(orders, angles)))
    return found.mean(1) * np.where(orders == 0, 0.5, 1)
