r"""Gumbel-max: the class of greatest $z + g$ per row, found in a stream over classes.

The noise $g$ of an entry is a function of the key, the row and the class. So the result
depends neither on size and order of tiles nor on a division of classes over devices.

- Bits: Threefry-2x32 of 20 rounds with one key per row and the class as its counter;
  the bits of `jax.random.fold_in(key of the row, class)`. JAX's operation for it runs
  on a CPU as a loop over stored words; the adds and shifts below fuse with all that
  follows, and take a twentieth of its time.
- Noise: $g = -\log E$ with $E$ exponential. The largest of 256,000 draws has $E$ near
  $4 \cdot 10^{-6}$, and a class of probability $10^{-9}$ must be drawn once in $10^9$
  rows, so a small $E$ needs a fine resolution. With the 23 bits of `jax.random.gumbel`
  the largest of 256,000 draws has a tie in 1 row of 30, which the lower class would
  win. The exponential has no memory: $E = k \log 2 - \log(1 - w)$, with $k$ geometric
  (the leading zeros of a word) and $w$ uniform in (0, 1/2) (the other word, and 24 bits
  of the first below it).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32
from numpy.polynomial import Chebyshev, Polynomial

from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying

from . import stream
from .operand import Operand
from .tile import Options

type Words = UInt32[Array, "..."]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


class Kept(NamedTuple):
    """Threshold of the logits that can be drawn: at least `top + log_share`."""

    top: Float[Array, " rows"]
    log_share: Float[Array, " rows"]


@compiled_once(0)
def max_logits(options: Options, head: Operand) -> Float[Array, " rows"]:
    """The greatest logit of each row, from the tiles that `drawn_of_head` visits."""
    found = stream.forward(options.including("max_logit"), head).max_logit
    assert found is not None
    return found


@compiled_once(0)
def drawn_of_head(
    options: Options,
    head: Operand,
    key: UInt32[Array, "2"],
    first: Int[Array, ""],
    kept: Kept | None,
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """The greatest sum of logit and noise of each row, and its class; -inf, -1 if none.

    `first` is the id of the first class. A row with a NaN has NaN for its sum.
    """
    keys = match_varying(_keys_of_rows(key, head.rows), head.like)

    def begin(rows: int) -> tuple[Array, Array]:
        none = jnp.full(rows, -jnp.inf, head.dtype), jnp.full(rows, -1, jnp.int32)
        return match_varying(none, head.like, first)

    def step(best, z, start, of_rows):
        return _better(best, _best(z, of_rows[0], first + start, of_rows[1]))

    return stream.fold_logits(options, head, begin, step, (keys, kept))


@compiled_once()
def drawn_of_array(
    z: Float[Array, "rows V"],
    key: UInt32[Array, "2"],
    kept: Kept | None,
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """`drawn_of_head` for an array of logits: one tile, which XLA may partition."""
    keys = _keys_of_rows(key, z.shape[0])
    top, classes = _best(z, keys, jnp.zeros((), jnp.int32), kept)
    return top, jnp.where(top == -jnp.inf, -1, classes)


def _best(
    z: Float[Array, "rows classes"],
    keys: UInt32[Array, "rows 2"],
    first: Int[Array, ""],
    kept: Kept | None,
) -> tuple[Array, Array]:
    """The greatest sum per row of a tile, and its class; NaN if the row has a NaN."""
    classes = first + lax.broadcasted_iota(jnp.int32, z.shape, 1)
    counters = (jnp.zeros((), jnp.uint32), classes.astype(jnp.uint32))
    scores = z + gumbel(*threefry((keys[:, :1], keys[:, 1:]), counters), z.dtype)
    if kept is not None:
        # NaN is not below the threshold, and stays.
        below = z - kept.top[:, None] < kept.log_share[:, None]
        scores = jnp.where(below, -jnp.inf, scores)
    # Two reductions read them: without the barrier noise would be computed twice.
    scores = lax.optimization_barrier(scores)
    top = scores.max(1)
    none = jnp.iinfo(jnp.int32).max
    return top, jnp.where(scores == top[:, None], classes, none).min(1)


def _better(best: tuple[Array, Array], other: tuple[Array, Array]) -> Any:
    """The greater sum per row, of the lower class if equal. NaN is greatest."""
    exceeds = (other[0] > best[0]) | jnp.isnan(other[0])
    return jnp.maximum(best[0], other[0]), jnp.where(exceeds, other[1], best[1])


# ------------------------------------------------------------------------------- noise
def key_words(key: Array) -> UInt32[Array, "2"]:
    """A key of Threefry drawn from a key of any generator, raw or typed."""
    return jax.random.bits(key, (2,), jnp.uint32)


def _keys_of_rows(key: UInt32[Array, "2"], rows: int) -> UInt32[Array, "rows 2"]:
    counters = jnp.zeros((), jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)
    keys = jnp.stack(threefry((key[0], key[1]), counters), axis=-1)
    # Fused with the noise, the key of a row would be computed again for each class.
    return lax.optimization_barrier(keys)


def threefry(
    key: tuple[Words, Words], counters: tuple[Words, Words]
) -> tuple[Words, Words]:
    """Two words of Threefry-2x32 with 20 rounds, for each pair of counters.

    "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counters[0] + schedule[0], counters[1] + schedule[1]
    for number in range(1, 6):
        for bits in _ROTATIONS[(number - 1) % 2]:
            x = x + y
            y = (y << jnp.uint32(bits)) | (y >> jnp.uint32(32 - bits))
            y = x ^ y
        x = x + schedule[number % 3]
        y = y + schedule[(number + 1) % 3] + jnp.uint32(number)
    return x, y


def gumbel(first: Words, second: Words, dtype: Any) -> Float[Array, "..."]:
    """Standard Gumbel noise from two words each, between -3.1 and 40."""
    of = lambda words: words.astype(dtype)
    # The second word is used twice. Where its leading zeros reach into its last bits,
    # these are far below the rounding of E.
    low = second & jnp.uint32(2**24 - 1)
    w = of(first) * 2.0**-33 + (of(low) + 0.5) * 2.0**-57
    k = of(lax.clz(second))
    # In one fusion with the bits, the logarithm takes LLVM seconds to compile, and on a
    # CPU of many threads longer than anyone waits.
    exponential = lax.optimization_barrier(k * math.log(2) + w * _log_series(w))
    return -jnp.log(exponential)


def _log_series(w: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log(1 - w) / w for w in (0, 1/2), by interpolation at Chebyshev points.

    It has no division, at which XLA would split the fusion and compute the bits twice,
    and the relative accuracy that a CPU's log1p lacks.
    """
    function = lambda w: -np.log1p(-w) / w
    # Coefficients fall as powers of 3 + sqrt(8), by the ellipse through the pole at 1.
    degree = math.ceil(-math.log(np.finfo(w.dtype).eps) / math.log(3 + 8**0.5)) + 1
    fitted = Chebyshev.interpolate(function, degree, domain=(0, 0.5))
    *rest, last = fitted.convert(kind=Polynomial, domain=(-1, 1)).coef
    series = jnp.full_like(w, float(last))
    for coefficient in reversed(rest):
        series = series * w + float(coefficient)
    return series
