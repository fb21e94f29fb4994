"""Words with their pronunciations, and the symbols of both."""

import pathlib
from typing import NamedTuple

import numpy as np
from language_model.failures import Failure
from study.packed_text import read_text

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
# A vowel has a stress, one of them also none.
_SOUNDS = sorted(
    [
        *(vowel + stress for vowel in _VOWELS.split() for stress in "012"),
        *_CONSONANTS.split(),
        "UW",
    ]
)
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *_SOUNDS]
BEGIN, END = 2, 3
MOST_LETTERS = 16


class Words(NamedTuple):
    """Words as ids.

    Attributes:
        letters: (B, MOST_LETTERS + 1), each with its end, then 0.
        lengths: (B,), letters with the end.
        phonemes: (B, longest), without the end, then -1.
    """

    letters: np.ndarray
    lengths: np.ndarray
    phonemes: np.ndarray


def load(path: pathlib.Path, count: int, longest: int, seed: int) -> Words:
    """Words that the seed draws, each with the first of its pronunciations."""
    text, _ = read_text(path)
    entries = [line.split("#")[0].split() for line in text.splitlines()]
    fitting = [
        (word, sounds)
        for word, *sounds in entries
        # Further pronunciations of a word have a number behind it.
        if word.isascii() and word.isalpha()
        if len(word) <= MOST_LETTERS and len(sounds) < longest
    ]
    if len(fitting) < count:
        raise Failure(f"{path} has {len(fitting)} words, fewer than {count}.")
    chosen = np.random.default_rng(seed).choice(len(fitting), count, replace=False)
    letters = np.zeros((count, MOST_LETTERS + 1), np.int32)
    phonemes = np.full((count, longest), -1, np.int32)
    lengths = np.zeros(count, np.int32)
    for row, at in enumerate(chosen):
        word, sounds = fitting[at]
        ids = [*map(LETTERS.index, word.lower()), LETTERS.index("</s>")]
        letters[row, : len(ids)], lengths[row] = ids, len(ids)
        phonemes[row, : len(sounds)] = [*map(PHONEMES.index, sounds)]
    return Words(letters, lengths, phonemes)
