"""Attention on small arrays, under masks that are told to library and oracle apart.

Arguments and results are arrays of NumPy: what a test does with them compiles nothing.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from softlib import attention, masks
from tests.host import jnp
from tests.oracles import masks as pairs
from tests.oracles.attention import attention as dense

ARRAYS = ("query", "key", "value", "scale", "bias", "sinks")


class Shape(NamedTuple):
    T: int = 21
    S: int = 27
    H: int = 6
    E: int = 5
    N: int = 4
    K: int = 2
    B: int = 2


class Given(NamedTuple):
    """A mask as keyword arguments of the library, and as pairs that attend."""

    options: dict[str, Any]
    allowed: Any


def problem(
    shape=None, dtype="float32", *, scale=None, bias=None, sinks=False, seed=0
) -> dict[str, Any]:
    """Rounded arrays by name, with scores of a few units.

    `scale` is "traced" or a number, `bias` its axes out of "bnts", then perhaps "-" for
    some entries of -inf.
    """
    shape = shape or Shape()
    random = np.random.default_rng(seed)
    T, S, H, E, N, K, B = shape
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, E)}
    draw = lambda shape: np.asarray(random.normal(size=shape), jnp.dtype(dtype))
    arrays = {name: draw(shape) for name, shape in shapes.items()}
    wide = "float64" if dtype == "float64" else "float32"
    if scale == "traced":
        arrays["scale"] = np.asarray(1.3 * H**-0.5, wide)
    if sinks:
        arrays["sinks"] = draw((N,)).astype(wide)
    if bias is not None:
        sizes = zip("bnts", (B, N, T, S), strict=True)
        array = draw(tuple(n if axis in bias else 1 for axis, n in sizes))
        if "-" in bias:
            dropped = random.random(array.shape) < 0.2
            array = np.where(dropped, -np.inf, array).astype(array.dtype)
        arrays["bias"] = array
    return arrays


def planted(array, index, value) -> Any:
    """A copy with a value at an index."""
    copy = array.copy()
    copy[index] = value
    return copy


def mask(name, shape):
    """A mask by name; `late` and `lengths` leave rows and columns without a pair."""
    random = np.random.default_rng(7)
    T, S, _, _, N, _, B = shape
    grid = lambda keeps: pairs.dense(keeps, range(T), range(S))[None, None]
    if name == "none":
        return Given({}, True)
    if name == "causal":
        return Given({"mask": masks.Causal()}, grid(pairs.causal()))
    if name == "window":
        keeps = pairs.window(9, 4)
        return Given({"mask": masks.Window(9, 4)}, grid(keeps))
    if name == "late":  # no key for the first queries, no query for the last keys
        late = masks.Causal(-T // 2) & masks.Window(None, 0)
        return Given({"mask": late}, grid(pairs.causal(-T // 2)))
    if name == "radial":
        keeps = pairs.radial(8, 1, 1.0, 0, "paper")
        return Given({"mask": masks.Radial(8)}, grid(keeps))
    if name == "segments":
        # The last id of the queries and that of the keys stand alone.
        query, key = (
            np.array(ids)[(np.arange(n) + 2 * np.arange(B)[:, None]) * 5 // (n + 2 * B)]
            for ids, n in (([0, 1, 1, 2, 3], T), ([0, 1, 2, 2, 4], S))
        )
        allowed = query[:, :, None] == key[:, None]
        value = masks.Segments(*map(jax.device_put, (query, key)))
        return Given({"mask": value}, allowed[:, None])
    if name == "lengths":
        query, key = np.array([T, (T + 1) // 2]), np.array([0, (S + 1) // 2])
        inside = [
            np.arange(n) < length[:, None] for n, length in ((T, query), (S, key))
        ]
        allowed = inside[0][:, None, :, None] & inside[1][:, None, None]
        lengths = {"query_seq_lengths": query, "key_value_seq_lengths": key}
        return Given(jax.device_put(lengths), allowed)
    assert name == "array"
    allowed = random.random((1, N, T, S)) < 0.7
    return Given({"mask": jax.device_put(allowed)}, allowed)


def oracle(arrays, **options):
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    return dense(**arrays, **options)


def cotangents(arrays, seed=1):
    """Of both results; that of the output rounded as the library gets it."""
    random = np.random.default_rng(seed)
    query, value = arrays["query"], arrays["value"]
    g_out = random.normal(size=(*query.shape[:-1], value.shape[-1]))
    g_lse = random.normal(size=query.shape[:-1])
    return np.asarray(np.asarray(g_out, query.dtype), np.float64), g_lse


def attended(arrays, traced=None, **options):
    """(out, lse), compiled; `traced` are keyword arguments that are operands."""

    @jax.jit
    def call(arrays, traced):
        return attention.dot_product_attention(
            **arrays, **traced, return_lse=True, **options
        )

    return jax.device_get(call(arrays, traced or {}))


def with_gradients(arrays, g_out, g_lse, traced=None, **options):
    """(out, lse) and the gradients of all arrays, compiled."""

    @jax.jit
    def call(arrays, traced, g_out, g_lse):
        function = lambda arrays: attention.dot_product_attention(
            **arrays, **traced, return_lse=True, **options
        )
        results, pull = jax.vjp(function, arrays)
        given = (g_out, g_lse)
        cast = (g.astype(r.dtype) for g, r in zip(given, results, strict=True))
        (gradients,) = pull(type(results)(*cast))
        return results, gradients

    return jax.device_get(call(arrays, traced or {}, g_out, g_lse))
