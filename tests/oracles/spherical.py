"""Losses of the spherical family with their gradients, and their head: NumPy, float64.

Row by row over the selected columns with finite logits, o of them n, y the label:

    z                softplus(a (b - s)) / a,  s = (o_y - mean) / sqrt(var + epsilon)
    log_spherical    -log((o_y^2 + epsilon) / sum (o^2 + epsilon))
    log_taylor       -log((1 + o_y + o_y^2 / 2) / sum (1 + o + o^2 / 2))
    squared_error    sum (o - [y])^2

A row that `where` drops is 0, a label outside [0, V) NaN, a row without a column 0, a
label on a column that is not selected +inf; the gradient is 0 in all of these.
"""

import numpy as np

from .row_statistics import Result, evaluate, exact, selected


def z(o, onehot, a, b, epsilon):
    n, mean = len(o), o.mean()
    sigma = np.sqrt(((o - mean) ** 2).mean() + epsilon)
    score = (o[onehot][0] - mean) / sigma
    u = a * (b - score)
    value = np.logaddexp(0, u) / a
    slope = 1 / (1 + np.exp(-u))
    of_score = (onehot - 1 / n) / sigma - score * (o - mean) / (n * sigma**2)
    slopes = {
        "a": (slope * (b - score) - value) / a,
        "b": slope,
        "epsilon": slope * score / (2 * sigma**2),
    }
    return value, -slope * of_score, slopes


def log_spherical(o, onehot, epsilon):
    own, every = o[onehot][0] ** 2 + epsilon, o**2 + epsilon
    gradient = 2 * o / every.sum() - onehot * 2 * o / own
    slopes = {"epsilon": len(o) / every.sum() - 1 / own}
    return np.log(every.sum()) - np.log(own), gradient, slopes


def log_taylor(o, onehot):
    every = 1 + o + o**2 / 2
    own = every[onehot][0]
    gradient = (1 + o) / every.sum() - onehot * (1 + o) / own
    return np.log(every.sum()) - np.log(own), gradient, {}


def squared_error(o, onehot):
    return ((o - onehot) ** 2).sum(), 2 * (o - onehot), {}


def spherical_loss(
    loss, labels, parameters, *, class_where=None, where=None, cotangent=None, **source
) -> Result:
    """Values {"loss"}; gradients by argument, those of parameters too."""
    name = "logits" if source.get("logits") is not None else "hidden"
    data = exact(source[name])
    batch = data.shape[:-1]
    keep = np.broadcast_to(True if where is None else where, batch)
    source[name] = np.where(keep[..., None], data, 0)
    g = np.ones(batch) if cotangent is None else exact(cotangent)
    per_row = {"keep": keep, "labels": np.asarray(labels), "g": g}

    def function(logits, keep, labels, g):
        columns = selected(logits, class_where) & (logits > -np.inf)
        values = {"loss": np.zeros(len(logits))}
        values |= {name: np.zeros(len(logits)) for name in parameters}
        dz = np.zeros(logits.shape)
        for row, label in enumerate(labels):
            if not keep[row]:
                continue
            chosen = columns[row]
            if not 0 <= label < logits.shape[1]:
                values["loss"][row] = np.nan
            elif not chosen.any():
                continue
            elif not chosen[label]:
                values["loss"][row] = np.inf
            else:
                onehot = np.flatnonzero(chosen) == label
                value, slope, slopes = loss(logits[row, chosen], onehot, **parameters)
                values["loss"][row] = value
                dz[row, chosen] = g[row] * slope
                for parameter, of_parameter in slopes.items():
                    values[parameter][row] = g[row] * of_parameter
        return values, dz

    found = evaluate(function, per_row, **source)
    gradients = dict(found.gradients)
    gradients |= {name: found.values[name].sum() for name in parameters}
    return Result({"loss": found.values["loss"]}, gradients)


def sgd(loss, weight, hidden, labels, parameters, learning_rate, weight_decay=0.0):
    """Loss per row, gradient of hidden of the mean, and the weight after a step."""
    found = spherical_loss(
        loss,
        labels,
        parameters,
        hidden=hidden,
        weight=weight,
        cotangent=np.full(len(labels), 1 / len(labels)),
    )
    gradient = found.gradients["weight"] + weight_decay * weight
    after = weight - learning_rate * gradient
    return found.values["loss"], found.gradients["hidden"], after
