"""Every function of logits, of every kind of logits, against float64 oracles.

Values, and gradients by every array behind the logits and by every parameter. The calls
are eager: functions that ask for the same numbers then share the programs of these.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from tests.heads import logits_of
from tests.host import jnp
from tests.logits.answers import DROPPED, ROWS, Rows
from tests.logits.functions import FAMILIES, PAIRS, Function
from tests.logits.sources import CLASSES, KINDS, MODIFIERS, STORED, Source
from tests.losses.problems import assert_agrees, labelled, precision
from tests.oracles.row_statistics import exact
from tests.pairwise import name, pairwise

LENGTH = 6 * CLASSES  # of the sums behind a gradient of all rows
AXES: dict[str, Any] = {
    "dtype": ("float32", "bfloat16", "float64"),
    "modifiers": MODIFIERS,
    "rows": ROWS,
    "chunks": (False, True),
    "implementation": (None, "xla", "reference"),
}
# Families that take arrays alone, and those whose implementation is not to be chosen.
ONLY_STORED = ("soft labels", "soft top k", "smooth_adversarial_comp_sum_loss")
# Losses of arrays without implementations, whose own tests compare them with oracles.
ELSEWHERE = {
    "bi_tempered_logistic_loss",
    "entmax_loss",
    "sparsemax_loss",
    "stablemax_cross_entropy",
}
IMPLEMENTATIONS = {
    "forward": (None, "xla"),
    "search": (None,),
    "soft top k": (None,),
    "sum": (None, "xla"),
}


def functions_of(package: Any) -> list[str]:
    """The public functions with a parameter that is logits."""
    values = {name: getattr(package, name) for name in package.__all__}
    return [
        n
        for n, f in values.items()
        if not isinstance(f, type) and callable(f) and logits_of(f)
    ]


def test_every_function_of_logits_has_an_oracle():
    packages = (softlib.losses, softlib.logits, softlib.scoring)
    every = [name for package in packages for name in functions_of(package)]
    known = {f.name for family in FAMILIES.values() for f in family}
    known |= {f.name for f in PAIRS.values()}
    missing = sorted({*every} - known - ELSEWHERE)
    assert not missing, f"tests/logits/functions.py has no oracle of {missing}."
    assert known <= {*every}


def check(function: Function, kinds: Sequence[str], case: Mapping[str, Any]) -> None:
    dtype = jnp.dtype(case["dtype"])
    computed = jnp.promote_types(dtype, jnp.float32)
    sources = [
        Source(kind, case, seed=seed, heated=function.heated)
        for seed, kind in enumerate(kinds)
    ]
    rows = Rows(case["rows"], sources, function.takes_where)
    poisoned = rows.where is not None
    given = [s.poisoned(DROPPED) if poisoned else dict(s.arrays) for s in sources]
    parameters = {n: jnp.asarray(p, computed) for n, p in function.parameters.items()}

    def floating(given, parameters):
        values = [s.value(own) for s, own in zip(sources, given, strict=True)]
        found = function.call(rows, values, parameters)
        split: dict[bool, dict[str, Any]] = {True: {}, False: {}}
        for result, array in found.items():
            split[jnp.issubdtype(array.dtype, jnp.floating)][result] = array
        return split[True], split[False]

    values, pull, others = jax.vjp(floating, given, parameters, has_aux=True)
    random = np.random.default_rng(2)
    cotangents = {
        n: jnp.asarray(random.normal(size=a.shape), a.dtype) for n, a in values.items()
    }
    gradients, by_parameter = jax.device_get(pull(cotangents))
    rows.cotangents = {n: exact(g) for n, g in cotangents.items()}
    numbers = {n: exact(p) for n, p in parameters.items()}
    answer = function.oracle(rows, numbers)
    for result, value in {**values, **others}.items():
        wanted = np.asarray(answer.values[result])
        assert value.shape == wanted.shape
        with labelled(result):
            if result in others:
                np.testing.assert_array_equal(value, wanted)
                continue
            assert value.dtype == computed
            assert_agrees(value, wanted, computed, LENGTH)
    for source, found, dz in zip(sources, gradients, answer.by_logits, strict=True):
        wanted = source.gradients(dz)
        assert found.keys() == wanted.keys()
        for argument, gradient in found.items():
            assert gradient.dtype == dtype
            with labelled(f"gradient of {argument} of {source.kind}"):
                assert_agrees(gradient, wanted[argument], dtype, LENGTH)
    for parameter, gradient in by_parameter.items():
        with labelled(f"gradient of {parameter}"):
            wanted = np.asarray(answer.by_parameter[parameter])
            assert_agrees(gradient, wanted, computed, LENGTH)


def is_valid(case: Mapping[str, Any]) -> bool:
    """By pairs: what an array cannot carry, and what a function does not take."""
    of = case.get
    function = str(of("function"))
    kinds = [case[axis] for axis in ("source", "own", "target") if axis in case]
    if function in ONLY_STORED and any(kind not in STORED for kind in kinds):
        return False
    names = IMPLEMENTATIONS.get(function, AXES["implementation"])
    if "implementation" in case and of("implementation") not in names:
        return False
    if of("rows") == "excluded" and of("modifiers", "class_where") != "class_where":
        return False
    if "array" in kinds and (
        of("modifiers") == "class_where" or of("rows") == "excluded"
    ):
        return False
    if of("chunks") and (of("source") in STORED or function in ONLY_STORED):
        return False
    if of("source") == "array":
        return of("modifiers", "none") == "none" and of("implementation") is None
    return True


SINGLE = pairwise({"function": tuple(FAMILIES), "source": KINDS, **AXES}, is_valid)
TWO = pairwise(
    {"function": tuple(PAIRS), "own": KINDS, "target": KINDS, **AXES}, is_valid
)


@pytest.mark.parametrize("case", SINGLE, ids=name)
def test_functions_of_logits_match_their_oracles(case):
    with precision(case["dtype"]):
        for function in FAMILIES[case["function"]]:
            with labelled(function.name):
                check(function, [case["source"]], case)


@pytest.mark.parametrize("case", TWO, ids=name)
def test_functions_of_two_logits_match_their_oracles(case):
    with precision(case["dtype"]):
        check(PAIRS[case["function"]], [case["own"], case["target"]], case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "modifiers"),
    [*zip((f for f in FAMILIES if f not in ONLY_STORED), itertools.cycle(MODIFIERS))],
)
def test_functions_of_a_head_in_few_bits_match_their_oracles(function, modifiers):
    case = {"dtype": "float32", "modifiers": modifiers, "rows": "dropped"}
    case |= {"chunks": True, "implementation": None}
    with precision("float32"):
        for each in FAMILIES[function]:
            with labelled(each.name):
                check(each, ["grid"], case)
