r"""Probabilistic principal components: a Gaussian of few factors and equal noise.

The maximum of the likelihood is in closed form: the first principal directions, each
shortened by the noise, which is the mean of the variances that are left.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

_matmul = functools.partial(jnp.matmul, precision="highest")


class FactorModel(NamedTuple):
    r"""The model $x = A h + \mu + \sigma e$ with standard normal $h$ and $e$.

    Attributes:
        mean: $\mu$.
        loading: $A$, one column per factor, the largest first; any rotation of the
            columns is the same model.
        noise: $\sigma^2$.
        log_likelihood: Mean log-density of the sample, in nats; inf if `noise` is 0.
    """

    mean: Float[Array, "*batch D"]
    loading: Float[Array, "*batch D r"]
    noise: Float[Array, "*batch"]
    log_likelihood: Float[Array, "*batch"]


@array_arguments
def fit_factor_model(
    x: Float[Array, "n D"],
    rank: int,
    *,
    where: Bool[Array, " n"] | None = None,
) -> FactorModel:
    r"""Maximum likelihood of probabilistic principal components.

    With the eigenvalues $l_1 \geq \dots \geq l_D$ of the sample's covariance (divided
    by $n$) and its eigenvectors $U$,

    $$\sigma^2 = \frac{1}{D - r} \sum_{i > r} l_i, \qquad
      A = U_r \operatorname{diag}(l_i - \sigma^2)^{1/2} .$$

    No other parameters of the model have a larger likelihood.

    Args:
        x: The sample, without labels, one example a row.
        rank: Static; $r$, at least 1 and below D. With $r = D$ there is no noise to
            estimate, and with fewer than $r + 2$ examples none is left.
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        `FactorModel`, float32 (float64 if `x` is). With fewer than $r + 2$ examples
        that count, the noise is 0 up to rounding; without any all is 0.

    Raises:
        TypeError: `x` is not floating, `where` is not boolean, or `rank` is no int.
        ValueError: Shapes do not fit together, `rank` is out of range, or there are
            fewer than $r + 2$ examples.

    Derivatives: those of a singular value decomposition, not finite where singular
        values are equal; the model is fitted, not trained through.
    Cost: a singular value decomposition, O(n D min(n, D)).
    Source: "On the Provable Advantage of Unsupervised Pretraining" has it as the first
        of its models; the estimate is the textbook's.

    Example:
        >>> x = jnp.array([[3.0, 1.0], [-3.0, -1.0], [3.0, -1.0], [-3.0, 1.0]])
        >>> model = softlib.estimation.fit_factor_model(x, 1)
        >>> print(abs(model.loading[:, 0]).round(2), model.noise.round(2))
        [2.83 0.  ] 1.0
    """
    function = "fit_factor_model"
    checks.require_floating(function, x=x)
    checks.require_rank(function, "x", x, 2, "(n, D)")
    count, features = x.shape[-2:]
    checks.require_shape(function, "x", x, (count, features), "one sample")
    checks.require_positive_integer(function, "rank", rank)
    checks.require_below(function, "rank", rank, features)
    if count < rank + 2:
        raise ValueError(
            f"{function}: `x` must have at least rank + 2 = {rank + 2} rows, "
            f"got {count}."
        )
    keep = jnp.ones(count, bool) if where is None else where
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, (count,), "rows of `x`")
    x = jnp.where(keep[:, None], x.astype(accumulator_dtype(x)), 0)
    number = jnp.maximum(keep.sum(dtype=x.dtype), 1)
    mean = x.sum(0) / number
    centred = jnp.where(keep[:, None], x - mean[None], 0)
    # Singular values instead of the covariance, whose small eigenvalues would be lost.
    _, values, directions = jnp.linalg.svd(
        centred / jnp.sqrt(number), full_matrices=False
    )
    variances = values * values
    noise = variances[rank:].sum() / (features - rank)
    first = variances[:rank]
    lengths = jnp.sqrt(jnp.maximum(first - noise, 0))
    loading = directions[:rank].T * lengths[None]
    log_det = jnp.log(first).sum() + (features - rank) * jnp.log(noise)
    density = -0.5 * (features * (math.log(2 * math.pi) + 1) + log_det)
    return FactorModel(mean, loading, noise, density)


@array_arguments
def factor_features(
    model: FactorModel, x: Float[Array, "*rows D"]
) -> Float[Array, "*rows r"]:
    r"""Posterior means of the factors, features for a model of few labels.

    $$\mathbb{E}[h \mid x] = (A^T A + \sigma^2 I)^{-1} A^T (x - \mu)$$

    Args:
        model: As `fit_factor_model` gives it, or of any rotation of its loading.
        x: Examples, other ones than those of the fit in general.

    Returns:
        The features, float32 (float64 if an argument is). If the noise is 0, they are
        the least-squares solution; 0 in a direction without loading.

    Raises:
        TypeError: An array is not floating.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order.
    Cost: O(rows D r + D r^2 + r^3).
    Source: as `fit_factor_model`.

    Example:
        >>> x = jnp.array([[3.0, 1.0], [-3.0, -1.0], [3.0, -1.0], [-3.0, 1.0]])
        >>> model = softlib.estimation.fit_factor_model(x, 1)
        >>> print(abs(softlib.estimation.factor_features(model, x)[:, 0]).round(2))
        [0.94 0.94 0.94 0.94]
    """
    function = "factor_features"
    checks.require_instance(function, "model", model, FactorModel, "a FactorModel")
    mean, loading, noise = (jnp.asarray(field) for field in model[:3])
    checks.require_floating(
        function,
        x=x,
        **{"model.mean": mean, "model.loading": loading, "model.noise": noise},
    )
    checks.require_rank(function, "model.loading", loading, 2, "(D, r)")
    features, rank = loading.shape[-2:]
    checks.require_shape(
        function, "model.loading", loading, (features, rank), "one model"
    )
    checks.require_shape(function, "model.mean", mean, (features,), "rows of `loading`")
    checks.require_shape(function, "model.noise", noise, (), "one model")
    checks.require_rank(function, "x", x, 1, "(*rows, D)")
    checks.require_shape(
        function, "x", x, (*x.shape[:-1], features), "features of `model`"
    )
    dtype = accumulator_dtype(x, mean, loading, noise)
    mean, loading, noise = (each.astype(dtype) for each in (mean, loading, noise))
    gram = _matmul(loading.T, loading)
    # Where nothing is loaded and there is no noise, 0 / tiny is the 0 of the promise.
    least = jnp.finfo(dtype).eps * jnp.trace(gram) + jnp.finfo(dtype).tiny
    gram += jnp.maximum(noise, least) * jnp.eye(rank, dtype=dtype)
    centred = x.astype(dtype) - mean.reshape((1,) * (x.ndim - 1) + (features,))
    along = _matmul(centred, loading)
    solve = jax.scipy.linalg.cho_solve
    factor = jax.scipy.linalg.cho_factor(gram)
    flat = along.reshape(-1, rank)
    return solve(factor, flat.T).T.reshape(along.shape)
