"""What a mask says of a block of pairs, and index arithmetic for it."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Block(enum.IntEnum):
    """What a mask holds in one block of (query, key) pairs.

    Attributes:
        NONE: No pair attends; proved.
        SOME: Nothing is claimed. Always a sound answer.
        ALL: Every pair attends; proved.

    The order makes `&` the minimum, `|` the maximum and `~` `2 - status`.

    Args:
        *args, **kwds: The number, as for any enumeration.

    Example:
        >>> status = softlib.masks.Causal().block_status(0, 4, 4, 8)
        >>> print(softlib.masks.Block(int(status)).name)
        NONE
    """

    NONE = 0
    SOME = 1
    ALL = 2

    @staticmethod
    def of(*, some: Any, every: Any) -> np.ndarray:
        """NONE where `some` is False, else ALL where `every` is True, else SOME.

        For `Mask.block_status` of a mask of one's own: the two proofs, as comparisons.

        Args:
            some: Booleans, NumPy; False where it is proved that no pair attends.
            every: Booleans that broadcast; True where it is proved that all pairs do.

        Returns:
            `Block` values as int8, of the broadcast shape.

        Example:
            >>> Block = softlib.masks.Block
            >>> print(Block.of(some=[False, True, True], every=[False, False, True]))
            [0 1 2]
        """
        every = np.logical_and(some, every)
        return np.asarray(np.add(some, every, dtype=np.int8))


def divide(index: Any, size: int) -> tuple[Any, Any]:
    """Quotient, rounded down, and remainder of positions by a static size."""
    if not isinstance(index, jax.Array):
        return index // size, index % size
    if size & (size - 1) == 0:
        return jnp.right_shift(index, size.bit_length() - 1), index & (size - 1)
    # Not `//`, whose sign function kernels for TPUs cannot lower without a device.
    quotient = jax.lax.div(index, jax.lax.full_like(index, size))
    quotient -= (index < quotient * size).astype(index.dtype)
    return quotient, index - quotient * size


def require_at_least(least: int, mask: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{mask}: `{name}` must be a Python int (it is static), got "
            f"{type(value).__name__}."
        )
    if value < least:
        raise ValueError(f"{mask}: `{name}` must be at least {least}, got {value}.")


def edges(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last index of each block; the last may be short."""
    start = np.arange(0, length, size, dtype=np.int64)
    return start, np.minimum(start + size, length)
