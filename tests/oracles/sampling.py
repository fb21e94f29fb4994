"""Gumbel-max by its definition, in float64, with noise by counters.

"Parallel Random Numbers: As Easy as 1, 2, 3": Threefry-2x32 of 20 rounds. A row has the
block cipher's output at (0, row) for its key, an entry the output at (0, class) for its
two words.
"""

import numpy as np

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
WORD = 2**32


def threefry(key, counter):
    """Two words of arrays of Python-sized integers, modulo 2^32 in each step."""
    key = [np.asarray(word, np.uint64) for word in key]
    key.append(key[0] ^ key[1] ^ np.uint64(PARITY))
    x, y = (np.asarray(word, np.uint64) for word in counter)
    x, y = (x + key[0]) % WORD, (y + key[1]) % WORD
    for done in range(20):
        bits = np.uint64(ROTATIONS[done % 8])
        x = (x + y) % WORD
        y = ((y << bits) | (y >> (np.uint64(32) - bits))) % WORD ^ x
        if done % 4 == 3:
            turn = done // 4 + 1
            x = (x + key[turn % 3]) % WORD
            y = (y + key[(turn + 1) % 3] + np.uint64(turn)) % WORD
    return x, y


def exponential(first, second):
    """K log 2 - log(1 - w): k are the leading zeros, w is uniform in (0, 1/2)."""
    leading = np.array([32 - int(word).bit_length() for word in second.ravel()])
    low = (second % 2**24).astype(np.float64)
    w = first * 2.0**-33 + (low + 0.5) * 2.0**-57
    return leading.reshape(second.shape) * np.log(2) - np.log1p(-w)


def noise(words, rows, classes):
    """(rows, classes) of Gumbel noise."""
    row_keys = threefry(words, (np.zeros(rows, int), np.arange(rows)))
    counter = np.broadcast_to(np.arange(classes), (rows, classes))
    keys = [word[:, None] for word in row_keys]
    return -np.log(exponential(*threefry(keys, (np.zeros_like(counter), counter))))


def sample(z, words, min_p=None):
    """Classes of final logits (*batch, V), -1 where there is none; and the margins.

    A margin is by how much the best sum exceeds the next: below the rounding of a sum
    the class is anybody's.
    """
    batch = z.shape[:-1]
    z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    if min_p is not None:
        bound = z.max(-1, keepdims=True) + np.log(np.reshape(min_p, (-1, 1)))
        z = np.where(z < bound, -np.inf, z)
    scores = z + noise(words, *z.shape)
    none = np.full((len(z), 1), -np.inf)
    ordered = np.sort(np.concatenate([none, none, scores], 1), -1)
    with np.errstate(invalid="ignore"):
        margin = ordered[:, -1] - ordered[:, -2]
    found = np.where(ordered[:, -1] > -np.inf, scores.argmax(-1), -1)
    return found.reshape(batch), np.where(found < 0, np.inf, margin).reshape(batch)
