"""Classes of the engine that stand for several: as if each stood there as often."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib import losses
from softlib.logits._sources import LinearLogits, StoredLogits
from softlib.testing import assert_close
from tests.heads import vq_cross_entropy
from tests.host import jnp
from tests.oracles import row_statistics as oracle

ROWS, FEATURES, CLASSES = 6, 3, 7
COUNTS = np.array([1, 4, 2, 0, 1, 3, 5])
NAMES = ("lse", "mean_logit", "label_logits", "sum_logits", "argmax")


def arrays(seed=0):
    random = np.random.default_rng(seed)
    return {
        "hidden": jnp.asarray(random.normal(size=(ROWS, FEATURES))),
        "weight": jnp.asarray(2 * random.normal(size=(CLASSES, FEATURES))),
        "bias": jnp.asarray(random.normal(size=CLASSES)),
        "temperature": jnp.asarray(random.uniform(0.5, 1.5, ROWS)),
    }


def source(given, log_weights, **options):
    head = LinearLogits.of("test", **given, softcap=3.0, **options)
    return head.counting(log_weights)


@pytest.mark.parametrize(
    ("implementation", "cut"),
    [
        ("xla", {"vocab_chunk": 3}),
        ("xla", {"vocab_chunk": 3, "token_chunk": 2}),
        ("reference", {}),
    ],
)
def test_statistics_and_gradients_are_those_of_repeated_classes(implementation, cut):
    with jax.enable_x64():
        given = arrays()
        labels = np.arange(ROWS) % CLASSES
        random = np.random.default_rng(1)
        cotangents = {n: random.normal(size=ROWS) for n in NAMES[:3]}
        cotangents["sum_logits"] = np.zeros(ROWS)  # of each class once: not compared

        @jax.jit
        def run(given, log_weights):
            def statistics(given):
                options = {"implementation": implementation, **cut}
                found = source(given, log_weights, **options)
                found = found.statistics(NAMES[:4], jnp.asarray(labels))
                return {n: getattr(found, n) for n in NAMES[:4]}

            found, pull = jax.vjp(statistics, given)
            return found, pull({n: jnp.asarray(c) for n, c in cotangents.items()})[0]

        with np.errstate(divide="ignore"):
            found, gradients = run(given, jnp.asarray(np.log(COUNTS)))
        # The label's own column is one more, at the end, that nothing selects.
        columns = np.concatenate([np.repeat(np.arange(CLASSES), COUNTS), labels])
        chosen = np.arange(len(columns)) < COUNTS.sum()
        repeated = {n: np.asarray(a) for n, a in given.items()}
        repeated |= {n: repeated[n][columns] for n in ("weight", "bias")}
        wanted = oracle.row_statistics(
            COUNTS.sum() + np.arange(ROWS),
            chosen,
            cotangents=cotangents,
            softcap=3.0,
            **repeated,
        )
        for name in NAMES[:3]:
            assert_close(found[name], wanted.values[name], dtype="float64", length=20)
        for name, gradient in gradients.items():
            expected = wanted.gradients[name]
            if name in ("weight", "bias"):
                total = np.zeros(gradient.shape)
                np.add.at(total, columns, expected)
                expected = total
            assert_close(gradient, expected, dtype="float64", length=60)


@pytest.mark.parametrize("name", ["lse", "mean_logit"])
@pytest.mark.parametrize("implementation", ["xla", "reference", "logits"])
def test_gradient_of_the_log_weights(name, implementation):
    with jax.enable_x64():
        given, log_weights = arrays(), jnp.linspace(-1.0, 1.0, CLASSES)

        @jax.jit
        def total(log_weights):
            if implementation == "logits":
                logits = given["hidden"] @ given["weight"].T
                head = StoredLogits.of("test", logits)
                modifiers = head.modifiers._replace(class_log_weights=log_weights)
                head = head.replaced(modifiers=modifiers)
            else:
                options = {"implementation": implementation, "vocab_chunk": 3}
                head = source(given, log_weights, **options)
            return getattr(head.statistics((name,)), name).sum()

        found = jax.jit(jax.grad(total))(log_weights)
        step = 1e-6
        for j in range(CLASSES):
            up, down = (total(log_weights.at[j].add(s)) for s in (step, -step))
            np.testing.assert_allclose(found[j], (up - down) / (2 * step), atol=1e-8)


def test_other_statistics_see_each_class_once():
    given: Any = {n: jnp.float32(a) for n, a in arrays().items()}
    names = ("label_logits", "sum_logits", "max_logit", "argmax", "label_rank")
    labels = jnp.arange(ROWS) % CLASSES
    bare = LinearLogits.of("test", **given, vocab_chunk=3)
    weighted = bare.counting(jnp.linspace(-3.0, 3.0, CLASSES))
    for a, b in zip(
        jax.tree.leaves(bare.statistics(names, labels)),
        jax.tree.leaves(weighted.statistics(names, labels)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_kernels_refuse_weights_of_classes():
    """Of a head that they would take otherwise, and by name in words."""
    struct = jax.ShapeDtypeStruct
    head = struct((1024, 512), jnp.float32), struct((32_768, 512), jnp.float32)
    labels, mapping = struct((1024,), jnp.int32), struct((131_072,), jnp.int32)
    options = {"implementation": "pallas_tpu"}

    def reason(loss, *operands):
        with pytest.raises(NotImplementedError) as raised:
            jax.eval_shape(lambda *a: loss(*a, **options), *operands)
        return str(raised.value)

    refused = reason(vq_cross_entropy, *head, mapping, labels)
    assert "it counts every class once (class_log_weights)" in refused
    taken = lambda *a: losses.linear_softmax_cross_entropy(*a, **options)
    assert jax.eval_shape(taken, *head, labels).shape == (1024,)
