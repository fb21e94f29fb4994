"""WordNet's nouns: definitions, and the concepts above each as its labels.

A label is a synset that is somebody's ancestor: "animal" for the definition of a dog.
Those that nearly every definition has ("entity") are left out, or the first place of
every ranking would be won by saying them always.
"""

import re
import zlib
from typing import NamedTuple

import numpy as np
from language_model.failures import Failure
from study import wordnet

from .options import Options


class Glosses(NamedTuple):
    """Definitions with their labels.

    Attributes:
        words: (N, W) int32, words as rows of a table; -1 fills up.
        positives: (N, K) int32, labels; -1 fills up.
        names: Of the labels, the most frequent first.
        counts: How many definitions of the training set have each label.
        held_out: How many definitions, the first ones, are not trained on.
        digest: Of the file.
    """

    words: np.ndarray
    positives: np.ndarray
    names: list[str]
    counts: np.ndarray
    held_out: int
    digest: str

    @property
    def training(self) -> np.ndarray:
        """Numbers of the definitions that are trained on."""
        return np.arange(self.held_out, len(self.words))


def load(options: Options) -> Glosses:
    nouns, digest = wordnet.read(options.nouns)
    if options.items > len(nouns):
        raise Failure(
            f"{options.nouns} has {len(nouns):,} definitions, fewer than --items "
            f"{options.items:,}."
        )
    above = wordnet.ancestors(nouns)
    random = np.random.default_rng(options.seed)
    chosen = random.permutation(len(nouns))[: options.items]
    counts = np.bincount([a for i in chosen for a in above[i]], minlength=len(nouns))
    # Frequent ones first: what log-uniform draws of labels expect.
    order = np.argsort(-counts, kind="stable")
    kept = (counts >= options.least) & (counts <= options.most * len(chosen))
    labels = [i for i in order if kept[i]]
    number = {synset: i for i, synset in enumerate(labels)}
    lists = [[number[a] for a in above[i] if a in number] for i in chosen]
    some = [i for i, found in enumerate(lists) if found]
    if len(some) < options.held_out + max(options.probes, options.batch):
        raise Failure(
            f"only {len(some):,} definitions have a label; --least {options.least} or "
            f"--most {options.most:g} leaves too few."
        )
    positives = _filled([sorted(lists[i]) for i in some])
    text = [_words(nouns[chosen[i]].gloss, options.buckets) for i in some]
    words = _filled([found[: options.words] for found in text])
    trained = positives[options.held_out :]
    return Glosses(
        words,
        positives,
        [nouns[i].lemmas[0] for i in labels],
        np.bincount(trained[trained >= 0], minlength=len(labels)),
        options.held_out,
        digest,
    )


def _words(gloss: str, buckets: int) -> list[int]:
    # Not Python's hash, which differs from run to run.
    found = re.findall(r"[a-z]+", gloss.lower())
    return [zlib.crc32(word.encode()) % buckets for word in found] or [0]


def _filled(lists: list[list[int]]) -> np.ndarray:
    width = max(map(len, lists))
    table = np.full((len(lists), width), -1, np.int32)
    for row, found in zip(table, lists, strict=True):
        row[: len(found)] = found
    return table
