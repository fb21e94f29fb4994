"""SDM in float64: similarity, distance and loss, point by point."""

import numpy as np


def log_sdm(logits, similarity, distance):
    """Natural logarithm; rows are the last axis, -inf entries do not count."""
    z = np.asarray(logits, np.float64)
    similarity = np.broadcast_to(similarity, z.shape[:-1])
    distance = np.broadcast_to(distance, z.shape[:-1])
    result = np.full(z.shape, -np.inf)
    for row in np.ndindex(z.shape[:-1]):
        of = np.flatnonzero(z[row] > -np.inf)
        if len(of):
            y = float(distance[row]) * z[row][of] * np.log(2 + float(similarity[row]))
            result[row][of] = y - np.logaddexp.reduce(y)
    return result


def similarity_depth(queries, keys, query_pred, key_pred, key_labels, exclude):
    depth, nearest = [], []
    for i, query in enumerate(np.asarray(queries, np.float64)):
        distance = [np.linalg.norm(key - query) for key in np.asarray(keys, np.float64)]
        order = sorted(range(len(distance)), key=lambda j: (distance[j], j))
        order = [j for j in order if j != exclude[i]]
        run = 0
        for j in order:
            if not key_pred[j] == key_labels[j] == query_pred[i]:
                break
            run += 1
        depth.append(run)
        nearest.append(distance[order[0]] if order else np.inf)
    return np.array(depth), np.array(nearest)


def distance_quantile(nearest, known, labels, where, classes):
    result = []
    for x in np.asarray(nearest, np.float64):
        shares = []
        for c in range(classes):
            own = [
                k for k, y, w in zip(known, labels, where, strict=True) if w and y == c
            ]
            share = sum(k < x for k in own) / len(own) if own else 1.0
            shares.append(1 - share)
        result.append(min(shares))
    return np.array(result)
