"""The generator of test cases covers what it promises with few cases."""

import itertools

from tests.pairwise import name, pairwise

OPTIONS = {"a": (1, 2, 3, 4), "b": ("x", "y", "z"), "c": (False, True), "d": (0, 5)}


def pairs_of(cases):
    return {
        pair
        for case in cases
        for pair in itertools.combinations(sorted(case.items()), 2)
    }


def test_every_pair_of_values_occurs():
    wanted = pairs_of(
        dict(zip(OPTIONS, values, strict=True))
        for values in itertools.product(*OPTIONS.values())
    )
    cases = pairwise(OPTIONS)
    assert pairs_of(cases) == wanted
    assert len(cases) <= 16  # of 48; 12 is the least that can do


def test_only_valid_pairs_occur_and_all_of_them():
    valid = lambda case: not (case.get("a") == 4 and case.get("b") in ("x", "y"))
    cases = pairwise(OPTIONS, valid)
    assert all(map(valid, cases))
    assert len(pairs_of(cases)) == len(pairs_of(pairwise(OPTIONS))) - 2


def test_the_cases_are_the_same_every_time():
    assert pairwise(OPTIONS) == pairwise(OPTIONS)
    assert name(pairwise(OPTIONS)[0]) == "a=1-b=x-c=False-d=0"
