"""Cross-entropy with weights of classes and lists of labels: NumPy, float64.

Per row, over the C columns that `class_where` selects, for a target t_k >= 0 per class
of mass T = sum t, weights a_k of the classes, smoothing e and penalty c:

    s_k = (1 - e) t_k + e T / C        loss = sum_k a_k s_k (-log p_k) + c lse^2

with the gradients

    dz_k = p_k (sum_j a_j s_j + 2 c lse) - a_k s_k      da_k = s_k (-log p_k)
    dt_k = (1 - e) a_k (-log p_k) + e / C sum_j a_j (-log p_j)

Rows that `where` drops are 0, rows that `broken` marks NaN, rows without a finite
selected logit 0, rows with a_k t_k != 0 on a column that is not selected +inf; the
gradient of all of these is 0.
"""

import numpy as np

from .row_statistics import Result, evaluate, exact, product, selected, softmax


def target_of(labels, count, weights=None, kept=None):
    """The target (*batch, V) of class ids (*batch, L), and the rows that are broken.

    Without weights the kept labels of a row share a mass of 1.
    """
    labels = np.asarray(labels)
    kept = np.ones(labels.shape, bool) if kept is None else np.asarray(kept)
    target = np.zeros((*labels.shape[:-1], count))
    broken = np.zeros(labels.shape[:-1], bool)
    for place in np.ndindex(labels.shape):
        row, label = place[:-1], labels[place]
        if not kept[place]:
            continue
        if not 0 <= label < count:
            broken[row] = True
        elif weights is None:
            target[(*row, label)] += 1 / kept[row].sum()
        else:
            target[(*row, label)] += exact(weights)[place]
    return target, broken


def weighted_cross_entropy(
    target,
    *,
    class_weights=None,
    label_smoothing=0.0,
    logsumexp_penalty=0.0,
    class_where=None,
    where=None,
    broken=None,
    cotangent=None,
    **source,
) -> Result:
    """Values {"loss"}; gradients by argument, with `class_weights` and `target`.

    Without a cotangent (one per row), no gradients.
    """
    name = "logits" if source.get("logits") is not None else "hidden"
    data = exact(source[name])
    batch = data.shape[:-1]
    keep = np.broadcast_to(True if where is None else where, batch)
    source[name] = np.where(keep[..., None], data, 0)
    target = exact(target)
    count = target.shape[-1]
    a = np.ones(count) if class_weights is None else exact(class_weights)
    g = np.ones(batch) if cotangent is None else exact(cotangent)
    bad = np.zeros(batch, bool) if broken is None else np.asarray(broken)
    e, c = label_smoothing, logsumexp_penalty

    def function(z, keep, target, g, bad):
        columns = selected(z, class_where)
        classes = np.maximum(columns.sum(axis=1, keepdims=True), 1)
        p, lse = softmax(z, columns)
        alive = keep & (lse.real > -np.inf)
        bad = bad & alive
        infinite = alive & ~bad & ((a * target != 0) & ~columns).any(axis=1)
        valid = (alive & ~bad & ~infinite)[:, None]
        safe = np.where(alive, lse, 0)[:, None]
        cost = np.where(columns, safe - z, 0)  # -log p
        mass = target.sum(axis=1, keepdims=True)
        s = np.where(columns, (1 - e) * target + e * mass / classes, 0)
        loss = product(a * s, cost).sum(axis=1) + c * safe[:, 0] ** 2
        loss = np.where(infinite, np.inf, np.where(valid[:, 0], loss, 0))
        dz = p * ((a * s).sum(axis=1, keepdims=True) + 2 * c * safe) - a * s
        mean = product(a * columns, cost).sum(axis=1, keepdims=True) / classes
        g = np.where(valid, g[:, None], 0)
        return {
            "loss": np.where(bad, np.nan, loss),
            "class_weights": product(g * s, cost),
            "target": g * ((1 - e) * product(a * columns, cost) + e * mean),
        }, None if cotangent is None else g * dz

    per_row = {"keep": keep, "target": target, "g": g, "bad": bad}
    found = evaluate(function, per_row, **source)
    if cotangent is None:
        return Result({"loss": found.values["loss"]}, {})
    weights = found.values["class_weights"].reshape(-1, count).sum(axis=0)
    more = {"class_weights": weights, "target": found.values["target"]}
    return Result({"loss": found.values["loss"]}, {**found.gradients, **more})
