"""Softplus attention in float64, row by row, in the order of the printed formulas."""

from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    out: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    weights: np.ndarray


def softplus_attention(
    query,
    key,
    value,
    allowed,
    cotangent,
    *,
    power=None,
    offset_rows=3,
    normalize_qk=True,
    scale=None,
) -> Found:
    """Arrays (B, T, N, H), (B, S, K, H), (B, S, K, E); `allowed` (B, N, T, S)."""
    query, key, value, cotangent = (
        np.asarray(x, np.float64) for x in (query, key, value, cotangent)
    )
    batch, length, heads, size = query.shape
    groups = heads // key.shape[2]
    allowed = np.broadcast_to(allowed, (batch, heads, length, key.shape[1]))
    out = np.zeros((batch, length, heads, value.shape[-1]))
    weights = np.zeros(allowed.shape)
    dq, dk, dv = map(np.zeros_like, (query, key, value))
    for b, n, i in np.ndindex(batch, heads, length):
        keys = np.flatnonzero(allowed[b, n, i])
        count = len(keys)
        offset = 0.0 if count <= offset_rows else 1.0
        if count == 0:
            continue
        head = n // groups
        q, k, v = query[b, i, n], key[b, keys, head], value[b, keys, head]
        q_norm = np.linalg.norm(q) if normalize_qk else 1.0
        k_norm = np.linalg.norm(k, axis=1) if normalize_qk else np.ones(count)
        q_hat, k_hat = q / q_norm, k / k_norm[:, None]
        factor = np.log(size) * np.log(count) if scale is None else scale
        s = factor * k_hat @ q_hat
        phi = np.logaddexp(s, 0)
        first = phi / phi.sum()  # A, the first normalisation
        if power is None:
            w = first
        else:
            entries = np.maximum(count * first - offset, 0) ** power
            if entries.sum() == 0:
                continue
            w = entries / entries.sum()
        weights[b, n, i, keys] = w
        out[b, i, n] = w @ v
        # Backward, through both normalisations one after the other.
        dw = v @ cotangent[b, i, n]
        if power is None:
            d_first = dw
        else:
            base = np.maximum(count * first - offset, 0)
            d_entries = (dw - w @ dw) / (base**power).sum()
            d_first = d_entries * power * base ** (power - 1) * (base > 0) * count
        d_phi = (d_first - first @ d_first) / phi.sum()
        ds = d_phi / (1 + np.exp(-s))
        dv[b, keys, head] += w[:, None] * cotangent[b, i, n]
        dq_hat, dk_hat = factor * ds @ k_hat, factor * ds[:, None] * q_hat
        if normalize_qk:
            dq_hat = (dq_hat - q_hat * (q_hat @ dq_hat)) / q_norm
            along = (k_hat * dk_hat).sum(1, keepdims=True)
            dk_hat = (dk_hat - k_hat * along) / k_norm[:, None]
        dq[b, i, n] += dq_hat
        dk[b, keys, head] += dk_hat
    return Found(out, dq, dk, dv, weights)
