"""Reads and writes long_tests.txt: the tests that take long, with their seconds.

`python -m tests.long_tests junit.xml` puts what a run has measured into the table;
`make test ARGS="--junitxml junit.xml"` measures. Tests that it did not take stay, and
so do those that were quick this time, as with programs that were compiled before: one
that has become quick for good is taken out by hand.
"""

import collections
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Mapping
from xml.etree import ElementTree as ET

TABLE = pathlib.Path(__file__).with_name("long_tests.txt")
# Seconds that a test may cost a run. Half of it is long for a case that has others
# beside it.
SHARE = 0.3
# So many are long for all cases of a test, however short each of them is.
CASES_SHARE = 10.0
# The same for tests, and for their cases, of what all functions are made of: a fault
# there is seen by little else.
ENGINE_SHARE = 2.0
ENGINES = (
    "tests/attention/test_attention.py",
    "tests/attention/test_attention_promises.py",
    "tests/attention/test_batch_heads.py",
    "tests/attention/test_mask_tuples.py",
    "tests/attention/test_scores.py",
    "tests/kernels/",
    "tests/logits/",
    "tests/losses/test_class_log_weights.py",
    "tests/losses/test_gradient_filter.py",
    "tests/losses/test_kernels_on_one_side.py",
    "tests/losses/test_label_rank.py",
    "tests/losses/test_others.py",
    "tests/losses/test_row_",
    "tests/masks/",
)
# So many runs in a row at most take a test once.
MOST = 8
# Words in the names of tests that every run takes, because they compare a function with
# an independent answer. Often no other test sees a wrong value.
ANSWERS = re.compile("oracle|vectors|definition")
# Tests of a file here share what their file has run, so they take turns together.
TOGETHER = "tests/examples/"
# Cases by name, each of which is there for one thing that the others do not show.
EVERY_TIME = ("tests/kernels/", "tests/test_readme.py")


def read(text: str) -> dict[str, float]:
    """Seconds of one case by the name of the test, or of a file."""
    lines = (line.split() for line in text.splitlines())
    return {test: float(seconds) for seconds, test in lines}


def entry(test: str) -> str:
    """Returns the name under which the table has this test: its own or its file's."""
    file = test.partition("::")[0]
    return file if file.startswith(TOGETHER) else test.partition("[")[0]


def share(test: str) -> float:
    """Returns the seconds that this test may cost a run."""
    return ENGINE_SHARE if test.startswith(ENGINES) else SHARE


def turns(test: str, seconds: float) -> int:
    """Number of runs in a row of which one takes a test, at about its share a run."""
    if ANSWERS.search(test.partition("::")[2]):
        return 1
    return min(MOST, math.ceil(seconds / share(test)))


def measured(junit: str) -> dict[str, float]:
    """Seconds of one case of each test of a run that takes long.

    Args:
        junit: The file of pytest's --junitxml.
    """
    seconds = collections.defaultdict(list)
    by_name = set()
    for case in ET.fromstring(junit).iter("testcase"):
        name, bracket, _ = case.attrib["name"].partition("[")
        file = case.attrib["classname"].replace(".", "/") + ".py"
        test = entry(f"{file}::{name}")
        seconds[test].append(float(case.attrib["time"]))
        if bracket and file.startswith(EVERY_TIME):
            by_name.add(test)
    found = {}
    for test, times in seconds.items():
        is_file = test.endswith(".py")
        mean = sum(times) if is_file else statistics.mean(times)
        limit = share(test)
        if limit == SHARE and len(times) > 1 and not is_file:
            limit /= 2
        long = mean > limit or (sum(times) > CASES_SHARE and limit < ENGINE_SHARE)
        if long and test not in by_name:
            found[test] = mean
    return found


def table(seconds: Mapping[str, float]) -> str:
    """The lines of the file."""
    return "".join(f"{seconds[test]:.1f} {test}\n" for test in sorted(seconds))


def exists(test: str) -> bool:
    """Whether the suite still has it."""
    file, _, name = test.partition("::")
    path = TABLE.parent.parent / file
    return path.exists() and (not name or f"\ndef {name}(" in path.read_text())


if __name__ == "__main__":
    known = read(TABLE.read_text())
    for name in sys.argv[1:]:
        known |= measured(pathlib.Path(name).read_text())
    TABLE.write_text(table({test: s for test, s in known.items() if exists(test)}))
