"""The Z-loss: a softplus of a wanted score less the label's standard score."""

from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._sources import source_of
from softlib.typing import Scalar

from ._spherical_family import Sums, loss_of_sums, require_z_parameters, z_loss_of


@array_arguments
def z_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    a: Scalar,
    b: Scalar,
    epsilon: Scalar = 1e-12,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Z-loss, per row.

    With mean $\mu$ and standard deviation $\sigma$ of the $n$ logits of a row,

    $$L = \frac{1}{a} \log\bigl(1 + e^{a (b - z)}\bigr), \qquad
        z = \frac{o_y - \mu}{\sqrt{\sigma^2 + \epsilon}} .$$

    Logits are standardised, so that neither a shift nor a positive scale of the logits
    changes the loss. Once the label's score $z$ is above $b$ the row has hardly any
    gradient. A large $b$ trains the label to be first, a small one to be among the
    first k. Scores are at most $\sqrt{n - 1}$, reached when all other logits are equal.
    Choose $b$ relative to that: 3 for 10 classes, 890 for 793,471.

    This is the loss of the paper below. Other libraries call a multiple of the square
    of the logsumexp z-loss; here that is `logsumexp_penalty` of the cross-entropies.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; NaN outside, +inf for that of an excluded class.
        a: Sharpness, positive: for large ones the loss is $\max(b - z, 0)$. A number is
            static, an array traced and differentiable.
        b: The score that the label is to reach. Static or traced, as `a`.
        epsilon: $\epsilon \geq 0$, static or traced. The slope of the score is at most
            $1 / \sqrt\epsilon$: finite but large at a head of zeros, where all logits
            are equal, so start from random weights. With 0 the gradient of such a row
            is 0.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        As `log_spherical_softmax_loss`.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `a`, `b` and `epsilon`.
    Cost: as `softmax_cross_entropy` without exponentials, in plain JAX on every
        platform. The mean is subtracted from the logits before they are squared; it
        comes from the sum of the weights, with a softcap from another stream. For a
        head whose step does not grow with the vocabulary see `FactoredSphericalState`.
    Source: "The Z-loss: a shift and scale invariant classification loss belonging to
        the Spherical Family". It has no $\epsilon$.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 0])
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> loss = softlib.losses.z_loss(logits, labels, a=1.0, b=1.0)
        >>> print((100 * loss).round())
        [ 51. 187.]
    """
    source = source_of("z_loss", logits)
    require_z_parameters(source.function, a, b, epsilon)

    def formula(sums: Sums) -> Array:
        return z_loss_of(sums.label, sums.squares, sums.classes, a, b, epsilon)

    return loss_of_sums(source, labels, where, formula, deviations=True)
