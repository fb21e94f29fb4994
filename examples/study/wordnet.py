"""Reads WordNet's nouns as they lie packed in `data/`: lemmas, parents, definitions."""

import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from language_model.failures import Failure

from .packed_text import read_text

CREDIT = "WordNet 3.1 (c) Princeton University"


class Noun(NamedTuple):
    """A synset.

    Attributes:
        lemmas: Its words, the commonest first, with spaces.
        parents: Indices of its hypernyms.
        gloss: Its definition.
    """

    lemmas: list[str]
    parents: list[int]
    gloss: str


def read(path: pathlib.Path) -> tuple[list[Noun], str]:
    """The nouns of a file, parents before children, and the digest of the file."""
    text, raw = read_text(path)
    nouns = []
    for i, line in enumerate(text.splitlines()):
        parts = line.split("\t")
        if len(parts) != 3:
            raise Failure(
                f"{path}: lines must hold lemmas, parents and a gloss between tabs, "
                f"line {i + 1} does not."
            )
        lemmas = parts[0].replace("_", " ").split("|")
        parents = [i - int(distance) for distance in parts[1].split(",") if distance]
        nouns.append(Noun(lemmas, parents, parts[2]))
    return nouns, hashlib.sha256(raw).hexdigest()


def ancestors(nouns: Sequence[Noun]) -> list[frozenset[int]]:
    """Indices of all synsets above each."""
    found: dict[int, frozenset[int]] = {}

    def above(i: int) -> frozenset[int]:
        if i not in found:
            parents = nouns[i].parents
            found[i] = frozenset(parents).union(*(above(p) for p in parents))
        return found[i]

    depth = sys.getrecursionlimit()
    assert depth > 100  # the hierarchy is some 20 deep
    return [above(i) for i in range(len(nouns))]
