import doctest
import inspect
import pathlib
import re
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jaxtyping import Array, Float

import softlib
from tests import docstring_rules, public_names
from tests.host import jnp

NAMES = list(public_names.public_names())
DOCUMENTED = [name for name in NAMES if callable(name.value)]  # not the type aliases


def test_every_subpackage_has_public_names():
    packages = {name.package for name in NAMES}
    assert packages | {"softlib"} == set(public_names.packages())
    assert len(NAMES) > 10


def test_a_public_name_lives_at_one_address():
    """The exceptions are those that softlib itself offers."""
    addresses: dict[int, list[str]] = {}
    for name in DOCUMENTED:
        if name.package == "softlib":
            continue
        addresses.setdefault(id(name.value), []).append(name.address)
    assert [several for several in addresses.values() if len(several) > 1] == []


@pytest.mark.parametrize("name", DOCUMENTED, ids=lambda name: name.address)
def test_docstring_says_what_a_user_must_know(name: public_names.PublicName):
    # An assertion of softlib.testing computes nothing that a user differentiates.
    without = name.package == "softlib.testing" or (
        inspect.isfunction(name.value) and public_names.is_of_text(name)
    )
    numeric = False if without else None
    assert docstring_rules.complaints(name.value, numeric=numeric) == []


@pytest.mark.parametrize("name", DOCUMENTED, ids=lambda name: name.address)
def test_examples_in_docstrings_run(name: public_names.PublicName, capsys):
    run_doctests(name.value, name.address)


def run_doctests(value, address: str) -> None:
    module = sys.modules[value.__module__]
    names = {"jax": jax, "jnp": jnp, "np": np, "softlib": softlib}
    globs = vars(module) | names | {value.__name__: value}
    finder = doctest.DocTestFinder(recurse=isinstance(value, type))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in finder.find(value, address, module=False, globs=globs):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_reference_lists_every_public_name_and_nothing_else(repository: pathlib.Path):
    pages = (repository / "docs/reference").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    listed = re.findall(r"^\.\. auto\w+:: (softlib[\w.]*)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(name.address for name in NAMES)


def test_docstrings_begin_with_a_verb_or_a_noun(repository: pathlib.Path):
    files = docstring_rules.files_without_riddles(repository)
    folders = {file.relative_to(repository).parts[:2] for file in files}
    assert {("softlib", "attention"), ("pallas_kernels", "tpu")} <= folders
    found = {str(file): docstring_rules.riddles(file.read_text()) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


# ---------------------------------------------------------------- the rules themselves
@pytest.mark.parametrize("word", docstring_rules.RIDDLES)
def test_a_docstring_that_begins_as_none_should_is_found(word: str):
    source = (
        f'"""{word} it."""\nclass A:\n    """{word} A."""\n    def f(): "{word}er."\n'
    )
    assert docstring_rules.riddles(source) == [f"{word} it.", f"{word} A."]


def complete(values: Float[Array, " n"], *, base: float = 2.0) -> Float[Array, " n"]:
    """Powers of a base.

    Args:
        values: Exponents.
        base: Static.

    Returns:
        One power for each value.

    Raises:
        ValueError: `base` is not positive.

    Derivatives: any.
    Cost: O(n).

    Example:
        >>> 1 + 1
        2
    """
    if base <= 0:
        raise ValueError(f"complete: `base` must be positive, got {base}.")
    return base**values


def bare(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """Doubles"""  # noqa: D415
    if values.ndim != 1:
        raise ValueError
    return values


def wrong(values: int) -> None:
    """Checks something.

    Args:
        value: Not the name of the parameter.

    Example:
        >>> 1
        1
        >>> 1
        1
        >>> 1
        1
        >>> for _ in range(1):
        ...     pass
        >>> 1
        1
        >>> 1
        1
    """


class Statistics(NamedTuple):
    """Two numbers: `lse` is explained."""

    lse: int
    mean: int


class Thing:
    """A thing with a parameter.

    Args:
        size: How many.
    """

    def __init__(self, size: int, colour: str):
        pass

    def update(self):
        pass

    def paint(self, colour: str, coats: int):
        """Paints it.

        Args:
            colour: Which one.
        """


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (complete, []),
        (
            bare,
            [
                "first line is no sentence: 'Doubles'",
                "Args: values is not explained",
                "Derivatives: missing",
                "Cost: missing",
                "Returns: missing",
                "Raises: missing",
                "Example: missing, or without `>>>`",
            ],
        ),
        (
            wrong,
            [
                "Args: values is not explained",
                "Args: value is no parameter",
                "Example: 7 lines, more than 6",
            ],
        ),
        (Statistics, ["field mean is not explained"]),
        (
            Thing,
            [
                "Args: colour is not explained",
                "method update has no docstring",
                "method paint: Args: coats is not explained",
                "Example: missing, or without `>>>`",
            ],
        ),
    ],
)
def test_rules_find_what_is_missing(value, expected):
    assert docstring_rules.complaints(value) == expected


def test_a_wrong_example_fails():
    def function():
        """Adds.

        Example:
            >>> 1 + 1
            3
        """

    run_doctests(complete, "complete")
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run_doctests(function, "function")
