"""Attention by monomials: sums over keys once per monomial, never over pairs.

The multinomial theorem turns a polynomial of the trilinear scores (bilinear,
quadrilinear, ...) into a sum of products. With x^alpha = prod_c x_c^{alpha_c},

    P(x) = sum_{k <= g} f_k x^k / k!
    P(sum_c q_c prod_t k_tc) = sum_{|alpha| <= g} f_{|alpha|} / alpha!
                               q^alpha prod_t k_t^alpha,

so numerators and denominator of attention are, with V_t next to a column of ones,

    sum_alpha f_{|alpha|} / alpha! q^alpha prod_t ( sum_j k_tj^alpha [v_tj, 1] ),

for causal attention with sums over j <= i. The loop runs over chunks of alpha, which
are recomputed for the gradient. Features are rows and tokens columns, so that a
monomial is the product of a few contiguous rows of a table of powers.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying
from softlib.typing import Precision

# Most monomials: their tables are constants of the program, a few bytes for each.
LARGEST_RANK = 2**20
CHUNK = 64
# Elements computed at a time: monomials of a block of tokens. Blocks have at least as
# many tokens as a vector register is wide.
TILE = 2**18
LEAST_BLOCK = 32


class Monomials(NamedTuple):
    """All monomials of total degree up to g in H variables, in chunks.

    The last chunk is padded with weights of 0.
    """

    rows: np.ndarray  # (chunks, size, factors): row indices of a table of `_powers`
    degree: np.ndarray  # (chunks, size)
    weight: np.ndarray  # (chunks, size), float64: 1 / alpha!


@functools.lru_cache(maxsize=4)
def monomials(width: int, degree: int, chunk: int) -> Monomials:
    count = math.comb(width + degree, degree)
    # Variable 0 is the constant 1: monomials of degree g in H + 1 variables, as
    # descending lists, so that the constant comes last.
    lists = itertools.combinations_with_replacement(range(width, -1, -1), degree)
    flat = itertools.chain.from_iterable(lists)
    variables = np.fromiter(flat, np.int32, count * degree).reshape(count, degree)
    run = np.ones_like(variables)  # counts 1, 2, ... along equal variables
    for i in range(1, degree):
        same = variables[:, i] == variables[:, i - 1]
        run[:, i] = np.where(same, run[:, i - 1] + 1, 1)
    real = variables > 0
    last = real.copy()
    last[:, :-1] &= variables[:, :-1] != variables[:, 1:]
    rows = np.where(last, (variables - 1) * degree + run, 0)
    rows = -np.sort(-rows, axis=1)[:, : max(min(degree, width), 1)]
    rows = rows.reshape(count, -1) if degree else np.zeros((count, 1), np.int32)
    total = real.sum(1)
    # alpha! is the product of the runs 1, ..., alpha_c.
    weight = 1 / np.where(real, run, 1).prod(1, dtype=np.float64)

    chunks = -(-count // chunk)
    size = -(-count // chunks)
    pad = chunks * size - count
    cut = lambda a: np.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1))).reshape(
        chunks, size, *a.shape[1:]
    )
    narrow = np.int16 if width * degree < 2**15 - 1 else np.int32
    return Monomials(cut(rows.astype(narrow)), cut(total.astype(np.int16)), cut(weight))


def attend(
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    factors: np.ndarray | Array,
    *,
    is_causal: bool,
    precision: Precision,
) -> Array:
    """Sums over keys of P times the values, (groups, E, columns of the query).

    Query (groups, H, columns), keys (groups, H, S_t) and values (groups, S_t, E) have
    one dtype; the factors f of P are NumPy (g + 1,) or (groups, g + 1, columns). If
    causal, columns of the query are ordered by position, several for each, and see the
    keys up to it.
    """
    if isinstance(factors, np.ndarray):
        known = tuple(factors.tolist())  # compares by value
        return _attend(is_causal, precision, known, query, keys, values, None)
    return _attend(is_causal, precision, None, query, keys, values, factors)


@compiled_once(0, 1, 2)
def _attend(
    is_causal: bool,
    precision: Precision,
    known: tuple[float, ...] | None,
    query: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    traced: Array | None,
) -> Array:
    """`attend` with static factors (`known`), or traced ones per row."""
    groups, width, columns = query.shape
    features, dtype = values[0].shape[-1], query.dtype
    if traced is None:
        assert known is not None
        degree = len(known) - 1
    else:
        degree = traced.shape[1] - 1
    table = monomials(width, degree, CHUNK)
    size = table.rows.shape[1]
    if is_causal:
        length = keys[0].shape[-1]
        per_key = columns // length
        block = _block(length, groups * size * (features + per_key))
        query_size, key_sizes = block * per_key, [block] * len(keys)
    else:
        per_key, query_size = 1, _block(columns, groups * size)
        key_sizes = [_block(key.shape[-1], groups * size) for key in keys]
    query_rows, weights, by_row = table.rows, table.weight, None
    if traced is None:
        weights = weights * np.array(known)[table.degree]
    else:
        # Queries have one factor more: f, from rows appended to their table of powers.
        by_row = _cut(traced, 2, query_size)
        extra = 1 + width * degree + table.degree[..., None].astype(np.int32)
        query_rows = np.concatenate([table.rows, extra], axis=-1)
    query_blocks = (_cut(query, 2, query_size), by_row)
    # Padding adds nothing: k^0 = 1, but its value is 0.
    key_blocks = [
        (_cut(key, 2, block), _cut(value, 1, block))
        for key, value, block in zip(keys, values, key_sizes, strict=True)
    ]

    einsum = functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=dtype
    )
    recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
    alike = lambda array: match_varying(array, query, *keys, *values)
    zeros = alike(jnp.zeros((groups, size, features), dtype))

    def over_all(chunk: Any) -> Array:
        rows, query_rows, weight = chunk

        def add(total: Array, now: Any) -> tuple[Array, None]:
            return total + recomputed(term)(now), None

        def term(now: Any) -> Array:
            key, value = now
            return einsum("gas,gse->gae", _products(key, degree, rows), value)

        def evaluate(_: None, now: Any) -> tuple[None, Array]:
            found = _products(now[0], degree, query_rows, now[1])
            return None, einsum("gae,gat->get", sums, found)

        sums = weight[None, :, None]
        for blocks in key_blocks:
            sums = sums * lax.scan(add, zeros, blocks)[0]
        return lax.scan(recomputed(evaluate), None, query_blocks)[1]

    def over_the_past(chunk: Any) -> Array:
        rows, query_rows, weight = chunk

        def step(states: list[Array], now: Any) -> tuple[list[Array], Array]:
            (query, by_row), keys = now
            sums, after = weight[None, :, None, None], []
            for state, (key, value) in zip(states, keys, strict=True):
                terms = _products(key, degree, rows)[..., None] * value[:, None]
                # Not a product with a triangular matrix: 0 * inf of a later key is NaN.
                of_axis = state[:, :, None] + lax.cumsum(terms, axis=2)
                after.append(of_axis[:, :, -1])
                sums = sums * of_axis
            found = _products(query, degree, query_rows, by_row)
            found = found.reshape(groups, size, -1, per_key)
            out = einsum("gate,gatn->getn", sums, found)
            return after, out.reshape(groups, features, -1)

        blocks = (query_blocks, key_blocks)
        return lax.scan(recomputed(step), [zeros] * len(keys), blocks)[1]

    contribution = recomputed(over_the_past if is_causal else over_all)
    total = (query_blocks[0].shape[0], groups, features, query_blocks[0].shape[-1])
    chunks = (table.rows, query_rows, weights.astype(dtype))
    total, _ = lax.scan(
        lambda total, chunk: (total + contribution(chunk), None),
        alike(jnp.zeros(total, dtype)),
        chunks,
    )
    total = jnp.moveaxis(total, 0, 2).reshape(groups, features, -1)
    return total[..., :columns]


def _block(length: int, per_token: int) -> int:
    """Number of tokens per block, so that its monomials fit the cache."""
    most = max(TILE // per_token, LEAST_BLOCK)
    return -(-length // -(-length // most))


def _cut(array: Array, axis: int, size: int) -> Array:
    """Cuts an axis into blocks on a new first axis; the last is padded with zeros."""
    count = -(-array.shape[axis] // size)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count * size - array.shape[axis])
    array = jnp.pad(array, widths)
    shape = (*array.shape[:axis], count, size, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _products(
    features: Array, degree: int, rows: Array, more: Array | None = None
) -> Array:
    """Monomials: (groups, H, columns), (size, factors) -> (groups, size, columns)."""
    table = _powers(features, degree)
    if more is not None:
        table = jnp.concatenate([table, more], axis=1)
    factors = (
        table.at[:, rows[:, i]].get(mode="promise_in_bounds")
        for i in range(rows.shape[1])
    )
    return functools.reduce(jnp.multiply, factors)


def _powers(features: Array, degree: int) -> Array:
    """1, then powers x_c^a: (groups, H, columns) -> (groups, 1 + H degree, columns)."""
    groups, width, columns = features.shape
    ones = jnp.ones_like(features, shape=(groups, 1, columns))
    if not degree or not width:
        return ones
    found = [features]
    while len(found) < degree:
        found.append(found[-1] * features)
    table = jnp.stack(found, axis=2).reshape(groups, width * degree, columns)
    return jnp.concatenate([ones, table], axis=1)
