"""The answers of `problems`, from the oracles of the test suite: NumPy in float64.

Each returns the result and the gradients for the cotangent `g`, in the order in which
the problem differentiates.
"""

from typing import Any

import numpy as np

from tests.oracles import (
    attention as dense,
    decode as cached,
    kronecker,
    row_statistics as rows,
    softmax as maps,
)


def cross_entropy(arrays: list[np.ndarray], g: np.ndarray) -> list[np.ndarray]:
    hidden, weight, labels = arrays
    found = rows.row_statistics(
        labels,
        cotangents={"lse": g, "label_logits": -g},
        hidden=hidden,
        weight=weight,
    )
    loss = found.values["lse"] - found.values["label_logits"]
    return [loss, found.gradients["hidden"], found.gradients["weight"]]


def attention(
    arrays: list[np.ndarray],
    g: np.ndarray,
    *,
    mask: Any,
    queries: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The answer for some queries; gradients are exact if `g` is 0 at all others."""
    query, key, value = arrays
    chosen = np.arange(query.shape[1]) if queries is None else queries
    allowed = np.asarray(mask.attends(chosen[:, None], np.arange(key.shape[1])[None]))
    found = dense.attention(
        *(query[:, chosen], key, value),
        allowed=allowed,
        g_out=g[:, chosen],
        g_lse=np.zeros((len(query), len(chosen), query.shape[2])),
    )
    of_query = np.zeros_like(query)
    of_query[:, chosen] = found.gradients["query"]
    return [found.out, of_query, found.gradients["key"], found.gradients["value"]]


def decode(arrays: list[np.ndarray], g: np.ndarray) -> list[np.ndarray]:
    query, key, value, missing = arrays
    lengths = key.shape[1] - missing // 4
    return [cached.decode(query, key, value, lengths=lengths).out]


def simplicial(
    arrays: list[np.ndarray], g: np.ndarray, *, windows: tuple[int, int]
) -> list[np.ndarray]:
    query, key1, key2, value1, value2 = arrays
    place = np.arange(query.shape[1])
    behind = place[:, None] - place[None]
    first, second = ((behind >= 0) & (behind < window) for window in windows)
    found = kronecker.kronecker_attention(
        *(query, (key1, key2), (value1, value2)),
        allowed=first[:, :, None] & second[:, None],
        scale=query.shape[-1] ** -0.5,
        g_out=g,
        g_lse=np.zeros(query.shape[:3]),
    )
    gradients = found.gradients
    of_query, of_keys, of_values = (gradients[k] for k in ("query", "keys", "values"))
    return [found.out, of_query, *of_keys, *of_values]


def softmax(arrays: list[np.ndarray], g: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(maps.softmax(arrays[0]), np.float64)]


def logsumexp(arrays: list[np.ndarray], g: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(maps.logsumexp(arrays[0]), np.float64)]
