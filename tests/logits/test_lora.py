"""A head with a low-rank change: the logits of the changed weight, and their memory."""

from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.logits import LoRALogits
from softlib.testing import assert_close
from tests.host import jnp

ROWS, FEATURES, RANK, CLASSES = 7, 5, 2, 141
LABELS = jnp.arange(ROWS) * 19 % CLASSES
CUTS: dict[str, Any] = {"vocab_chunk": 60, "token_chunk": 3}


def arrays(axis=0, batch=(ROWS,), dtype="float32") -> dict[str, Any]:
    random = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    weight = draw(CLASSES, FEATURES)
    return {
        "hidden": draw(*batch, FEATURES),
        "weight": weight.T if axis else weight,
        "lora_a": draw(FEATURES, RANK),
        "lora_b": draw(RANK, CLASSES),
        "lora_scale": jnp.asarray(0.5, dtype),
        "bias": draw(CLASSES),
    }


def formed(given, axis=0, **modifiers):
    """The logits by their definition: of the changed weight, as an array."""
    weight = given["weight"] if axis else given["weight"].T
    changed = weight + given["lora_scale"] * given["lora_a"] @ given["lora_b"]
    return softlib.logits.StoredLogits(
        given["hidden"] @ changed, bias=given["bias"], **modifiers
    )


def streamed(given, axis=0, **options) -> Any:
    return LoRALogits(**given, vocab_axis=axis, **options)


def other():
    random = np.random.default_rng(8)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return softlib.LinearLogits(draw(ROWS, 4), draw(CLASSES, 4))


LOSSES: dict[str, Any] = {
    "cross-entropy": lambda z: losses.softmax_cross_entropy(
        z, LABELS, label_smoothing=0.1, where=LABELS != 19
    ),
    "focal": lambda z: losses.softmax_focal_loss(z, LABELS, gamma=2.0),
    "divergence": lambda z: losses.softmax_kl_divergence(z, other()),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_changed_weight(name, axis):
    """In pieces with a rest of rows and of classes; against float64."""
    factors = jnp.cos(jnp.arange(ROWS))
    modifiers: dict[str, Any] = {"softcap": 6.0, "temperature": 1.5}

    def total(given, in_pieces):
        if in_pieces:
            logits = streamed(given, axis, **modifiers, **CUTS)
        else:
            logits = formed(given, axis, **modifiers)
        return (factors * LOSSES[name](logits)).sum()

    given = arrays(axis)
    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    ours, gradients = run(given, True)
    with jax.enable_x64():
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), given)
        theirs, wanted = run(exact, False)
    assert_close(ours, theirs, dtype=jnp.float32, length=50 * CLASSES)
    for field, gradient in gradients.items():
        assert np.any(wanted[field])
        largest = np.abs(wanted[field]).max()
        np.testing.assert_allclose(
            gradient, wanted[field], rtol=0, atol=2e-5 * largest, err_msg=field
        )


def test_narrow_arrays_are_summed_in_float32():
    """The reduced features are not rounded between the two products."""
    given = arrays(dtype="bfloat16")
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), given)
    logits = streamed(given)
    assert logits.dtype == jnp.float32
    found, wanted = logits.materialize(), formed(wide).materialize()
    assert_close(found, wanted, dtype=jnp.float32, length=100)
    gradient = jax.grad(lambda z: losses.softmax_cross_entropy(z, LABELS).sum())(logits)
    assert gradient.lora_a.dtype == jnp.bfloat16
    exact = jax.grad(lambda g: losses.softmax_cross_entropy(formed(g), LABELS).sum())(
        wide
    )
    for name in ("lora_a", "lora_b", "hidden", "weight"):
        np.testing.assert_allclose(
            np.asarray(getattr(gradient, name), np.float32),
            exact[name],
            rtol=0,
            atol=0.02 * np.abs(exact[name]).max(),
        )


