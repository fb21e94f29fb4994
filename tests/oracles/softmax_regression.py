"""Softmax regression in float64, with every matrix of the paper formed."""

import numpy as np


def prediction(x, A):
    z = A @ x
    e = np.exp(z - z.max())
    return e / e.sum()


def loss(x, A, b):
    return 0.5 * np.sum((prediction(x, A) - b) ** 2)


def _jacobian(f):
    return np.diag(f) - np.outer(f, f)


def gradient(x, A, b):
    f = prediction(x, A)
    return A.T @ _jacobian(f) @ (f - b)


def hessian(x, A, b):
    f = prediction(x, A)
    c, J = f - b, _jacobian(f)
    inner = J @ J + np.diag(f * (c - f @ c)) + 2 * (f @ c) * np.outer(f, f)
    inner -= np.outer(c * f, f) + np.outer(f, c * f)
    return A.T @ inner @ A
