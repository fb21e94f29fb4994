"""Questions with known answers: what kind of thing a word names, by WordNet.

Right is every concept above any sense of the word, in any of its words, unless nearly
everything is one ("entity", "object").
"""

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from language_model.failures import Failure
from study import wordnet
from study.wordnet import Noun

from .options import Options

# What a question begins with: four others, answered.
SHOWN = (
    "A violin is a kind of musical instrument.\n"
    "A salmon is a kind of fish.\n"
    "A hammer is a kind of tool.\n"
    "A tulip is a kind of flower.\n"
)
# Words for things, not for acts or measures, whose kind can be told in a word.
ROOTS = ("animal", "plant", "food", "artifact", "body part", "material", "disease")
MOST_SENSES = 3
LEAST_USES = 8  # in the definitions of others, so that the word is not rare
MOST_BELOW = 0.1  # of all nouns: a concept that holds more says too little
ENDS = ".,;\n"


class Question(NamedTuple):
    """A word, and the concepts that it is a kind of."""

    word: str
    accepted: frozenset[str]

    @property
    def text(self) -> str:
        article = "An" if self.word[0] in "aeiou" else "A"
        return f"{article} {self.word} is a kind of"


def draw(options: Options) -> list[Question]:
    """Questions about words drawn at random."""
    nouns, _ = wordnet.read(options.nouns)
    above = wordnet.ancestors(nouns)
    below = collections.Counter(a for some in above for a in some)
    glosses = " ".join(noun.gloss.lower() for noun in nouns)
    uses = collections.Counter(re.findall(r"[a-z]+", glosses))
    senses = collections.defaultdict(list)
    for i, noun in enumerate(nouns):
        for lemma in noun.lemmas:
            senses[lemma].append(i)
    shown = {line.split()[1] for line in SHOWN.splitlines()}
    roots = {max(senses[name], key=lambda i: below[i]) for name in ROOTS}
    words = [
        word
        for word, found in senses.items()
        if re.fullmatch(r"[a-z]{3,}", word)
        and word not in shown
        and uses[word] >= LEAST_USES
        and len(found) <= MOST_SENSES
        and any(roots & above[i] for i in found)
    ]
    if len(words) < options.questions:
        raise Failure(
            f"{options.nouns} has {len(words):,} words to ask for, fewer than "
            f"--questions {options.questions:,}."
        )
    random = np.random.default_rng(options.seed)
    chosen = random.permutation(len(words))[: options.questions]
    narrow = {i for i, count in below.items() if count <= MOST_BELOW * len(nouns)}
    return [_question(words[i], senses[words[i]], nouns, above, narrow) for i in chosen]


def _question(
    word: str,
    senses: Sequence[int],
    nouns: Sequence[Noun],
    above: Sequence[frozenset[int]],
    narrow: set[int],
) -> Question:
    concepts = frozenset().union(*(above[i] for i in senses)) & narrow
    lemmas = {lemma.lower() for i in concepts for lemma in nouns[i].lemmas}
    return Question(word, frozenset(lemmas - {word}))


def normalized(answer: str) -> str:
    """An answer to compare: its first clause, in small letters, without article."""
    clause = re.split(f"[{ENDS}]", answer)[0].lower().strip()
    return re.sub(r"^(?:an?|the) ", "", clause)


def is_right(answer: str, question: Question) -> bool:
    """Whether the answer, or what is left without adjectives, is accepted."""
    words = normalized(answer).split()
    ends = (" ".join(words[start:]) for start in range(len(words)))
    return any(end in question.accepted for end in ends)
