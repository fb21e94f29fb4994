"""Cauchy-Schwarz divergences by sums over all pairs, in float64, from the integrals.

With normalised weights w the density of the samples is sum_i w_i k(., a_i).
"""

import numpy as np


def kernel(a, b, bandwidth):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = np.empty((len(a), len(b)))
    for i in range(len(a)):
        for j in range(len(b)):
            found[i, j] = np.exp(-((a[i] - b[j]) ** 2).sum() / (2 * bandwidth**2))
    return found


def normalised(count, weights=None, where=None):
    w = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    w = w * (np.ones(count) if where is None else np.asarray(where))
    return w / w.sum()


def divergence(p, q, bandwidth, of_p=None, of_q=None):
    of_p = normalised(len(p)) if of_p is None else of_p
    of_q = normalised(len(q)) if of_q is None else of_q
    mean = lambda k, one, two: (one[:, None] * two[None] * k).sum()
    pp = mean(kernel(p, p, bandwidth), of_p, of_p)
    qq = mean(kernel(q, q, bandwidth), of_q, of_q)
    pq = mean(kernel(p, q, bandwidth), of_p, of_q)
    return np.log(pp) + np.log(qq) - 2 * np.log(pq)


def information(x, t, bandwidth_x, bandwidth_t, w=None):
    w = normalised(len(x)) if w is None else w
    k, l = kernel(x, x, bandwidth_x), kernel(t, t, bandwidth_t)
    n = len(x)
    joint = product = cross = 0.0
    for i in range(n):
        for j in range(n):
            joint += w[i] * w[j] * k[i, j] * l[i, j]
            for m in range(n):
                cross += w[i] * w[j] * w[m] * k[i, j] * l[i, m]
                for o in range(n):
                    product += w[i] * w[j] * w[m] * w[o] * k[i, j] * l[m, o]
    return np.log(joint) + np.log(product) - 2 * np.log(cross)


def normalized_information(x, t, bandwidth_x, bandwidth_t, w=None):
    own_x = information(x, x, bandwidth_x, bandwidth_x, w)
    own_t = information(t, t, bandwidth_t, bandwidth_t, w)
    return information(x, t, bandwidth_x, bandwidth_t, w) / np.sqrt(own_x * own_t)


def conditional(x, y, y_hat, bandwidth_x, bandwidth_y, w=None, symmetric=False):
    """Integrals of p(y|x) q(y|x) p(x) as means of p(x, y) / p(x)^2 over samples."""
    w = normalised(len(x)) if w is None else w
    k = kernel(x, x, bandwidth_x)
    density = [(w * k[j]).sum() for j in range(len(x))]

    def integral(one, two):
        l = kernel(one, two, bandwidth_y)
        total = 0.0
        for j in range(len(x)):
            for i in range(len(x)):
                other = density[i] if symmetric else density[j]
                total += w[j] * w[i] * k[j, i] * l[j, i] / (density[j] * other)
        return total

    own = np.log(integral(y, y)) + np.log(integral(y_hat, y_hat))
    return own - 2 * np.log(integral(y_hat, y))
