"""Batches of the two trainings, a function of the seed and the step alone."""

import dataclasses

import numpy as np

from .options import Options
from .sites import LENGTH, LETTERS, Sites

# Beyond every step.
FRESH = 1 << 40
# Of five distinct sequences one is kept from the classifier.
HELD_OUT = 5


@dataclasses.dataclass(frozen=True)
class Noised:
    """Sites as often as in the genome, with times and the noise of their paths."""

    sites: Sites
    seed: int

    def at(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, step])
        tokens = self.sites.draw(count, random)
        times = random.random(count, np.float32)
        noise = random.gumbel(size=(count, LENGTH, len(LETTERS)))
        return tokens, times, noise.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Sites, and whether they are common; the held-out ones are never trained on."""

    sites: Sites
    common: int
    seed: int

    @property
    def is_held_out(self) -> np.ndarray:
        order = np.random.default_rng(self.seed).permutation(len(self.sites.tokens))
        return order % HELD_OUT == 0

    def at(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return self._draw(step, count, ~self.is_held_out)

    def held_out(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return self._draw(FRESH, count, self.is_held_out)

    def _draw(
        self, step: int, count: int, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, step])
        share = np.where(kept, self.sites.counts, 0)
        rows = random.choice(len(share), count, p=share / share.sum())
        is_common = self.sites.counts[rows] >= self.common
        return self.sites.tokens[rows], is_common.astype(np.float32)


def of(sites: Sites, options: Options) -> tuple[Noised, Labelled]:
    return (
        Noised(sites, options.seed),
        Labelled(sites, options.common, options.seed),
    )
