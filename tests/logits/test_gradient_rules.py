"""The derivative rules of the engine by themselves, and what reaches their products."""

from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib.logits._engine import head as heads, operations, stream
from softlib.logits._engine.tile import Modifiers, Options, RowStatistics
from softlib.logits._engine.tile_gradient import RowCotangents
from tests.host import jnp

ROWS, FEATURES, CLASSES = 6, 3, 7
STATISTICS = (
    "lse",
    "label_logits",
    "mean_logit",
    "sum_logits",
    "sum_squared_logits",
    "sum_softplus",
)


def modifiers(which: str) -> Any:
    draw: Any = np.random.default_rng(3)
    if which == "none":
        return Modifiers(None, None, None, None)
    where = np.arange(CLASSES) != 2
    weights = draw.normal(size=CLASSES)
    if which == "of rows":
        scale, temperature = draw.uniform(0.5, 1.5, (2, ROWS))
        return Modifiers(draw.normal(size=CLASSES), scale, temperature, where, weights)
    if which == "temperature":  # alone: its gradient follows from that of hidden
        return Modifiers(None, None, draw.uniform(0.5, 1.5, ROWS), None, None)
    numbers: Any = map(np.asarray, (0.7, 1.3))
    return Modifiers(None, next(numbers), next(numbers), where, None)


CASES = pytest.mark.parametrize(
    ("which", "exclude"),
    [
        ("none", False),
        ("temperature", False),
        ("of rows", True),
        ("scalars", False),
    ],
)


@CASES
def test_rules_of_a_head_agree(which, exclude):
    """Where a gradient of the weight exists already, too."""
    check("head", which, exclude)


@CASES
def test_rules_of_an_array_agree(which, exclude):
    check("array", which, exclude)


def check(source, which, exclude):
    """The rule that differentiates the definition, and the one of the stream."""
    draw = np.random.default_rng(0)
    normal: Any = lambda *shape: draw.normal(size=shape)
    hidden, weight = normal(ROWS, FEATURES), normal(CLASSES, FEATURES)
    labels = jnp.array([[0, 3], [6, 6], [1, -1], [-1, -1], [2, 5], [4, 0]])
    cotangents = RowStatistics(
        **{n: normal(ROWS) for n in STATISTICS if n != "label_logits"},
        label_logits=normal(ROWS, 2),
    )
    cap = None if which in ("none", "temperature") else 2.0
    options = Options(STATISTICS, cap, vocab_chunk=3, exclude_labels=exclude)

    @jax.jit
    def run(hidden, weight, further, given, cotangents):
        if source == "head":
            head = heads.Head(hidden, weight, labels, given)
            found = stream.forward(options, head)
            rows = RowCotangents(found.lse, found.mean_logit, cotangents)
            of_head = stream.BackwardOperands(head, rows, None, further)
            return (
                operations._linear_gradient_reference(options, of_head),
                stream.backward(options, of_head),
            )
        stored = operations.Given(hidden @ weight.T, labels, given)
        found = operations._given_forward_xla(options, stored)
        rows = RowCotangents(found.lse, found.mean_logit, cotangents)
        of_array = stream.BackwardOperands(stored, rows)
        return (
            operations._given_gradient_reference(options, of_array),
            operations._given_gradient_xla(options, of_array),
        )

    with jax.enable_x64():
        given = modifiers(which)
        arrays = jax.tree.map(jnp.asarray, (hidden, weight, weight**2, given))
        one, other = jax.device_get(run(*arrays, jax.tree.map(jnp.asarray, cotangents)))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
    assert np.abs(one[0]).max() > 0.1


@pytest.mark.parametrize("what", ["loss", "top", "attention"])
def test_the_precision_reaches_every_matrix_product(what):
    hidden = jnp.linspace(-1, 1, 15).reshape(5, 3)
    weight = jnp.linspace(1, 2, 21).reshape(7, 3)
    labels = jnp.arange(5)
    options: Any = {"precision": "highest"}

    def call(hidden, weight):
        if what == "attention":
            x, y = hidden[None, :, None], weight[None, :, None]
            return softlib.attention.dot_product_attention(x, y, y, **options).sum()
        logits = softlib.LinearLogits(hidden, weight, vocab_chunk=3, **options)
        if what == "top":
            return softlib.logits.top_k(logits, k=2)[0].sum()
        return softlib.losses.softmax_cross_entropy(logits, labels).sum()

    for function in (call,) if what == "top" else (call, jax.grad(call, (0, 1))):
        text = jax.jit(function).lower(hidden, weight).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products
        assert all("HIGHEST" in line for line in products)
