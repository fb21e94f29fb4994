"""Softmax and logsumexp of the last axis, in the widest float NumPy has."""

import numpy as np


def softmax(x, where=True):
    """0 where an entry does not count, and everywhere in a row where none does."""
    z = np.where(where, np.asarray(x, np.longdouble), -np.inf)
    top = z.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(z - np.where(top == -np.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def logsumexp(x, where=True):
    z = np.where(where, np.asarray(x, np.longdouble), -np.inf)
    top = z.max(-1, initial=-np.inf)
    safe = np.where(top == -np.inf, 0, top)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(z - safe[..., None]).sum(-1))


def log_softmax(x, where=True):
    z = np.where(where, np.asarray(x, np.longdouble), -np.inf)
    lse = logsumexp(x, where)
    return z - np.where(lse == -np.inf, 0, lse)[..., None]


def softmax_pullback(x, cotangent, where=True):
    p = softmax(x, where)
    given = np.where(p > 0, np.asarray(cotangent, np.longdouble), 0)
    return p * (given - (p * given).sum(-1, keepdims=True))
