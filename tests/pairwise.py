"""A small set of cases in which every pair of values of two options occurs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Case(dict[str, Any]):
    """Values of options by name, from a list that is only complete as a whole.

    A run of the suite that leaves cases out takes all of these.
    """


def pairwise(
    options: Mapping[str, Sequence[Any]],
    valid: Callable[[dict[str, Any]], bool] = lambda case: True,
) -> list[Case]:
    """Covers all pairs of values, greedily and always in the same way.

    Args:
        options: The values of each option; hashable.
        valid: Told a part of a case, or a whole one, whether its values go together. It
            must be enough to look at pairs: a part whose pairs are all valid can be
            completed. Pairs that are not valid are left out.
    """
    names = list(options)
    uncovered = {
        pair
        for one, two in itertools.combinations(names, 2)
        for pair in itertools.product(
            [(one, value) for value in options[one]],
            [(two, value) for value in options[two]],
        )
        if valid(dict(pair))
    }
    order = {
        (name, value): (i, j)
        for i, name in enumerate(names)
        for j, value in enumerate(options[name])
    }
    used = dict.fromkeys(order, 0)
    cases = []
    while uncovered:
        first = min(uncovered, key=lambda pair: [order[entry] for entry in pair])
        case = dict(first)
        for name in names:
            if name in case:
                continue
            # Most new pairs first; among equals, the value used least so far.
            candidates = [
                value for value in options[name] if valid({**case, name: value})
            ]
            case[name] = max(
                candidates,
                key=lambda value, name=name: (
                    len(uncovered & set(_pairs({**case, name: value}, order))),
                    -used[name, value],
                ),
            )
        for entry in case.items():
            used[entry] += 1
        uncovered -= set(_pairs(case, order))
        cases.append(Case({name: case[name] for name in names}))
    return cases


def name(case: Mapping[str, Any]) -> str:
    """What pytest shows for a case."""
    return "-".join(f"{option}={value}" for option, value in case.items())


def _pairs(case: Mapping[str, Any], order: Mapping[tuple[str, Any], tuple[int, int]]):
    entries = sorted(case.items(), key=order.__getitem__)
    return itertools.combinations(entries, 2)
