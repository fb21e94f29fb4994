"""Masks pair by pair: Python integers and fractions, straight from the definitions.

`keeps(query, key)` functions take two integers; `dense` makes the array of them, and
`classify` says what a range of it holds by looking at every pair.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

type Keeps = Callable[[int, int], bool]


def dense(keeps: Keeps, queries, keys) -> np.ndarray:
    """Of the positions in two sequences of integers."""
    rows = [[keeps(int(q), int(k)) for k in keys] for q in queries]
    return np.array(rows, bool).reshape(len(queries), len(keys))


def classify(pairs: np.ndarray) -> int:
    """0 if no pair attends, 2 if every pair does, else 1."""
    return 2 if pairs.all() else int(pairs.any())


def causal(offset=0) -> Keeps:
    return lambda q, k: k <= q + offset


def window(left, right) -> Keeps:
    def keeps(q, k):
        far_left = left is not None and k < q - left
        far_right = right is not None and k > q + right
        return not far_left and not far_right

    return keeps


def dilated(stride) -> Keeps:
    return lambda q, k: (k - q) % stride == 0


def chunked(size) -> Keeps:
    def keeps(q, k):
        while q < 0 or k < 0:
            q, k = q + size, k + size
        while q >= size and k >= size:
            q, k = q - size, k - size
        return q < size and k < size

    return keeps


def prefix(length) -> Keeps:
    return lambda q, k: k in range(length)


def global_tokens(start, stop=None) -> Keeps:
    def is_global(token):
        return token >= start and (stop is None or token < stop)

    return lambda q, k: is_global(q) or is_global(k)


def blocks(array, block) -> Keeps:
    by_block = {
        (i, j): bool(array[i, j])
        for i in range(array.shape[0])
        for j in range(array.shape[1])
    }
    return lambda q, k: by_block.get((q // block[0], k // block[1]), False)


def segments(query_ids, key_ids) -> Keeps:
    def keeps(q, k):
        known = q in range(len(query_ids)) and k in range(len(key_ids))
        return known and query_ids[q] == key_ids[k]

    return keeps


def padding(query_length, key_length) -> Keeps:
    return lambda q, k: q < query_length and k < key_length


def octave(distance: int) -> int:
    """The largest power of two up to max(distance, 1)."""
    power = 1
    while 2 * power <= distance:
        power *= 2
    return power


def radial(
    tokens, sink_frames=1, decay=1.0, min_window=0, rule="paper", *, sinks=True
) -> Keeps:
    def keeps(q, k):
        (query_frame, query_place), (key_frame, key_place) = (
            divmod(q, tokens),
            divmod(k, tokens),
        )
        if sinks and 0 <= key_frame < sink_frames:
            return True
        d, apart = abs(query_frame - key_frame), abs(query_place - key_place)
        if rule == "paper":
            return paper_band(tokens, d, apart)
        return blocked_band(tokens, d, apart, Fraction(decay), min_window)

    return keeps


def paper_band(tokens, d, apart) -> bool:
    power = octave(d)
    if power <= tokens:
        return (apart + 1) * power <= tokens
    return d % ceil(Fraction(power, tokens)) == 0 and apart == 0


def blocked_band(tokens, d, apart, decay, min_window) -> bool:
    if d <= 1:
        return True
    run = Fraction(octave(tokens), octave(d))
    least = max(min_window, 1)
    if run < least and d % ceil(least / run) != 0:
        return False
    return apart <= max(decay * run, min_window)


def ceil(fraction: Fraction) -> int:
    return -(-fraction.numerator // fraction.denominator)


def public_code_blocks(frames, tokens, block, decay, variant, text) -> np.ndarray:
    """The block mask of the public code, from token masks on shifted canvases."""
    total = (frames * tokens + text) // block
    found = np.zeros((total, total), bool)
    side = -(-tokens // block)
    places = np.arange(tokens)
    apart = abs(places[:, None] - places)
    for i in range(frames):
        for j in range(frames):
            local = _public_code_band(apart, abs(i - j), tokens, block, decay)
            if variant == "wan" and j == 0:
                local = np.ones_like(local)
            (row, above), (column, before) = (divmod(t * tokens, block) for t in (i, j))
            canvas = np.zeros((side * block + block, side * block + block), bool)
            canvas[above : above + tokens, before : before + tokens] = local
            for a in range(side):
                for b in range(side):
                    tile = canvas[
                        a * block : (a + 1) * block, b * block : (b + 1) * block
                    ]
                    if row + a < total and column + b < total and _is_dense(tile):
                        found[row + a, column + b] = True
    border = frames * tokens // block
    found[border:] = found[:, border:] = True
    return found


def _public_code_band(apart, d, tokens, block, decay) -> np.ndarray:
    if d <= 1:
        return np.ones_like(apart, bool)
    run = 2 ** tokens.bit_length() / 2 ** d.bit_length()
    if run < 128 and d % int(128 / run) != 0:
        return np.zeros_like(apart, bool)
    return apart <= max(run * decay, block)


def _is_dense(tile: np.ndarray) -> bool:
    covered = tile.sum(axis=0)
    filled = int((covered > 0).sum())
    high = sum(Fraction(int(c), len(tile)) > Fraction(1, 3) for c in covered)
    return filled > 0 and Fraction(high, filled) > Fraction(6, 10)
