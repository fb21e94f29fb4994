"""Plain `jit` of arrays divided over rows, classes or features on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import losses
from softlib.testing import assert_close
from tests.oracles.cross_entropy import token_metrics
from tests.oracles.row_statistics import row_statistics

ROWS, FEATURES, CLASSES = 16, 8, 48
STATISTICS = (
    "lse",
    "label_logits",
    "mean_logit",
    "sum_logits",
    "sum_squared_logits",
    "max_logit",
    "argmax",
)
MESHES = {"line": ((8,), ("a",)), "grid": ((2, 4), ("a", "b"))}

# How rows, classes and features are divided; the mesh that it needs.
DIVISIONS = {
    "rows": ("line", "a", None, None),
    "classes": ("line", None, "a", None),
    "features": ("line", None, None, "a"),
    "rows and classes": ("grid", "a", "b", None),
    "rows and features": ("grid", "a", None, "b"),
    "classes and features": ("grid", None, "b", "a"),
    "rows over the grid": ("grid", ("a", "b"), None, None),
    "classes over the grid": ("grid", None, ("a", "b"), None),
}

pytestmark = [
    pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit]),
    pytest.mark.parametrize("division", DIVISIONS),
]


def make_mesh(division, axis_type):
    shape, names = MESHES[DIVISIONS[division][0]]
    return jax.make_mesh(shape, names, (axis_type,) * len(shape))


def place(mesh, division, vocab_axis, arrays):
    """Every array with its rows, classes and features where the division wants them."""
    _, rows, classes, features = DIVISIONS[division]
    weight = P(classes, features) if vocab_axis == 0 else P(features, classes)
    specs = {
        "hidden": P(rows, features),
        "weight": weight,
        "bias": P(classes),
        "logits": P(rows, classes),
    }
    return {
        name: jax.device_put(a, NamedSharding(mesh, specs.get(name, P(rows))))
        for name, a in arrays.items()
    }


def problem(vocab_axis):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    weight = draw(CLASSES, FEATURES)
    return {
        "hidden": draw(ROWS, FEATURES),
        "weight": weight.T if vocab_axis else weight,
        "bias": draw(CLASSES),
    }


def run(function, mesh, division, vocab_axis, arrays, others, in_context):
    """Values and gradients of `function(arrays, **others)`, from divided arrays."""

    @jax.jit
    def both(arrays, others):
        def total(arrays):
            outputs, weights = function(arrays, **others)
            return sum((weights * o).sum() for o in outputs.values()), outputs

        return jax.grad(total, has_aux=True)(arrays)

    place_all = functools.partial(place, mesh, division, vocab_axis)
    if in_context:
        with jax.set_mesh(mesh):
            return jax.device_get(both(place_all(arrays), place_all(others)))
    return jax.device_get(both(place_all(arrays), place_all(others)))


def test_linear_softmax_cross_entropy(division, axis_type):
    # Each division has both layouts, one with either kind of mesh.
    explicit = axis_type == AxisType.Explicit
    vocab_axis = (list(DIVISIONS).index(division) + explicit) % 2
    arrays = problem(vocab_axis)
    weights = np.linspace(-1, 2, ROWS, dtype=np.float32)
    labels = np.arange(ROWS) * 3 % CLASSES
    where = np.arange(ROWS) != 5
    options = {"label_smoothing": 0.1, "logsumexp_penalty": 0.01}

    def function(arrays, labels, where, weights):
        loss, lse = losses.linear_softmax_cross_entropy(
            **arrays,
            labels=labels,
            where=where,
            vocab_axis=vocab_axis,
            vocab_chunk=20,
            return_lse=True,
            **options,
        )
        return {"loss": loss, "lse": lse}, weights

    gradients, values = run(
        function,
        make_mesh(division, axis_type),
        division,
        vocab_axis,
        arrays,
        {"labels": labels, "where": where, "weights": weights},
        in_context=explicit or vocab_axis == 1,
    )
    expected = token_metrics(
        labels,
        where=where,
        vocab_axis=vocab_axis,
        cotangents={"loss": weights, "lse": weights},
        **options,
        **arrays,
    )
    for name, value in values.items():
        assert_close(value, expected.values[name], dtype=jnp.float32, length=CLASSES)
    for name, gradient in gradients.items():
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype=jnp.float32, length=CLASSES)


@pytest.mark.parametrize("source", ["linear", "logits"])
def test_row_statistics(division, axis_type, source):
    arrays = problem(0)
    if source == "logits":
        # A division of features leaves the logits whole on every device.
        logits = arrays.pop("hidden") @ arrays.pop("weight").T
        arrays["logits"] = logits
    weights = np.linspace(-1, 2, ROWS, dtype=np.float32)
    labels = np.arange(ROWS) * 3 % CLASSES
    linear = functools.partial(losses.linear_row_statistics, vocab_chunk=20)
    operation = linear if source == "linear" else losses.row_statistics

    def function(arrays, labels, weights):
        got = operation(
            **arrays, labels=labels, logit_softcap=5.0, statistics=STATISTICS
        )
        return got._asdict(), weights

    def differentiable(arrays, **others):
        outputs, weights = function(arrays, **others)
        outputs["argmax"] = outputs["argmax"].astype(jnp.float32)
        return outputs, weights

    gradients, values = run(
        differentiable,
        make_mesh(division, axis_type),
        division,
        0,
        arrays,
        {"labels": labels, "weights": weights},
        in_context=True,
    )
    expected = row_statistics(
        labels,
        cotangents=dict.fromkeys(STATISTICS[:5], weights),
        logit_softcap=5.0,
        **arrays,
    )
    for name, value in values.items():
        assert_close(value, expected.values[name], dtype=jnp.float32, length=CLASSES)
    for name, gradient in gradients.items():
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype=jnp.float32, length=CLASSES)
