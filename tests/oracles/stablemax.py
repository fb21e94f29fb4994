"""StableMax, its cross-entropy and perpendicular gradients: brute force in float64.

With s(x) = x + 1 from 0 on and 1 / (1 - x) below, entry by entry from the definition:

    stablemax(x)_i = s(x_i) / sum_j s(x_j)        over the entries that count
    loss(z, y) = log(sum_j s(z_j) / s(z_y)) = log(1 + sum_(j != y) s(z_j) / s(z_y))
    loss(z, q) = -sum_k q_k log stablemax(z)_k    0 for a mass of 0
    dloss/dz_k = (sum(q) p_k - q_k) / (1 + |z_k|)

and for a weight w with its gradient g, each one long vector,

    perpendicular = g - <w, g> / (<w, w> + eps) w     g where w = 0

scaled to the norm of g if asked to.
"""

import numpy as np


def s(x):
    x = np.asarray(x, np.float64)
    return np.array([v + 1 if v >= 0 else 1 / (1 - v) for v in x.ravel()]).reshape(
        x.shape
    )


def log_s(x):
    x = np.asarray(x, np.float64)
    return np.array(
        [np.log1p(v) if v >= 0 else -np.log1p(-v) for v in x.ravel()]
    ).reshape(x.shape)


def stablemax(x, axis=-1, where=None):
    """P and log p."""
    kept = np.ones(np.shape(x), bool) if where is None else where
    kept = np.broadcast_to(kept, np.shape(x)) & (np.asarray(x) != -np.inf)
    inside = np.where(kept, x, 0)
    weights = np.where(kept, s(inside), 0)
    total = weights.sum(axis, keepdims=True)
    total = np.where(total == 0, 1, total)
    return weights / total, np.where(kept, log_s(inside) - np.log(total), -np.inf)


def stablemax_gradient(x, cotangent, log_cotangent, axis=-1, where=None):
    """Of sum(cotangent p) + sum(log_cotangent log p), over the entries that count."""
    p, _ = stablemax(x, axis, where)
    kept = p > 0
    inside = np.where(kept, x, 0)
    cotangent = np.asarray(cotangent, np.float64)
    log_cotangent = np.asarray(log_cotangent, np.float64)
    of_p = p * (cotangent - (p * cotangent).sum(axis, keepdims=True))
    asked = np.where(kept, log_cotangent, 0)
    of_log = asked - p * asked.sum(axis, keepdims=True)
    return np.where(kept, (of_p + of_log) / (1 + np.abs(inside)), 0)


def cross_entropy(logits, labels, class_where=None):
    """Loss per row of (N, V) logits and its gradient; labels (N,) ids, or (N, V)."""
    logits = np.asarray(logits, np.float64)
    kept = np.ones(logits.shape, bool) if class_where is None else class_where
    kept = np.broadcast_to(kept, logits.shape) & (logits != -np.inf)
    losses, gradients = np.zeros(len(logits)), np.zeros(logits.shape)
    for row, z in enumerate(logits):
        columns = np.flatnonzero(kept[row])
        if len(columns) == 0:
            continue
        weights, distances = s(z[columns]), 1 + np.abs(z[columns])
        if np.ndim(labels) == 1:
            own = columns == labels[row]
            rest = weights[~own].sum()
            losses[row] = np.log1p(rest / weights[own][0])
            # Without cancellation too: p_y - 1 is -rest / sum.
            slope = np.where(own, -rest, weights) / weights.sum()
        else:
            q, p = labels[row][columns], weights / weights.sum()
            asked = q != 0
            log_p = log_s(z[columns]) - np.log(weights.sum())
            losses[row] = -(q * np.where(asked, log_p, 0)).sum()
            slope = q.sum() * p - q
        gradients[row, columns] = slope / distances
    return losses, gradients


def perpendicular(weight, gradient, *, rescale=False, epsilon=0.0, axes=None):
    w, g = np.asarray(weight, np.float64), np.asarray(gradient, np.float64)
    dot = lambda a, b: (a * b).sum(axis=axes, keepdims=True)
    square = dot(w, w) + epsilon
    found = g - dot(w, g) / np.where(square == 0, 1, square) * w
    if rescale:
        norm = np.sqrt(dot(found, found))
        found = found * np.sqrt(dot(g, g)) / np.where(norm == 0, 1, norm)
    return found
