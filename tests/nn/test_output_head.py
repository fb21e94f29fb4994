"""Output heads: loss and logits by one definition, tied and untied, NNX and linen."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

import softlib
from softlib import masked_mean
from softlib.nn import LinenOutputHead, OutputHead
from tests.compiled import losses
from tests.host import jnp

FEATURES, CLASSES = 6, 37
cross_entropy = losses.softmax_cross_entropy


def batch(seed=0):
    hidden = jax.random.normal(jax.random.key(seed), (2, 5, FEATURES))
    labels = jax.random.randint(jax.random.key(seed + 1), (2, 5), 0, CLASSES)
    return hidden, labels


def next_token_loss(logits, tokens):
    return cross_entropy(logits[:, :-1], tokens[:, 1:]).mean()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}])
def test_loss_is_the_cross_entropy_of_the_logits(tied, options):
    rngs = nnx.Rngs(0)
    embed = nnx.Embed(CLASSES, FEATURES, rngs=rngs) if tied else None
    head = OutputHead(
        FEATURES, CLASSES, embedding=embed, use_bias=True, rngs=rngs, **options
    )
    assert head.bias is not None
    head.bias[...] = jnp.linspace(-1, 1, CLASSES)
    hidden, labels = batch()

    @nnx.jit
    def everything(head, hidden, labels):
        logits = head(hidden)
        loss = softlib.losses.softmax_cross_entropy(logits, labels)
        metrics = softlib.logits.token_metrics(logits, labels)
        return logits.materialize(), loss, metrics

    logits, loss, metrics = everything(head, hidden, labels)
    assert logits.shape == (2, 5, CLASSES)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_array_equal(metrics.correct, logits.argmax(-1) == labels)


def test_tied_head_owns_no_table_and_adds_to_the_embedding_gradient():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(CLASSES, FEATURES, rngs=rngs)
            self.head = OutputHead(FEATURES, CLASSES, embedding=self.embed)

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    model = Model(nnx.Rngs(0))
    table = model.embed.embedding[...]
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == (
        table.size
    )
    tokens = jnp.arange(12).reshape(2, 6)
    gradient = nnx.grad(lambda model: next_token_loss(model(tokens), tokens))(model)

    def plain(table):
        logits = table[tokens[:, :-1]] @ table.T
        loss = optax.softmax_cross_entropy_with_integer_labels
        return loss(logits, tokens[:, 1:]).mean()

    (found,) = jax.tree.leaves(gradient)
    np.testing.assert_allclose(found, jax.grad(plain)(table), atol=1e-5)


def test_options_of_the_call_reach_the_logits():
    head = OutputHead(FEATURES, CLASSES, rngs=nnx.Rngs(0))
    hidden, labels = batch()
    exists = jnp.arange(CLASSES) != 3
    logits = head(hidden, temperature=2.0, class_where=exists, vocab_chunk=16)
    assert head.kernel is not None
    expected = losses.linear_softmax_cross_entropy(
        hidden, head.kernel[...], labels, temperature=2.0, class_where=exists
    )
    found = losses.softmax_cross_entropy(logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_training_under_nnx_jit_lowers_the_loss():
    head = OutputHead(FEATURES, CLASSES, use_bias=True, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(head, optax.adam(0.1), wrt=nnx.Param)
    hidden, labels = batch()

    @nnx.jit
    def step(head, optimizer):
        loss = lambda head: masked_mean(cross_entropy(head(hidden), labels))
        value, gradient = nnx.value_and_grad(loss)(head)
        optimizer.update(head, gradient)
        return value

    values = [float(step(head, optimizer)) for _ in range(20)]
    assert values[-1] < 0.5 * values[0]


def test_dtype_is_that_of_the_products_and_gradients_have_the_parameters_dtype():
    head = OutputHead(FEATURES, CLASSES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    hidden, labels = batch()
    loss = cross_entropy(head(hidden), labels)
    assert loss.dtype == jnp.float32
    assert head.kernel is not None
    cast = (hidden.astype(jnp.bfloat16), head.kernel[...].astype(jnp.bfloat16))
    expected = losses.linear_softmax_cross_entropy(*cast, labels)
    np.testing.assert_array_equal(loss, expected)
    of = lambda head: cross_entropy(head(hidden), labels).mean()
    gradient = nnx.grad(of)(head)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_errors_say_what_is_missing():
    embed = nnx.Embed(5, FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"`embedding`.*\(37, 6\).*got \(5, 6\)"):
        OutputHead(FEATURES, CLASSES, embedding=embed)
    with pytest.raises(ValueError, match="`rngs` must be given"):
        OutputHead(FEATURES, CLASSES)
    embed = linen.Embed(5, FEATURES)
    with pytest.raises(ValueError, match=r"`embedding`.*got \(5, 6\)"):
        LinenOutputHead(FEATURES, CLASSES, embedding=embed).init(
            jax.random.key(0), batch()[0]
        )


# -------------------------------------------------------------------------------- linen
def test_linen_loss_is_the_cross_entropy_of_the_logits():
    head = LinenOutputHead(FEATURES, CLASSES, use_bias=True, softcap=4.0)
    hidden, labels = batch()
    variables = head.init(jax.random.key(0), hidden)
    assert set(variables["params"]) == {"kernel", "bias"}
    logits: Any = head.apply(variables, hidden)
    array = logits.materialize()
    expected = optax.softmax_cross_entropy_with_integer_labels(array, labels)
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, atol=1e-5)
    metrics = softlib.logits.token_metrics(logits, labels)
    np.testing.assert_array_equal(metrics.correct, array.argmax(-1) == labels)


def test_linen_head_shares_the_embedding_of_its_model():
    class Model(linen.Module):
        def setup(self):
            self.embed = linen.Embed(CLASSES, FEATURES)
            self.head = LinenOutputHead(FEATURES, CLASSES, embedding=self.embed)

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    model = Model()
    tokens = jnp.arange(12).reshape(2, 6)
    variables = model.init(jax.random.key(0), tokens)
    leaves = jax.tree.leaves(variables)
    assert [leaf.shape for leaf in leaves] == [(CLASSES, FEATURES)]
    loss = lambda variables: next_token_loss(model.apply(variables, tokens), tokens)
    gradient = jax.grad(loss)(variables)

    def plain(table):
        logits = table[tokens[:, :-1]] @ table.T
        loss = optax.softmax_cross_entropy_with_integer_labels
        return loss(logits, tokens[:, 1:]).mean()

    (found,) = jax.tree.leaves(gradient)
    np.testing.assert_allclose(found, jax.grad(plain)(leaves[0]), atol=1e-5)
