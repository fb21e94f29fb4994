"""The edit-invariant sequence loss: loops over n-grams and places, NumPy, float64.

log_probs (T, S): that of target token s at position t. With g[i, j] the mean of
log_probs[i + k, j + k] over k < n, for the windows whose positions and tokens all
count, and w[:, j] the softmax of g[:, j],

    softmax    L_n = -mean_j sum_i w[i, j] g[i, j]
    logsumexp  L_n = -mean_j log sum_i exp g[i, j]
"""

import numpy as np


def log_probs_of(logits, labels, floor):
    """(T, S) of logits (T, V) and labels (S,)."""
    top = logits.max(axis=1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return np.maximum((logits - lse)[:, labels], floor)


def n_gram_loss(log_probs, n, mode, where, label_where):
    positions, tokens = log_probs.shape
    per_n_gram = []
    for j in range(tokens - n + 1):
        if not label_where[j : j + n].all():
            continue
        g = np.array(
            [
                np.mean([log_probs[i + k, j + k] for k in range(n)])
                for i in range(positions - n + 1)
                if where[i : i + n].all()
            ]
        )
        if len(g) == 0:
            continue
        e = np.exp(g - g.max())
        if mode == "softmax":
            per_n_gram.append((e / e.sum() * g).sum())
        else:
            per_n_gram.append(g.max() + np.log(e.sum()))
    return -np.mean(per_n_gram) if per_n_gram else 0.0


def loss(logits, labels, ngrams, weights, mode, floor, where, label_where):
    """Of one example."""
    log_probs = log_probs_of(logits, labels, floor)
    return sum(
        weight * n_gram_loss(log_probs, n, mode, where, label_where)
        for weight, n in zip(weights, ngrams, strict=True)
    )


def gradient(function, array, step=1e-6):
    """Central differences, element by element."""
    found = np.zeros_like(array)
    for place in np.ndindex(array.shape):
        more, less = array.copy(), array.copy()
        more[place] += step
        less[place] -= step
        found[place] = (function(more) - function(less)) / (2 * step)
    return found
