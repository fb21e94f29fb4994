"""Robust cross-entropy and contrastive losses row by row, in float64."""

import numpy as np


def _row(z, tau):
    """Softmax of z / tau, and its divergence from the uniform distribution."""
    e = np.exp((z - z.max()) / tau)
    w = e / e.sum()
    positive = w > 0
    return w, (w[positive] * np.log(w[positive])).sum() + np.log(len(z))


def robust(logits, labels, tau, rho, where=None, class_where=None):
    """Losses, and gradients of their sum in logits and temperatures."""
    logits = np.asarray(logits, np.float64)
    rows, classes = logits.shape
    where = np.ones(rows, bool) if where is None else where
    kept = np.arange(classes) if class_where is None else np.flatnonzero(class_where)
    tau = np.broadcast_to(np.asarray(tau, np.float64), rows)
    loss = np.zeros(rows)
    of_logits, of_tau = np.zeros((rows, classes)), np.zeros(rows)
    for i in np.flatnonzero(where):
        y = labels[i]
        if not 0 <= y < classes:
            loss[i] = np.nan
        elif len(kept) == 0:
            continue
        elif y not in kept:
            loss[i] = np.inf
        else:
            h = (logits[i, kept] - logits[i, y]) / tau[i]
            top = h.max()
            mean = top + np.log(np.mean(np.exp(h - top)))
            loss[i] = tau[i] * (mean + rho)
            w, divergence = _row(logits[i, kept], tau[i])
            of_logits[i, kept] = w
            of_logits[i, y] -= 1
            of_tau[i] = rho - divergence
    return loss, of_logits, of_tau


def best(logits, rho, low, high):
    """By bisection; the divergence falls with the temperature."""
    found = []
    for z in np.asarray(logits, np.float64):
        a, b = low, high
        for _ in range(60):
            middle = (a + b) / 2
            a, b = (middle, b) if _row(z, middle)[1] > rho else (a, middle)
        found.append((a + b) / 2)
    return np.array(found)


def best_slopes(logits, tau):
    """Of the best temperatures, by the implicit function: in logits, and in rho."""
    x = np.asarray(logits, np.float64) / tau[:, None]
    w = np.array([_row(row, 1.0)[0] for row in x])
    mean = (w * x).sum(1, keepdims=True)
    variance = (w * (x - mean) ** 2).sum(1, keepdims=True)
    return w * (x - mean) / variance, -tau / variance[:, 0]


def contrastive(similarity, row_tau, col_tau, rho, where=None):
    s = np.asarray(similarity, np.float64)
    pairs = len(s)
    where = np.ones(pairs, bool) if where is None else where

    def direction(s, tau):
        loss = np.zeros(pairs)
        for i in np.flatnonzero(where):
            others = [j for j in np.flatnonzero(where) if j != i]
            if others:
                h = np.array([(s[i, j] - s[i, i]) / tau[i] for j in others])
                mean = h.max() + np.log(np.mean(np.exp(h - h.max())))
                loss[i] = tau[i] * (mean + rho)
        return loss

    return direction(s, row_tau), direction(s.T, col_tau)
