"""An output layer over bins of a continuous variable, for Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

from ._fourier_density import FourierDensity


class FourierHead(nnx.Module):
    r"""A head over m bins of [-1, 1] whose density is a Fourier series.

    Takes the place of a linear layer with m outputs where these are the bins of a
    number, in their order: quantized time series, actions. A linear layer learns every
    bin on its own; this one has $2 (n + 1)$ outputs, the coefficients of a density that
    $n$ waves make up. Few frequencies are smooth, many are expressive.

    `head(x)` gives logits, with a floor `epsilon` under the probabilities, for an
    ordinary cross-entropy; `head(x, labels)` the exact loss; `head.density(x)` the
    `FourierDensity`, which needs no bins.

    Args:
        features: Size of the last axis of `x`.
        num_bins: Number of bins m.
        num_frequencies: n; beyond m / 2 waves alias.
        weight_scale: Multiplies the initial kernel. Only ratios of the coefficients
            matter, so small ones move fast: the gradient grows as they shrink.
        bias_scale: Multiplies the initial bias. Not both may be 0: coefficients of 0
            have no gradient.
        epsilon: Of `FourierDensity.logits`.
        dtype: Dtype of the product; None uses the arrays as they are.
        param_dtype: Dtype of the parameters.
        rngs: Key source.

    Raises:
        ValueError: A number is out of range, or both scales are 0.

    Attributes:
        kernel: (features, 2 (n + 1)).
        bias: (2 (n + 1),).

    Derivatives: forward and reverse mode, any order; finite where the density is 0.
    Cost: a product with 2 (n + 1) columns instead of m, then that of `FourierDensity`.
    Source: "Fourier Head: Helping Large Language Models Learn Complex Probability
        Distributions"; initial values as in its code.

    Example:
        >>> head = softlib.nn.FourierHead(8, 50, num_frequencies=4, rngs=nnx.Rngs(0))
        >>> x, labels = jnp.ones((2, 8)), jnp.array([3, 4])
        >>> print(head(x).shape, head(x, labels).shape, head.kernel.shape)
        (2, 50) (2,) (8, 10)
    """

    def __init__(
        self,
        features: int,
        num_bins: int,
        *,
        num_frequencies: int,
        weight_scale: float = 0.01,
        bias_scale: float = 0.01,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if isinstance(num_frequencies, bool) or num_frequencies < 0:
            raise ValueError(
                "FourierHead: `num_frequencies` must be an integer of at least 0, "
                f"got {num_frequencies!r}."
            )
        if weight_scale == 0 and bias_scale == 0:
            raise ValueError(
                "FourierHead: `weight_scale` or `bias_scale` must not be 0, got both: "
                "coefficients of 0 have no gradient."
            )
        outputs = 2 * (num_frequencies + 1)
        self.num_bins = num_bins
        self.num_frequencies = num_frequencies
        self.epsilon = epsilon
        self.dtype = dtype
        # Uniform up to 1 / sqrt(features), kernel and bias alike.
        kernel = initializers.variance_scaling(1 / 3, "fan_in", "uniform")(
            rngs.params(), (features, outputs), param_dtype
        )
        bound = features**-0.5
        bias = jax.random.uniform(rngs.params(), (outputs,), param_dtype, -bound, bound)
        self.kernel = nnx.Param(kernel * weight_scale)
        self.bias = nnx.Param(bias * bias_scale)

    @array_arguments
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        labels: Integer[Array, "*batch"] | None = None,
        *,
        where: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Returns the loss per row for `labels`, or logits (..., m) without them.

        Args:
            x: Inputs of the head.
            labels: Bins, see `FourierDensity.cross_entropy`.
            where: True for the rows that count; only with labels.
        """
        if labels is None:
            if where is not None:
                raise ValueError(
                    "FourierHead: `where` must be None without `labels`, got an array."
                )
            return self.density(x).logits(self.num_bins, epsilon=self.epsilon)
        if where is not None:
            # Also before the product: 0 * NaN in its transpose is NaN.
            kept = jnp.broadcast_to(where, x.shape[:-1])
            x = jnp.where(kept[..., None], x, 0)
        density = self.density(x)
        return density.cross_entropy(labels, num_bins=self.num_bins, where=where)

    @array_arguments
    def density(self, x: Float[Array, "*batch D"]) -> FourierDensity:
        """Computes the density of each row, whose coefficients are float32.

        Args:
            x: Inputs of the head.
        """
        kernel, bias = self.kernel[...], self.bias[...]
        if self.dtype is not None:
            x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        wide = accumulator_dtype(x, kernel, bias)
        product = jnp.matmul(x, kernel, preferred_element_type=wide)
        bias = bias.astype(wide).reshape((1,) * (x.ndim - 1) + bias.shape)
        return FourierDensity(product + bias)
