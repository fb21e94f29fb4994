"""Caches of several sequences, and what the library and the oracle make of them.

Arguments and results are arrays of NumPy: what a test does with them compiles nothing.
"""

import functools
from typing import Any

import jax
import numpy as np

from softlib import attention
from tests.host import jnp
from tests.oracles.decode import decode

LENGTHS = (11, 1, 0, 7)
FLOATING = ("query", "key", "value", "scale", "sinks")


def problem(
    dtype="float32", *, T=1, N=4, K=2, S=11, H=6, Hv=5, B=4, sinks=False, seed=0
) -> dict[str, Any]:
    """Rounded arrays by name; with scores of a few units."""
    random = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, Hv)}
    arrays = {
        name: np.asarray(1.5 * random.normal(size=shape), jnp.dtype(dtype))
        for name, shape in shapes.items()
    }
    wide = "float64" if dtype == "float64" else "float32"
    arrays["scale"] = np.asarray(0.4, wide)
    if sinks:
        arrays["sinks"] = np.asarray(random.normal(size=N), wide)
    return arrays


def oracle(arrays, **options):
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    return decode(**arrays, **options)


def decoded(arrays, lengths=None, **options):
    """(output, whole result), compiled once per set of static options and shapes."""
    traced, static = _sorted(lengths, options)
    return jax.device_get(_decoded(arrays, traced, static))


def gradients(arrays, lengths, g_out, g_lse, **options):
    """Of the sum of both results with these cotangents, by argument, compiled."""
    traced, static = _sorted(lengths, options)
    dtype = jnp.promote_types(arrays["query"].dtype, jnp.float32)
    cotangents = np.asarray(g_out, dtype), np.asarray(g_lse, dtype)
    return jax.device_get(_gradients(arrays, traced, cotangents, static))


def _sorted(lengths, options):
    options = dict(options)
    traced = {n: options.pop(n) for n in ("phi", "valid_range") if n in options}
    if lengths is not None:
        traced["key_value_seq_lengths"] = np.asarray(lengths, np.int32)
    return traced, tuple(sorted(options.items()))


@functools.partial(jax.jit, static_argnums=2)
def _decoded(arrays, traced, static):
    found = attention.decode_attention(
        **arrays, **traced, **dict(static), return_statistics=True
    )
    return found.output, found


@functools.partial(jax.jit, static_argnums=3)
@jax.grad
def _gradients(arrays, traced, cotangents, static):
    out, lse = attention.decode_attention(
        **arrays, **traced, **dict(static), return_lse=True
    )
    g_out, g_lse = cotangents
    # An empty row has the lse -inf, which has no slope.
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    return (out.astype(lse.dtype) * g_out).sum() + (lse * g_lse).sum()
