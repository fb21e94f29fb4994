"""Checks that decode kernels of GPUs and TPUs share, against the oracle."""

import numpy as np

from softlib.testing import assert_close
from tests.attention.decode_problems import oracle

PHI = 0.5  # of all heads, where rows leave the range


def traced(lengths, numbers):
    """The arguments of `decode_attention` that are no arrays of the problem."""
    found = dict(numbers)
    if lengths is not None:
        found["key_value_seq_lengths"] = np.int32(lengths)
    return found


def unified(criterion, phi, valid_range):
    """The numbers of a unified maximum; none for the running one, criterion None."""
    limits = tuple(map(np.float32, valid_range))
    return {"phi": phi, "valid_range": limits} if criterion else {}


def check_rows_that_leave_the_range(
    name, call, check, arrays, lengths, criterion, numbers, overflow
):
    """Right results, and flags exactly where the criterion says.

    Args:
        name: Of the range; with "overflow" the first sequence's scores are large.
        call: The program, of arrays, lengths and numbers.
        check: Of its results.
        arrays: The problem.
        lengths: Of its sequences.
        criterion: What makes a row leave the range.
        numbers: Those of a unified maximum, with phi `PHI`.
        overflow: How many times larger these scores are.
    """
    scale = overflow if name == "overflow" else 1
    query = np.array(arrays["query"])
    query[0] *= scale
    arrays = arrays | {"query": query}
    out, statistics = call(arrays, lengths, numbers)
    expected = oracle(arrays, lengths=lengths)
    flags = expected.outside(PHI, numbers["valid_range"], criterion)
    if name == "overflow":
        flags = flags | (expected.max_score > 80)
    assert flags.any(), name
    assert not flags.all(), name
    np.testing.assert_array_equal(statistics.needs_recompute, flags, name)
    check(arrays, lengths, out, statistics, scale)


def check_what_lies_behind_the_length(call, check, arrays, lengths, numbers):
    """Checks results with NaN there, and returns the statistics."""
    behind = np.arange(arrays["key"].shape[1])[None] >= np.array(lengths)[:, None]
    spoilt = {name: np.array(arrays[name]) for name in ("key", "value")}
    for array in spoilt.values():
        array[behind] = np.nan
    out, statistics = call(arrays | spoilt, lengths, numbers)
    check(arrays, lengths, out, statistics)
    return statistics


def check_results(
    arrays, lengths, out, statistics, *, keys, features, out_length, **shared
):
    """Compares with the oracle; tolerances are those of sums of so many terms."""
    expected = oracle(arrays, lengths=lengths, **shared)
    dtype = arrays["query"].dtype
    assert out.dtype == dtype
    assert_close(out, expected.out, dtype=dtype, length=out_length)
    assert_close(statistics.lse, expected.lse, dtype="float32", length=keys)
    top = statistics.max_score
    assert_close(top, expected.max_score, dtype="float32", length=features)
