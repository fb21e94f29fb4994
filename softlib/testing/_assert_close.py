"""A result against its oracle, within a bound that follows from the arithmetic."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike


def assert_close(
    actual: ArrayLike | float,
    oracle: ArrayLike | float,
    *,
    dtype: DTypeLike,
    length: int,
    c: float = 4.0,
) -> None:
    r"""Fails unless every element of `actual` lies within the tolerance of `oracle`.

    The tolerance is absolute and the same for all elements,

    $$c \cdot \varepsilon(\mathrm{dtype}) \cdot \sqrt{\mathrm{length}}
      \cdot \max(1, \max|\mathrm{oracle}|),$$

    because the rounding errors of a sum grow like the square root of its length and
    are relative to its largest terms, not to a result that has cancelled. Infinities
    and NaNs must stand in the same places, with the same sign.

    Args:
        actual: What the library returned.
        oracle: The reference, computed in float64 from the *rounded* inputs. It has
            the shape of `actual`; nothing is broadcast.
        dtype: That of the arithmetic or of the result, whichever is coarser. Inputs do
            not count, since the oracle saw them rounded.
        length: Number of terms of the longest sum on the way to one element; 0 counts
            as 1.
        c: Static. A value above 16 asks for a comment at the call.

    Raises:
        AssertionError: The shapes differ, or an element is too far off. The message
            says where the largest error is and how many times the tolerance it is.
        TypeError: `dtype` is not floating.  ValueError: `length` or `c` is negative.

    Derivatives: none; the result is None.
    Cost: a few float64 copies of the arrays, on the host.
    Source: softlib's own; the bound is the usual probabilistic one for sums.

    Example:
        >>> assert_close(jnp.float32(1 / 3), 1 / 3, dtype="float32", length=1)
        >>> try:
        ...     assert_close([0.0, 2.0], [0.0, 1.0], dtype="float32", length=1)
        ... except AssertionError as error:
        ...     print(str(error).split(",")[0])
        assert_close: largest error 1 at index (1)
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(
            f"assert_close: `dtype` must be a floating dtype, got {jnp.dtype(dtype)}."
        )
    for name, value in (("length", length), ("c", c)):
        if value < 0:
            raise ValueError(
                f"assert_close: `{name}` must be non-negative, got {value}."
            )
    actual, oracle = np.asarray(actual, np.float64), np.asarray(oracle, np.float64)
    if actual.shape != oracle.shape:
        raise AssertionError(
            f"assert_close: shapes differ, actual {actual.shape} and oracle "
            f"{oracle.shape}."
        )

    finite = np.isfinite(oracle)
    scale = max(1.0, float(np.max(np.abs(oracle), initial=0.0, where=finite)))
    eps = float(jnp.finfo(dtype).eps)
    tolerance = c * eps * float(np.sqrt(max(length, 1))) * scale

    same = (actual == oracle) | (np.isnan(actual) & np.isnan(oracle))
    # A misplaced inf or NaN is an infinite error; inf - inf is never evaluated.
    both = finite & np.isfinite(actual)
    difference = np.subtract(actual, oracle, where=both, out=np.zeros_like(oracle))
    error = np.where(same, 0.0, np.where(both, np.abs(difference), np.inf))
    if not np.any(error > tolerance):
        return
    worst = np.unravel_index(np.argmax(error), error.shape)
    place = ", ".join(map(str, worst))
    times = error[worst] / tolerance if tolerance else np.inf
    raise AssertionError(
        f"assert_close: largest error {error[worst]:.6g} at index ({place}), "
        f"{times:.3g} times the tolerance {tolerance:.3g} (actual {actual[worst]:.9g}, "
        f"oracle {oracle[worst]:.9g}; c={c:g}, dtype={jnp.dtype(dtype)}, "
        f"length={length}, scale={scale:.3g}); {np.count_nonzero(error > tolerance)} "
        f"of {error.size} elements are too far off."
    )
