"""Losses of the label's probability, with their gradients: NumPy, float64.

With p the softmax over the selected columns, p_y that of the label and r the sum of the
others (so that 1 - p_y does not cancel):

    focal            -r^gamma log p_y
    comp_sum         ((1 + u)^(1 - tau) - 1) / (1 - tau), log(1 + u) for tau = 1,
                     with u = sum_(k != y) exp(z_k - z_y)
    generalized      (1 - p_y^q) / q
    absolute         r
    poly1            -log p_y + epsilon r
    symmetric        -alpha log p_y - beta A r

Each has the gradient c (p - [y]) with its own number c per row. A row that `where`
drops is 0, a label outside [0, V) is NaN, a row without a finite selected logit is 0, a
label on a column that is not selected costs the limit for p_y = 0; the gradient with
respect to the logits is 0 in all of these.
"""

import numpy as np

from .row_statistics import Result, evaluate, exact, selected, softmax


def focal(p, r, gamma):
    value = -(r**gamma) * np.log(p)
    c = r**gamma - gamma * p * np.log(p) * r ** (gamma - 1)
    return value, c, {"gamma": value * np.log(r)}


def comp_sum(p, r, tau):
    u = r / p
    s = 1 - tau
    if s == 0:
        return np.log1p(u), np.ones_like(p), {"tau": -(np.log1p(u) ** 2) / 2}
    power = (1 + u) ** s
    slope = (power * np.log1p(u) * s - (power - 1)) / s**2  # with respect to s
    return (power - 1) / s, p**-s, {"tau": -slope}


def generalized(p, r, q):
    power = p**q
    slope = -(power * np.log(p) * q + 1 - power) / q**2
    return (1 - power) / q, power, {"q": slope}


def absolute(p, r):
    return r, p, {}


def poly1(p, r, epsilon):
    return -np.log(p) + epsilon * r, 1 + epsilon * p, {"epsilon": r}


def symmetric(p, r, alpha, beta, log_zero):
    value = -alpha * np.log(p) - beta * log_zero * r
    slopes = {"alpha": -np.log(p), "beta": -log_zero * r, "log_zero": -beta * r}
    return value, alpha - beta * log_zero * p, slopes


def smooth_adversarial(z, moved, labels, tau, rho, nu):
    """The comp-sum loss of z / rho, and nu times how far the margins are moved.

    Of matrices; row by row, margin by margin.
    """
    found = np.zeros(len(z), np.result_type(z, moved, *map(np.asarray, (tau, rho, nu))))
    for row, label in enumerate(labels):
        others = np.arange(z.shape[1]) != label
        margins = z[row, label] - z[row, others]
        change = moved[row, label] - moved[row, others] - margins
        total, power = np.exp(-margins / rho).sum(), 1 - tau
        loss = np.log1p(total) if power == 0 else ((1 + total) ** power - 1) / power
        found[row] = loss + nu * np.sqrt((change**2).sum())
    return found


def limit(loss, parameters):
    """What p_y = 0 costs, and the slopes of that in the parameters."""
    if loss is absolute:
        return 1.0, {}
    a = {comp_sum: parameters.get("tau", 1) - 1, generalized: parameters.get("q", 0)}
    exponent = a.get(loss, 0)
    if np.real(exponent) > 0:
        return 1 / exponent, {next(iter(parameters)): -1 / exponent**2}
    return np.inf, {}


def label_loss(
    loss,
    labels,
    parameters,
    *,
    class_weights=None,
    class_where=None,
    where=None,
    cotangent=None,
    **source,
) -> Result:
    """Values {"loss"}; gradients by argument, those of parameters and weights too.

    Without a cotangent (one per row), no gradients.
    """
    name = "logits" if source.get("logits") is not None else "hidden"
    data = exact(source[name])
    batch = data.shape[:-1]
    keep = np.broadcast_to(True if where is None else where, batch)
    source[name] = np.where(keep[..., None], data, 0)
    g = np.ones(batch) if cotangent is None else exact(cotangent)
    per_row = {"keep": keep, "labels": np.asarray(labels), "g": g}
    factors = np.ones(1) if class_weights is None else exact(class_weights)

    def function(z, keep, labels, g):
        count = z.shape[1]
        columns = selected(z, class_where)
        p, lse = softmax(z, columns)
        alive = keep & (lse.real > -np.inf)
        outside = alive & ((labels < 0) | (labels >= count))
        label = np.where((labels < 0) | (labels >= count), 0, labels)
        rows = np.arange(len(z))
        impossible = alive & ~outside & ~columns[rows, label]
        valid = alive & ~outside & ~impossible
        onehot = np.arange(count) == label[:, None]
        p_label = np.where(valid, p[rows, label], 0.5)
        others = np.where(valid, np.where(onehot, 0, p).sum(axis=1), 0.5)
        value, c, slopes = loss(p_label, others, **parameters)
        worst, worst_slopes = limit(loss, parameters)

        a = factors[label] if class_weights is not None else np.ones(len(z))
        total = np.where(valid, a * value, 0)
        infinite = a * worst if np.isfinite(worst) else np.where(a == 0, 0, np.inf)
        total = np.where(impossible, infinite, total)
        values = {"loss": np.where(outside, np.nan, total)}
        for name, slope in slopes.items():
            at_limit = a * worst_slopes.get(name, 0.0)
            values[name] = g * np.where(valid, a * slope, at_limit * impossible)
        if class_weights is not None:
            bare = np.where(valid, value, 0)
            values["class_weights"] = (g * bare)[:, None] * onehot
        dz = np.where(valid, g * a * c, 0)[:, None] * (p - onehot)
        return values, None if cotangent is None else dz

    found = evaluate(function, per_row, **source)
    values, gradients = {"loss": found.values["loss"]}, dict(found.gradients)
    if cotangent is None:
        return Result(values, {})
    for name, per_row_slope in found.values.items():
        if name == "class_weights":
            gradients[name] = per_row_slope.reshape(-1, len(factors)).sum(axis=0)
        elif name != "loss":
            gradients[name] = per_row_slope.sum()
    return Result(values, gradients)
