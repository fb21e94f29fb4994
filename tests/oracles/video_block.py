"""A pre-norm transformer block over the tokens of a video: NumPy, token by token."""

import numpy as np


def layer_norm(x, parameters, eps=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * parameters["scale"] + parameters["bias"]


def rms_norm(x, parameters, eps=1e-6):
    size = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x / size * parameters["scale"]


def linear(x, parameters):
    return x @ parameters["kernel"] + parameters["bias"]


def gelu(x):
    """The approximation by tanh."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x, position, base):
    """One token, (heads, H): pair p holds the features p and p + H / 2.

    The first pairs turn with the frame, as many as are left over by two thirds of the
    pairs, rounded down; then a third with the row and a third with the column.
    """
    pairs = x.shape[-1] // 2
    third = pairs // 3
    numbers = x[:, :pairs] + 1j * x[:, pairs:]
    at = 0
    for place, count in zip(position, (pairs - 2 * third, third, third), strict=True):
        for i in range(count):
            numbers[:, at] *= np.exp(1j * place * base ** (-i / count))
            at += 1
    return np.concatenate((numbers.real, numbers.imag), -1)


def block(tokens, parameters, *, heads, key_heads, grid, mask, base):
    """(length, D) -> (length, D); mask is (length, length); base None: not rotated."""
    rows, columns = grid
    length = len(tokens)
    x = layer_norm(tokens, parameters["attention_norm"])
    query, key, value = (
        linear(x, parameters[name]).reshape(length, count, -1)
        for name, count in (("query", heads), ("key", key_heads), ("value", key_heads))
    )
    if "query_norm" in parameters:
        query = rms_norm(query, parameters["query_norm"])
        key = rms_norm(key, parameters["key_norm"])
    if base is not None:
        for token in range(length):
            frame, place = divmod(token, rows * columns)
            position = (frame, *divmod(place, columns))
            query[token] = rotate(query[token], position, base)
            key[token] = rotate(key[token], position, base)
    attended = np.zeros_like(query)
    for i in range(length):
        seen = np.flatnonzero(mask[i])
        for head in range(heads):
            of_key = head // (heads // key_heads)
            scores = key[seen, of_key] @ query[i, head] / np.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max(initial=-np.inf))
            total = weights.sum()
            if total > 0:
                attended[i, head] = weights @ value[seen, of_key] / total
    tokens = tokens + linear(attended.reshape(length, -1), parameters["out"])
    hidden = gelu(
        linear(layer_norm(tokens, parameters["mlp_norm"]), parameters["mlp_in"])
    )
    return tokens + linear(hidden, parameters["mlp_out"])