@pytest.mark.parametrize("axis", [0, 1])
def test_best_classes_samples_and_edges(axis):
    exists = jnp.arange(CLASSES) % 3 != 0
    given = arrays(axis)
    logits = streamed(given, axis, class_where=exists, **CUTS)
    array = formed(given, axis, class_where=exists).materialize()
    best = softlib.logits.top_k(logits, k=3)
    np.testing.assert_array_equal(best.classes, jax.lax.top_k(array, 3)[1])
    key = jax.random.key(0)
    drawn = softlib.logits.sample(key, logits)
    np.testing.assert_array_equal(drawn, softlib.logits.sample(key, array))
    loss = losses.softmax_cross_entropy(logits, LABELS)
    np.testing.assert_array_equal(np.isinf(loss), ~exists[LABELS])
    given["hidden"] = given["hidden"].at[0].set(jnp.nan)
    where = jnp.arange(ROWS) > 0

    def total(given):
        dropped = streamed(given, axis, class_where=exists)
        loss = losses.softmax_cross_entropy(dropped, LABELS, where=where)
        return jnp.where(jnp.isfinite(loss), loss, 0).sum()

    for leaf in jax.tree.leaves(jax.grad(total)(given)):
        assert np.isfinite(leaf).all()


def test_is_a_value():
    """Through jit and vmap; rows of it; what is asked of labels of whole sequences."""
    given, labels = arrays(batch=(2, 4)), jnp.arange(8).reshape(2, 4)
    logits = streamed(given, vocab_chunk=60)
    wanted = losses.softmax_cross_entropy(formed(given), labels)
    loss = losses.softmax_cross_entropy
    mapped = jax.vmap(loss, in_axes=(logits.batch_axes(), 0))
    for found in (jax.jit(loss)(logits, labels), mapped(logits, labels)):
        assert_close(found, wanted, dtype=jnp.float32, length=CLASSES)
    for found, theirs in (
        (loss(logits[:, 1:], labels[:, 1:]), wanted[:, 1:]),
        (loss(logits.reshape(-1), labels.reshape(-1)), wanted.reshape(-1)),
    ):
        assert_close(found, theirs, dtype=jnp.float32, length=CLASSES)
    edits = losses.edit_invariant_sequence_loss
    assert_close(
        edits(logits, labels),
        edits(formed(given).materialize(), labels),
        dtype=jnp.float32,
        length=CLASSES,
    )
    assert "lora_scale=float32[]" in repr(logits)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_frozen_weight_has_no_gradient_in_memory(axis):
    """A gradient of all but the weight: less than a fifth of its size, and no copy."""
    rows, classes, features, rank = 256, 65_536, 256, 8
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    learned = shape(rows, features), shape(features, rank), shape(rank, classes)
    weight = shape(features, classes) if axis else shape(classes, features)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def total(learned, weight, labels):
        hidden, *factors = learned
        logits = LoRALogits(hidden, weight, *factors, vocab_axis=axis)
        return losses.softmax_cross_entropy(logits, labels).sum()

    gradient = jax.jit(jax.grad(total))
    memory = gradient.lower(learned, weight, labels).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.2 * features * classes * 4


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    given = arrays()
    with pytest.raises(
        ValueError, match=r"`weight` must have shape \(D, V\) with D = 5"
    ):
        streamed(given, 1)
    with pytest.raises(ValueError, match=r"`lora_a` must have shape \(D, r\)"):
        streamed(given | {"lora_a": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"`lora_b` must have shape \(2, 141\)"):
        streamed(given | {"lora_b": jnp.ones((CLASSES, 2))})
    with pytest.raises(ValueError, match="`lora_scale` must have shape"):
        streamed(given | {"lora_scale": jnp.ones(ROWS)})
    with pytest.raises(ValueError, match="`vocab_axis` must be one of"):
        streamed(given, 2)
    with pytest.raises(TypeError, match="`hidden` must have a floating"):
        streamed(given | {"hidden": jnp.ones((ROWS, FEATURES), int)})
