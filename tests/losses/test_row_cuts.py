"""However rows are cut, and whatever is kept for the backward pass: same numbers."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib import losses
from softlib.logits._engine import chunks as _chunks
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles.cross_entropy import token_metrics

FEATURES, CLASSES = 6, 300


def problem(rows, features=FEATURES, classes=CLASSES) -> tuple[dict[str, Any], Any]:
    random = np.random.default_rng(rows)
    arrays = {
        "hidden": random.normal(size=(rows, features)),
        "weight": random.normal(size=(classes, features)) / features**0.5,
        "bias": random.normal(size=classes),
        "scale": np.linspace(0.5, 2, rows),
        "temperature": 1.5,
    }
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
    return arrays, jnp.asarray(random.integers(0, classes, rows))


def weights_of(labels):
    return np.linspace(-1, 1, labels.shape[0], dtype=np.float32)


def value_and_gradients(arrays, labels, **options):
    weights = weights_of(labels)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            arrays = dict(arrays)
            if options.get("vocab_axis") == 1:
                arrays["weight"] = arrays["weight"].T
            found = losses.linear_softmax_cross_entropy(
                **arrays, labels=labels, label_smoothing=0.1, **options
            )
            return (weights * found).sum(), found

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    (_, rows), gradients = run(arrays)
    return {"loss": rows, **gradients}


def assert_same_as_oracle(actual, arrays, labels):
    wanted = token_metrics(
        labels,
        cotangents={"loss": weights_of(labels)},
        label_smoothing=0.1,
        **arrays,
    )
    gradients = dict(wanted.gradients)
    assert gradients.keys() | {"loss"} == actual.keys()
    length = max(arrays["weight"].shape)
    for name, value in {"loss": wanted.values["loss"], **gradients}.items():
        of_all = name == "temperature"  # and so a sum over the rows too
        terms = length * labels.shape[0] if of_all else length
        assert_close(actual[name], value, dtype=jnp.float32, length=terms)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("token_chunk", [1, 4, 7, 12, 100])
def test_a_token_chunk_of_any_size(token_chunk, vocab_axis):
    arrays, labels = problem(12)
    actual = value_and_gradients(
        arrays, labels, token_chunk=token_chunk, vocab_chunk=128, vocab_axis=vocab_axis
    )
    assert_same_as_oracle(actual, arrays, labels)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 300])
def test_products_that_are_kept(rows, vocab_axis):
    """Enough features for most of the classes to be kept, and few rows or many."""
    arrays, labels = problem(rows, 256, 2000)
    assert _chunks.kept_classes(rows, 256, 2000, 100) == 1400
    actual = value_and_gradients(arrays, labels, vocab_chunk=100, vocab_axis=vocab_axis)
    assert_same_as_oracle(actual, arrays, labels)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 300])
def test_one_tile_of_all_classes(rows, vocab_axis):
    arrays, labels = problem(rows)
    assert rows * CLASSES <= _chunks.WHOLE
    actual = value_and_gradients(arrays, labels, vocab_axis=vocab_axis)
    assert_same_as_oracle(actual, arrays, labels)


@pytest.mark.parametrize("rows", [1, 7, 1000, 8192, 8184, 8191, 10**6])
@pytest.mark.parametrize("features", [1, 64, 4096])
@pytest.mark.parametrize("strided", [False, True])
def test_cuts_cover_all_rows_in_pieces_of_bounded_size(rows, features, strided):
    cut = _chunks.row_cut(rows, features, strided=strided)
    assert cut.groups * cut.size + cut.rest == rows
    assert 0 <= cut.rest < cut.size
    assert cut.size <= 2048
    assert cut.size * features <= max(_chunks.ROWS, 256 * features)
    assert strided or cut.whole or cut.size % 128 == 0


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_a_cut_gives_every_row_to_one_piece(size, strided):
    cut = _chunks.RowCut(10 // size, size, 10 % size, strided)
    rows = jnp.arange(10.0)
    total = cut.zeros(jnp.zeros(size))
    visit = lambda total, group: cut.add(total, cut.take(rows, group) ** 2, group)
    np.testing.assert_array_equal(cut.joined(cut.fold(visit, total)), rows**2)


def test_a_token_chunk_bounds_the_scratch():
    rows, features, classes = 4099, 64, 4096  # prime: no groups of equal size
    struct = jax.ShapeDtypeStruct

    def scratch(token_chunk):
        def loss(hidden, weight, labels):
            return losses.linear_softmax_cross_entropy(
                hidden, weight, labels, token_chunk=token_chunk, vocab_chunk=1024
            ).sum()

        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
            struct((rows, features), jnp.float32),
            struct((classes, features), jnp.float32),
            struct((rows,), jnp.int32),
        )
        memory = program.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    tile = 4 * 1024
    assert scratch(128) < scratch(4099) - 0.8 * tile * (4099 - 128)


def test_chunks_must_be_positive_integers():
    arrays, labels = problem(4)
    for value, error in ((0, ValueError), (True, TypeError)):
        with pytest.raises(error, match="`token_chunk` must be"):
            losses.linear_softmax_cross_entropy(
                **arrays, labels=labels, token_chunk=value
            )
