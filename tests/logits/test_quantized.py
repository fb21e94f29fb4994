"""A head in few bits: the logits of the decoded weight, its memory, and edges."""

from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses, quantize
from softlib.logits import FusedLogits, QuantizedLogits
from softlib.quantize import QuantizedArray
from softlib.testing import assert_close
from tests.host import jnp

ROWS, FEATURES, CLASSES = 7, 24, 141
LABELS = jnp.arange(ROWS) * 19 % CLASSES
CUTS: dict[str, Any] = {"vocab_chunk": 60, "token_chunk": 3}


def drawn(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def weight_of(kind) -> QuantizedArray:
    table = drawn(CLASSES, FEATURES) / 4
    if kind == "groups":
        where = quantize.prune_by_magnitude(table, sparsity=0.3, axis=1).where
        return quantize.quantize_groups(table, bits=3, group_size=8, where=where)
    if kind == "symmetric":
        return quantize.quantize_groups(table, group_size=24, is_symmetric=True)
    codebook = drawn(60, 4, seed=1)
    if kind == "vectors":
        return quantize.quantize_vectors(table, codebook / 4)
    return quantize.quantize_vectors(table, codebook, group_size=12)


@pytest.mark.parametrize("kind", ["groups", "symmetric", "scaled vectors"])
def test_values_and_gradients_are_those_of_the_decoded_weight(kind):
    """In pieces with a rest of rows and of classes; against float64."""
    weight = weight_of(kind)
    factors = jnp.cos(jnp.arange(ROWS))
    modifiers: dict[str, Any] = {"softcap": 6.0, "temperature": 1.5}

    def total(hidden, parameters, bias, in_pieces):
        head = weight.with_parameters(parameters)
        if in_pieces:
            logits = QuantizedLogits(hidden, head, bias=bias, **modifiers, **CUTS)
        else:
            logits = softlib.logits.StoredLogits(
                hidden @ head.decode().T, bias=bias, **modifiers
            )
        loss = losses.softmax_cross_entropy(
            logits, LABELS, label_smoothing=0.1, where=LABELS != 19
        )
        return (factors * loss).sum()

    given = drawn(ROWS, FEATURES, seed=2), weight.parameters, drawn(CLASSES, seed=3)
    run = jax.jit(jax.value_and_grad(total, (0, 1, 2)), static_argnums=3)
    ours, gradients = run(*given, True)
    with jax.enable_x64():
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), given)
        theirs, wanted = run(*exact, False)
    assert_close(ours, theirs, dtype=jnp.float32, length=50 * CLASSES)
    for found, right in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True
    ):
        assert np.any(right)
        atol = 2e-5 * np.abs(right).max()
        np.testing.assert_allclose(found, right, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["vectors"])
def test_best_classes_samples_and_edges(kind):
    exists = jnp.arange(CLASSES) % 3 != 0
    weight, hidden = weight_of(kind), drawn(ROWS, FEATURES, seed=2)
    logits = QuantizedLogits(hidden, weight, class_where=exists, **CUTS)
    array = logits.materialize()
    wanted = jnp.where(exists[None], hidden @ weight.decode().T, -jnp.inf)
    assert_close(array, wanted, dtype=jnp.float32, length=FEATURES)
    best = softlib.logits.top_k(logits, k=3)
    np.testing.assert_array_equal(best.classes, jax.lax.top_k(array, 3)[1])
    key = jax.random.key(0)
    drawn_classes = softlib.logits.sample(key, logits)
    np.testing.assert_array_equal(drawn_classes, softlib.logits.sample(key, array))
    at = softlib.logits.gather(logits, jnp.array([1, 140]))
    assert_close(at, array[:, [1, 140]], dtype=jnp.float32, length=FEATURES)
    loss = losses.softmax_cross_entropy(logits, LABELS)
    np.testing.assert_array_equal(np.isinf(loss), ~exists[LABELS])
    fused = FusedLogits([logits, array], [2.0, -1.0])
    assert_close(
        losses.softmax_cross_entropy(fused, LABELS),
        loss,
        dtype=jnp.float32,
        length=FEATURES,
    )


