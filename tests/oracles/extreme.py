r"""Losses of rows with many positives, and their gradients: NumPy, float64, loops.

For a row of scores z, the columns that count and the set P of its positives:

    decoupled    sum_(l in P) w_l log(1 + sum_(j not in P) exp(z_j - z_l)),  w = 1 / |P|
    multilabel   sum_(l in P) log sum_j exp(z_j - z_l)
    one_versus_all  sum_(l in P) w_l log(1 + exp(-z_l))
                 + sum_(j not in P) log(1 + exp(z_j))
    soft_top_k   -sum_(l in P) w_l log sigma(alpha (z_l + t)),  sum_j sigma(..) = k

Gradients are written down, not differentiated. A row without positives is 0 in all but
one-versus-all; a row with an id that is no class is NaN, with gradient 0; one with a
positive on a column that does not count is infinite, with gradient 0.
"""

from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    loss: float
    gradient: np.ndarray  # by the scores
    by_weights: dict  # by column


def _of_weights(positives, weights, each):
    if weights is None:
        return {l: (1.0 if each else 1.0 / len(positives)) for l in positives}
    return weights


def decoupled(z, columns, positives, weights=None):
    negatives = [j for j in range(len(z)) if columns[j] and j not in positives]
    loss, dz, dw = 0.0, np.zeros(len(z)), {}
    for l, w in _of_weights(positives, weights, False).items():
        if not negatives:
            continue
        if not columns[l]:
            loss += np.inf if w else 0.0
            continue
        top = max(z[j] for j in [*negatives, l])
        mass = {j: np.exp(z[j] - top) for j in negatives}
        total = sum(mass.values()) + np.exp(z[l] - top)
        ratio = np.logaddexp.reduce([z[j] - z[l] for j in negatives])
        cost = np.logaddexp(0, ratio)
        loss, dw[l] = loss + w * cost, cost
        for j in negatives:
            dz[j] += w * mass[j] / total
            dz[l] -= w * mass[j] / total
    return Row(loss, dz, dw)


def multilabel(z, columns, positives, weights=None):
    every = [j for j in range(len(z)) if columns[j]]
    loss, dz = 0.0, np.zeros(len(z))
    for l in positives:
        if not every:
            continue
        if not columns[l]:
            loss = np.inf
            continue
        ratios = {j: np.exp(z[j] - z[l]) for j in every}
        loss += np.log(sum(ratios.values()))
        for j in every:
            dz[j] += ratios[j] / sum(ratios.values())
        dz[l] -= 1
    return Row(loss, dz, {})


def one_versus_all(z, columns, positives, weights=None):
    loss, dz, dw = 0.0, np.zeros(len(z)), {}
    for j in range(len(z)):
        if columns[j] and j not in positives:
            loss += np.logaddexp(0, z[j])
            dz[j] = np.exp(-np.logaddexp(0, -z[j]))
    for l, w in _of_weights(positives, weights, True).items():
        if not any(columns):
            continue
        if not columns[l]:
            loss += np.inf if w else 0.0
            continue
        dw[l] = np.logaddexp(0, -z[l])
        loss += w * dw[l]
        dz[l] -= w * np.exp(-np.logaddexp(0, z[l]))
    return Row(loss, dz, dw)


def soft_top_k(z, columns, positives, weights=None, *, k=None, alpha=1.0):
    every = [j for j in range(len(z)) if columns[j]]
    k = len(positives) if k is None else k
    low, high = -1e3 - max(z[every]), 1e3 - min(z[every])
    for _ in range(200):
        t = (low + high) / 2
        total = sum(np.exp(-np.logaddexp(0, -alpha * (z[j] + t))) for j in every)
        low, high = (low, t) if total > k else (t, high)
    chosen = {j: np.exp(-np.logaddexp(0, -alpha * (z[j] + t))) for j in every}
    slopes = {j: p * (1 - p) for j, p in chosen.items()}
    loss, dz, dw = 0.0, np.zeros(len(z)), {}
    for l, w in _of_weights(positives, weights, False).items():
        if not columns[l]:
            loss += np.inf if w else 0.0
            continue
        dw[l] = np.logaddexp(0, -alpha * (z[l] + t))
        loss += w * dw[l]
        factor = w * alpha * (1 - chosen[l])
        dz[l] -= factor
        for j in every:
            dz[j] += factor * slopes[j] / sum(slopes.values())
    return Row(loss, dz, dw)


def losses_of(loss, z, ids, *, weights=None, class_where=None, where=None, **options):
    """Of rows of scores (N, V) with lists of ids (N, K); by row, and by argument.

    -1 in a list is nothing. Weights have the shape of the lists.
    """
    z = np.asarray(z, np.float64)
    count, classes = z.shape
    columns = np.ones(classes, bool) if class_where is None else class_where
    columns = np.broadcast_to(columns, z.shape)
    keep = np.broadcast_to(True if where is None else where, (count,))
    values, dz = np.zeros(count), np.zeros(z.shape)
    dw = np.zeros(np.shape(ids))
    for i in range(count):
        places = {int(l): p for p, l in enumerate(ids[i]) if l != -1}
        needed = loss is not one_versus_all
        if not keep[i] or (needed and not places):
            continue
        if any(not 0 <= l < classes for l in places):
            values[i] = np.nan
            continue
        given = None
        if weights is not None:
            given = {l: float(weights[i][p]) for l, p in places.items()}
        found = loss(z[i], columns[i], list(places), given, **options)
        values[i] = found.loss
        if np.isinf(found.loss):
            continue
        dz[i] = found.gradient
        for l, slope in found.by_weights.items():
            dw[i, places[l]] = slope
    return values, dz, dw


# ------------------------------------------------------------------------ in one batch
def triplet(s, positives, margin, k, tau=None):
    """In-batch triplet losses, per row."""
    found = []
    for i, row in enumerate(np.asarray(s, np.float64)):
        others = sorted(x for x, own in zip(row, positives[i], strict=True) if not own)
        hardest = others[::-1][:k]
        costs = [max(0.0, x - row[i] + margin) for x in hardest]
        if tau is None:
            found.append(sum(costs) / max(1, len(costs)))
            continue
        top = max(hardest, default=0.0)
        pairs = list(zip(hardest, costs, strict=True))
        shares = [np.exp((x - top) / tau) if c > 0 else 0.0 for x, c in pairs]
        total = sum(share * c for share, (_, c) in zip(shares, pairs, strict=True))
        found.append(total / sum(shares) if sum(shares) else 0.0)
    return np.array(found)


# ------------------------------------------------------------------------------ metrics
def propensities(counts, total, a, b):
    c = (np.log(total) - 1) * (b + 1) ** a
    return np.array([1 / (1 + c * np.exp(-a * np.log(n + b))) for n in counts])


def ranking_scores(ranking, positives, inverse, k):
    """P@k and R@k by row, and PSP@k of all."""
    precision, recall, gained, best = [], [], 0.0, 0.0
    for first, labels in zip(ranking, positives, strict=True):
        right = {int(l) for l in labels if l >= 0}
        hits = [int(l) for l in first[:k] if int(l) in right]
        precision.append(len(hits) / k)
        recall.append(len(hits) / len(right) if right else 0.0)
        gained += sum(inverse[l] for l in hits)
        best += sum(sorted((inverse[l] for l in right), reverse=True)[:k])
    return np.array(precision), np.array(recall), gained / best if best else 0.0
