"""Linear systems with varying parameters, by their kernels: NumPy, float64, loops.

Nothing here carries a state. Every output is the sum over the past of its definition,

    y_i = 1 / eta_i sum_{j <= i} a_{j+1} ... a_i score(q_i, k_j) v_j

with products of decays taken factor by factor.
"""

import math

import numpy as np


def exact(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def dot(q, k):
    return q @ k


def elu1(q, k):
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    return phi(q) @ phi(k)


def relu(q, k):
    return np.maximum(q, 0) @ np.maximum(k, 0)


def exponential(q, k):
    return np.exp(q) @ np.exp(k)


def taylor(order):
    return lambda q, k: sum((q @ k) ** r / math.factorial(r) for r in range(order + 1))


SCORES = {
    "elu1": elu1,
    "relu": relu,
    "exp": exponential,
    "identity": dot,
    "taylor2": taylor(2),
    "taylor3": taylor(3),
}


def attention_matrix(
    query, key, *, score, eta="sum", is_causal=True, log_decay=None, mask=None
):
    """(*batch, N, T, S) for `eta` "sum", "none" or an array (*batch, T, N)."""
    query, key = map(exact, (query, key))
    *batch, length, heads, _ = query.shape
    key_length, key_heads = key.shape[-3:-1]
    matrix = np.zeros((*batch, heads, length, key_length))
    for place in np.ndindex(*batch, heads):
        *b, n = place
        k = n * key_heads // heads
        kept = np.ones(key_length, bool) if mask is None else np.asarray(mask)[*b]
        decay = np.ones(key_length)
        if log_decay is not None:
            own = exact(log_decay)[*b]
            decay = np.exp(own[:, n if own.shape[-1] == heads else k])
        for i in range(length):
            for j in range(i + 1 if is_causal else key_length):
                if not kept[j]:
                    continue
                between = [decay[m] for m in range(j + 1, i + 1) if kept[m]]
                matrix[*place, i, j] = math.prod(between) * score(
                    query[*b, i, n], key[*b, j, k]
                )
            row = matrix[*place, i]
            if isinstance(eta, str):
                total = row.sum() if eta == "sum" else 1.0
                row[:] = row / total if total else 0
            else:
                row[:] = row / exact(eta)[*b, i, n]
    return matrix


def linear_attention(query, key, value, **options):
    matrix = attention_matrix(query, key, **options)
    value = exact(value)
    groups = matrix.shape[-3] // value.shape[-2]
    # An absent token has the coefficient 0, and no value.
    if options.get("mask") is not None:
        value = np.where(np.asarray(options["mask"])[..., None, None], value, 0)
    return np.einsum("...nts,...snd->...tnd", matrix, np.repeat(value, groups, -2))


def softmax_attention(query, key, value):
    """Causal, scale 1; (T, H), (T, H), (T, D)."""
    query, key, value = map(exact, (query, key, value))
    weights = np.tril(np.exp(query @ key.T))
    return weights @ value / weights.sum(1, keepdims=True)


def linear_recurrence(decay, inputs, *, initial_state=None, axis=0, reverse=False):
    """All states, as sums over the past: the initial state is one more input."""
    decay, inputs = map(exact, (decay, inputs))
    decay = np.moveaxis(np.broadcast_to(decay, inputs.shape), axis, 0)
    inputs = np.moveaxis(inputs, axis, 0)
    if reverse:
        decay, inputs = decay[::-1], inputs[::-1]
    states = np.zeros(inputs.shape)
    for i in range(len(inputs)):
        for j in range(i + 1):
            states[i] += np.prod(decay[j + 1 : i + 1], axis=0) * inputs[j]
        if initial_state is not None:
            states[i] += np.prod(decay[: i + 1], axis=0) * exact(initial_state)
    return np.moveaxis(states[::-1] if reverse else states, 0, axis)


def selective_scan_matrix(delta, A, B, C, D=None):
    """(*batch, channels, T, T)."""
    delta, A, B, C = map(exact, (delta, A, B, C))
    *batch, length, channels = delta.shape
    matrix = np.zeros((*batch, channels, length, length))
    for place in np.ndindex(*batch, channels, length):
        *b, d, i = place
        for j in range(i + 1):
            steps = delta[*b, j + 1 : i + 1, d]
            decay = np.prod(np.exp(-steps[:, None] * A[d]), axis=0)
            matrix[*place, j] = (C[*b, i] * decay * B[*b, j]).sum() * delta[*b, j, d]
        if D is not None:
            matrix[*place, i] += exact(D)[d]
    return matrix


def selective_scan(u, delta, A, B, C, D=None):
    matrix = selective_scan_matrix(delta, A, B, C, D)
    return np.einsum("...dts,...sd->...td", matrix, exact(u))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def quasi_lstm(f, i, o, z, *, alpha=None):
    """The decay is the power itself of the reversed gate, not its logarithm."""
    f, i, o, z = map(exact, (f, i, o, z))
    decay = sigmoid(f) if alpha is None else sigmoid(-f) ** exact(alpha)
    return sigmoid(o) * linear_recurrence(decay, sigmoid(i) * z, axis=-2)
