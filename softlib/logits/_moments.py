"""Moments of the surprisal of each row."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._sharding import in_auto_mode, match_varying

from ._engine import surprisal
from ._engine.surprisal import Known
from ._engine.vocabulary_parallel import first_class
from ._source_rows import collapsed
from ._sources import Logits, source_of
from ._top_k import require_forward_stream


class Moments(NamedTuple):
    r"""Moments of $-\log p$ per row, in nats; None above the requested order.

    Attributes:
        mean: The entropy of the row.
        variance: The variance of $-\log p$.
        third: The third central moment.
        fourth: The fourth central moment.

    Derivatives: none.
    Cost: a number per row and field.

    Example:
        >>> found = softlib.logits.moments(jnp.array([[0.0, 0.0, -jnp.inf]]))
        >>> print(found.mean.round(4), found.variance, found.third)
        [0.6931] [0.] None
    """

    mean: Float[Array, "*batch"]
    variance: Float[Array, "*batch"] | None = None
    third: Float[Array, "*batch"] | None = None
    fourth: Float[Array, "*batch"] | None = None


@array_arguments
def moments(logits: Logits, *, order: int = 2) -> Moments:
    r"""Mean and central moments of $-\log p$ for a class that is drawn from the row.

    The central moments are $\mu_k = \sum_j p_j (-\log p_j - H)^k$ around the entropy
    $H$, the mean. With mean and variance, test whether the log-probability of a text is
    typical of texts that the model writes.

    Nothing cancels: probabilities are relative to the greatest one, which is never
    subtracted from 1. Sums are taken around a mean computed before, so that its
    rounding enters squared. A certain row has moments near 0, not near the rounding of
    its logits; equally likely classes have variance 0.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        order: Static number of moments, 1 to 4.

    Returns:
        `Moments`, float32 (float64 if an argument is float64); 0 in a row in which no
        class has a probability.

    Raises:
        TypeError: `order` is not a Python integer.
        ValueError: `order` is not from 1 to 4, or an option of the logits has no
            meaning here.

    Derivatives: none; the entropy with a gradient is `softlib.logits.entropy`.
    Cost: two forward passes of `row_statistics`.
    Source: the definition.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> print(softlib.logits.moments(logits).variance[1].round(4))
        0.6706
    """
    source = source_of("moments", logits)
    require_forward_stream(source)
    checks.require_positive_integer(source.function, "order", order)
    if order > 4:
        raise ValueError(f"{source.function}: `order` must be 1 to 4, got {order}.")
    value = lax.stop_gradient(source).prepared()
    found = value.statistics(("lse", "mean_logit", "max_logit", "argmax"))
    assert found.max_logit is not None
    assert found.argmax is not None
    assert found.mean_logit is not None
    assert found.lse is not None
    empty = found.lse == -jnp.inf
    top = jnp.where(empty, 0, found.max_logit)
    known = Known(top, found.argmax, jnp.where(empty, 0, top - found.mean_logit))

    batch, axis_name = value.batch_shape, value.axis_name
    first = jnp.zeros((), jnp.int32)
    if axis_name is not None:
        first = first_class(axis_name, value.own_classes).astype(jnp.int32)

    def summed(_, value, known, first):
        rows = Known(*(collapsed(array, batch) for array in known))
        head = match_varying(value.operand(), first)
        sums = surprisal.sums(value.options, head, rows, first, order)
        return tuple(s.reshape(batch) for s in (sums.rest, *sums.powers))

    specs = lambda spec: (PartitionSpec(*spec[: len(batch)]),) * (order + 1)
    rest, *powers = in_auto_mode(summed, specs, value.per_row, value, known, first)
    if axis_name is not None:
        rest, *powers = lax.psum((rest, *powers), axis_name)
    # Moments about the shift, then about the mean, which is close to it.
    d, *others = (power / (1 + rest) for power in powers)
    mean = jnp.log1p(rest) + (known.shift + d)
    central = [mean]
    if order > 1:
        central.append(jnp.maximum(others[0] - d**2, 0))
    if order > 2:
        central.append(others[1] - 3 * d * others[0] + 2 * d**3)
    if order > 3:
        fourth = others[2] - 4 * d * others[1] + 6 * d**2 * others[0] - 3 * d**4
        central.append(fourth)
    return Moments(*(jnp.where(empty, 0, each) for each in central))
