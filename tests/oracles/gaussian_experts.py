"""Gaussian mixtures of experts in float64: one example and one expert at a time."""

import itertools
import math

import numpy as np

from . import gates


def gate_of(x, experts, top_k=None, bias_in="weights", activation=None, scaled=True):
    """Of one example; `experts` are the six parameters, the temperature last."""
    weight, bias, *_, tau = (np.asarray(each, np.float64) for each in experts)
    scores = np.array([row @ np.asarray(x, np.float64) for row in weight])
    scores = scores if activation is None else activation(scores)
    inner = bias if scaled else tau * bias
    k = len(scores) if top_k is None else top_k
    return gates.top_k((scores / tau)[None], k, (inner / tau)[None], bias_in)[0][0]


def joint(x, y, experts, **gate):
    """Gate times normal density of one example, per expert."""
    _, _, slopes, bias, scale, _ = (np.asarray(each, np.float64) for each in experts)
    x, y = np.asarray(x, np.float64), float(y)
    shares = gate_of(x, experts, **gate)
    found = []
    for g, a, b, s in zip(shares, slopes, bias, scale, strict=True):
        z = (y - a @ x - b) / s
        found.append(g * math.exp(-z * z / 2) / (s * math.sqrt(2 * math.pi)))
    return np.array(found)


def log_density(x, y, experts, **gate):
    pairs = zip(np.asarray(x), np.asarray(y), strict=True)
    return np.array([math.log(joint(*pair, experts, **gate).sum()) for pair in pairs])


def responsibilities(x, y, experts, **gate):
    pairs = zip(np.asarray(x), np.asarray(y), strict=True)
    found = [joint(*pair, experts, **gate) for pair in pairs]
    return np.array([each / each.sum() for each in found])


def m_step(x, y, shares):
    """Slopes, intercepts, scales by the normal equations."""
    x, y, shares = (np.asarray(each, np.float64) for each in (x, y, shares))
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    slopes, intercepts, scales = [], [], []
    for r in shares.T:
        fitted = np.linalg.solve(rows.T @ (r[:, None] * rows), rows.T @ (r * y))
        rest = y - rows @ fitted
        slopes.append(fitted[:-1])
        intercepts.append(fitted[-1])
        scales.append(math.sqrt((r * rest**2).sum() / r.sum()))
    return np.array(slopes), np.array(intercepts), np.array(scales)


def voronoi_loss(fitted, true, k, powers=None):
    """`powers`: size of a cell -> r; None: the exactly specified loss."""
    fitted, true = ([np.asarray(e, np.float64) for e in s] for s in (fitted, true))
    atom = lambda s, i: np.concatenate([s[0][i], s[2][i], [s[3][i]], [s[4][i]]])
    count, stars = len(fitted[1]), len(true[1])
    cells = [
        min(
            range(stars),
            key=lambda j, i=i: np.linalg.norm(atom(fitted, i) - atom(true, j)),
        )
        for i in range(count)
    ]
    terms = []
    for j in range(stars):
        members = [i for i in range(count) if cells[i] == j]
        r = 1 if powers is None or len(members) < 2 else powers[len(members)]
        half = 1 if r == 1 else r / 2
        total = abs(sum(np.exp(fitted[1][i]) for i in members) - np.exp(true[1][j]))
        for i in members:
            total += np.exp(fitted[1][i]) * (
                np.linalg.norm(fitted[0][i] - true[0][j]) ** r
                + np.linalg.norm(fitted[2][i] - true[2][j]) ** half
                + abs(fitted[3][i] - true[3][j]) ** r
                + abs(fitted[4][i] - true[4][j]) ** half
            )
        terms.append(total)
    subsets = itertools.combinations(range(stars), k)
    return max(sum(terms[j] for j in subset) for subset in subsets), cells
