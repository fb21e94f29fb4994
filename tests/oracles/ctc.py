"""CTC by its definition: all alignments, one by one, NumPy, float64 or complex."""

import itertools

import numpy as np


def collapsed(path, blank):
    merged = [one for one, _ in itertools.groupby(path)]
    return [one for one in merged if one != blank]


def loss(z, labels, blank):
    """Of one sequence, z (T, V) and labels without padding."""
    e = np.exp(z - z.real.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    total = 0.0
    for path in itertools.product(sorted({blank, *labels}), repeat=len(z)):
        if collapsed(path, blank) == list(labels):
            total = total + np.prod([p[t, one] for t, one in enumerate(path)])
    return np.inf if total == 0 else -np.log(total)
