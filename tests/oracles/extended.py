"""Exponentials and their sums in NumPy's longest float, and distances in last places.

Where longdouble is no longer than float64 (not on x86), that is what the oracles are.
A row is the last axis. The logarithm of the softmax is written so that it is right
where a probability is almost 1: the sum leaves out one largest term.
"""

from fractions import Fraction

import numpy as np

LONG = np.longdouble
# To 40 digits: as a string, because a Python float would cut it.
LOG_2 = LONG("0.6931471805599453094172321214581765680755")


def value(mantissa, exponent):
    """The numbers m 2^n as fractions."""
    pairs = zip(np.ravel(mantissa), np.ravel(exponent), strict=True)
    return [
        Fraction(float(m)) * Fraction(2) ** int(n) if m != 0 else Fraction(0)
        for m, n in pairs
    ]


def exp_mantissa(x, exponent):
    """e^x / 2^exponent."""
    return np.exp(LONG(x) - LONG(exponent) * LOG_2)


def log_softmax(x):
    x = np.asarray(x).astype(LONG)
    top = x.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), 0, top)
    e = np.exp(x - top)
    np.put_along_axis(e, x.argmax(-1)[..., None], 0, -1)
    found = x - top - np.log1p(e.sum(-1, keepdims=True))
    return np.where(np.isneginf(x), -np.inf, found)


def softmax(x):
    return np.exp(log_softmax(x))


def logsumexp(x):
    x = np.asarray(x).astype(LONG)
    top = x.max(-1)
    with np.errstate(divide="ignore"):
        return np.where(np.isneginf(top), 0, top) + np.log(
            np.exp(x - np.where(np.isneginf(top), 0, top)[..., None]).sum(-1)
        )


def softmax_vjp(x, cotangent):
    y = softmax(x)
    return y * (cotangent - (y * cotangent).sum(-1, keepdims=True))


def last_places(actual, exact, dtype="float32"):
    """Errors in units of the last place of the exact value; normal numbers only."""
    actual, exact = np.asarray(actual).astype(LONG), np.asarray(exact).astype(LONG)
    normal = np.abs(exact) >= np.finfo(dtype).tiny
    unit = np.spacing(np.abs(exact).astype(dtype)).astype(LONG)
    return np.where(normal, np.abs(actual - exact), 0) / unit
