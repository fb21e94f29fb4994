"""Cross-entropy of a codebook head by brute force: all V logits, NumPy, float64.

z_i = cap(scale h . c_M(i)) / T + b_i, the loss is log sum_i exp z_i - z_y, and its
gradient is followed back by hand, token by token. Also what the draws and the codes of
the head are compared with.
"""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    loss: np.ndarray
    logits: np.ndarray  # (rows, V)
    gradients: dict[str, np.ndarray]


def cross_entropy(
    hidden,
    codebook,
    mapping,
    labels,
    cotangent,
    *,
    token_bias=None,
    scale=1.0,
    softcap=None,
    temperature=1.0,
    where=None,
) -> Result:
    h, c = np.asarray(hidden, np.float64), np.asarray(codebook, np.float64)
    rows, tokens = len(h), len(mapping)
    bias = (
        np.zeros(tokens) if token_bias is None else np.asarray(token_bias, np.float64)
    )
    t = np.broadcast_to(np.asarray(temperature, np.float64), (rows,))
    where = np.ones(rows, bool) if where is None else where
    loss, logits = np.zeros(rows), np.full((rows, tokens), np.nan)
    gradients = {"hidden": np.zeros_like(h), "codebook": np.zeros_like(c)}
    gradients |= {"token_bias": np.zeros(tokens), "temperature": np.zeros(rows)}
    for r in range(rows):
        if not where[r]:
            continue
        z, slope, du = np.empty(tokens), np.empty(tokens), np.empty(tokens)
        for i, code in enumerate(mapping):
            u = scale * (h[r] @ c[code])
            cap, slope[i] = u, 1.0
            if softcap is not None:
                cap = softcap * np.tanh(u / softcap)
                slope[i] = 1 - np.tanh(u / softcap) ** 2
            du[i], z[i] = cap, cap / t[r] + bias[i]
        logits[r] = z
        y = labels[r]
        if not 0 <= y < tokens:
            loss[r] = np.nan
            continue
        top = z.max()
        p = np.exp(z - top)
        loss[r] = top + np.log(p.sum()) - z[y]
        dz = cotangent[r] * (p / p.sum() - (np.arange(tokens) == y))
        gradients["token_bias"] += dz
        gradients["temperature"][r] = -(dz * du).sum() / t[r] ** 2
        for i, code in enumerate(mapping):
            step = scale * slope[i] * dz[i] / t[r]
            gradients["hidden"][r] += step * c[code]
            gradients["codebook"][code] += step * h[r]
    return Result(loss, logits, gradients)


def nearest(embeddings, codebook):
    """The lowest of the nearest codes."""
    e, c = np.asarray(embeddings, np.float64), np.asarray(codebook, np.float64)
    return np.array([np.square(row - c).sum(1).argmin() for row in e])
