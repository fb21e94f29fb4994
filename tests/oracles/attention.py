"""Attention with its gradients, of all pairs at once: NumPy, float64, closed forms.

With scores z = c tanh(s q k / c) + bias, a positive f that counts as 0 where a pair
does not attend, and perhaps a sink, one more weight without a value,

    F = sum_j f(z_j) + exp(sink),    p_j = f(z_j) / F,    out = sum_j p_j v_j,
    lse = log F,    dz_j = f'(z_j) / F (g_out (v_j - out) + g_lse)

and the sink has the derivative exp(sink) / F (g_lse - g_out out).
"""

from typing import NamedTuple

import numpy as np


class Attended(NamedTuple):
    out: np.ndarray
    lse: np.ndarray
    weights: np.ndarray  # p, (B, N, T, S)
    gradients: dict[str, np.ndarray]


def attention(
    query,
    key,
    value,
    *,
    allowed=True,
    bias=None,
    scale=None,
    softcap=None,
    sinks=None,
    normalizer="softmax",
    g_out=None,
    g_lse=None,
):
    """`allowed` and `bias` broadcast to (B, N, T, S); everything else has its shape."""
    wide = lambda a: np.asarray(a, np.float64)
    shared = query.shape[2] // key.shape[2]
    q, k, v = wide(query), wide(key), wide(value)
    k, v = (np.repeat(a, shared, axis=2) for a in (k, v))  # a key head per query head
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    raw = np.einsum("btnh,bsnh->bnts", q, k)
    z, bent = scale * raw, 1.0
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
        bent = 1 - (z / softcap) ** 2
    if bias is not None:
        z = z + wide(bias)
    z = np.where(allowed, z, -np.inf)

    shift = np.zeros(z.shape[:-1])
    if normalizer == "softmax":
        shift = np.max(z, axis=-1, initial=-np.inf)
        if sinks is not None:
            shift = np.maximum(shift, wide(sinks)[None, :, None])
        shift = np.where(shift == -np.inf, 0, shift)
    f, slope = positive(normalizer, z - shift[..., None])
    total = f.sum(-1)
    sink = 0.0
    if sinks is not None:
        sink = np.exp(wide(sinks)[None, :, None] - shift)
        total = total + sink
    safe = np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)
    p, slope = f / safe[..., None], slope / safe[..., None]
    out = np.einsum("bnts,bsne->btne", p, v)
    found = out, np.moveaxis(lse, 1, 2), p
    if g_out is None:
        return Attended(*found, {})

    g_out, g_lse = wide(g_out), np.moveaxis(wide(g_lse), 2, 1)
    g_p = np.einsum("btne,bsne->bnts", g_out, v)
    delta = np.einsum("btne,btne->bnt", g_out, out) - g_lse
    dz = slope * (g_p - delta[..., None])
    du = dz * bent
    per_key_head = lambda a: a.reshape(*key.shape[:3], shared, a.shape[-1]).sum(3)
    gradients = {
        "query": scale * np.einsum("bnts,bsnh->btnh", du, k),
        "key": per_key_head(scale * np.einsum("bnts,btnh->bsnh", du, q)),
        "value": per_key_head(np.einsum("bnts,btne->bsne", p, g_out)),
        "scale": (du * raw).sum(),
    }
    if bias is not None:
        narrow = [axis for axis in range(4) if bias.shape[axis] == 1]
        gradients["bias"] = dz.sum(tuple(narrow), keepdims=True)
    if sinks is not None:
        gradients["sinks"] = -(sink / safe * delta).sum((0, 2))
    return Attended(*found, gradients)


def positive(normalizer, z):
    """The function of the scores and its derivative; both 0 at -inf."""
    if normalizer == "softmax":
        return np.exp(z), np.exp(z)
    if normalizer == "softplus":
        return np.logaddexp(0, z), np.exp(-np.logaddexp(0, -z))
    assert normalizer == "stablemax"
    below = 1 / (1 + np.abs(z))
    return np.where(z >= 0, 1 + z, below), np.where(z >= 0, 1.0, below**2)