def test_a_dropped_row_with_nan_has_no_part_in_gradients():
    weight, where = weight_of("groups"), jnp.arange(ROWS) > 0
    hidden = drawn(ROWS, FEATURES, seed=2).at[0].set(jnp.nan)

    def total(hidden, parameters):
        logits = QuantizedLogits(hidden, weight.with_parameters(parameters))
        return losses.softmax_cross_entropy(logits, LABELS, where=where).sum()

    gradients = jax.grad(total, (0, 1))(hidden, weight.parameters)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()


def test_is_a_value():
    """Through jit, vmap and grad; rows of it; labels of whole sequences."""
    hidden, labels = drawn(2, 4, FEATURES), jnp.arange(8).reshape(2, 4)
    weight = weight_of("scaled vectors")
    logits = QuantizedLogits(hidden, weight, vocab_chunk=60)
    loss = losses.softmax_cross_entropy
    wanted = loss(hidden @ weight.decode().T, labels)
    mapped = jax.vmap(loss, in_axes=(logits.batch_axes(), 0))
    for found in (jax.jit(loss)(logits, labels), mapped(logits, labels)):
        assert_close(found, wanted, dtype=jnp.float32, length=CLASSES)
    found = loss(logits[:, 1:].reshape(-1), labels[:, 1:].reshape(-1))
    assert_close(found, wanted[:, 1:].reshape(-1), dtype=jnp.float32, length=CLASSES)
    total = lambda z: loss(z, labels).sum()
    gradient = jax.grad(total, allow_int=True)(logits)
    assert gradient.hidden.shape == hidden.shape
    assert gradient.weight.codebook.shape == (60, 4)
    assert "vocab_chunk=60" in repr(logits)


def test_products_are_in_the_dtype_of_both():
    hidden, weight = drawn(ROWS, FEATURES, dtype="bfloat16"), weight_of("groups")
    narrow = QuantizedLogits(hidden, weight.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    decoded = weight.astype(jnp.bfloat16).decode().astype(jnp.float32)
    wanted = hidden.astype(jnp.float32) @ decoded.T
    assert_close(narrow.materialize(), wanted, dtype=jnp.float32, length=100)


@pytest.mark.parametrize("kind", ["groups", "vectors"])
def test_the_weight_is_never_decoded_whole(kind):
    """Values, gradients of hidden and of scales: less than a tenth of the floats."""
    rows, classes, features = 256, 32_768, 512
    shape = lambda dtype, *axes: jax.ShapeDtypeStruct(axes, dtype)

    def packed(codes, numbers):
        if kind == "groups":
            return QuantizedArray(codes, bits=4, scale=numbers, zero=numbers)
        return QuantizedArray(codes[:, ::4], bits=8, codebook=numbers[:256, :4])

    weight = jax.eval_shape(
        packed,
        shape(jnp.int32, classes, features),
        shape(jnp.float32, classes, features // 64),
    )
    labels = shape(jnp.int32, rows)

    def total(hidden, parameters, weight, labels):
        logits = QuantizedLogits(hidden, weight.with_parameters(parameters))
        return losses.softmax_cross_entropy(logits, labels).sum()

    floats = classes * features * 4
    assert weight.nbytes < 0.2 * floats
    for function in (total, jax.grad(total), jax.grad(total, (0, 1))):
        hidden = shape(jnp.float32, rows, features)
        lowered = jax.jit(function).lower(hidden, weight.parameters, weight, labels)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        of_all = memory.temp_size_in_bytes + memory.output_size_in_bytes
        # The gradient of scale and zero is a part of it, a 32nd of the floats.
        assert of_all < 0.25 * floats


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    weight: Any = weight_of("groups")
    hidden = drawn(ROWS, FEATURES)
    with pytest.raises(TypeError, match=r"`weight` must be a softlib.*got ArrayImpl"):
        QuantizedLogits(hidden, weight.decode())
    with pytest.raises(
        ValueError, match=r"`weight` must have shape \(V, D\) with D = 5"
    ):
        QuantizedLogits(hidden[:, :5], weight)
    with pytest.raises(TypeError, match="`hidden` must have a floating"):
        QuantizedLogits(LABELS[:, None], weight)
    with pytest.raises(
        TypeError, match="`weight` must be an array, got QuantizedArray"
    ):
        softlib.LinearLogits(hidden, weight)
    logits = QuantizedLogits(hidden, weight, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        losses.softmax_cross_entropy(logits, LABELS)
