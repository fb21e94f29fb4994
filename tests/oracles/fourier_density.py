"""Fourier densities from their definition: autocorrelations, complex, float64.

softlib squares a sum of waves; here the coefficients c_k are added up one by one.
"""

import numpy as np


def autocorrelation(coefficients):
    """c_0 to c_n of one row."""
    real, imaginary = np.split(np.float64(coefficients), 2)
    a = real + 1j * imaginary
    n = len(a) - 1
    return np.array(
        [sum(a[j + k] * np.conj(a[j]) for j in range(n - k + 1)) for k in range(n + 1)]
    )


def density(coefficients, x):
    """Of one row at one point."""
    c = autocorrelation(coefficients)
    waves = [c[k] / c[0] * np.exp(1j * np.pi * k * x) for k in range(1, len(c))]
    return 0.5 + np.real(sum(waves, 0j))


def distribution(coefficients, x):
    c = autocorrelation(coefficients)
    total = (x + 1) / 2
    for k in range(1, len(c)):
        wave = (np.exp(1j * np.pi * k * x) - (-1) ** k) / (1j * np.pi * k)
        total += np.real(c[k] / c[0] * wave)
    return total


def bins(coefficients, num_bins):
    """Probabilities (rows, bins)."""
    centres = -1 + (2 * np.arange(num_bins) + 1) / num_bins
    y = np.array([[density(row, b) for b in centres] for row in coefficients])
    return y / y.sum(axis=1, keepdims=True)


def penalty(coefficients, *, normalize):
    c = autocorrelation(coefficients)
    c = c / c[0] if normalize else c
    return 4 * np.pi**2 * sum(k**2 * abs(c[k]) ** 2 for k in range(1, len(c)))


def smoothness(pmf, max_sigma):
    """Each blur as a loop over the taps of its kernel."""
    p = np.asarray(pmf, np.float64)
    total, m = 0.0, len(p)
    for sigma in range(1, max_sigma + 1):
        offsets = np.arange(-(m - 1), m)
        kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
        kernel /= kernel.sum()
        blurred = sum(w * np.roll(p, o) for w, o in zip(kernel, offsets, strict=True))
        total += 6 / (np.pi * sigma) ** 2 * np.sqrt(np.square(p - blurred).sum())
    return total
