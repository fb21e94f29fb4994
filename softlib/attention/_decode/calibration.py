"""Calibration of the unified maximum of each head from observed scores."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

FUNCTION = "calibrate_unified_max"


class UnifiedMaxCalibration(NamedTuple):
    r"""The unified maximum of `decode_attention`.

    Attributes:
        phi: $\varphi$ of each head; 0 for a head without a finite maximum.
        valid_range: $(a, b)$, one pair for all heads.
        recompute_rate: Share of each head's rows whose maximum is not in the range.
    """

    phi: Float[Array, "*heads"]
    valid_range: tuple[Float[Array, ""], Float[Array, ""]]
    recompute_rate: Float[Array, "*heads"]


@array_arguments
def calibrate_unified_max(
    scores_max: Float[Array, "*samples N"],
    quantiles: tuple[float, float] = (1e-4, 1 - 1e-4),
    *,
    valid_range: tuple[ArrayLike, ArrayLike] | None = None,
) -> UnifiedMaxCalibration:
    r"""The reference and the range of a unified maximum, from largest scores of rows.

    $\varphi$ is the middle between two quantiles of a head's maxima. By default
    $(a, b)$ reaches from quantile to quantile, in the head where these are farthest
    apart (the paper's way, which suits a narrow number format). With float32 sums the
    range that the format allows is far wider than what scores need, and a row outside
    of the quantiles costs nothing if it may be left there: pass
    `valid_range=(-70.0, 80.0)` to keep that range and put the maxima in its middle.

    A step is computed twice as soon as *one* of its rows is outside. With a share $r$
    of the rows outside, that happens in $1 - (1 - r)^{B N}$ of the steps: at
    `r = 2e-4`, `B = 64`, `N = 32` in every third.

    Args:
        scores_max: Largest score of each row, over any number of axes, the heads last
            (`DecodeResult.max_score` of several calls, joined). One axis alone is
            samples for a single $\varphi$. Values that are not finite do not count.
        quantiles: Static pair in [0, 1], the lower first.
        valid_range: None, or the range $(a, b)$ to keep.

    Returns:
        `UnifiedMaxCalibration`, in float32 (float64 if `scores_max` is).

    Raises:
        TypeError: `scores_max` is not floating.
        ValueError: It has no axis, or `quantiles` are no ascending pair in [0, 1].

    Derivatives: zero; the results are constants.
    Cost: sorts the maxima of each head once.
    Source: "FlashDecoding++: Faster Large Language Model Inference on GPUs". Keeping a
    given range is an addition. The quantiles themselves are inside, by a margin of
    1e-3.

    Example:
        >>> maxima = jnp.array([[1.0, -4.0], [2.0, -5.0], [3.0, -jnp.inf]])
        >>> found = softlib.attention.calibrate_unified_max(maxima, (0.0, 1.0))
        >>> print(found.phi, found.valid_range[1].round(2))
        [ 2.  -4.5] 1.0
    """
    scores_max = jnp.asarray(scores_max)
    checks.require_floating(FUNCTION, scores_max=scores_max)
    checks.require_rank(FUNCTION, "scores_max", scores_max, 1, "(*samples, N)")
    if (
        not isinstance(quantiles, Sequence)
        or len(quantiles) != 2
        or not 0 <= quantiles[0] < quantiles[1] <= 1
    ):
        raise ValueError(
            f"{FUNCTION}: `quantiles` must be an ascending pair in [0, 1], got "
            f"{quantiles!r}."
        )
    dtype = accumulator_dtype(scores_max)
    heads = scores_max.shape[-1:] if scores_max.ndim > 1 else ()
    maxima = lax.stop_gradient(scores_max).astype(dtype).reshape(-1, *heads)
    counts = jnp.isfinite(maxima)
    none = ~counts.any(0)
    # 0 in a head without samples, whose nanquantile would be NaN.
    kept = jnp.where(counts, maxima, jnp.where(none, 0, jnp.nan)[None])
    low, high = jnp.nanquantile(kept, jnp.asarray(quantiles, dtype), axis=0)
    phi = (low + high) / 2
    if valid_range is None:
        half = 1e-3 + (1 + 1e-3) * ((high - low) / 2).max(initial=0)
        bounds = -half, half
    else:
        bounds = tuple(jnp.asarray(bound, dtype) for bound in valid_range)
        phi = jnp.where(none, 0, phi - (bounds[0] + bounds[1]) / 2)
    distance = maxima - phi[None]
    outside = (distance <= bounds[0]) | (distance >= bounds[1])
    rate = (counts & outside).sum(0) / jnp.maximum(counts.sum(0), 1)
    return UnifiedMaxCalibration(phi, (bounds[0], bounds[1]), rate.astype(dtype))
