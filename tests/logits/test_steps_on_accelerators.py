"""The stream over classes in the steps of TPUs and GPUs: few, large, and as exact.

Programs are lowered for these platforms; their steps are also run here, on a CPU.
"""

import functools

import jax
import numpy as np
import pytest

import softlib
from softlib import LinearLogits, losses
from softlib.logits._engine import accelerator, slices
from softlib.logits._engine.accelerator import Accelerator
from softlib.logits._engine.tile import Options
from softlib.testing import assert_close
from tests.host import jnp
from tests.losses.test_row_cuts import (
    assert_same_as_oracle,
    problem,
    value_and_gradients,
)
from tests.lowered import loops, lowered, products
from tests.operations import in_steps_of_accelerators

ROWS, FEATURES, CLASSES = 16384, 4096, 151_936
STEP = 2**26


def _loss(hidden, weight, labels, **options):
    logits = LinearLogits(hidden, weight, implementation="xla", **options)
    return losses.softmax_cross_entropy(logits, labels).sum()


def _shapes(rows, features, classes, dtype, vocab_axis=0):
    weight = (classes, features) if vocab_axis == 0 else (features, classes)
    return (
        jax.ShapeDtypeStruct((rows, features), dtype),
        jax.ShapeDtypeStruct(weight, dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_few_steps_and_narrow_operands(platform, vocab_axis, dtype):
    step = jax.value_and_grad(lambda *a: _loss(*a, vocab_axis=vocab_axis), (0, 1))
    arguments = _shapes(ROWS, FEATURES, CLASSES, dtype, vocab_axis)
    text = lowered(platform, step, *arguments)
    assert loops(text) == [37, 37]
    found = products(text)
    # Of a loop, and of the shorter rest: one product forward, three backward.
    assert len(found) == 8
    narrow = "bf16" if dtype == jnp.bfloat16 else "f16"
    for left, right, result in found:
        assert left.endswith(f"x{narrow}")
        assert right.endswith(f"x{narrow}")
        assert result.endswith("xf32")
    assert f"{ROWS}x4096xf32" in {result for *_, result in found}


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_no_array_of_all_classes_is_sliced_as_a_matrix(vocab_axis):
    """XLA for TPUs 7x would copy it, and does not if it is seen in tiles of 8 rows."""
    step = jax.grad(lambda *a: _loss(*a, vocab_axis=vocab_axis), (0, 1))
    arguments = _shapes(ROWS, FEATURES, CLASSES, jnp.bfloat16, vocab_axis)
    text = lowered("tpu", step, *arguments)
    matrix, tiles = (
        (f"{CLASSES}x{FEATURES}xbf16", f"{CLASSES // 8}x8x{FEATURES}xbf16")
        if vocab_axis == 0
        else (f"{FEATURES}x{CLASSES}xbf16", f"{FEATURES // 8}x8x{CLASSES}xbf16")
    )
    sliced = [line for line in text.splitlines() if "slice" in line]
    assert any(tiles in line for line in sliced)
    assert not any(matrix in line for line in sliced)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_sum_with_gradients_keeps_few_logits_and_computes_many_again(platform):
    def total(hidden, weight, labels):
        logits = LinearLogits(hidden, weight, implementation="xla")
        return losses.softmax_cross_entropy_sum(logits, labels)

    step = jax.value_and_grad(total, (0, 1))
    count = lambda classes: len(
        products(lowered(platform, step, *_shapes(2048, 768, classes, jnp.bfloat16)))
    )
    assert count(30_000) == 3
    # In two steps, each of three products; those of the second are computed again.
    assert count(50_257) == 7


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_two_heads_share_the_memory_of_a_step(platform):
    def loss(hidden, weight, labels):
        student = LinearLogits(hidden, weight, implementation="xla")
        teacher = LinearLogits(2 * hidden, weight, implementation="xla")
        return losses.softmax_kl_divergence(student, teacher).sum()

    arguments = _shapes(ROWS, 256, 65_536, jnp.bfloat16)
    tiles = {result for *_, result in products(lowered(platform, loss, *arguments))}
    # Statistics of each head, then the terms of both.
    assert tiles == {f"{ROWS}x4096xf32", f"{ROWS}x2048xf32"}


def test_sizes_of_steps():
    sizes = Accelerator().classes
    quarter = Accelerator(copies=4).classes(ROWS, FEATURES, CLASSES, jnp.float32)
    assert quarter == STEP // ROWS // 4
    assert sizes(ROWS, FEATURES, CLASSES, jnp.float32) == STEP // ROWS
    assert sizes(ROWS, FEATURES, CLASSES, jnp.float64) == STEP // ROWS // 2
    # Features of a gradient count like rows; steps are about equal.
    assert sizes(1, 2**16, 1025, jnp.float32) == 768
    assert sizes(1, 1, CLASSES, jnp.float32) == CLASSES
    assert sizes(2**20, 1, CLASSES, jnp.float32) == accelerator.LEAST
    assert Accelerator().most_rows(jnp.float32) == STEP // accelerator.LEAST


def test_rows_are_cut_only_where_the_fewest_classes_of_all_exceed_a_step():
    def lse(hidden, weight, labels):
        logits = LinearLogits(hidden, weight, implementation="xla")
        return softlib.logits.logsumexp(logits)

    shapes = lambda rows: _shapes(rows, 8, 1024, jnp.float32)
    text = lambda rows: lowered("cuda", lse, *shapes(rows))
    assert {r for *_, r in products(text(2**18))} == {f"{2**18}x256xf32"}
    assert {r for *_, r in products(text(2**19))} == {f"{2**18}x256xf32"}


def test_explain_says_the_steps():
    text = str(softlib.explain(_loss, *_shapes(ROWS, FEATURES, CLASSES, jnp.bfloat16)))
    assert "xla: on a TPU or GPU a step takes 4096 classes of all rows" in text
    few = str(softlib.explain(_loss, *_shapes(4, 8, 100, jnp.bfloat16)))
    assert "a step takes" not in few


@pytest.fixture
def small_steps(monkeypatch):
    """Runs steps of accelerators, as small as small problems need."""
    monkeypatch.setattr(accelerator, "LEAST", 128)
    monkeypatch.setattr(accelerator, "STEP_BYTES", 4 * 128 * 128)
    monkeypatch.setattr(accelerator, "KEPT_BYTES", 4 * 100 * 200)
    with in_steps_of_accelerators():
        yield


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 60, 300])
def test_the_numbers_are_those_of_the_oracle(small_steps, rows, vocab_axis):
    arrays, labels = problem(rows)
    actual = value_and_gradients(arrays, labels, vocab_axis=vocab_axis)
    assert_same_as_oracle(actual, arrays, labels)


