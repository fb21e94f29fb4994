"""Static options of attention on a TPU: scores, weights and masks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from .attention_weights import Weights


@dataclasses.dataclass(frozen=True)
class Masking:
    """The mask of a block of pairs, evaluated in the kernel.

    Attributes:
        attends: `attends(query, key, *scalars, *numbers)`, for positions (rows, 1) and
            (1, columns) or the other way round; broadcasts. The numbers are those of
            `Extras`, in the shape of the positions.
        key_length: Number of keys.
        scalars: Number of integers per batch entry that `attends` takes.
    """

    attends: Callable[..., Any]
    key_length: int
    scalars: int = 0

    def of(
        self,
        shape: tuple[int, int],
        starts: tuple[Any, Any],
        batch: Any,
        scalars_ref: Any,
        numbers: Sequence[Any] = (),
        *,
        transposed: bool = False,
    ) -> Any:
        """Booleans of a piece of a block, whose rows are keys if `transposed`.

        `starts` are the positions of the first query and the first key, `numbers` those
        of its queries and of its keys.
        """
        queries, keys = (1, 0) if transposed else (0, 1)
        query, key = (
            start + lax.broadcasted_iota(jnp.int32, _along(shape, axis), axis)
            for start, axis in zip(starts, (queries, keys), strict=True)
        )
        scalars = [scalars_ref[batch * self.scalars + i] for i in range(self.scalars)]
        ok = self.attends(query, key, *scalars, *numbers) & (key < self.key_length)
        return jnp.broadcast_to(ok, shape)


@dataclasses.dataclass(frozen=True)
class Form:
    """Options that turn products into weights; Python values.

    Attributes:
        weights: The positive function of scores.
        scale: The factor of the products.
        softcap: None for none.
        precision: The precision of float32 products.
        masking: The mask.
    """

    weights: Weights
    scale: float
    softcap: float | None
    precision: Any
    masking: Masking

    def scores(self, products: Any) -> tuple[Any, Any]:
        """The scores, and the slope of the softcap (None without)."""
        return self.weights.scores(products, self.scale, self.softcap)


def _along(shape: tuple[int, int], axis: int) -> tuple[int, ...]:
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))
