"""Weights in few bits by brute force: NumPy, float64, group by group."""

import numpy as np


def grouped(weight, bits, group_size, *, is_symmetric=False, where=None):
    """(codes, scale, zero, decoded); zero is None for a symmetric grid."""
    weight = np.asarray(weight, np.float64)
    rows = weight.reshape(-1, weight.shape[-1])
    kept = np.ones_like(rows, bool) if where is None else np.reshape(where, rows.shape)
    codes, decoded = np.zeros_like(rows, int), np.zeros_like(rows)
    groups = rows.shape[1] // group_size
    scale, zero = np.ones((len(rows), groups)), np.zeros((len(rows), groups))
    for i, row in enumerate(rows):
        for g in range(groups):
            own = np.arange(g * group_size, (g + 1) * group_size)
            own = own[kept[i, own]]
            if not len(own):
                continue
            w = row[own]
            if is_symmetric:
                width, offset = np.abs(w).max() / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
            else:
                width, offset = (w.max() - w.min()) / (2**bits - 1), 0
                zero[i, g] = w.min()
            if width > 0:
                scale[i, g] = width
            steps = np.rint((w - zero[i, g]) / scale[i, g])  # ties to even
            codes[i, own] = steps + offset
            decoded[i, own] = steps * scale[i, g] + zero[i, g]
    batch = weight.shape[:-1]
    return (
        codes.reshape(weight.shape),
        scale.reshape(*batch, -1),
        None if is_symmetric else zero.reshape(*batch, -1),
        decoded.reshape(weight.shape),
    )


def by_vectors(weight, codebook, group_size=None):
    """(codes, scale, decoded); scale is None without groups."""
    weight, codebook = np.asarray(weight, np.float64), np.asarray(codebook, np.float64)
    size, scale = codebook.shape[1], None
    normalized = weight
    if group_size is not None:
        groups = weight.reshape(*weight.shape[:-1], -1, group_size)
        scale = np.sqrt(np.square(groups).mean(-1))
        scale[scale == 0] = 1
        normalized = (groups / scale[..., None]).reshape(weight.shape)
    vectors = normalized.reshape(*weight.shape[:-1], -1, size)
    distances = np.square(vectors[..., None, :] - codebook).sum(-1)
    codes = distances.argmin(-1)
    decoded = codebook[codes].reshape(weight.shape)
    if scale is not None:
        groups = decoded.reshape(*scale.shape, -1) * scale[..., None]
        decoded = groups.reshape(weight.shape)
    return codes, scale, decoded


def pruned(weight, sparsity):
    """A row without the smallest weights, the later one of equal ones."""
    row = np.array(weight, np.float64)
    order = sorted(range(len(row)), key=lambda i: (abs(row[i]), -i))
    for i in order[: int(np.floor(sparsity * len(row) + 0.5))]:
        row[i] = 0
    return row
