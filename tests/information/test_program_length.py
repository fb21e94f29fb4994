"""Code lengths: vectors, round trips, bounds, contexts by brute force, errors."""

import collections
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib.information import range_decode, range_encode
from softlib.scoring import sequence_nll
from softlib.testing import assert_close
from tests.compiled import information
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/kolmogorov_test_case0.npz"


def distributions(rows: int, classes: int, sharpness: float = 3.0) -> Any:
    logits = sharpness * np.random.default_rng(0).normal(size=(rows, classes))
    probs = np.exp(logits)
    return probs / probs.sum(-1, keepdims=True)


def drawn(probs: Any) -> Any:
    uniform = np.random.default_rng(1).uniform(size=(len(probs), 1))
    return np.minimum((probs.cumsum(-1) < uniform).sum(-1), probs.shape[-1] - 1)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        logits, tokens = (jnp.asarray(data[f"in_{n}"]) for n in ("logits", "tokens"))
        where = jnp.asarray(data["in_where"])
        bits = sequence_nll(logits, tokens, where=where) / math.log(2)
        assert_close(bits, data["out_bits"], dtype="float64", length=96)
        found = information.integer_frequencies(jax.nn.softmax(logits))
        np.testing.assert_array_equal(found, data["out_freqs"])
    for table, symbols, coded in zip(
        data_of("out_freqs"),
        data_of("in_tokens"),
        data_of("out_coded_bits"),
        strict=True,
    ):
        code = range_encode(table, symbols)
        assert code.ideal_bits <= coded <= code.ideal_bits + 2
        # Whole bytes; and what follows the end is known to be zeros.
        assert 8 * len(code.data) <= 8 * math.ceil(coded / 8)
        back = range_decode(code.data, lambda seen, t=table: t[len(seen)], length=8)
        np.testing.assert_array_equal(back, symbols)


@functools.cache
def data_of(name: str) -> Any:
    with np.load(DATA) as data:
        return data[name]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ten_kilobytes_come_back_and_cost_what_the_model_says(dtype):
    probs = distributions(10_000, 256)
    symbols = drawn(probs)
    with jax.enable_x64(dtype == "float64"):
        table = np.asarray(information.integer_frequencies(jnp.asarray(probs, dtype)))
    assert (table >= 1).all()
    assert (table.sum(-1) == 2**16).all()
    code = range_encode(table, symbols)
    assert 8 * len(code.data) < code.ideal_bits + 8
    model = -np.log2(probs[np.arange(10_000), symbols]).sum()
    # The sheet's limit, and the bound of the docstring.
    assert 8 * len(code.data) < 1.01 * model + 16
    assert code.ideal_bits <= model + 10_000 * math.log2(2**16 / (2**16 - 256)) + 1
    back = range_decode(code.data, lambda seen: table[len(seen)], length=10_000)
    np.testing.assert_array_equal(back, symbols)


@pytest.mark.parametrize("bits", [1, 8, 32])
def test_extreme_frequencies_come_back(bits):
    """Carries run through many bytes where the interval ends at a round number."""
    rng = np.random.default_rng(bits)
    for _ in range(20):
        low = [1, 2**bits - 1]
        rows = np.array([low if rng.uniform() < 0.5 else low[::-1] for _ in range(200)])
        symbols = rng.integers(2, size=200)
        code = range_encode(rows, symbols)
        slack = 8 + 200 * 2.0 ** (bits - 55)
        assert 8 * len(code.data) < code.ideal_bits + slack
        back = range_decode(code.data, lambda seen, r=rows: r[len(seen)], length=200)
        np.testing.assert_array_equal(back, symbols)


