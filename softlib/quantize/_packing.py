"""Integers of few bits in words of 32.

The codes of a block of 32 take as many words as they have bits. A number of bits is a
sum of powers of two, as 3 = 2 + 1, and each power packs its part of all codes by
itself, so that no code lies across two words and a shift and a mask unpack it.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt32

from softlib import _checks as checks
from softlib._array_arguments import array_arguments

_BLOCK = 32
MOST_BITS = 16


@array_arguments
def pack_codes(
    codes: Integer[Array, "*batch n"], *, bits: int
) -> UInt32[Array, "*batch words"]:
    """Packs integers of few bits along the last axis.

    Args:
        codes: Integers in [0, 2^bits). One outside raises where its value is known; of
            one in a traced array the lowest bits are kept.
        bits: Static, 1 to 16.

    Returns:
        Words of 32 bits, `bits` of them for each 32 codes, the last ones filled up.

    Raises:
        TypeError: `codes` are no integers, or `bits` is no Python int.
        ValueError: `bits` is out of range, or a code is known to be.

    Derivatives: none, integers.
    Cost: a few operations for each code.
    Source: softlib.

    Example:
        >>> words = softlib.quantize.pack_codes(jnp.array([5, 0, 7]), bits=3)
        >>> print(words, softlib.quantize.unpack_codes(words, 3, bits=3))
        [49  0  5] [5 0 7]
    """
    function = "pack_codes"
    require_bits(function, bits, 1, MOST_BITS)
    require_codes(function, "codes", codes, bits)
    count = codes.shape[-1]
    rest = -count % _BLOCK
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, rest)])
    blocks = padded.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, _BLOCK)
    words = []
    for lowest, width in _planes(bits):
        part = (blocks >> np.uint32(lowest)) & np.uint32(2**width - 1)
        part = part.reshape(*blocks.shape[:-1], width, _BLOCK // width)
        # Disjoint bits: the sum is the union.
        words.append((part << _shifts(width, part.ndim)).sum(-1, dtype=jnp.uint32))
    return jnp.concatenate(words, axis=-1).reshape(*codes.shape[:-1], -1)


@array_arguments(as_given=("words",))
def unpack_codes(
    words: UInt32[Array, "*batch words"], count: int, *, bits: int
) -> Int[Array, "*batch n"]:
    """Unpacks the integers of `pack_codes`.

    Args:
        words: As `pack_codes` returns them.
        count: Static number of codes along the last axis.
        bits: Static, as they were packed.

    Returns:
        The codes, int32.

    Raises:
        TypeError: `words` are not uint32, or a number is no Python int.
        ValueError: `bits` is out of range, or `words` are not as many as `count` codes
            of so many bits take.

    Derivatives: none, integers.
    Cost: a few operations for each code.
    Source: softlib.

    Example:
        >>> words = softlib.quantize.pack_codes(jnp.arange(4), bits=2)
        >>> print(words, softlib.quantize.unpack_codes(words, 4, bits=2))
        [228   0] [0 1 2 3]
    """
    function = "unpack_codes"
    if words.dtype != jnp.uint32:
        raise TypeError(
            f"{function}: `words` must have dtype uint32, got {words.dtype}."
        )
    require_bits(function, bits, 1, MOST_BITS)
    checks.require_integer_from(function, "count", count, 0)
    checks.require_rank(function, "words", words, 1, "(..., words)")
    if words.shape[-1] != words_for(count, bits):
        raise ValueError(
            f"{function}: `words` must be {words_for(count, bits)} along the last axis "
            f"for {count} codes of {bits} bits, got shape {words.shape}."
        )
    return unpacked(words, count, bits)


def unpacked(words: Array, count: int, bits: int) -> Int[Array, "*batch n"]:
    """Unpacks without checks."""
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    total, first = None, 0
    for lowest, width in _planes(bits):
        part = blocks[..., first : first + width, None]
        part = part >> _shifts(width, part.ndim)
        part = (part & np.uint32(2**width - 1)) << np.uint32(lowest)
        part = part.reshape(*blocks.shape[:-1], _BLOCK)
        total = part if total is None else total | part
        first += width
    assert total is not None
    codes = total.reshape(*words.shape[:-1], blocks.shape[-2] * _BLOCK)
    return codes[..., :count].astype(jnp.int32)


def words_for(count: int, bits: int) -> int:
    """Number of words that so many codes take."""
    return math.ceil(count / _BLOCK) * bits


def require_bits(function: str, bits: object, least: int, most: int) -> None:
    checks.require_integer_from(function, "bits", bits, least)
    assert isinstance(bits, int)
    if bits > most:
        raise ValueError(f"{function}: `bits` must be at most {most}, got {bits}.")


def require_codes(function: str, name: str, codes: Array, bits: int) -> None:
    """Requires integers, in [0, 2^bits) where their values are known."""
    checks.require_integer(function, **{name: codes})
    checks.require_rank(function, name, codes, 1, "(..., n)")
    checks.require_known_below(function, name, codes, 2**bits, "integers")


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, number of bits) of each part of a code; numbers divide 32."""
    lowest = 0
    for width in (16, 8, 4, 2, 1):
        if bits & width:
            yield lowest, width
            lowest += width


def _shifts(width: int, ndim: int) -> np.ndarray:
    """The shifts of the codes of a word, along the last of `ndim` axes."""
    shifts = np.arange(0, _BLOCK, width, dtype=np.uint32)
    return shifts.reshape(*(1,) * (ndim - 1), -1)
