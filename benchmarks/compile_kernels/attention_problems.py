"""Problems of block-sparse attention, and the two programs made of each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from softlib import masks
from softlib.masks import Mask

from .case import Case, array


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention: a batch entry unless said otherwise.

    Attributes:
        mask: Of what attends.
        lengths: Queries and keys.
        heads: Query heads and key heads.
        features: Of a query and of a value.
        dtype: Of all arrays.
        batch: Entries.
    """

    mask: Mask
    lengths: tuple[int, int]
    heads: tuple[int, int]
    features: tuple[int, int] = (128, 128)
    dtype: Any = jnp.bfloat16
    batch: int = 1

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Query, key, value, and the cotangent of the output, heads first."""
        (t, s), (n, k), (h, e) = self.lengths, self.heads, self.features
        shapes = ((n, t, h), (k, s, h), (k, s, e), (n, t, e))
        return tuple(array(self.dtype, self.batch, *shape) for shape in shapes)

    @property
    def naive_bytes(self) -> int:
        return 4 * self.batch * self.heads[0] * self.lengths[0] * self.lengths[1]

    def flops(self, products: int) -> float:
        """Of products over so many features, for every pair that attends."""
        density = self.mask.density(*self.lengths)
        return 2 * products * density * self.naive_bytes / 4

    def bytes_of(self, names: str) -> int:
        """Of arrays, each as often as its letter occurs; r are numbers per row."""
        sizes: dict[str, int] = dict(zip("qkvo", map(_bytes, self.arrays), strict=True))
        sizes["r"] = 4 * self.batch * self.heads[0] * self.lengths[0]
        return sum(sizes[name] for name in names)


def forward_and_training(
    name: str,
    problem: Problem,
    forward: Callable[..., Any],
    arrays: tuple[jax.ShapeDtypeStruct, ...],
    extra: tuple[jax.ShapeDtypeStruct, ...],
    case: Callable[..., Case],
) -> list[Case]:
    """Attention, and attention with its gradients.

    Args:
        name: Of the problem.
        problem: What is computed.
        forward: Of query, key, value and what is extra.
        arrays: Query, key, value, and the cotangent of the output.
        extra: More arguments.
        case: Makes one of a name, the problem, a function and its arguments.
    """

    def training(cotangent: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        call = lambda *arrays: forward(*arrays, *rest)
        out, pull = jax.vjp(call, query, key, value)
        return out, pull(cotangent)

    (h, e), (*operands, cotangent) = problem.features, arrays
    arguments = (*operands, *extra)
    return [
        case(
            *(f"{name}, forward", problem, forward, arguments),
            products=h + e,
            moved="qkvor",
        ),
        case(
            *(f"{name}, training", problem, training, (cotangent, *arguments)),
            products=4 * h + 3 * e + h + e,
            moved="qkvorqkvooqkvqkvorqkv",
        ),
    ]


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


CAUSAL = Problem(masks.Causal(), (8192, 8192), (8, 2))
# A video of 33 latent frames of 45 x 80 tokens.
RADIAL = Problem(masks.Radial(3600), (118_800, 118_800), (24, 24))