def test_a_sum_keeps_the_logits_of_the_first_steps(small_steps):
    arrays, labels = problem(100)

    def of(function, hidden, weight):
        logits = LinearLogits(hidden, weight, bias=arrays["bias"])
        return function(logits, labels)

    def step(function):
        given = arrays["hidden"], arrays["weight"]
        loss = lambda *a: of(function, *a)
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)

    weighted = lambda logits, labels: losses.softmax_cross_entropy(logits, labels).sum()
    value, gradients = step(losses.softmax_cross_entropy_sum)
    expected, wanted = step(weighted)
    assert_close(value, expected, dtype=jnp.float32, length=300 * 100)
    for found, expected in zip(gradients, wanted, strict=True):
        assert_close(found, expected, dtype=jnp.float32, length=300)


def test_copies_of_a_vmap_share_the_memory_of_a_step(small_steps):
    arrays, labels = problem(96)
    hidden, weight = arrays["hidden"], arrays["weight"]
    loss = lambda h, l: losses.softmax_cross_entropy(LinearLogits(h, weight), l)
    mapped = jax.jit(jax.vmap(loss))(hidden.reshape(4, 24, -1), labels.reshape(4, 24))
    assert_close(
        mapped.reshape(96), loss(hidden, labels), dtype=jnp.float32, length=300
    )


@pytest.mark.parametrize("shape", [(24, 48), (20, 48), (24, 50), (24,)])
@pytest.mark.parametrize("size", [8, 10])
def test_slices_of_classes(shape, size):
    """Of a matrix, seen in tiles of 8 rows if these and the slices are whole tiles."""
    array = np.arange(np.prod(shape)).reshape(shape)
    given, options = jnp.asarray(array), Options(("lse",), accelerator=Accelerator())

    @functools.partial(jax.jit, static_argnums=1)
    def both(start, axis):
        found = slices.slice_of(options, given, start, size, axis)
        return found, slices.with_slice(options, given, -found, start, axis)

    for axis in range(len(shape)):
        own = np.moveaxis(array, axis, 0)
        for start in (0, size):
            expected = own.copy()
            expected[start : start + size] *= -1
            for each in (start, jnp.asarray(start)):
                taken, written = (np.moveaxis(x, axis, 0) for x in both(each, axis))
                np.testing.assert_array_equal(taken, own[start : start + size])
                np.testing.assert_array_equal(written, expected)
