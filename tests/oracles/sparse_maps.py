"""Sparse and polynomial maps of scores (rows, V) and their losses: NumPy, longdouble.

Sparsemax and entmax 1.5 by sorting, the others by bisection on the threshold, each by
its definition. Entries of -inf do not count; a row without others is 0. Derivatives are
central differences of these.
"""

import fractions
import math

import numpy as np

STEPS = 200  # of bisection: more than the bits of a longdouble


def wide(z):
    return np.asarray(z, np.longdouble)


def _rows(function):
    """Applies a map of the finite scores of one row to each row."""

    def of_rows(z, *parameters):
        z = wide(z)
        p = np.zeros_like(z)
        per_row = [np.broadcast_to(wide(each), len(z)) for each in parameters]
        for i, row in enumerate(z):
            on = row > -np.inf
            if on.any():
                p[i, on] = function(row[on], *(each[i] for each in per_row))
        return p

    return of_rows


def _root(excess, low, high):
    """Where a falling function is 0."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return high


@_rows
def sparsemax(z):
    s = np.sort(z)[::-1]
    k = np.arange(1, len(s) + 1)
    last = np.flatnonzero(1 + k * s > np.cumsum(s))[-1]
    return np.maximum(z - (np.cumsum(s)[last] - 1) / (last + 1), 0)


@_rows
def entmax15(z):
    z = (z - z.max()) / 2
    s = np.sort(z)[::-1]
    k = np.arange(1, len(s) + 1)
    mean, square = np.cumsum(s) / k, np.cumsum(s**2) / k
    tau = mean - np.sqrt(np.maximum(0, (1 - k * (square - mean**2)) / k))
    return np.maximum(z - tau[np.flatnonzero(tau <= s)[-1]], 0) ** 2


@_rows
def entmax(z, alpha):
    d, s = z - z.max(), alpha - 1
    if s == 0:
        return np.exp(d) / np.exp(d).sum()

    def probabilities(level):  # -log of the largest
        y = s * np.exp(s * level) * d
        on = y > -1
        return np.where(on, np.exp(np.log1p(np.where(on, y, 0)) / s - level), 0)

    p = probabilities(_root(lambda x: probabilities(x).sum() - 1, 0, np.log(len(z))))
    return p / p.sum()


def tempered_softmax(z, t):
    return entmax(z, 2 - wide(t))


@_rows
def normmax(z, alpha):
    d, power = z - z.max(), 1 / (alpha - 1)
    weights = lambda tau: np.maximum(d - tau, 0) ** power
    q = weights(_root(lambda tau: (weights(tau) ** alpha).sum() - 1, -1, 0))
    return q / q.sum()


@_rows
def budget_sparsemax(z, budget):
    if budget >= len(z):
        return np.ones_like(z)
    clipped = lambda tau: np.clip(z - tau, 0, 1)
    return clipped(_root(lambda t: clipped(t).sum() - budget, z.min() - 1, z.max()))


def taylor_softmax(z, order):
    """Exact: in fractions, of which each float is one."""
    p = np.zeros(np.shape(z))
    for i, row in enumerate(np.asarray(z, np.float64)):
        on = row > -np.inf
        exact = [fractions.Fraction(float(x)) for x in row[on]]
        terms = [sum(x**k / math.factorial(k) for k in range(order + 1)) for x in exact]
        p[i, on] = [float(term / sum(terms)) for term in terms]
    return p


@_rows
def spherical_softmax(z, epsilon):
    return (z**2 + epsilon) / (z**2 + epsilon).sum()


def entropy(p, alpha):
    p, alpha = wide(p), wide(alpha)
    if alpha == 1:
        return -(p * np.log(np.where(p > 0, p, 1))).sum()
    return (1 - (p**alpha).sum()) / (alpha * (alpha - 1))


def distributions(labels, z):
    labels = np.asarray(labels)
    if labels.ndim == np.ndim(z):
        return wide(labels)
    return np.eye(np.shape(z)[-1], dtype=np.longdouble)[labels]


def entmax_loss(z, labels, alpha):
    """Of finite scores."""
    z, q = wide(z), distributions(labels, z)
    alpha = np.broadcast_to(wide(alpha), len(z))
    p = entmax(z, alpha)
    terms = zip(p, q, z, alpha, strict=True)
    return np.array(
        [entropy(p, a) - entropy(q, a) + ((p - q) * z).sum() for p, q, z, a in terms]
    )


def bi_tempered_loss(z, labels, t1, t2):
    """As it is printed, for labels with a probability above 0."""
    p, q, s = tempered_softmax(z, t2), distributions(labels, z), 1 - wide(t1)
    log = lambda x: np.log(x) if s == 0 else (x**s - 1) / s
    difference = log(np.where(q > 0, q, 1)) - log(np.where(q > 0, p, 1))
    return (q * difference - (q ** (1 + s) - p ** (1 + s)) / (1 + s)).sum(-1)


def directional(function, arguments, directions, step=1e-6):
    """The derivative of a function along directions, one for each argument."""
    moved = lambda h: function(
        *(wide(a) + h * wide(d) for a, d in zip(arguments, directions, strict=True))
    )
    return (moved(step) - moved(-step)) / (2 * step)
