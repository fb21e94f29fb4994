"""Cross-entropy and its companions with their gradients: NumPy, float64, closed forms.

Per row, over the C columns that `class_where` selects, p = softmax(z), label y:

    log_prob = log p_y              its gradient  [y] - p
    entropy = -sum p log p          -p (log p + entropy)
    lse                             p
    loss = (1 - e) (-log p_y) + e mean(-log p) + c lse^2
                                    p - (1 - e) [y] - e / C + 2 c lse p

and for a distribution q instead of a label, -sum q log p in the place of -log p_y. Rows
where `where` is False give 0 and False; rows without a selected finite logit give loss,
log_prob and entropy 0 and lse -inf; a label outside [0, V) gives NaN, one on a column
that is not selected loss +inf; in all of these the gradient is 0.
"""

import numpy as np

from .row_statistics import Result, evaluate, exact, product, selected, softmax

OUTPUTS = ("loss", "log_prob", "entropy", "lse", "correct")


def token_metrics(
    labels=None,
    *,
    label_smoothing=0.0,
    logsumexp_penalty=0.0,
    class_where=None,
    where=None,
    cotangents=None,
    **source,
) -> Result:
    """All outputs by name, and the gradients for `cotangents` by name.

    Integer labels have the batch shape, floating ones a class axis more; `source` goes
    to `evaluate`.
    """
    name = "logits" if source.get("logits") is not None else "hidden"
    data = exact(source[name])
    batch = data.shape[:-1]
    keep = np.broadcast_to(True if where is None else where, batch)
    # What a masked row holds has no influence, not even as NaN times 0.
    source[name] = np.where(keep[..., None], data, 0)
    per_row = {"keep": keep}
    if labels is not None:
        per_row["labels"] = np.asarray(labels)
    if class_where is not None and np.ndim(class_where) > 1:
        per_row["class_where"] = np.broadcast_to(class_where, data.shape)
    for output, g in (cotangents or {}).items():
        per_row["g_" + output] = exact(g)

    def function(z, keep, labels=None, class_where=class_where, **g):
        columns = selected(z, class_where)
        classes = np.maximum(columns.sum(axis=1), 1)
        p, lse = softmax(z, columns)
        alive = keep if np.iscomplexobj(z) else keep & (lse > -np.inf)
        safe = np.where(alive, lse, 0)
        log_p = np.where(columns, z - safe[:, None], 0)
        entropy = -product(p, log_p).sum(axis=1)
        by_row = lambda output: g.get("g_" + output, np.zeros(len(z)))[:, None]

        values = {
            "lse": np.where(keep, lse, 0),
            "entropy": np.where(alive, entropy, 0),
        }
        slope = product(p, log_p + entropy[:, None])
        dz = by_row("lse") * p * keep[:, None]
        dz = dz - by_row("entropy") * np.where(alive[:, None], slope, 0)
        if labels is not None:
            target, outside = _target(labels, z.shape[1], keep)
            outside = outside & alive
            excluded = ((target != 0) & ~columns).any(axis=1)
            infinite = alive & ~outside & excluded
            valid = alive & ~outside & ~infinite
            log_prob = product(target, log_p).sum(axis=1)
            e, c = label_smoothing, logsumexp_penalty
            loss = -(1 - e) * log_prob + c * safe**2
            if e:
                loss = loss - e * log_p.sum(axis=1) / classes
            for output, value, worst in (
                ("loss", loss, np.inf),
                ("log_prob", log_prob, -np.inf),
            ):
                value = np.where(valid, value, 0)
                value = np.where(infinite, worst, value)
                values[output] = np.where(outside, np.nan, value)
            top = np.where(columns, z.real, -np.inf).argmax(axis=1)
            values["correct"] = valid & (target.argmax(axis=1) == top)

            mass = target.sum(axis=1, keepdims=True)
            d_loss = p * ((1 - e) * mass + e + 2 * c * safe[:, None])
            d_loss = d_loss - (1 - e) * target - e * columns / classes[:, None]
            both = by_row("loss") * d_loss + by_row("log_prob") * (target - mass * p)
            dz = dz + np.where(valid[:, None], both, 0)
        return values, None if cotangents is None else dz

    return evaluate(function, per_row, **source)


def _target(labels, count, keep):
    """The distribution that the labels stand for, and the rows that have none."""
    if np.issubdtype(labels.dtype, np.integer):
        inside = (labels >= 0) & (labels < count)
        return (np.arange(count) == labels[:, None]) * 1.0, ~inside
    return np.where(keep[:, None], exact(labels), 0), np.zeros_like(keep)
