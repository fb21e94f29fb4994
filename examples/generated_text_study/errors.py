"""Errors of the tests against the length of a text, with intervals over texts."""

from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from study import intervals

from .reading import Reading

LEVEL = 0.05
LEAST = 5  # texts that a rate must count to be a point of a line


class Tested(NamedTuple):
    """Statistics of all pieces of a length, (texts, pieces).

    Attributes:
        difference: Log-perplexity less entropy, in nats per token.
        z: The difference in standard deviations.
        log_ratio: Mean of the log-likelihood ratio.
    """

    difference: np.ndarray
    z: np.ndarray
    log_ratio: np.ndarray


def tested(reading: Reading, length: int) -> Tested:
    """`softlib.scoring.entropy_test` of every piece of so many tokens."""
    pieces = lambda array: array.reshape(len(array), -1, length)
    excess = pieces(reading.surprisal - reading.entropy)
    deviation = np.sqrt(pieces(reading.variance).sum(-1))
    return Tested(
        excess.mean(-1),
        excess.sum(-1) / deviation,
        pieces(reading.log_ratio).mean(-1),
    )


def of_lengths(
    own: Reading, other: Reading, lengths: tuple[int, ...], *, with_ratio: bool
) -> list[dict[str, Any]]:
    """Errors of each test at each length: of own texts, and of another author's.

    The tests: |z| above its quantile at a level of 5 %; |difference| above half of the
    mean difference of the author, which both errors fall with; the sign of the log
    ratio, if the other author is the other model.
    """
    gap = abs(np.mean(other.surprisal - other.entropy)) / 2
    quantile = scipy.stats.norm.ppf(1 - LEVEL / 2)
    found = []
    for length in lengths:
        mine, theirs = tested(own, length), tested(other, length)
        decisions = {
            "level": (np.abs(mine.z) > quantile, np.abs(theirs.z) <= quantile),
            "threshold": (
                np.abs(mine.difference) > gap,
                np.abs(theirs.difference) <= gap,
            ),
        }
        if with_ratio:
            decisions["ratio"] = (mine.log_ratio < 0, theirs.log_ratio >= 0)
        for test, (false, missed) in decisions.items():
            found += [
                {
                    "test": test,
                    "length": length,
                    "error": error,
                    # Pieces of one text are drawn together.
                    "rate": intervals.bootstrap(wrong.mean(1)),
                    "pieces": wrong.size,
                    "wrong": int(wrong.sum()),
                }
                for error, wrong in (("false", false), ("missed", missed))
            ]
    return found


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Straight lines through the logarithms of errors that fall with the length."""
    found = []
    for test in dict.fromkeys(row["test"] for row in rows):
        for error in ("false", "missed"):
            if (test, error) == ("level", "false"):  # held at the level instead
                continue
            points = [
                (row["length"], np.log(row["rate"].value))
                for row in rows
                if (row["test"], row["error"]) == (test, error)
                and row["wrong"] >= LEAST
            ]
            if len(points) < 3:
                continue
            fit = scipy.stats.linregress(*np.transpose(points))
            found.append(
                {
                    "test": test,
                    "error": error,
                    "points": len(points),
                    "slope": float(fit.slope),
                    "intercept": float(fit.intercept),
                    "r_squared": float(fit.rvalue**2),
                }
            )
    return found
