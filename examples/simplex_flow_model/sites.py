"""Human 5' splice sites with their counts, and how near other sequences are to them.

The counts are an exactly known distribution over sequences of nine letters: what a
sample of a model lacks can be measured, not only seen.
"""

import hashlib
import itertools
import pathlib
from typing import NamedTuple

import numpy as np
from language_model.failures import Failure
from study.packed_text import read_text

LETTERS = "ACGU"
LENGTH = 9
# The intron begins between the third and the fourth letter, with G.
POSITIONS = [-3, -2, -1, 1, 2, 3, 4, 5, 6]
CREDIT = (
    "counts of 5' splice sites in hg38/GENCODE from logomaker, (c) 2019 Ammar Tareen "
    "and Justin B. Kinney, MIT licence"
)


class Sites(NamedTuple):
    """Distinct sequences and what is known of them.

    Attributes:
        tokens: (M, 9), letters as 0 to 3.
        counts: How often each occurs in the genome.
        digest: Of the file.
    """

    tokens: np.ndarray
    counts: np.ndarray
    digest: str

    @property
    def share(self) -> np.ndarray:
        return self.counts / self.counts.sum()

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Sequences as often as in the genome."""
        return self.tokens[random.choice(len(self.tokens), count, p=self.share)]

    def of_count(self, least: int) -> "Sites":
        kept = self.counts >= least
        return Sites(self.tokens[kept], self.counts[kept], self.digest)

    def table(self) -> np.ndarray:
        """The share of every sequence of nine letters, by `number`."""
        return np.bincount(number(self.tokens), self.share, len(LETTERS) ** LENGTH)

    def count_of(self, tokens: np.ndarray) -> np.ndarray:
        table = np.bincount(number(self.tokens), self.counts, len(LETTERS) ** LENGTH)
        return table[number(tokens)]


def load(path: pathlib.Path) -> Sites:
    text, raw = read_text(path)
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line and line[0].strip(LETTERS) == ""]
    whole = all(len(row) == 2 and len(row[0]) == LENGTH for row in rows)
    if not rows or not whole or not all(row[1].isdigit() for row in rows):
        raise Failure(f"cannot read {path}: lines must hold {LENGTH} letters, a count.")
    tokens = np.array([[LETTERS.index(c) for c in s] for s, _ in rows], np.int32)
    counts = np.array([int(n) for _, n in rows])
    return Sites(tokens, counts, hashlib.sha256(raw).hexdigest())


def number(tokens: np.ndarray) -> np.ndarray:
    """Each sequence as one integer."""
    return (tokens * len(LETTERS) ** np.arange(LENGTH)).sum(-1)


def frequencies(tokens: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(9, 4): the share of each letter at each position."""
    hot = np.eye(len(LETTERS))[tokens]
    return np.average(hot, axis=0, weights=weights)


def pairs(tokens: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(36, 4, 4): the share of each two letters at each two positions."""
    hot = np.eye(len(LETTERS))[tokens]
    weights = np.full(len(hot), 1 / len(hot)) if weights is None else weights
    every = itertools.combinations(range(LENGTH), 2)
    return np.stack([(hot[:, i] * weights[:, None]).T @ hot[:, j] for i, j in every])


def independent(sites: Sites, count: int, random: np.random.Generator) -> np.ndarray:
    """Sequences with the right letters at each position, drawn on their own."""
    columns = frequencies(sites.tokens, sites.share)
    drawn = [random.choice(len(LETTERS), count, p=p / p.sum()) for p in columns]
    return np.stack(drawn, axis=1)


class Nearness(NamedTuple):
    """How near a sample is to the sites.

    Attributes:
        missing_bits: Kullback-Leibler divergence of the sample's frequencies from the
            sites, in bits, with a hundredth of the sites mixed into the sample so
            that what it lacks costs a finite amount. A sample of the sites
            themselves does not reach 0.
        letters: Largest total variation of a position.
        pairs: Mean total variation of two positions.
        known: Share of the sample that is a site.
    """

    missing_bits: float
    letters: float
    pairs: float
    known: float


def nearness(tokens: np.ndarray, sites: Sites) -> Nearness:
    true = sites.table()
    found = np.bincount(number(tokens), minlength=len(true)) / len(tokens)
    mixed = 0.99 * found + 0.01 * true
    real = true > 0
    missing = (true[real] * np.log2(true[real] / mixed[real])).sum()
    letters = frequencies(tokens) - frequencies(sites.tokens, sites.share)
    two = pairs(tokens) - pairs(sites.tokens, sites.share)
    return Nearness(
        float(missing),
        float(abs(letters).sum(-1).max() / 2),
        float(abs(two).sum((-2, -1)).mean() / 2),
        float(real[number(tokens)].mean()),
    )
