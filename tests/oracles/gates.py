"""Gates, filters and soft top-k in float64, row by row, from their definitions.

A row is the last axis. -inf entries and those where `where` is False do not count.
"""

import numpy as np


def _wide(array):
    return np.asarray(array, np.float64)


def softmax(z):
    """0 for -inf; a row of -inf is 0."""
    if np.isnan(z).any() or (z == np.inf).any():
        return np.full(z.shape, np.nan)
    if not np.isfinite(z).any():
        return np.zeros(z.shape)
    e = np.exp(z - z.max())
    return e / e.sum()


def best(scores, k):
    """The first `k` indices in falling order of the scores, lower index first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in order[:k] if scores[i] > -np.inf]


def top_k(x, k, bias=None, bias_in="weights", renormalize=True, where=None):
    """Gates in the shape of `x`, and per row the chosen indices, best first."""
    x = _wide(x)
    bias = np.broadcast_to(0.0 if bias is None else _wide(bias), x.shape)
    where = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    gates, chosen = np.zeros(x.shape), {}
    for row in np.ndindex(x.shape[:-1]):
        z = np.where(where[row], x[row], -np.inf)
        b = np.where(z > -np.inf, bias[row], 0)
        if np.isnan(z + b).any() or (z + b == np.inf).any():
            gates[row], chosen[row] = np.nan, []
            continue
        selection = z if bias_in == "weights" else z + b
        weight = z if bias_in == "selection" else z + b
        chosen[row] = best(selection, k)
        if renormalize:
            kept = np.full(z.shape, -np.inf)
            kept[chosen[row]] = weight[chosen[row]]
            gates[row] = softmax(kept)
        else:
            gates[row][chosen[row]] = softmax(weight)[chosen[row]]
    return gates, chosen


def filtered(x, kind, value, where=None):
    """Logits of what a sampler may draw, else -inf."""
    x = _wide(x)
    where = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    result = np.full(x.shape, -np.inf)
    value = np.broadcast_to(np.asarray(value), x.shape[:-1])
    for row in np.ndindex(x.shape[:-1]):
        z, v = np.where(where[row], x[row], -np.inf), value[row]
        p = softmax(z)
        order = best(z, len(z))
        if np.isnan(p).any():
            result[row] = np.nan
            continue
        if kind == "top_k":
            kept = order[: max(v, 1)]
        elif kind == "top_p":
            before = np.cumsum([0, *p[order]])[:-1]
            kept = [i for i, mass in zip(order, before, strict=True) if mass < v]
            kept = order if v >= 1 else kept or order[:1]
        else:
            kept = [i for i in order if p[i] >= min(v, 1) * p.max()]
        result[row][kept] = z[kept]
    return result


def soft_top_k(x, k, alpha, where=None):
    """z, log z and the Jacobians of both by x; the threshold by bisection."""
    x, k, alpha = _wide(x), _wide(k), _wide(alpha)
    where = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    rows = x.shape[:-1]
    k, alpha = np.broadcast_to(k, rows), np.broadcast_to(alpha, rows)
    z, log_z = np.zeros(x.shape), np.full(x.shape, -np.inf)
    jacobians = np.zeros((2, *x.shape, x.shape[-1]))
    for row in np.ndindex(rows):
        of = np.flatnonzero(where[row] & (x[row] > -np.inf))
        y, a = x[row][of], alpha[row]
        if len(of) == 0:
            continue
        if k[row] >= len(of):
            z[row][of], log_z[row][of] = 1, 0
            continue
        wide = (np.log(len(of)) + 40) / a
        low, high = -y.max() - wide, -y.min() + wide
        for _ in range(200):
            t = (low + high) / 2
            low, high = (t, high) if _below(a * (y + t), k[row]) else (low, t)
        log_z[row][of] = -np.logaddexp(0, -a * (y + t))
        z[row][of] = np.exp(log_z[row][of])
        log_rest = -np.logaddexp(0, a * (y + t))
        share = softmax(log_z[row][of] + log_rest)
        slopes = a * np.exp(log_rest)[:, None] * (np.eye(len(of)) - share)
        jacobians[1][row][np.ix_(of, of)] = slopes
        jacobians[0][row][np.ix_(of, of)] = z[row][of][:, None] * slopes
    return z, log_z, *jacobians


def _below(u, k):
    """Is the sum of the sigmoids below k? For a whole k without cancellation."""
    u = np.sort(u)[::-1]
    if k != int(k):
        return np.exp(-np.logaddexp(0, -u)).sum() < k
    chosen, rest = u[: int(k)], u[int(k) :]
    missing = np.logaddexp.reduce(-np.logaddexp(0, chosen))
    return np.logaddexp.reduce(-np.logaddexp(0, -rest)) < missing


def concrete_log_prob(log_x, logits, temperature):
    """By the change of variables, not by the closed form that the library uses.

    Integrates over the common shift s of the perturbed logits z_i = tau log x_i + s:
    their densities are Gumbel, and the Jacobian of (z) -> (x, s) is tau^(V-1) / prod x.
    """
    log_x, logits = _wide(log_x), _wide(logits)
    classes = log_x.shape[-1]
    s = np.linspace(-60, 60, 240_001)
    result = np.zeros(log_x.shape[:-1])
    for row in np.ndindex(result.shape):
        z = temperature * log_x[row][:, None] + s - logits[row][:, None]
        with np.errstate(over="ignore"):
            log_density = (-z - np.exp(-z)).sum(0)
        top = log_density.max()
        integral = np.exp(log_density - top).sum() * (s[1] - s[0])
        jacobian = (classes - 1) * np.log(temperature) - log_x[row].sum()
        result[row] = top + np.log(integral) + jacobian
    return result
