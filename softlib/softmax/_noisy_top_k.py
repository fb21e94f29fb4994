"""Top-k gating with learned noise, and each expert's probability of selection."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtr
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._nan import nan_where

from ._entries import Entries
from ._top_k import top_k_gating


class NoisyTopKGating(NamedTuple):
    """A draw of noisy top-k gating.

    Attributes:
        weights: Of the selected entries, best first; float32 (float64 for float64).
        indices: Where they are, int32; -1 with weight 0 where a row has too few.
        load: In the shape of the logits: the probability of each entry to be selected,
            had only its own noise been drawn again; in the dtype of `weights`.
    """

    weights: Float[Array, "..."]
    indices: Int[Array, "..."]
    load: Float[Array, "..."]


@array_arguments
def noisy_top_k_gating(
    key: Array | None,
    logits: Float[Array, "*shape"],
    noise_logits: Float[Array, "*shape"],
    *,
    k: int,
    axis: int = -1,
    noise_floor: float = 0.0,
    renormalize: bool = True,
    where: Bool[Array, "..."] | None = None,
) -> NoisyTopKGating:
    r"""Gates of the $k$ largest of $H = v + \epsilon \, s$, a smooth load beside them.

    $s = \log(1 + e^u)$ with the logits $u$ of the noise, $\epsilon$ standard normal:
    experts near the border are tried, and the router learns how much noise each token
    needs. The load of entry $i$,

    $$P_i = \Phi\left(\frac{v_i - \text{k-th largest of } H \text{ without } i}
    {s_i}\right),$$

    is what the count of its selections would be on average over $\epsilon_i$, and has a
    derivative, which a count has not. Averaged over all of the noise, the loads of a
    row sum to $k$.

    Args:
        key: Of `jax.random`. None draws no noise, as after training: the gates are
            those of `top_k_gating`, the load 1 for what is selected and 0 elsewhere.
        logits: $v$. -inf never counts; NaN or +inf make their row NaN.
        noise_logits: $u$; -inf is no noise, NaN or +inf make their row NaN.
        k: Static, from 1 to the size of `axis`.
        axis: Static; the axis of a row.
        noise_floor: Static, not negative; added to $s$ so that some noise is left
            whatever the router learns.
        renormalize: Static; whether the weights of a row sum to 1, or are the softmax
            of all of $H$ at the selected entries.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Weights, indices and load; the load is 0 where an entry does not count, and 1
        for all that do where these are at most $k$.

    Raises:
        TypeError: An array has the wrong kind of dtype, or `k` is no Python int.
        ValueError: `k` is out of range, `noise_floor` is negative, `axis` is no axis of
            `logits`, or shapes do not fit together.

    Derivatives: forward and reverse mode, any order, with respect to `logits` and
        `noise_logits`, with the noise held fixed and for the selection as it is. Where
        the scale of an entry is below a fortieth of its distance, or below 1e-19, its
        load is 0 or 1 without a derivative.
    Cost: the noise and two partial sorts.
    Source: "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
        Layer".

    Example:
        >>> key, v = jax.random.key(0), jnp.array([0.0, 2.0, 1.0])
        >>> quiet = jnp.full(3, -jnp.inf)
        >>> found = softlib.softmax.noisy_top_k_gating(key, v, quiet, k=1)
        >>> print(found.weights, found.indices, found.load)
        [1.] [1] [0. 1. 0.]
    """
    function = "noisy_top_k_gating"
    checks.require_positive_integer(function, "k", k)
    checks.require_scalar(function, "noise_floor", noise_floor, 0, jnp.inf)
    entries = Entries.of(function, logits, axis, where, "logits")
    checks.require_floating(function, noise_logits=noise_logits)
    why = "that of `logits`"
    checks.require_shape(function, "noise_logits", noise_logits, logits.shape, why)
    if k > logits.shape[axis]:
        raise ValueError(
            f"{function}: `k` must be at most the size of `axis`, "
            f"{logits.shape[axis]}, got {k}."
        )
    last = lambda y: jnp.moveaxis(y, axis, -1)
    scores, u = last(entries.scores), last(noise_logits.astype(entries.x.dtype))
    counts = scores != -jnp.inf
    v, u = jnp.where(counts, scores, 0), jnp.where(counts, u, 0)
    bad = jnp.isnan(v) | jnp.isnan(u) | (v == jnp.inf) | (u == jnp.inf)
    bad = bad.any(-1, keepdims=True)
    v, u = jnp.where(bad, 0, v), jnp.where(bad, 0, u)
    scale = jax.nn.softplus(u) + noise_floor
    # Drawn in the shape of `logits`, so that the noise does not depend on `axis`.
    noise = None
    if key is not None:
        noise = last(jax.random.normal(key, logits.shape, v.dtype))
    noisy = jnp.where(counts, v if noise is None else v + scale * noise, -jnp.inf)
    bad_or_noisy = nan_where(bad, noisy)
    weights, indices = top_k_gating(bad_or_noisy, k=k, renormalize=renormalize)
    chosen = jax.nn.one_hot(indices, v.shape[-1], dtype=bool).any(-2)
    if noise is None:
        load = chosen.astype(v.dtype)
    else:
        load = jnp.where(counts, _load(v, scale, noisy, chosen, k), 0)
    load = jnp.where(bad, jnp.nan, load)
    back = lambda y: jnp.moveaxis(y, -1, axis)
    return NoisyTopKGating(back(weights), back(indices), back(load))


def _load(v: Array, scale: Array, noisy: Array, chosen: Array, k: int) -> Array:
    """The probability that an entry is above the k-th largest of the others."""
    size = v.shape[-1]
    _, order = lax.top_k(lax.stop_gradient(noisy), min(k + 1, size))
    best = jnp.take_along_axis(noisy, order, axis=-1)
    kth = best[..., k - 1 : k]
    after = best[..., k:] if k < size else jnp.full_like(kth, -jnp.inf)
    border = jnp.where(chosen, after, kth)
    free = border == -jnp.inf  # fewer than k others
    gap = v - jnp.where(free, 0, border)
    # Beyond it the normal distribution is 0 or 1 in float64 too, and the quotient may
    # overflow or be 0 / 0. The derivative divides by the square of the scale.
    least = float(jnp.finfo(v.dtype).tiny) ** 0.5
    certain = free | (jnp.abs(gap) >= 40 * scale) | (scale <= least)
    z = jnp.where(certain, 0, gap) / jnp.where(certain, 1, scale)
    above = free | (gap > 0) | ((gap == 0) & chosen)
    return jnp.where(certain, above.astype(v.dtype), ndtr(z))