def test_every_short_sequence_has_a_code_of_its_own():
    found = collections.Counter()
    for number in range(3**5):
        symbols = [number // 3**k % 3 for k in range(5)]
        code = range_encode([[1, 2, 1]] * 5, symbols)
        found[int.from_bytes(code.data.ljust(4, b"\0"))] += 1
        back = range_decode(code.data, lambda _: [1, 2, 1], length=5)
        np.testing.assert_array_equal(back, symbols)
    assert max(found.values()) == 1


def test_the_decoder_sees_what_it_has_decoded():
    """An adaptive model needs nothing but the code and the length."""
    symbols = np.array(list(b"abracadabra" * 8)) - 97

    def frequencies(seen: Any) -> Any:
        counts = np.bincount(seen, minlength=26) + 1
        counts[0] += 2**10 - counts.sum()
        return counts

    table = [frequencies(symbols[:t]) for t in range(len(symbols))]
    code = range_encode(np.array(table), symbols)
    assert 8 * len(code.data) < code.ideal_bits + 8
    np.testing.assert_array_equal(
        range_decode(code.data, frequencies, length=len(symbols)), symbols
    )


def test_contexts_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    symbols, classes, orders = rng.integers(3, size=40), 3, 3
    wanted = np.zeros((40, orders + 1))
    for order in range(orders + 1):
        seen: Any = collections.defaultdict(lambda: np.zeros(classes))
        for t, symbol in enumerate(symbols.tolist()):
            if t < order:
                wanted[t, order] = -math.log(classes)
                continue
            counts = seen[tuple(symbols[t - order : t])]
            share = (counts[symbol] + 0.5) / (counts.sum() + classes / 2)
            wanted[t, order] = math.log(share)
            counts[symbol] += 1
    found = information.context_log_likelihoods(
        jnp.asarray(symbols), num_classes=3, max_order=3
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    mixed = information.sequential_mixture(found, jnp.zeros(4)).log_predictive.sum()
    assert mixed >= wanted.sum(0).max() - math.log(4) - 1e-3


# ---------------------------------------------------------------------------- promises
def test_nothing_costs_nothing():
    code = range_encode(np.zeros((0, 3), int), np.zeros(0, int))
    assert code == (b"", 0)
    assert range_decode(b"", lambda _: [1], length=0).shape == (0,)
    run = information.context_log_likelihoods
    empty = run(jnp.zeros(0, int), num_classes=2, max_order=2)
    assert empty.shape == (0, 3)


def test_what_is_no_distribution_has_no_frequencies():
    probs = jnp.array([[0.5, 0.5], [0.5, 0.6], [jnp.nan, 1.0], [-0.5, 1.5], [1.0, 0.0]])
    found = information.integer_frequencies(probs, precision_bits=4)
    np.testing.assert_array_equal(found, [[8, 8], [0, 0], [0, 0], [0, 0], [15, 1]])
    with pytest.raises(
        ValueError, match=r"^range_encode: `frequencies` must be at least"
    ):
        range_encode(np.asarray(found), [0] * 5)


def test_a_symbol_that_is_no_class_is_nan_and_matches_nothing():
    run = information.context_log_likelihoods
    found = run(jnp.array([0, 7, 1, 7, 1]), num_classes=2, max_order=1)
    assert np.isnan(found[jnp.array([1, 3])]).all()
    np.testing.assert_allclose(found[4, 1], -math.log(2), rtol=1e-6)


def test_a_program_that_fails_counts_as_the_baseline():
    rate = information.compression_rate
    bits = jnp.array([100.0, jnp.nan, 100.0])
    data, baseline = jnp.array([1000.0, 1000.0, 0.0]), jnp.array([500.0, 500.0, 1.0])
    right = jnp.array([True, False, True])
    found = rate(bits, data, baseline_bits=baseline, reproduces=right)
    np.testing.assert_allclose(found, [0.1, 0.5, np.nan])
    slope = jax.grad(
        lambda b: rate(b, data, baseline_bits=baseline, reproduces=right)[:2].sum()
    )(bits)
    np.testing.assert_allclose(slope[:2], [1e-3, 0])


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    probs = jnp.ones((2, 4)) / 4
    run: Any = information.integer_frequencies
    with pytest.raises(
        ValueError, match=r"`precision_bits` must be at most 16 .* got 17"
    ):
        run(probs, precision_bits=17)
    with pytest.raises(ValueError, match=r"more than the 4 classes, got 2"):
        run(probs, precision_bits=2)
    encode: Any = range_encode
    with pytest.raises(ValueError, match=r"sum that is a power of two .* sum of 3"):
        encode([[1, 2]], [0])
    with pytest.raises(ValueError, match=r"`symbols` must hold integers in \[0, 2\)"):
        encode([[1, 3]], [2])
    with pytest.raises(ValueError, match=r"`symbols` must hold integers .* got 0.5"):
        encode([[1, 3]], [0.5])
    with pytest.raises(ValueError, match=r"`symbols` must have shape \(T,\)"):
        encode([[1, 3]], [0, 1])
    with pytest.raises(
        ValueError, match=r"`frequencies` must be integers of V classes"
    ):
        encode([[0.5, 0.5]], [0])
    decode: Any = range_decode
    with pytest.raises(
        ValueError, match=r"^range_decode: `next_frequencies` must be at"
    ):
        decode(b"", lambda _: [0, 1], length=1)
    with pytest.raises(ValueError, match=r"^range_decode: `length` must be at least 0"):
        decode(b"", lambda _: [1], length=-1)
    contexts: Any = information.context_log_likelihoods
    with pytest.raises(ValueError, match=r"`max_order` must be at least 0, got -1"):
        contexts(jnp.zeros(3, int), num_classes=2, max_order=-1)
    with pytest.raises(ValueError, match=r"`symbols` must have shape \(T,\), got"):
        contexts(jnp.zeros((3, 1), int), num_classes=2, max_order=1)
    rate: Any = information.compression_rate
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match=r"`data_bits` must have shape \(2,\)"):
        rate(ones, jnp.ones(3), baseline_bits=ones, reproduces=ones > 0)
