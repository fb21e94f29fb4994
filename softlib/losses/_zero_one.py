"""A smooth step in place of the error of a classifier."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar


@array_arguments
def smoothed_zero_one_loss(
    margins: Float[Array, "*batch"],
    *,
    width: Scalar,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    r"""A smooth step from 1 to 0 where a margin becomes positive: $\sigma(-m / s)$.

    It goes to the error of the classifier as the width $s$ goes to 0, and is nowhere
    convex. An example far on the wrong side costs no more than one just on it, which is
    what makes the loss robust to wrong labels where convex losses are not.

    Args:
        margins: $m = y f(x)$ with a sign $y = \pm 1$, on a scale on which the width
            means something: for a halfspace $y \langle w, x \rangle / |w|$.
        width: $s > 0$; a number is static, an array traced and differentiable.
        where: True for the examples that count; the others cost 0, whatever they hold.

    Returns:
        The loss per example, between 0 and 1, float32 (float64 if an argument is).

    Raises:
        TypeError: `margins` is not floating, or `where` is not boolean.
        ValueError: `width` is not positive, or `where` has another shape.

    Derivatives: forward and reverse mode, any order. They vanish far from the boundary:
        begin with a width at which examples are near it, and lower it.
    Cost: a few passes over the margins.
    Source: "An Efficient Tester-Learner for Halfspaces".

    Example:
        >>> margins = jnp.array([-2.0, 0.0, 20.0])
        >>> print(softlib.losses.smoothed_zero_one_loss(margins, width=0.1))
        [1.  0.5 0. ]
    """
    function = "smoothed_zero_one_loss"
    checks.require_floating(function, margins=margins)
    checks.require_positive_scalars(function, width=width)
    keep = jnp.ones(margins.shape, bool) if where is None else where
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, margins.shape, "that of `margins`")
    is_array = not isinstance(width, int | float)
    dtype = accumulator_dtype(margins, width if is_array else None)
    m = jnp.where(keep, margins.astype(dtype), math.inf)
    finite = jnp.where(jnp.isinf(m), 0, m)
    steps = jax.nn.sigmoid(-finite / jnp.asarray(width, dtype))
    # The ends without arithmetic: inf * 0 would be the slope by the width.
    steps = jnp.where(m == math.inf, 0, jnp.where(m == -math.inf, 1, steps))
    return steps.astype(dtype)
