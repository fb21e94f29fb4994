"""Every problem that attention is tested with is one: zeros agree with any zeros.

A row with a single key has that key's value as its output, whatever the scores are, and
no gradient of its query. So each problem has rows that weigh several keys, and each
that is named after empty rows has those too.
"""

from collections.abc import Iterator

import numpy as np

from tests.attention import (
    problems,
    tensor_problems,
    test_attention,
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


def block_sparse() -> Iterator[tuple[str, np.ndarray]]:
    """Names, and (..., queries, keys): who attends to whom."""
    gpu, tpu = test_gpu_attention, test_tpu_attention
    for lists in (gpu.PROBLEMS, gpu.SLOW, tpu.PROBLEMS, tpu.MORE):
        for name, problem in lists.items():
            mask = problem.operands().plan.mask
            yield name, np.asarray(mask.materialize(problem.T, problem.S))
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
