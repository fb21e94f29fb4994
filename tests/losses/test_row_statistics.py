"""Row statistics agree with the oracle: values, and gradients of every argument."""

import pathlib

import pytest

import softlib
from tests.heads import of_head, of_stored
from tests.losses.problems import (
    OPTIONS,
    SHAPES,
    Problem,
    is_small,
    precision,
    values_and_gradients,
)
from tests.oracles import row_statistics as oracle
from tests.pairwise import name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
# The rank has a test of its own: rounding may exchange two nearly equal logits.
ALL = [name for name in softlib.logits.RowStatistics._fields if name != "label_rank"]
IMPLEMENTATIONS = ("reference", "xla")
CASES = pairwise(
    {
        **SHAPES,
        **OPTIONS,
        "labels": (None, "one", "several"),
        "implementation": IMPLEMENTATIONS,
    },
    is_small,
)
LARGE = pairwise(
    {"V": (50257, 151936), "N": (1000, 7), **OPTIONS, "labels": ("one", "several")}
)
LARGE = [case for case in LARGE if not is_small(case)]


def check(case, implementation):
    with precision(case["dtype"]):
        problem = Problem(case)
        labels = None
        if case["labels"] == "one":
            labels = problem.labels()
        elif case["labels"] == "several":
            labels = problem.labels(4)
            labels[..., 1] = labels[..., 0]  # a label may occur twice
            labels[..., 0, 2], labels[..., -1, 3] = -100, problem.classes
        statistics = [n for n in ALL if n != "label_logits" or labels is not None]
        cotangents = {
            "lse": problem.cotangent(),
            "mean_logit": problem.cotangent(),
            "max_logit": problem.cotangent(),  # must have no effect
            # As for a mean over the classes: float16 holds no sum of 1e5 squares.
            "sum_logits": problem.cotangent() / problem.classes,
            "sum_squared_logits": problem.cotangent() / problem.classes,
            "sum_softplus": problem.cotangent() / problem.classes,
        }
        if labels is not None:
            several = labels.shape[len(problem.batch) :]
            cotangents["label_logits"] = problem.cotangent(*several)
        operation = (
            of_head.row_statistics if problem.linear else of_stored.row_statistics
        )

        def function(labels=None, **arrays):
            got = operation(
                **arrays,
                **problem.options,
                labels=labels,
                class_where=problem.class_where,
                statistics=tuple(statistics),
                implementation=implementation,
            )
            assert isinstance(got, softlib.logits.RowStatistics)
            return {n: a for n, a in got._asdict().items() if a is not None}

        others = {} if labels is None else {"labels": labels}
        values, gradients = values_and_gradients(
            function, problem.arrays, cotangents, **others
        )
        del cotangents["max_logit"]
        expected = oracle.row_statistics(
            labels, problem.class_where, cotangents=cotangents, **problem.source()
        )
        assert values.keys() == expected.values.keys()
        problem.check(values, gradients, expected)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle(case):
    check(case, case["implementation"])


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=name)
def test_large_shapes_match_oracle(case):
    check(case, "xla")
