r"""The positive functions that turn scores into weights inside attention kernels.

Kernels work in base 2, like the exponential of the hardware: the entries of a function
with a running maximum are $\log_2 f(z)$, their weights $2^{e - m}$.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A positive function f.

    Attributes:
        name: `softmax`, `log_softplus`, `softplus` or `stablemax`. The first two are
            summed relative to a running maximum, the others directly.
    """

    name: str

    @property
    def is_log(self) -> bool:
        return self.name in ("softmax", "log_softplus")

    @property
    def is_light(self) -> bool:
        """Whether weights take few registers besides those of scores and results."""
        return self.name == "softmax"

    @property
    def absent(self) -> float:
        """The entry of a pair that does not attend."""
        return -math.inf if self.is_log else 0.0

    @property
    def unit(self) -> float:
        """The factor of scores; that from nats to bits is merged into the scale."""
        return LOG2_E if self.name == "softmax" else 1.0

    def scores(
        self, products: Any, scale: float, softcap: float | None
    ) -> tuple[Any, Any]:
        """Scores (in bits for softmax) from products, and the slope of the softcap."""
        if softcap is None:
            factor = scale * self.unit
            return (products if factor == 1 else products * factor), None
        bent = jnp.tanh(products * (scale / softcap))
        return bent * (softcap * self.unit), 1 - bent * bent

    def entries(self, z: Any) -> Any:
        """Entries of the accumulator: log2 f, or f."""
        if self.name == "softmax":
            return z
        if self.name == "log_softplus":
            far, near = _far(z)
            return jnp.where(far, z, jnp.log(jax.nn.softplus(near))) * LOG2_E
        if self.name == "softplus":
            return jax.nn.softplus(z)
        return jnp.where(z >= 0, 1 + z, 1 / (1 + jnp.abs(z)))

    def of_entries(self, entries: Any, inverse: Any) -> Any:
        """The normalised weights.

        `inverse` is the row's log-normalizer in bits (+inf for an empty row), or one
        over its normalizer (0 for an empty row).
        """
        return jnp.exp2(entries - inverse) if self.is_log else entries * inverse

    def slopes(self, z: Any, p: Any, inverse: Any) -> Any:
        """Derivatives by the scores, valid where the pair attends."""
        if self.name == "softmax":
            return p
        if self.name == "log_softplus":
            far, near = _far(z)
            ratio = jax.nn.sigmoid(near) / jax.nn.softplus(near)
            return p * jnp.where(far, 1, ratio)
        if self.name == "softplus":
            return jax.nn.sigmoid(z) * inverse
        below = 1 / (1 + jnp.abs(z))
        return jnp.where(z >= 0, 1, below * below) * inverse


def _far(z: Any) -> tuple[Any, Any]:
    """True where log softplus rounds to its argument, and the argument elsewhere."""
    far = z < -36.0
    return far, jnp.where(far, 0.0, z)
