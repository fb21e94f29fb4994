"""A linear-chain conditional random field by enumeration of all label sequences.

The score of labels y over the steps t that count is

    start[y_1] + sum emissions[t, y_t] + sum transitions[y_(t-1), y_t] + end[y_T]

and their probability e to the score, normalised over all sequences: K^T of them.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Field(NamedTuple):
    """One row per chain.

    Fields:
        nll: Of the given labels.
        log_normalizer: 0 without a step.
        marginals, best: 0 in steps that do not count.
        score: Of the best labels, of ties those of the lowest last label, and so on.
        emissions, transitions, start, end: Gradients of the sum of all `nll`.
    """

    nll: np.ndarray
    log_normalizer: np.ndarray
    marginals: np.ndarray
    best: np.ndarray
    score: np.ndarray
    emissions: np.ndarray
    transitions: np.ndarray
    start: np.ndarray
    end: np.ndarray


def score(emissions, transitions, start, end, labels):
    total = start[labels[0]] + end[labels[-1]]
    for t, label in enumerate(labels):
        total += emissions[t, label]
        if t:
            total += transitions[labels[t - 1], label]
    return total


def field(emissions, labels, transitions, start, end, where):
    rows, steps, size = emissions.shape
    zeros = lambda *shape: np.zeros(shape)
    found = Field(
        *(zeros(rows), zeros(rows), zeros(rows, steps, size)),
        *(np.zeros((rows, steps), int), zeros(rows), zeros(rows, steps, size)),
        *(zeros(size, size), zeros(size), zeros(size)),
    )
    for b in range(rows):
        at = np.flatnonzero(where[b])
        if not len(at):
            continue
        ways = list(itertools.product(range(size), repeat=len(at)))
        own = (emissions[b, at], transitions, start, end)
        scores = np.array([score(*own, way) for way in ways])
        target = score(*own, labels[b, at])
        top = scores.max()
        found.score[b] = top
        backwards = [way[::-1] for way in ways]
        tied = np.flatnonzero(scores >= top - 1e-12) if top > -np.inf else [0]
        found.best[b, at] = min(backwards[i] for i in tied)[::-1]
        if top == -np.inf:
            found.log_normalizer[b], found.nll[b] = -np.inf, np.inf
            continue
        log_z = top + np.log(np.exp(scores - top).sum())
        found.log_normalizer[b], found.nll[b] = log_z, log_z - target
        learns = target > -np.inf
        weights = [*np.exp(scores - log_z), -1.0]
        for p, way in zip(weights, [*ways, tuple(labels[b, at])], strict=True):
            if p > 0:
                found.marginals[b, at, way] += p
            if not learns:
                continue
            found.emissions[b, at, way] += p
            found.start[way[0]] += p
            found.end[way[-1]] += p
            np.add.at(found.transitions, (way[:-1], way[1:]), p)
    return found
