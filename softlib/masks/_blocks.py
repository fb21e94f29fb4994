"""The status of a block of pairs, and index arithmetic for masks."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Block(enum.IntEnum):
    """The status of a block of (query, key) pairs: none, some or all of them attend.

    Attributes:
        NONE: No pair attends; proved.
        SOME: Nothing is claimed, so it is always sound.
        ALL: Every pair attends; proved.

    In this order `&` is the minimum, `|` the maximum and `~` is `2 - status`.

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

        A subclass of `Mask` writes its `block_status` with it, as two comparisons.

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
    """Quotient, rounded down, and remainder of positions divided by a static size."""
    if not isinstance(index, jax.Array):
        return index // size, index % size
    if size & (size - 1) == 0:
        return jnp.right_shift(index, size.bit_length() - 1), index & (size - 1)
    # `//` uses a sign function, which TPU kernels cannot lower without a device.
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
    """Start and exclusive stop of each block of indices; the last may be short."""
    start = np.arange(0, length, size, dtype=np.int64)
    return start, np.minimum(start + size, length)
