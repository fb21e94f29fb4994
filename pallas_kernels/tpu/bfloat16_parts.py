"""Splits float32 numbers into sums of bfloat16 parts, which the matrix unit multiplies.

Three parts, each with 8 of the 24 bits, add up to the number. A product sums those
products of parts that reach these bits: six of nine.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax

# Mask of the bits of float32 that bfloat16 keeps.
_UPPER = 0xFFFF0000
COUNTS = {lax.Precision.HIGHEST: 3, lax.Precision.HIGH: 2, lax.Precision.DEFAULT: 1}


def part_count(dtype: Any, precision: lax.Precision) -> int:
    """Number of bfloat16 parts of a number of this dtype."""
    return 1 if dtype == jnp.bfloat16 else COUNTS[precision]


def parts_of(x: Any, count: int) -> Iterator[Any]:
    """Yields bfloat16 parts, the largest first; three add up to x, one is x rounded."""
    for _ in range(count - 1):
        # Some compilers would simplify away a rounding to bfloat16 and back.
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_UPPER)
        upper = lax.bitcast_convert_type(bits, jnp.float32)
        yield upper.astype(jnp.bfloat16)
        x = x - upper
    yield x.astype(jnp.bfloat16)


def pairs(counts: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs of parts whose products reach the bits of float32, the smallest first.

    This order loses the fewest digits in the sum.
    """
    every = [(i, j) for i in range(counts[0]) for j in range(counts[1])]
    enough = (pair for pair in every if sum(pair) < max(counts))
    return sorted(enough, key=sum, reverse=True)


def product(first: Any, second: Any, contract: tuple[int, int]) -> Any:
    return lax.dot_general(
        first,
        second,
        (((contract[0],), (contract[1],)), ((), ())),
        # bfloat16 accepts no other precision.
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
