"""Numbers of float32 as sums of numbers of bfloat16, which the matrix unit multiplies.

Three of them, each with 8 of the 24 bits, add up to the number; products of parts are
added as far as they reach those bits: six of three parts by three.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax

# Bits of float32 that bfloat16 has.
_UPPER = 0xFFFF0000
COUNTS = {lax.Precision.HIGHEST: 3, lax.Precision.HIGH: 2, lax.Precision.DEFAULT: 1}


def part_count(dtype: Any, precision: lax.Precision) -> int:
    """How many numbers of bfloat16 stand for one of the dtype."""
    return 1 if dtype == jnp.bfloat16 else COUNTS[precision]


def parts_of(x: Any, count: int) -> Iterator[Any]:
    """Numbers of bfloat16, the largest first; their sum is x if they are three.

    One is x rounded.
    """
    for _ in range(count - 1):
        # Rounding to bfloat16 and back would be simplified away by some compilers.
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_UPPER)
        upper = lax.bitcast_convert_type(bits, jnp.float32)
        yield upper.astype(jnp.bfloat16)
        x = x - upper
    yield x.astype(jnp.bfloat16)


def pairs(counts: tuple[int, int]) -> list[tuple[int, int]]:
    """The products of parts that reach the bits of float32.

    The smallest first: they are rounded off least.
    """
    every = [(i, j) for i in range(counts[0]) for j in range(counts[1])]
    enough = (pair for pair in every if sum(pair) < max(counts))
    return sorted(enough, key=sum, reverse=True)


def product(first: Any, second: Any, contract: tuple[int, int]) -> Any:
    return lax.dot_general(
        first,
        second,
        (((contract[0],), (contract[1],)), ((), ())),
        # Any other precision is refused for bfloat16.
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
