"""Attention to a cache with its gradients, row by row: NumPy, float64, closed forms.

For a query q and the keys k_j it sees, z_j = c tanh(s q k_j / c), a sink z_0 without a
value, p the softmax of all z,

    out = sum_j p_j v_j,   lse = log sum exp z,   dz_j = p_j (g_out (v_j - out) + g_lse)

and dz_0 = p_0 (g_lse - g_out out).
"""

from typing import NamedTuple

import numpy as np


class Decoded(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    max_score: np.ndarray
    min_score: np.ndarray
    gradients: dict[str, np.ndarray]

    def outside(self, phi, valid_range, criterion="row_max"):
        """Which rows a unified maximum does not serve."""
        a, b = valid_range
        with np.errstate(invalid="ignore"):
            good = (a < self.max_score - phi) & (self.max_score - phi < b)
            if criterion == "elementwise":
                good &= a < self.min_score - phi
        return ~good & (self.max_score > -np.inf)


def decode(
    query,
    key,
    value,
    *,
    lengths=None,
    is_causal=False,
    scale=None,
    softcap=None,
    sinks=None,
    g_out=None,
    g_lse=None,
):
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    batch, queries, heads, size = query.shape
    shared = heads // key.shape[2]
    scale = size**-0.5 if scale is None else float(scale)
    rows = (batch, queries, heads)
    out = np.zeros((*rows, value.shape[-1]))
    lse, top, least = (np.full(rows, sign * np.inf) for sign in (-1, -1, 1))
    zeros = lambda a: np.zeros(np.shape(a))
    d = {"query": zeros(query), "key": zeros(key), "value": zeros(value)}
    d |= {"scale": np.zeros(()), "sinks": np.zeros(heads)}
    for b, t, n in np.ndindex(rows):
        seen = key.shape[1] if lengths is None else int(lengths[b])
        if is_causal:
            seen = max(0, seen - queries + 1 + t)
        sink = None if sinks is None else float(sinks[n])
        if seen == 0:
            lse[b, t, n] = -np.inf if sink is None else sink
            if sink is not None and g_lse is not None:
                d["sinks"][n] += g_lse[b, t, n]
            continue
        k, v = key[b, :seen, n // shared], value[b, :seen, n // shared]
        raw = k @ query[b, t, n]
        cap = softcap
        z = scale * raw if cap is None else cap * np.tanh(scale * raw / cap)
        slope = 1 if cap is None else 1 - (z / cap) ** 2
        top[b, t, n], least[b, t, n] = z.max(), z.min()
        everything = z if sink is None else np.append(z, sink)
        shift = everything.max()
        total = np.exp(everything - shift).sum()
        lse[b, t, n] = shift + np.log(total)
        p = np.exp(z - shift) / total
        out[b, t, n] = p @ v
        if g_out is None or g_lse is None:
            continue
        go, gl = g_out[b, t, n], g_lse[b, t, n]
        du = p * ((v - out[b, t, n]) @ go + gl) * slope
        d["query"][b, t, n] += scale * du @ k
        d["key"][b, :seen, n // shared] += scale * np.outer(du, query[b, t, n])
        d["value"][b, :seen, n // shared] += np.outer(p, go)
        d["scale"] += du @ raw
        if sink is not None:
            d["sinks"][n] += np.exp(sink - lse[b, t, n]) * (gl - go @ out[b, t, n])
    return Decoded(out, lse, top, least, d)
