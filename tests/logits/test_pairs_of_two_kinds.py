"""Divergences of logits of two kinds: memory, masks, errors."""

import functools

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.logits import StoredLogits
from softlib.testing import assert_close
from tests.host import jnp


@pytest.mark.parametrize("order", ["head first", "stored first"])
def test_stored_logits_are_never_copied(order):
    """8,192 rows over 256,000 classes: a fiftieth of the logits as temporaries."""
    rows, classes, features = 8192, 256_000, 256
    shape = jax.ShapeDtypeStruct
    stored = shape((rows, classes), jnp.bfloat16)
    hidden, weight = (shape((n, features), jnp.bfloat16) for n in (rows, classes))

    def total(hidden, weight, stored):
        pair = softlib.LinearLogits(hidden, weight), stored
        both = pair if order == "head first" else pair[::-1]
        return losses.softmax_kl_divergence(*both).sum()

    for learned in ((0, 1), (0, 1, 2)):
        gradient = jax.jit(jax.grad(total, argnums=learned))
        memory = gradient.lower(hidden, weight, stored).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 0.02 * rows * classes * 4


def test_a_stored_teacher_with_a_class_mask_per_row():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, weight, teacher = draw(5, 3), draw(70, 3), draw(5, 70)
    exists = jnp.asarray(random.random((5, 70)) < 0.7)
    head = softlib.LinearLogits(hidden, weight, token_chunk=2, vocab_chunk=32)
    masked = StoredLogits(teacher, class_where=exists)
    student = StoredLogits(head.materialize(), class_where=exists)
    close = functools.partial(assert_close, dtype=jnp.float32, length=70)
    # The classes of the teacher are those that it gives a probability.
    found = losses.softmax_soft_target_cross_entropy(head, masked)
    p = jax.nn.softmax(jnp.where(exists, teacher, -jnp.inf))
    close(found, -(p * jax.nn.log_softmax(head.materialize())).sum(-1))
    assert not np.allclose(found, losses.softmax_kl_divergence(student, masked))


@pytest.mark.usefixtures("untyped")
def test_bad_pairs():
    head = softlib.LinearLogits(jnp.ones((2, 3)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"`teacher_logits` must have 5 classes.*4\."):
        losses.softmax_kl_divergence(head, jnp.ones((2, 4)))
    arrays = jnp.ones((2, 3)), jnp.ones((5, 3))
    pinned = softlib.LinearLogits(*arrays, implementation="pallas")
    with pytest.raises(NotImplementedError, match="linear_divergence"):
        losses.softmax_kl_divergence(jnp.ones((2, 5)), pinned)
