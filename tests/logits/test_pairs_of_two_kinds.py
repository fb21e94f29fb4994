"""Divergences of two logits of any kinds, in both orders: oracle, edges, memory."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.logits import BlockwiseLogits, StoredLogits
from softlib.testing import assert_close
from tests.host import jnp
from tests.losses.problems import assert_agrees, precision
from tests.oracles import divergences as oracle

ROWS, CLASSES = 9, 141
NAMES = {
    "kl": losses.softmax_kl_divergence,
    "jensen_shannon": losses.softmax_jensen_shannon_divergence,
    "cross_entropy": losses.softmax_soft_target_cross_entropy,
}


class OwnHead(BlockwiseLogits):
    """A linear head, but for the library one of somebody else's."""

    of_rows, of_classes = ("hidden",), ("weight",)

    def block(self):
        return self.hidden @ self.weight.T


def source(kind, seed, dtype, **options) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Logits of arrays, these arrays, and the oracle's further arguments."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    bias, static = draw(CLASSES), {"softcap": 4.0, "scale": 0.7}
    own: dict[str, Any] = {"softcap": 4.0, "scale": 0.7, **options}
    if kind == "stored":
        make: Any = lambda bias, logits: StoredLogits(
            logits, bias=bias, softcap=4.0, scale=0.7
        )
        return make, {"bias": bias, "logits": 2 * draw(ROWS, CLASSES)}, static
    features = 3 + seed
    given = {"bias": bias, "hidden": draw(ROWS, features)}
    if kind == "columns":
        make = lambda bias, hidden, weight: softlib.LinearLogits(
            hidden, weight, bias=bias, vocab_axis=1, **own
        )
        given["weight"] = draw(features, CLASSES)
        return make, given, static | {"vocab_axis": 1}
    make = lambda bias, hidden, weight: softlib.LinearLogits(
        hidden, weight, bias=bias, **own
    )
    if kind == "own":
        make = lambda bias, hidden, weight: OwnHead(
            hidden=hidden, weight=weight, bias=bias, **own
        )
    given["weight"] = draw(CLASSES, features)
    return make, given, static


KINDS = ("linear", "columns", "stored", "own")
MIXED = [
    (a, b) for a in KINDS for b in KINDS if {a, b} & {"stored", "own"} and a != b
] + [("own", "own")]
# Every pair of kinds with one of these; each of these with several pairs.
OPTIONS = [
    ("kl", False, "float64", {}),
    ("jensen_shannon", False, "float32", {"vocab_chunk": 37, "token_chunk": 4}),
    ("cross_entropy", False, "float32", {"vocab_chunk": 64}),
    ("kl", True, "bfloat16", {"token_chunk": 5}),
]
CASES = [(*pair, *OPTIONS[i % len(OPTIONS)]) for i, pair in enumerate(MIXED)]


@pytest.mark.parametrize(
    ("own", "target", "name", "reverse", "dtype", "chunks"),
    CASES,
    ids=[f"{a}-{b}-{n}-{r}-{d}" for a, b, n, r, d, _ in CASES],
)
def test_matches_the_oracle(own, target, name, reverse, dtype, chunks):
    """Values and every gradient, with dropped rows and excluded labels."""
    with precision(dtype):
        random = np.random.default_rng(7)
        (of_own, mine, static), (of_target, others, target_static) = (
            source(kind, seed, dtype, **chunks)
            for seed, kind in enumerate((own, target))
        )
        where = jnp.asarray(random.random(ROWS) < 0.8)
        excluded = jnp.asarray(random.integers(-1, CLASSES, (ROWS, 2)))
        cotangent = jnp.asarray(random.normal(size=ROWS), jnp.float32)
        options: dict[str, Any] = {"reverse": True} if reverse else {}
        if name != "cross_entropy":
            options["excluded_labels"] = excluded
        else:
            excluded = None

        @jax.jit
        def run(mine, others):
            def total(mine, others):
                loss = NAMES[name](
                    of_own(**mine), of_target(**others), where=where, **options
                )
                return (cotangent * loss).sum(), loss

            return jax.grad(total, argnums=(0, 1), has_aux=True)(mine, others)

        gradients, value = run(mine, others)
        mixture = 0.5 if name == "jensen_shannon" else None
        wanted, d_own, d_target, _ = oracle.divergence(
            getattr(oracle, name),
            mine | static,
            others | target_static,
            mixture=mixture,
            reverse=reverse,
            excluded_labels=None if excluded is None else np.asarray(excluded),
            where=where,
            cotangent=cotangent,
        )
        length = 20 * CLASSES
        assert_agrees(value, wanted, dtype, length)
        for found, theirs in zip(gradients, (d_own, d_target), strict=True):
            for field, gradient in found.items():
                assert np.any(theirs[field])
                assert_agrees(gradient, theirs[field], dtype, length)


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


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(losses.knowledge_distillation_loss, temperature=2.0),
        losses.kl_to_reference,
    ],
)
def test_a_student_learns_from_stored_logits(loss):
    """The value and gradient are those of two arrays; the teacher has none."""
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, weight, teacher = draw(2, 5, 3), draw(70, 3), draw(2, 5, 70)

    def total(hidden, weight, teacher, *, stored):
        head = softlib.LinearLogits(hidden, weight)
        return loss(head.materialize() if stored else head, teacher).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(total, stored=s), (0, 1, 2)))(
            hidden, weight, teacher
        )
        for s in (False, True)
    )
    assert not np.any(ours[1][2])
    for found, wanted in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(found, wanted, dtype=jnp.float32, length=500)


@pytest.mark.usefixtures("untyped")
def test_bad_pairs():
    head = softlib.LinearLogits(jnp.ones((2, 3)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"`target_logits` must have 5 classes.*4\."):
        losses.softmax_kl_divergence(head, jnp.ones((2, 4)))
    arrays = jnp.ones((2, 3)), jnp.ones((5, 3))
    pinned = softlib.LinearLogits(*arrays, implementation="pallas")
    with pytest.raises(NotImplementedError, match="linear_divergence"):
        losses.softmax_kl_divergence(jnp.ones((2, 5)), pinned)
