"""Which cases run: few at a time, all of them in turn, and never none of a kind.

The suite holds more cases than one run can try. A run takes one case in `every`, drawn
by a hash of its name, which no order of parameters can be in step with. With the next
offset it takes others; `every` offsets in a row take all. Whatever the offset, a run
takes at least one case of each test, and at least one for each value of each axis of
its parameters. A test with one axis therefore runs whole. The exceptions take long: of
such a test's axes only a pairwise list runs whole, and where it has none, only one of
several offsets in a row takes the test.
"""

import dataclasses
import hashlib
import pathlib
import subprocess
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from tests import pairwise


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to run a test.

    Attributes:
        name: As pytest writes it: file::test[parameters].
        values: Where the case lies on the axes each value of which is to run.
        turns: Its test runs in one of so many offsets in a row.
        together: A name; tests that share it run in the same of them. By default the
            test's own.
    """

    name: str
    values: tuple[tuple[str, Hashable], ...] = ()
    turns: int = 1
    together: str | None = None

    @property
    def test(self) -> str:
        return self.name.partition("[")[0]

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]


def case(
    name: str,
    parameters: Mapping[str, Any],
    turns: int | None = None,
    together: str | None = None,
) -> Case:
    """The case of a test with these parameters: equal ones are one value.

    Args:
        name: As pytest writes it.
        parameters: By the names of the test's arguments; empty where it has none.
        turns: Of a test that takes long: in one of so many offsets it runs, unless
            its parameters come from a pairwise list. Only such values are axes then.
        together: As in `Case`.
    """
    values = tuple(
        (name, _hashable(value))
        for name, value in parameters.items()
        if isinstance(value, pairwise.Case) or turns is None
    )
    return Case(name, values, 1 if values else turns or 1, together)


def select(
    cases: Sequence[Case], every: int, offset: int, one_in: int = 1
) -> list[Case]:
    """The cases to run, in the order in which they are given.

    `every` offsets in a row take all cases, and `turns * every` those of a test that
    takes turns.

    Args:
        cases: Of any number of tests in any number of files.
        every: Of the cases of a test one in so many runs, and what else is needed for
            each value of each axis.
        offset: Which ones.
        one_in: Of the tests of a file one in so many runs, and at least one.
    """
    # Other bits than those that choose among the cases of a test.
    turns = lambda case: case.turns if every > 1 else 1  # 1 means everything
    start = lambda case: number(case.together or case.test) >> 32
    turn = lambda case: divmod(offset + start(case), turns(case))
    due = [case for case in cases if turn(case)[1] == 0]
    tests = {
        test.name
        for of_file in _grouped([Case(c.test) for c in due], "file")
        for test in _select_one_group(list(dict.fromkeys(of_file)), one_in, offset)
    }
    chosen = set()
    for of_test in _grouped([case for case in due if case.test in tests], "test"):
        chosen |= _select_one_group(of_test, every, turn(of_test[0])[0])
    return [case for case in cases if case in chosen]


def slice_of(cases: Iterable[Case], parts: int, offset: int) -> list[Case]:
    """One in `parts` of the cases, in an order that changes with the offset too.

    `parts` offsets in a row take all. Nothing else is promised: it is for cases that a
    selection has left out.
    """
    # Other bits than those that selected.
    chosen = [c for c in cases if ((number(c.name) >> 32) + offset) % parts == 0]
    return sorted(chosen, key=lambda case: number(f"{offset} {case.name}"))


def number(name: str) -> int:
    """The same for a name in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def commits(repository: pathlib.Path) -> int:
    """How many commits led to what is checked out; 0 where git cannot say."""
    command = ["git", "rev-list", "--count", "HEAD"]
    try:
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    except OSError:  # no such program
        return 0
    return int(done.stdout) if done.returncode == 0 else 0


def _select_one_group(cases: Sequence[Case], every: int, offset: int) -> set[Case]:
    turn = {case: ((number(case.name) & 0xFFFFFFFF) + offset) % every for case in cases}
    values = {case: _covered(case) for case in cases}
    chosen = {case for case in cases if turn[case] == 0}
    missing = {value for case in cases for value in values[case]}
    missing -= {value for case in chosen for value in values[case]}
    while missing:
        # Greedily; of those that add as much, the one drawn last by the next offsets.
        best = max(
            (case for case in cases if case not in chosen),
            key=lambda case: (len(missing & values[case]), turn[case], case.name),
        )
        chosen.add(best)
        missing -= values[best]
    return chosen


def _covered(case: Case) -> set[tuple[str, Hashable]]:
    # A test without parameters has a case as well.
    return {("", None), *case.values}


def _grouped(cases: Iterable[Case], attribute: str) -> list[list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(getattr(case, attribute), []).append(case)
    return list(groups.values())


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:  # a dict, an array: the same object in each case that has it
        return id(value)
    return type(value), value
