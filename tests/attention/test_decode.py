"""decode_attention: values, gradients and flags against the oracle."""

import pathlib

import jax
import numpy as np
import pytest

from softlib.testing import assert_close
from tests.attention.decode_problems import (
    FLOATING,
    LENGTHS,
    decoded,
    gradients,
    oracle,
    problem,
)
from tests.host import jnp
from tests.pairwise import name as case_name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
OPTIONS = {
    "implementation": ("xla", "reference"),
    "phi": (None, 0.3, "per head"),
    "criterion": ("row_max", "elementwise"),
    "T": (1, 3),
    "is_causal": (False, True),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "lengths": (None, LENGTHS),
    "num_splits": (None, 3),
    "heads": ((4, 2), (3, 3)),
    "dtype": ("float64", "bfloat16", "float16"),  # float32 is that of the other tests
}


def valid(case):
    if case.get("implementation") == "reference" and case.get("num_splits"):
        return False
    return not (case.get("phi", 0) is None and case.get("criterion") == "elementwise")


def prepared(case):
    """The arrays of a case, the options of the library, those of the oracle."""
    case = dict(case)
    dtype, (N, K) = case.pop("dtype"), case.pop("heads")
    arrays = problem(dtype, T=case.pop("T"), N=N, K=K, sinks=case.pop("sinks"))
    if case["phi"] == "per head":
        case["phi"] = np.linspace(-2, 2, N, dtype=np.float32)
    shared = {name: case[name] for name in ("is_causal", "softcap", "lengths")}
    return arrays, case, shared, dtype


@pytest.mark.parametrize("case", pairwise(OPTIONS, valid), ids=case_name)
def test_matches_oracle(case):
    with jax.enable_x64(case["dtype"] == "float64"):
        arrays, options, shared, dtype = prepared(case)
        out, statistics = decoded(arrays, **options)
        expected = oracle(arrays, **shared)
        wide = arrays["scale"].dtype
        assert (out.dtype, statistics.lse.dtype) == (jnp.dtype(dtype), wide)
        assert_close(out, expected.out, dtype=dtype, length=11)
        assert_close(statistics.lse, expected.lse, dtype=wide, length=11)
        assert_close(statistics.max_score, expected.max_score, dtype=wide, length=6)
        assert not statistics.needs_recompute.any()


GRADIENT_OPTIONS = {
    name: OPTIONS[name]
    for name in (
        "implementation",
        "is_causal",
        "softcap",
        "sinks",
        "lengths",
    )
} | {
    "phi": (None, 0.3),
    "num_splits": (None, 3),
    "dtype": ("float32", "bfloat16"),
    "T": (2,),
    "heads": ((4, 2),),
}


@pytest.mark.parametrize("case", pairwise(GRADIENT_OPTIONS, valid), ids=case_name)
def test_gradients_match_oracle(case):
    arrays, options, shared, dtype = prepared(case)
    random = np.random.default_rng(1)
    shape = arrays["query"].shape[:-1]
    g_out, g_lse = random.normal(size=(*shape, 5)), random.normal(size=shape)
    found = gradients(arrays, options.pop("lengths"), g_out, g_lse, **options)
    # The cotangent of a bfloat16 result is rounded to bfloat16.
    rounded = np.asarray(np.asarray(g_out, jnp.dtype(dtype)), np.float64)
    expected = oracle(arrays, **shared, g_out=rounded, g_lse=g_lse).gradients
    for argument in FLOATING:
        if argument in arrays:
            actual = found[argument]
            assert actual.dtype == arrays[argument].dtype
            assert_close(actual, expected[argument], dtype=dtype, length=32)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("criterion", ["row_max", "elementwise"])
def test_matches_independent_vectors(implementation, criterion):
    data = np.load(DATA / "unified_max_softmax_case0.npz")
    arrays = {name: data["in_" + name] for name in ("query", "key")}
    arrays["value"] = data["in_value"]
    out, statistics = decoded(
        arrays,
        data["in_lengths"],
        phi=float(data["in_phi"]),
        valid_range=(float(data["in_a"]), float(data["in_b"])),
        criterion=criterion,
        implementation=implementation,
    )
    assert_close(out, data["out_attn"], dtype="float32", length=48)
    assert_close(statistics.lse, data["out_lse"], dtype="float32", length=48)
    flags = "out_needs_recompute" if criterion == "row_max" else "out_paper_flag"
    np.testing.assert_array_equal(statistics.needs_recompute, data[flags])


@pytest.mark.parametrize(
    ("S", "phi"),
    [(1, None), (2, 0.0), (127, None), (128, 0.0), (129, None), (129, 0.0), (300, 0.0)],
)
def test_any_number_of_keys_around_the_size_of_a_part(S, phi, monkeypatch):
    monkeypatch.setattr("softlib.attention._decode.stream.SPLIT_SIZE", 1)
    arrays = problem(S=S, B=2, N=1, K=1)
    lengths = [S, (S + 1) // 2]
    out, statistics = decoded(arrays, lengths, phi=phi)
    expected = oracle(arrays, lengths=lengths)
    assert_close(out, expected.out, dtype="float32", length=S)
    assert_close(statistics.lse, expected.lse, dtype="float32", length=S)


@pytest.mark.parametrize(
    ("num_splits", "phi"),
    [(1, -1.0), (2, -1.0), (3, None), (3, -1.0), (7, None), (7, -1.0), (11, -1.0)],
)
def test_any_number_of_splits_gives_the_same(num_splits, phi):
    arrays = problem(T=2)
    out, statistics = decoded(arrays, LENGTHS, phi=phi, num_splits=num_splits)
    expected = oracle(arrays, lengths=LENGTHS)
    assert_close(out, expected.out, dtype="float32", length=11)
    assert_close(statistics.lse, expected.lse, dtype="float32", length=11)


def test_no_queries_no_keys_no_sequences():
    for empty, count in (({"T": 0}, 0), ({"B": 0}, 0), ({"S": 0}, 16)):
        arrays = problem(**empty)
        lengths = [0] * arrays["query"].shape[0]
        for options in ({}, {"phi": 0.0}, {"lengths": lengths}):
            out, statistics = decoded(arrays, **options)
            assert statistics.lse.size == count
            assert (out == 0).all()
            assert (statistics.lse == -jnp.inf).all()


def test_batch_axes_may_be_none_or_several():
    arrays = problem(T=2)
    expected = decoded(arrays, LENGTHS, phi=0.0)
    fold = lambda a: a.reshape(2, 2, *a.shape[1:]) if a.ndim else a
    folded = {name: fold(array) for name, array in arrays.items()}
    several = decoded(folded, fold(np.array(LENGTHS)), phi=0.0)
    first = {name: a[0] if a.ndim else a for name, a in arrays.items()}
    one = decoded(first, LENGTHS[0], phi=0.0)
    leaves = map(jax.tree.leaves, (expected, several, one))
    for all_, two, single in zip(*leaves, strict=True):
        np.testing.assert_array_equal(fold(all_), two)
        np.testing.assert_allclose(all_[0], single, atol=1e-6)
