r"""Feature maps of linear attention: the score of a query and a key is phi(q) . phi(k).

A map is positive if no score can be negative, which is what a division by the sum of
the scores needs.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

type FeatureMap = str | Callable[[Array], Array]
"""The name of a feature map, or a function (..., H) -> (..., features)."""


@array_arguments
def taylor_feature_map(
    x: Float[Array, "*batch H"], *, order: int
) -> Float[Array, "*batch features"]:
    r"""Features whose inner product is the Taylor polynomial of the exponential.

    $$\phi(q) \cdot \phi(k) = \sum_{r=0}^{p} \frac{(q \cdot k)^r}{r!} \approx
      e^{q \cdot k}, \qquad
      \phi(x) = \Bigl( \frac{x^a}{\sqrt{a!}} \Bigr)_{|a| \leq p}$$

    with one feature per multi-index $a$, that is per distinct monomial. With these
    features and the sum as normaliser, linear attention approaches softmax attention
    (of scale 1: multiply the query by the scale) as the order grows.

    Even orders give positive scores; an odd order is negative for scores below a
    negative number (-1 for order 1), where it is no approximation of a probability.

    Args:
        x: Queries or keys.
        order: Static degree $p$ of the polynomial, 0 or more.

    Returns:
        $\binom{H + p}{p}$ features, ordered by degree, float32 (float64 for float64).

    Raises:
        TypeError: `x` is not floating or `order` is not a Python int.
        ValueError: `order` is negative.

    Derivatives: forward and reverse mode, any order.
    Cost: one product per feature; the features themselves.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks". Each monomial occurs once with its
        multinomial weight, instead of once per ordering of its factors
        ($\sum_r H^r$ features): the same scores from fewer features.

    Example:
        >>> query, key = jnp.array([0.5, 1.0]), jnp.array([1.0, 0.5])
        >>> for order in (1, 2, 8):
        ...     phi = lambda x: softlib.recurrent.taylor_feature_map(x, order=order)
        ...     print(phi(query).size, f"{phi(query) @ phi(key):.4f}")
        3 2.0000
        6 2.5000
        45 2.7183
    """
    function = "taylor_feature_map"
    _checks.require_floating(function, x=x)
    _checks.require_rank(function, "x", x, 1, "(..., H)")
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(
            f"{function}: `order` must be a Python int (it is static), "
            f"got {type(order).__name__}."
        )
    if order < 0:
        raise ValueError(f"{function}: `order` must be at least 0, got {order}.")

    size = x.shape[-1]
    x = x.astype(accumulator_dtype(x))
    degrees = [jnp.ones_like(x[..., :1]) if size else jnp.ones((*x.shape[:-1], 1))]
    for degree in range(1, order + 1 if size else 1):
        # Monomials in lexicographic order: those that start with x_i are x_i times the
        # monomials of one degree less in x_i, x_{i+1}, ..., which are a suffix.
        lower = degrees[-1]
        total = lower.shape[-1]
        suffix = [math.comb(size - i + degree - 2, degree - 1) for i in range(size)]
        higher = [
            x[..., i : i + 1] * lower[..., total - suffix[i] :] for i in range(size)
        ]
        degrees.append(jnp.concatenate(higher, axis=-1))
    weights = [_weights(size, degree) for degree in range(len(degrees))]
    features = jnp.concatenate(degrees, axis=-1)
    scale = jnp.asarray(np.concatenate(weights), features.dtype)
    return features * jnp.broadcast_to(scale, features.shape)


def _weights(size: int, degree: int) -> np.ndarray:
    """1 / sqrt(a!) for the monomials of one degree, in lexicographic order."""
    factors = itertools.combinations_with_replacement(range(size), degree)
    monomials = np.array(list(factors), int)
    factorials, run = np.ones(len(monomials)), np.ones(len(monomials))
    for j in range(1, degree):
        run = np.where(monomials[:, j] == monomials[:, j - 1], run + 1, 1)
        factorials *= run
    return 1 / np.sqrt(factorials)


def elu1(x: Array) -> Array:
    """elu(x) + 1; not through expm1, whose sum with 1 cancels far below 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def _relu(x: Array) -> Array:
    return jnp.where(x > 0, x, 0)


def _identity(x: Array) -> Array:
    return x


# Name -> the map, and whether every score is at least 0.
_NAMED: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "elu1": (elu1, True),
    "relu": (_relu, True),
    "exp": (jnp.exp, True),
    "identity": (_identity, False),
}


def resolve(function: str, feature_map: FeatureMap) -> Callable[[Array], Array]:
    """Returns the feature map as a function."""
    return _resolve(function, feature_map)[0]


def require_positive(function: str, feature_map: FeatureMap) -> None:
    """Refuses to divide by a sum that may be 0 or negative."""
    if not _resolve(function, feature_map)[1]:
        raise ValueError(
            f'{function}: `normalizer` must not be "sum" with `feature_map` '
            f"{feature_map!r}, whose scores may be negative, got 'sum'. Pass an array, "
            '"none", or a positive feature map.'
        )


@functools.lru_cache
def _taylor(order: int) -> Callable[[Array], Array]:
    """Returns the same function object for an order each time, for jit's cache."""
    return functools.partial(taylor_feature_map, order=order)


def _resolve(
    function: str, feature_map: FeatureMap
) -> tuple[Callable[[Array], Array], bool]:
    if callable(feature_map):
        return feature_map, True  # the caller's promise
    if isinstance(feature_map, str):
        if feature_map in _NAMED:
            return _NAMED[feature_map]
        if match := re.fullmatch(r"taylor(\d+)", feature_map):
            order = int(match[1])
            return _taylor(order), order % 2 == 0
    known = ", ".join(repr(name) for name in _NAMED)
    raise ValueError(
        f"{function}: `feature_map` must be one of {known}, 'taylor' followed by an "
        f"order, or a function, got {feature_map!r}."
    )
