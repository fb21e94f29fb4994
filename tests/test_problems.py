"""Every problem that attention is tested with is one: zeros agree with any zeros.

A row with a single key has that key's value as its output, whatever the scores are, and
no gradient of its query. So each problem has rows that weigh several keys, and each
that is named after empty rows has those too.
"""

from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest

from tests.attention import (
    decode_problems,
    problems,
    tensor_problems,
    test_attention,
    test_decode,
    test_kronecker,
    test_sequence_parallel,
    test_softplus,
)
from tests.kernels import (
    test_gpu_attention,
    test_gpu_row_statistics,
    test_gpu_trilinear,
    test_tpu_attention,
    test_tpu_row_statistics,
    test_tpu_trilinear,
)
from tests.masks import random_masks, test_against_definition
from tests.oracles import masks as oracle
from tests.pairwise import pairwise
from tests.recurrent import test_recurrent_forms


def block_sparse() -> Iterator[tuple[str, np.ndarray]]:
    """Names, and (..., queries, keys): who attends to whom."""
    gpu, tpu = test_gpu_attention, test_tpu_attention
    for lists in (gpu.PROBLEMS, gpu.SLOW, tpu.PROBLEMS, tpu.MORE):
        for name, problem in lists.items():
            operands = problem.operands()
            mask = operands.plan.mask.materialize(problem.T, problem.S)
            allowed = np.asarray(mask).reshape(-1, 1, problem.T, problem.S)
            arrays = True if operands.dense is None else np.asarray(operands.dense)
            yield name, allowed & arrays
    for name in test_attention.MASKS:
        for of, shape in test_attention.SHAPES.items():
            allowed = problems.mask(name, shape).allowed
            yield f"{name} {of}", expanded(allowed, shape.T, shape.S)
    for name, make in test_softplus.MASKS.items():
        for lengths in ((21, 21), (16, 40)):
            yield name, test_softplus.allowed(make(*lengths), lengths)
    length = test_sequence_parallel.LENGTH
    for name, mask in test_sequence_parallel.MASKS.items():
        if mask is not None:
            yield name, np.asarray(mask.materialize(length, length))


def of_tuples() -> Iterator[tuple[str, np.ndarray]]:
    """The same for pairs and triples of keys, as one axis."""
    gpu, tpu = test_gpu_trilinear, test_tpu_trilinear
    for name, case in {**gpu.CASES, **gpu.SLOW, **tpu.EVERY}.items():
        allowed = np.asarray(case.mask.materialize(*case.lengths))
        yield name, allowed.reshape(len(allowed), -1)
    for name in test_kronecker.MASKS:
        for of, shape in test_kronecker.SHAPES.items():
            if of == "ones":
                continue  # one key is its subject
            allowed = tensor_problems.mask(name, shape).allowed
            allowed = expanded(allowed, shape.T, *shape.S)
            yield f"{name} {of}", allowed.reshape(*allowed.shape[:3], -1)


def expanded(allowed: np.ndarray | bool, *lengths: int) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(allowed), (1, 1, *lengths))
    return np.broadcast_to(allowed, shape)


def test_some_rows_weigh_several_keys():
    found = [*block_sparse(), *of_tuples()]
    assert len(found) > 100
    for name, allowed in found:
        counts = allowed.sum(-1)
        assert counts.max() > 1, name
        if "empty rows" in name or name.startswith(("late ", "padding ")):
            assert counts.min() == 0, name


def test_labels_are_classes_that_count():
    gpu, tpu = test_gpu_row_statistics, test_tpu_row_statistics
    for problem in (
        *gpu.PROBLEMS.values(),
        *gpu.SHIPPED.values(),
        *tpu.PROBLEMS.values(),
    ):
        head = problem.head()
        labels = np.asarray(head.labels)
        inside = labels[labels >= 0]
        assert inside.size
        where = head.modifiers.class_where
        if where is not None:
            chosen = np.asarray(where)
            assert 0 < chosen[inside].sum() < inside.size
            assert 1 < chosen.sum() < chosen.size


def differs(left: np.ndarray, right: np.ndarray) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.shape != right.shape or bool(np.abs(left - right).max() > 1e-3)


ONE_DTYPE = {"dtype": ("float32",)}


def test_every_option_of_a_decoding_step_changes_its_result():
    for case in pairwise(test_decode.OPTIONS | ONE_DTYPE, test_decode.valid):
        arrays, _, options, _ = test_decode.prepared(case)
        found = decode_problems.oracle(arrays, **options)
        plain = {"is_causal": False, "softcap": None, "lengths": None}
        for name in plain:
            # One query is the last one, with or without a causal mask.
            if options[name] != plain[name] and (name, case["T"]) != ("is_causal", 1):
                without = options | {name: plain[name]}
                other = decode_problems.oracle(arrays, **without)
                assert differs(found.out, other.out), (name, case)
        for name in arrays:
            others = {**arrays, name: 1.3 * arrays[name]}
            other = decode_problems.oracle(others, **options)
            assert differs(found.out, other.out), (name, case)


def test_every_option_of_a_recurrence_changes_its_result():
    for case in test_recurrent_forms.CASES:
        given = test_recurrent_forms.from_case(case)
        found = test_recurrent_forms.oracle(given, case)
        options = set(given) & {"log_decay", "mask"} if case["length"] > 1 else set()
        for name in options:
            without = {n: array for n, array in given.items() if n != name}
            other = test_recurrent_forms.oracle(without, case)
            assert differs(found, other), (name, case)
        # A single key may be masked.
        for name in ("query", "key", "value") if case["length"] > 1 else ():
            others = given | {name: given[name][..., ::-1]}
            other = test_recurrent_forms.oracle(others, case)
            assert differs(found, other), (name, case)


@pytest.mark.parametrize("name", [*random_masks.PRIMITIVES, "compositions"])
def test_random_masks_allow_some_pairs_and_not_others(name):
    drawn = []
    strategy = random_masks.PRIMITIVES.get(name, random_masks.compositions)
    positions = test_against_definition.POSITIONS

    @hypothesis.settings(max_examples=30, database=None)
    @hypothesis.given(strategy)
    def draw(case):
        pairs = oracle.dense(case.keeps, positions, positions)
        drawn.append(pairs.any() and not pairs.all())

    draw()
    assert sum(drawn) >= len(drawn) / 3 or name == "All", (sum(drawn), len(drawn))
