"""Divergences of two softmax distributions and distillation: NumPy, float64.

With p the softmax of the target's logits and q that of the own ones over the columns
that both select, in nats per row:

    kl              sum p log(p / q)
                    dz_q = q - p                    dz_p = p (log(p / q) - KL)
    cross_entropy   -sum p log q
                    dz_q = q - p                    dz_p = -p (log q + H)
    jensen_shannon  w KL(p || m) + (1 - w) KL(q || m),  m = w p + (1 - w) q
                    dz_p = w p (log(p / m) - KL(p || m)),  dz_q alike
                    dw = KL(p || m) - KL(q || m)

A row that `where` drops, and one without a column, is 0 with gradient 0.
"""

import numpy as np

from .row_statistics import evaluate, exact, selected, softmax


def kl(p, q, w=None):
    ratio = _log_ratio(p, q)
    value = (p * ratio).sum(1)
    return value, p * (ratio - value[:, None]), q - p, None


def cross_entropy(p, q, w=None):
    log_q = np.log(np.where(p > 0, q, 1))
    value = -(p * log_q).sum(1)
    return value, -p * (log_q + value[:, None]), q - p, None


def jensen_shannon(p, q, w):
    m = w * p + (1 - w) * q
    of_p, of_q = _log_ratio(p, m), _log_ratio(q, m)
    kl_p, kl_q = (p * of_p).sum(1), (q * of_q).sum(1)
    return (
        w * kl_p + (1 - w) * kl_q,
        w * p * (of_p - kl_p[:, None]),
        (1 - w) * q * (of_q - kl_q[:, None]),
        kl_p - kl_q,
    )


def divergence(
    function,
    own,
    target,
    *,
    mixture=None,
    reverse=False,
    class_where=None,
    excluded_labels=None,
    where=None,
    cotangent=None,
):
    """The value per row and the gradients of each source, and of the mixture.

    `own` and `target` are keyword arguments of `row_statistics.evaluate`.
    """
    own, target = _masked(own, where), _masked(target, where)
    z = [_logits(source) for source in (own, target)]
    batch = z[0].shape[:-1]
    keep = np.broadcast_to(True if where is None else where, batch)
    g = np.ones(batch) if cotangent is None else exact(cotangent)
    z_own, z_target = (a.reshape(-1, a.shape[-1]) for a in z)
    columns = selected(z_own, class_where).copy()
    if excluded_labels is not None:
        for row, labels in enumerate(
            excluded_labels.reshape(-1, excluded_labels.shape[-1])
        ):
            for label in labels:
                if 0 <= label < columns.shape[1]:
                    columns[row, label] = False
    q, lse_q = softmax(z_own, columns)
    p, lse_p = softmax(z_target, columns)
    alive = keep.reshape(-1) & np.isfinite(lse_q) & np.isfinite(lse_p)
    first, second = (q, p) if reverse else (p, q)
    value, d_first, d_second, d_mixture = function(first, second, mixture)
    flat = g.reshape(-1)
    scaled = lambda dz: np.where(alive[:, None], flat[:, None] * dz, 0).reshape(
        z[0].shape
    )
    d_target, d_own = (d_second, d_first) if reverse else (d_first, d_second)
    gradients = [
        evaluate(lambda z, dz: ({}, dz), {"dz": scaled(dz)}, **source).gradients
        for source, dz in ((own, d_own), (target, d_target))
    ]
    dw = 0 if d_mixture is None else np.where(alive, flat * d_mixture, 0).sum()
    return np.where(alive, value, 0).reshape(batch), *gradients, dw


def normalized_distillation(z, teacher, labels, temperature, gamma):
    """Of matrices of logits."""
    rows = np.arange(len(z))
    others = np.arange(z.shape[1]) != labels[:, None]
    every = np.ones(z.shape, bool)
    s, t = softmax(z, every)[0][rows, labels], softmax(teacher, every)[0][rows, labels]
    q, p = (softmax(a / temperature, others)[0] for a in (z, teacher))
    return -t * np.log(s) + gamma * temperature**2 * cross_entropy(p, q)[0]


def decoupled_distillation(z, teacher, labels, alpha, beta, temperature):
    rows = np.arange(len(z))
    others = np.arange(z.shape[1]) != labels[:, None]
    every = np.ones(z.shape, bool)
    s, t = (softmax(a / temperature, every)[0][rows, labels] for a in (z, teacher))
    binary = t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))
    q, p = (softmax(a / temperature, others)[0] for a in (z, teacher))
    return temperature**2 * (alpha * binary + beta * kl(p, q)[0])


def self_distillation(z, weak, labels, alpha, beta, mu, smoothing):
    """The three terms, for class ids or distributions mixed of two classes."""
    count, classes = z.shape
    every = np.ones(z.shape, bool)
    s, w = softmax(z, every)[0], softmax(weak, every)[0]
    values = np.eye(classes)[labels] if labels.ndim == 1 else labels
    top = np.argsort(-values, axis=1, kind="stable")[:, : labels.ndim]
    target, other = np.zeros(count), np.zeros(count)
    squares = np.take_along_axis(s, top, 1) ** 2
    for row in range(count):
        own = [k for k in top[row] if values[row, k] > 0]
        for place, k in enumerate(top[row]):
            if values[row, k] > 0:
                soft = squares[row, place] + values[row, k] - squares[:, place].mean()
                target[row] -= soft * np.log(s[row, k])
        rest = [k for k in range(classes) if k not in own]
        score = w[row] / (1 - w[row, own].sum()) + s[row] / (1 - s[row, own].sum())
        zipf = zipf_labels(score, own)
        log_rest = np.log(s[row] / s[row, rest].sum())
        other[row] = -(zipf[rest] * log_rest[rest]).sum()
    smooth = (1 - smoothing) * values + smoothing / classes
    return alpha * target, beta * other, -mu * (smooth * np.log(w)).sum(1)


def zipf_labels(scores, own):
    """Of one row: 1 / rank among all classes, without those of `own`."""
    found = np.zeros(len(scores))
    for rank, k in enumerate(np.argsort(-scores, kind="stable"), start=1):
        found[k] = 0 if k in own else 1 / rank
    return found / found.sum()


def _log_ratio(p, q):
    """Log(p / q), 0 where p is 0."""
    some = p > 0
    with np.errstate(divide="ignore"):
        return np.where(some, np.log(np.where(some, p, 1)) - np.log(q), 0) * some


def _logits(source):
    return evaluate(lambda z: ({"z": z}, None), {}, **source).values["z"]


def _masked(source, where):
    if where is None:
        return source
    name = "logits" if "logits" in source else "hidden"
    data = exact(source[name])
    keep = np.broadcast_to(where, data.shape[:-1])
    return {**source, name: np.where(keep[..., None], data, 0)}
