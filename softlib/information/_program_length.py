r"""Code lengths: integer frequencies, a range coder, and mixtures of contexts.

The length of a sequence in bits under a model is `softlib.scoring.sequence_nll` divided
by $\log 2$; a coder comes within a byte of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype

# The interval of the coder has 64 bits; it is widened when fewer than 56 are left.
WHOLE, NARROW = 1 << 64, 1 << 56
MOST_BITS = {"float64": 30}  # of frequencies that are exact; else 16


class RangeCode(NamedTuple):
    r"""A coded sequence.

    Attributes:
        data: The code. Its end, and so the number of symbols, is not in it.
        ideal_bits: $-\sum_t \log_2 (f_t / \sum f)$ of the frequencies given. The code
            has less than 8 bits more, and $2^{b - 55}$ for a symbol whose frequencies
            sum to $2^b$.

    Derivatives: none.
    Cost: the bytes of the code.

    Example:
        >>> code = softlib.information.range_encode([[1, 3]] * 16, [1] * 16)
        >>> print(len(code.data), round(code.ideal_bits, 2))
        1 6.64
    """

    data: bytes
    ideal_bits: float


@array_arguments
def integer_frequencies(
    probs: Float[Array, "*batch V"], *, precision_bits: int = 16
) -> Int[Array, "*batch V"]:
    r"""Positive integers with a sum of $2^b$, for a coder, from probabilities.

    $f_v = \lfloor p_v (2^b - V) \rfloor + 1$, and what is left is added to the (first)
    largest. A symbol costs at most $-\log_2 p_v + \log_2 \frac{2^b}{2^b - V}$ bits.

    Encoder and decoder need the same integers. Programs of other batch sizes, or other
    devices, round probabilities otherwise: compute them by one compiled program on both
    sides, or round the logits before.

    Args:
        probs: Distributions over V classes.
        precision_bits: Static $b$, 1 to 16, or to 30 for float64: products keep eight
            bits behind the point. $2^b$ must exceed V.

    Returns:
        int32; all 0 in a row that is no distribution to 1e-3, which `range_encode`
        refuses.

    Raises:
        TypeError: `probs` is not floating, or `precision_bits` no Python int.
        ValueError: `precision_bits` is out of range.

    Derivatives: none; integers.
    Cost: a few passes.
    Source: "The KoLMogorov Test: Compression by Code Generation", whose baselines are
        coders.

    Example:
        >>> probs = jnp.array([0.7, 0.3, 0.0])
        >>> print(softlib.information.integer_frequencies(probs, precision_bits=4))
        [11  4  1]
    """
    function = "integer_frequencies"
    probs = jnp.asarray(probs)
    checks.require_floating(function, probs=probs)
    checks.require_rank(function, "probs", probs, 1, "(..., V)")
    checks.require_positive_integer(function, "precision_bits", precision_bits)
    classes = probs.shape[-1]
    most = MOST_BITS.get(str(probs.dtype), 16)
    if not (precision_bits <= most and 0 < classes < 2**precision_bits):
        raise ValueError(
            f"{function}: `precision_bits` must be at most {most} for {probs.dtype}, "
            f"and 2 to its power more than the {classes} classes, got {precision_bits}."
        )
    return _frequencies(probs.astype(accumulator_dtype(probs)), precision_bits)


def range_encode(
    frequencies: Sequence[Sequence[int]] | np.ndarray,
    symbols: Sequence[int] | np.ndarray,
) -> RangeCode:
    r"""Codes symbols in the bits that their frequencies promise, and less than a byte.

    A range coder of 64 bits on the host, in integers: exact on every machine.

    Args:
        frequencies: For every symbol those of all classes, at least 1; (T, V). Their
            sums must be powers of two, at most $2^{32}$.
        symbols: What is coded, in $[0, V)$; (T,).

    Returns:
        `RangeCode`; no bytes for no symbols.

    Raises:
        ValueError: Shapes do not fit together, or a symbol or frequency is out of
            range.

    Derivatives: none; integers.
    Cost: a few operations of Python and V additions per symbol.
    Source: "The KoLMogorov Test: Compression by Code Generation", whose baselines are
        coders.

    Example:
        >>> code = softlib.information.range_encode([[1, 3], [1, 3]], [1, 1])
        >>> decode = softlib.information.range_decode
        >>> print(decode(code.data, lambda _: [1, 3], length=2))
        [1 1]
    """
    function = "range_encode"
    table, symbols = np.asarray(frequencies), np.asarray(symbols)
    if symbols.ndim != 1 or len(table) != len(symbols):
        raise ValueError(
            f"{function}: `symbols` must have shape (T,), one for each of the "
            f"{len(table)} rows of frequencies, got {symbols.shape}."
        )
    low, width, ideal = 0, WHOLE, 0.0
    out = bytearray()
    for row, symbol in zip(table, symbols.tolist(), strict=True):
        ends, bits = _ends(function, row)
        if not (isinstance(symbol, int) and 0 <= symbol < len(ends) - 1):
            raise ValueError(
                f"{function}: `symbols` must hold integers in [0, {len(ends) - 1}), "
                f"got {symbol}."
            )
        start, stop = ends[symbol], ends[symbol + 1]
        ideal += bits - math.log2(stop - start)
        unit = width >> bits
        low, width = low + unit * start, unit * (stop - start)
        while width < NARROW:
            low, width = _emit(low, out), width << 8
    # The fewest bytes after which the decoder may read zeros.
    for count in range(9):
        unit = 1 << (64 - 8 * count)
        value = -(-low // unit) * unit
        if value < low + width:
            break
    for _ in range(count):
        value = _emit(value, out)
    if value >= WHOLE:
        _carry(out)
    return RangeCode(bytes(out), ideal)


def range_decode(
    data: bytes,
    next_frequencies: Callable[[np.ndarray], Sequence[int] | np.ndarray],
    *,
    length: int,
) -> np.ndarray:
    r"""The symbols that `range_encode` has coded.

    Args:
        data: The code.
        next_frequencies: Gives, for the symbols so far, the frequencies of the next:
            the same integers as the encoder had.
        length: How many symbols there are.

    Returns:
        int64, (length,). Other data, or frequencies, than those of the encoder give
        other symbols, without notice.

    Raises:
        TypeError: `length` is no Python int.
        ValueError: `length` is negative, or a frequency out of range.

    Derivatives: none; integers.
    Cost: a call of `next_frequencies` and V additions per symbol.
    Source: "The KoLMogorov Test: Compression by Code Generation", whose baselines are
        coders.

    Example:
        >>> code = softlib.information.range_encode([[1, 3], [3, 1]], [1, 0])
        >>> decode = softlib.information.range_decode
        >>> print(decode(code.data, lambda seen: [[1, 3], [3, 1]][len(seen)], length=2))
        [1 0]
    """
    function = "range_decode"
    checks.require_integer_from(function, "length", length, 0)
    # Where the code lies above the low end of the interval.
    above, width, read = int.from_bytes(data[:8].ljust(8, b"\0")), WHOLE, 8
    symbols = np.zeros(length, np.int64)
    for t in range(length):
        ends, bits = _ends(function, np.asarray(next_frequencies(symbols[:t])))
        unit = width >> bits
        place = min(above // unit, ends[-1] - 1)
        symbol = int(np.searchsorted(ends, place, side="right")) - 1
        symbols[t] = symbol
        above -= unit * ends[symbol]
        width = unit * (ends[symbol + 1] - ends[symbol])
        while width < NARROW:
            following = data[read] if read < len(data) else 0
            above, width, read = (above << 8) | following, width << 8, read + 1
    return symbols


@array_arguments
def context_log_likelihoods(
    symbols: Integer[Array, " T"], *, num_classes: int, max_order: int
) -> Float[Array, "T orders"]:
    r"""Predictions of the next symbol from those that followed the same context before.

    For contexts of $k = 0, \dots, K$ symbols, with counts $n$ of what followed earlier,
    $\log p_k(x_t) = \log \frac{n(x_t) + 1/2}{\sum n + V / 2}$ (Krichevsky and
    Trofimov). Mixed by `sequential_mixture` they make a strong compressor without any
    training, which loses at most $\log (K + 1)$ nats against the best order.

    Args:
        symbols: In $[0, V)$. Another one is NaN, and matches nothing.
        num_classes: Static V, at least 1.
        max_order: Static K, at least 0.

    Returns:
        Nats for the orders 0 to K, float32, (T, K + 1); $-\log V$ for a context that is
        new or longer than what came before.

    Raises:
        TypeError: `symbols` are no integers, or an option no Python int.
        ValueError: `symbols` has not one axis, or an option is out of range.

    Derivatives: none; counts.
    Cost: T² K comparisons, row by row.
    Source: "The KoLMogorov Test: Compression by Code Generation", as a baseline.

    Example:
        >>> symbols = jnp.array([0, 1] * 8)
        >>> values = softlib.information.context_log_likelihoods(
        ...     symbols, num_classes=2, max_order=1)
        >>> mixed = softlib.information.sequential_mixture(values, jnp.zeros(2))
        >>> print(-mixed.log_predictive.sum() < 16 * jnp.log(2) / 2)
        True
    """
    function = "context_log_likelihoods"
    symbols = jnp.asarray(symbols)
    checks.require_integer(function, symbols=symbols)
    if symbols.ndim != 1:
        raise ValueError(
            f"{function}: `symbols` must have shape (T,), got {symbols.shape}."
        )
    checks.require_positive_integer(function, "num_classes", num_classes)
    checks.require_integer_from(function, "max_order", max_order, 0)
    return _context_log_likelihoods(symbols, num_classes, max_order)


@array_arguments
def compression_rate(
    program_bits: Float[Array, "*batch"],
    data_bits: Float[Array, "*batch"],
    *,
    baseline_bits: Float[Array, "*batch"],
    reproduces: Bool[Array, "*batch"],
) -> Float[Array, "*batch"]:
    r"""The bits of a program as a share of those of the data that it prints.

    A program that does not reproduce its data counts as the baseline compressor, so
    that the mean over sequences rewards no failure.

    Args:
        program_bits: The lengths of programs, whatever those that fail have.
        data_bits: The lengths of the data as they are, above 0.
        baseline_bits: The lengths of the data under the baseline.
        reproduces: True where running the program gives the data.

    Returns:
        Rates, the lower the better, float32 (float64 if an argument is float64); NaN
        where data has no positive length.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ.

    Derivatives: forward and reverse, any order, in the lengths that count.
    Cost: a division per program.
    Source: "The KoLMogorov Test: Compression by Code Generation".

    Example:
        >>> rate = softlib.information.compression_rate
        >>> bits, data = jnp.array([100.0, 90.0]), jnp.array([1000.0, 1000.0])
        >>> print(rate(bits, data, baseline_bits=data / 2, reproduces=[True, False]))
        [0.1 0.5]
    """
    function = "compression_rate"
    lengths = {
        "program_bits": jnp.asarray(program_bits),
        "data_bits": jnp.asarray(data_bits),
        "baseline_bits": jnp.asarray(baseline_bits),
    }
    checks.require_floating(function, **lengths)
    reproduces = jnp.asarray(reproduces)
    checks.require_boolean(function, reproduces=reproduces)
    shape = lengths["program_bits"].shape
    for name, array in (*lengths.items(), ("reproduces", reproduces)):
        checks.require_shape(function, name, array, shape, "that of `program_bits`")
    dtype = accumulator_dtype(*lengths.values())
    program, data, baseline = (one.astype(dtype) for one in lengths.values())
    bits = jnp.where(reproduces, program, baseline)
    return jnp.where(data > 0, bits / jnp.where(data > 0, data, 1), jnp.nan)


@compiled_once(1)
def _frequencies(probs: Float[Array, "*batch V"], precision_bits: int) -> Array:
    classes, whole = probs.shape[-1], 2**precision_bits
    given = (probs >= 0).all(-1) & (jnp.abs(probs.sum(-1) - 1) < 1e-3)
    probs = jnp.where(given[..., None], probs, 0)
    found = jnp.floor(probs * (whole - classes)).astype(jnp.int32) + 1
    places = lax.broadcasted_iota(jnp.int32, probs.shape, probs.ndim - 1)
    is_largest = places == probs.argmax(-1, keepdims=True).astype(jnp.int32)
    left = whole - found.sum(-1, keepdims=True)
    found = found + jnp.where(is_largest, left, 0)
    # Rounded probabilities may sum to more than 1; a row that is far off is refused.
    given &= (found >= 1).all(-1)
    return jnp.where(given[..., None], found, 0)


def _ends(function: str, row: np.ndarray) -> tuple[list[int], int]:
    """Cumulative frequencies from 0, and the logarithm of their sum."""
    name = "frequencies" if function == "range_encode" else "next_frequencies"
    if row.ndim != 1 or not len(row) or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(
            f"{function}: `{name}` must be integers of V classes, got {row.dtype} of "
            f"shape {row.shape}."
        )
    ends = [0, *np.cumsum(row, dtype=np.int64).tolist()]
    total = ends[-1]
    if row.min() < 1 or total & (total - 1) or total > 1 << 32:
        raise ValueError(
            f"{function}: `{name}` must be at least 1 with a sum that is a power of "
            f"two up to 2**32, got a least of {row.min()} and a sum of {total}."
        )
    return ends, total.bit_length() - 1


def _emit(low: int, out: bytearray) -> int:
    """Appends the top byte, carries what overflows; the rest of `low`."""
    if low >= WHOLE:
        _carry(out)
        low -= WHOLE
    out.append(low >> 56)
    return (low << 8) & (WHOLE - 1)


def _carry(out: bytearray) -> None:
    place = len(out) - 1
    while out[place] == 255:
        out[place] = 0
        place -= 1
    out[place] += 1


@compiled_once(1, 2)
def _context_log_likelihoods(symbols: Array, num_classes: int, max_order: int) -> Array:
    length = symbols.shape[0]
    known = (symbols >= 0) & (symbols < num_classes)
    places = jnp.arange(length)

    def of_row(t: Array) -> Array:
        before = places < t
        # Whether the last k symbols before s are those before t, for k = 0, 1, ...
        same, matches = before, [before]
        for lag in range(1, max_order + 1):
            here = jnp.roll(symbols, lag)
            valid = (places >= lag) & jnp.roll(known, lag)
            same = same & valid & (here == here[t]) & (t >= lag)
            matches.append(same)
        matched = jnp.stack(matches) & known[None]
        total = matched.sum(1).astype(jnp.float32)
        own = (matched & (symbols == symbols[t])[None]).sum(1).astype(jnp.float32)
        share = (own + 0.5) / (total + num_classes / 2)
        return jnp.where(known[t], jnp.log(share), jnp.nan)

    if not length:
        return jnp.zeros((0, max_order + 1), jnp.float32)
    return lax.map(of_row, places)
