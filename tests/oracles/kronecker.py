"""Kronecker attention with its gradients, dense: NumPy, float64, closed forms.

With m key axes, a flat softmax over all tuples (j, k, ...) of one key per axis,

    z_ijk = s sum_c q_ic k1_jc k2_kc,    p_i = softmax over the tuples that attend,
    out_i = sum_jk p_ijk v1_j v2_k,      lse_i = log sum_jk exp(z_ijk)
    dz_ijk = p_ijk (g_out_i (v1_j v2_k - out_i) + g_lse_i)

and the gradient of any factor of a product is the sum over all axes but its own. A row
without tuples has the output 0, the lse -inf, and no gradient.
"""

from typing import Any, NamedTuple

import numpy as np


class Attended(NamedTuple):
    out: np.ndarray  # (B, T, N, E)
    lse: np.ndarray  # (B, T, N)
    weights: np.ndarray  # p, (B, N, T, S1, ..., Sm)
    gradients: dict[str, Any]


def kronecker_attention(
    query, keys, values, *, allowed=True, scale=None, g_out=None, g_lse=None
):
    """`allowed` broadcasts to (B, N, T, S1, ..., Sm)."""
    wide = lambda a: np.asarray(a, np.float64)
    shared = query.shape[2] // keys[0].shape[2]
    per_query_head = lambda a: np.repeat(wide(a), shared, axis=2)
    q, ks, vs = wide(query), *([per_query_head(a) for a in x] for x in (keys, values))
    scale = 1 / q.shape[-1] if scale is None else float(scale)
    axes = "jklm"[: len(ks)]
    tuples = "bnt" + axes
    of_keys = [f"b{axis}nc" for axis in axes]

    def sums(result, *factors):
        """Factors are arrays with the names of their axes."""
        names, arrays = zip(*factors, strict=True)
        return np.einsum(",".join(names) + "->" + result, *arrays, optimize=True)

    k_factors, v_factors = (
        list(zip(of_keys, arrays, strict=True)) for arrays in (ks, vs)
    )
    raw = sums(tuples, ("btnc", q), *k_factors)
    z = np.where(allowed, scale * raw, -np.inf)
    over = tuple(range(3, z.ndim))
    narrow = lambda a: a.reshape(*a.shape, *(1 for _ in axes))

    top = z.max(over, initial=-np.inf)
    shift = np.where(top == -np.inf, 0, top)
    weights = np.exp(z - narrow(shift))
    total = weights.sum(over)
    p = weights / narrow(np.where(total == 0, 1, total))
    with np.errstate(divide="ignore"):
        lse = np.moveaxis(shift + np.log(total), 1, 2)
    out = sums("btnc", (tuples, p), *v_factors)
    if g_out is None:
        return Attended(out, lse, p, {})

    g_out, g_lse = wide(g_out), np.moveaxis(wide(g_lse), 2, 1)
    g_p = sums(tuples, ("btnc", g_out), *v_factors)
    delta = np.einsum("btne,btne->bnt", g_out, out) - g_lse
    dz = p * (g_p - narrow(delta))

    def of_each(pairs, rows, factors):
        """The gradients of the factors, of which one is left out at a time."""
        found = []
        for t, name in enumerate(of_keys):
            others = [*factors[:t], *factors[t + 1 :]]
            wide_one = sums(name, (tuples, pairs), ("btnc", rows), *others)
            per_key_head = (*keys[t].shape[:3], shared, wide_one.shape[-1])
            found.append(wide_one.reshape(per_key_head).sum(3))
        return tuple(found)

    gradients = {
        "query": scale * sums("btnc", (tuples, dz), *k_factors),
        "keys": tuple(scale * g for g in of_each(dz, q, k_factors)),
        "values": of_each(p, g_out, v_factors),
        "scale": (dz * raw).sum(),
    }
    return Attended(out, lse, p, gradients)
