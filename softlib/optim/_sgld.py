"""Stochastic gradient Langevin dynamics."""

import math

import optax
from jaxtyping import Array

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.typing import Scalar


@array_arguments(gives_functions=True)
def sgld(
    learning_rate: Scalar, *, key: Array, temperature: Scalar = 1.0
) -> optax.GradientTransformation:
    r"""Steps that draw weights from their posterior instead of finding its mode.

    $$\theta \leftarrow \theta - \eta \nabla U(\theta)
        + \sqrt{2 \eta T}\, \varepsilon, \qquad \varepsilon \sim N(0, 1)$$

    has, for small $\eta$, the stationary density $e^{-U(\theta) / T}$. With $U$ the
    negative log-likelihood of all data minus the log-prior that is the posterior at
    $T = 1$. Average predicted probabilities over the iterates, not the weights.

    The gradient is that of a sum over the data. For the mean loss of a batch multiply
    it by the number of all examples: otherwise the temperature is too high by it.

    Args:
        learning_rate: $\eta > 0$; a number or a scalar array.
        key: A key of JAX, kept and split in the state.
        temperature: $T \geq 0$; 0 is gradient descent. A number or a scalar array.

    Returns:
        `optax.add_noise` before `optax.scale`: gradients in, updates to be added to
        the weights out.

    Raises:
        ValueError: `learning_rate` is not positive, or `temperature` negative.

    Derivatives: of updates with respect to gradients, $-\eta$.
    Cost: a normal number per weight and step.
    Source: "The Universality Lens: Why Even Highly Over-Parametrized Models Learn
        Well", which mixes over weights; the dynamics are those of Welling and Teh.

    Example:
        >>> step = softlib.optim.sgld(0.1, key=jax.random.key(0), temperature=0.0)
        >>> weights = jnp.array([1.0, -2.0])
        >>> print(step.update(weights, step.init(weights))[0])
        [-0.1  0.2]
    """
    function = "sgld"
    checks.require_positive_scalars(function, learning_rate=learning_rate)
    checks.require_scalar(function, "temperature", temperature, 0, math.inf)
    # The step scales the noise, too: by -learning_rate.
    temperature, learning_rate = promoted(temperature, learning_rate)
    noise = optax.add_noise(2 * temperature / learning_rate, 0.0, key)
    return optax.chain(noise, optax.scale(-1 * learning_rate))
