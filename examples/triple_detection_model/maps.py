"""What trained heads attend to: their weights on the pairs (j, k) of a query."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from . import model as model_
from .options import Options
from .task import Sequences, matches

AT_MOST = 512  # sequences


class Map(NamedTuple):
    """The pairs of one query.

    Attributes:
        tokens: The sequence.
        query: Position i.
        weights: (heads, n + 1, n + 1), sum 1 each; row and column 0 are the blanks.
        matches: (n + 1, n + 1), True where the three numbers sum to zero.
    """

    tokens: np.ndarray
    query: int
    weights: np.ndarray
    matches: np.ndarray


class Attended(NamedTuple):
    """The weights of all heads on fresh sequences.

    Attributes:
        on_matches: Mean weight on pairs that match, of queries that have one, by head.
        by_chance: The mean share of the pairs that match, for the same queries.
        found: The share of these queries for which one head has more than half of its
            weight on pairs that match.
        by_sum: (heads, M): the weight on triples with this sum, relative to how many
            there are.
        map: The first query with one match.
    """

    on_matches: list[float]
    by_chance: float
    found: float
    by_sum: np.ndarray
    map: Map


def attended(model: Any, sequences: Sequences, options: Options) -> Attended:
    count = min(AT_MOST, options.test_sequences)
    tokens, answers = sequences.fresh(count)
    weights = np.asarray(model_.attention_weights(model, jnp.asarray(tokens)))
    # Blanks are no numbers: they match nothing.
    match = np.pad(matches(tokens, options.modulus), ((0, 0), (0, 0), (1, 0), (1, 0)))
    on_matches = np.where(match[:, None], weights, 0).sum((-2, -1))
    on_matches = np.moveaxis(on_matches, 1, -1)[answers]  # (queries, heads)
    row, query = first_with_one_match(match)
    return Attended(
        on_matches.mean(0).tolist(),
        float(match.mean((-2, -1))[answers].mean()),
        float((on_matches.max(1) > 0.5).mean()),
        _by_sum(tokens, weights[..., 1:, 1:], options.modulus),
        Map(tokens[row], query, weights[row, :, query], match[row, query]),
    )


def _by_sum(tokens: np.ndarray, weights: np.ndarray, modulus: int) -> np.ndarray:
    pair = (tokens[:, :, None] + tokens[:, None, :])[:, None]
    sums = ((tokens[:, :, None, None] + pair) % modulus).ravel()
    there_are = np.bincount(sums, minlength=modulus) / sums.size
    of_head = [
        np.bincount(sums, weights=w.ravel(), minlength=modulus) / w.sum()
        for w in np.moveaxis(weights, 1, 0)
    ]
    return np.stack(of_head) / there_are


def first_with_one_match(match: np.ndarray) -> tuple[int, int]:
    """The first sequence, and its first query, with two numbers in either order."""
    row, query = np.argwhere(match.sum((-2, -1)) == 2)[0]
    return int(row), int(query)
