"""Sequence losses on a linear head: no array of logits, and the memory of its loss."""

import math

import jax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from softlib import losses
from tests import operations
from tests.heads import of_head
from tests.host import jnp

struct = jax.ShapeDtypeStruct
BATCH, LENGTH, FEATURES, CLASSES = 4, 16, 8, 6000
CHUNK = 2048  # several chunks, the last one short


def log_probs(hidden, weight, labels, **options):
    return of_head.token_log_probs(hidden, weight, labels, **options)


def cross_entropy(hidden, weight, labels, **options):
    return losses.linear_softmax_cross_entropy(hidden, weight, labels, **options)


def edit_invariant(hidden, weight, labels, **options):
    return of_head.edit_invariant_sequence_loss(
        hidden, weight, labels, ngrams=(1, 2), **options
    )


def smoothed(hidden, weight, labels, **options):
    nll = 0 - log_probs(hidden, weight, labels, **options)
    return losses.smoothed_token_loss(nll)


def bellman(hidden, weight, labels, **options):
    log_prob = log_probs(hidden, weight, labels, **options)
    ref = jax.lax.stop_gradient(log_prob)
    values, rewards = hidden[..., 0].astype(jnp.float32), jnp.ones(hidden.shape[0])
    steps = jnp.broadcast_to(jnp.arange(hidden.shape[1]) // 4, labels.shape)
    return losses.oreo_value_loss(values, log_prob, ref, rewards) + (
        losses.oreo_policy_loss(
            log_prob, ref, values, rewards, level="step", segment_ids=steps
        )
    )


def latent(hidden, weight, labels, **options):
    sums = log_probs(hidden, weight, labels, **options).sum(-1)
    count = sums.shape[0] // 2
    correct = jnp.arange(count) % 2 == 0
    return losses.trice_loss(sums[:count], sums[count:], correct, jnp.ones(count, bool))


COMPOSED = [edit_invariant, smoothed, bellman, latent]
every_loss = pytest.mark.parametrize("loss", COMPOSED)


def shapes_in(jaxpr: Jaxpr):
    """Of every array in a program, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield getattr(variable.aval, "shape", ())
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: isinstance(p, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr):
                parameter = parameter.jaxpr
            if isinstance(parameter, Jaxpr):
                yield from shapes_in(parameter)


def program(loss, **options):
    def total(hidden, weight, labels):
        return loss(hidden, weight, labels, **options).sum()

    operands = (
        struct((BATCH, LENGTH, FEATURES), jnp.float32),
        struct((CLASSES, FEATURES), jnp.float32),
        struct((BATCH, LENGTH), jnp.int32),
    )
    return operations.make_jaxpr(jax.value_and_grad(total, (0, 1)))(*operands)


def logits_in(jaxpr: ClosedJaxpr) -> list[tuple[int, ...]]:
    rows = BATCH * LENGTH
    shapes = [s for s in shapes_in(jaxpr.jaxpr) if CLASSES in s]
    return [s for s in shapes if math.prod(s) >= rows * CLASSES]


@every_loss
def test_no_array_of_rows_by_classes(loss):
    """Forward and backward, with the gradients of both arguments."""
    jaxpr = program(loss, vocab_chunk=CHUNK, implementation="xla")
    assert any(CHUNK in shape for shape in shapes_in(jaxpr.jaxpr))
    assert logits_in(jaxpr) == []


def test_an_array_of_rows_by_classes_would_be_found():
    assert logits_in(program(cross_entropy, implementation="reference"))


ROWS, WIDTH, MANY = 1024, 128, 256_000


def temporary(loss) -> int:
    def mean(hidden, weight, labels):
        return loss(hidden, weight, labels).mean()

    operands = (
        struct((16, 64, WIDTH), jnp.float32),
        struct((MANY, WIDTH), jnp.float32),
        struct((16, 64), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*operands).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.slow
@every_loss
def test_memory_is_that_of_cross_entropy(loss):
    """Logits would be 1 GB, a second gradient of the weight 131 MB."""
    of_cross_entropy = temporary(cross_entropy)
    allowed = 0.2 * of_cross_entropy
    if loss is edit_invariant:
        # Rows of the weight at the labels, and their gradient, with a tenth of both.
        allowed = 1.1 * 2 * ROWS * WIDTH * 4
    assert temporary(loss) < of_cross_entropy + allowed
