"""The reader of what pyright and mypy reveal; `make lint` runs them."""

import re

import pytest

from scripts import static_types

MYPY = '{}:{}: note: Revealed type is "{}"'
PYRIGHT = '  /home/{}:{}:13 - information: Type of "softlib.f" is "{}"'
NAME = static_types.REVEALING.name


@pytest.mark.parametrize(
    ("revealed", "expected"),
    [
        ("(x: int) -> Array", ["Array"]),
        ("(f: (x: int) -> Any) -> Array", ["Array"]),
        ("() -> ((...) -> Any)", ["((...) -> Any)"]),
        ("Overload[(x: A) -> A, (x: B, *, y: C = 1) -> tuple[B, C]]", None),
        ("def (x: int) -> jax.Array", ["jax.Array"]),
        ("def [T] (x: T`-1) -> tuple[T`-1, jax.Array]", ["tuple[T`-1, jax.Array]"]),
        ("def (x: int, f: def (*Any, **Any) -> Any =)", ["None"]),
        ("Overload(def (x: A) -> A, def (x: B) -> tuple[B, C])", None),
        ("int", ["int"]),
    ],
)
def test_results_are_found(revealed, expected):
    found = static_types.results(revealed)
    assert found == (expected or ["A", "tuple[B, C]"])


@pytest.mark.parametrize(
    ("result", "known"),
    [
        ("Array", True),
        ("Any", False),
        ("Unknown", False),
        ("tuple[Array, Any]", False),
        ("tuple[Array, tuple[Unknown, int]]", False),
        ("tuple[Array, Any, fallback=softlib.State]", True),
        ("dict[str, Any]", True),
        ("ndarray[tuple[Any, ...], dtype[Any]]", True),
    ],
)
def test_a_result_is_known_or_not(result, known):
    assert static_types.is_known(result) == known


@pytest.mark.parametrize("form", [MYPY, PYRIGHT])
def test_a_result_that_nobody_knows_is_a_complaint(form):
    asked = ["softlib.f", "softlib.g", "softlib.masks.plot"]
    types = ["(x: int) -> int", "(x: int) -> Any", "() -> Any"]
    output = [form.format(NAME, line, told) for line, told in enumerate(types, 2)]
    assert static_types.complaints("\n".join(output), asked) == [
        "softlib.g returns Any"
    ]


def test_errors_and_silence_are_complaints():
    error = 'tests/static_types/uses.py:9: error: Expression is "Any"  [assert-type]'
    told = MYPY.format(NAME, 2, "() -> int")
    found = static_types.complaints(f"{error}\n{told}", ["softlib.f", "softlib.g"])
    assert found == [error, "1 types are not revealed, of softlib.g for one"]
    (silence,) = static_types.complaints("No module named mypy", ["softlib.f"])
    assert silence == "it has not run: No module named mypy"


def test_every_exception_is_of_something_public():
    addresses = list(static_types.addresses())
    for pattern in static_types.ANY:
        assert any(re.fullmatch(pattern, address) for address in addresses), pattern
