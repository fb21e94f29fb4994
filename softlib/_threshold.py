"""The threshold above which the entries of a row have a given number, or weight.

This avoids a sort. The weight of the entries that are at least t falls as t rises, so
the largest t for which it is enough is found bit by bit, in as many passes over the row
as a score has bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._compiled_once import compiled_once
from ._largest import largest

# Up to this number of entries a partial sort is quicker.
_FEW = 128


def threshold(
    scores: Float[Array, "*rows V"],
    enough: Callable[[Bool[Array, "*rows V"]], Bool[Array, "*rows 1"]],
) -> Float[Array, "*rows 1"]:
    """The largest t for which `enough(scores >= t)` is True; -inf if there is none.

    `enough` is monotone (more entries keep it True) and False for no entries.
    """
    bits = scores.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{bits}")
    high = jnp.asarray(1 << (bits - 1), unsigned)

    # Unsigned integers in the order of the floats. NaNs lie below -inf and above +inf;
    # no score is at least NaN, which is right above, and corrected below at the end.
    def number(code: Array) -> Array:
        raw = jnp.where(code >= high, code ^ high, ~code)
        return lax.bitcast_convert_type(raw, scores.dtype)

    def set_bit(i, code):
        with_bit = code | (high >> jnp.asarray(i, unsigned))
        return jnp.where(enough(scores >= number(with_bit)), with_bit, code)

    # The first step is outside the loop, so that the carry has the result's sharding.
    code = jnp.where(enough(scores >= 0), high, 0)
    found = number(lax.fori_loop(1, bits, set_bit, code))
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


class Cut(NamedTuple):
    """The bound of the largest entries of a row."""

    least: Float[Array, "*rows 1"]  # entries above are among them, entries below not
    last: Int[Array, "*rows 1"]  # entries equal to `least` are, up to this index

    def kept(self, scores: Float[Array, "*rows V"]) -> Bool[Array, "*rows V"]:
        """True for the largest entries; -inf is never one of them."""
        index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
        chosen = (scores > self.least) | ((scores == self.least) & (index <= self.last))
        return chosen & (scores > -jnp.inf)


def kth_largest(
    scores: Float[Array, "*rows V"], k: int | Int[Array, "*rows 1"]
) -> Float[Array, "*rows 1"]:
    """The score of rank `k`, from 1; the smallest where there are fewer."""
    count = scores.shape[-1]
    if isinstance(k, int) and k <= _FEW:
        return lax.top_k(scores, min(k, count))[0][..., -1:]
    return _at_rank(scores, jnp.clip(k, 1, count))


@compiled_once()
def _at_rank(scores: Array, rank: Array) -> Float[Array, "*rows 1"]:
    return threshold(scores, lambda entries: number_of(entries) >= rank)


def first_of_largest(
    scores: Float[Array, "*rows V"], k: int | Array
) -> Bool[Array, "*rows V"]:
    """True for the `k` largest entries of each row (the last axis), first index first.

    Entries of -inf are never among them. An array `k` has one value per row. The result
    of a row with NaN is undefined.
    """
    if isinstance(k, int):
        return _first_of_largest(k, lax.stop_gradient(scores), None)
    return _first_of_largest(None, lax.stop_gradient(scores), k)


@compiled_once(0)
def _first_of_largest(
    number: int | None, scores: Float[Array, "*rows V"], per_row: Array | None
) -> Bool[Array, "*rows V"]:
    count = scores.shape[-1]
    if count == 0:
        return jnp.zeros(scores.shape, bool)
    if per_row is None:
        assert number is not None
        k = number
    else:
        k = jnp.broadcast_to(per_row, scores.shape[:-1])[..., None]
    if number is not None and number <= _FEW:
        # top_k takes the first of equal entries, but 0 before -0.
        best, index = largest(scores, min(number, count))
        least = best[..., -1:]
        last = jnp.where(best == least, index, -1).max(-1, keepdims=True)
        crowded = least == 0
    else:
        least = kth_largest(scores, k)
        crowded = number_of(scores >= least) > k
        last = jnp.where(crowded, jnp.int32(-1), count)
    room = lambda above, equal: k - number_of(above)
    return cut(scores, least, last, crowded, room).kept(scores)


def cut(
    scores: Float[Array, "*rows V"],
    least: Float[Array, "*rows 1"],
    last: Int[Array, "*rows 1"],
    crowded: Bool[Array, "*rows 1"],
    room: Callable[[Array, Array], Array],
) -> Cut:
    """The bound at `least`; `crowded` rows keep `room(above, equal)` equal entries."""

    def by_index() -> Array:
        above, equal = scores > least, scores == least
        rank = jnp.cumsum(equal, axis=-1, dtype=jnp.int32)
        index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
        kept = equal & (rank <= room(above, equal))
        found = jnp.where(kept, index, -1).max(-1, keepdims=True)
        return jnp.where(crowded, found, last)

    some = (crowded & (least > -jnp.inf)).any()
    return Cut(least, lax.cond(some, by_index, lambda: last))


def number_of(entries: Bool[Array, "*rows V"]) -> Int[Array, "*rows 1"]:
    return entries.sum(-1, keepdims=True, dtype=jnp.int32)


def is_bad(scores: Float[Array, "*rows V"]) -> Bool[Array, "*rows 1"]:
    """True for rows with NaN or +inf."""
    # Not through the maximum, in which XLA on CPUs may lose a NaN of a long row.
    return ~(scores < jnp.inf).all(-1, keepdims=True)
