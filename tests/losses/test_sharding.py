"""Plain `jit` of arrays divided over rows, classes or features on eight devices."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import losses
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.oracles.cross_entropy import token_metrics
from tests.oracles.row_statistics import row_statistics

ROWS, FEATURES, CLASSES = 16, 8, 48
STATISTICS = (
    "lse",
    "label_logits",
    "mean_logit",
    "sum_logits",
    "sum_squared_logits",
    "sum_softplus",
    "max_logit",
    "argmax",
)
MESHES = {"line": ((8,), ("a",)), "grid": ((2, 4), ("a", "b"))}

# How rows, classes and features are divided; the mesh that it needs. Where a fourth
# axis is given, features are divided differently in hidden.
DIVISIONS = {
    "rows": ("line", "a", None, None),
    "classes": ("line", None, "a", None),
    "features": ("line", None, None, "a"),
    "rows and classes": ("grid", "a", "b", None),
    "rows and features": ("grid", "a", None, "b"),
    "classes and features": ("grid", None, "b", "a"),
    "rows over the grid": ("grid", ("a", "b"), None, None),
    "classes over the grid": ("grid", None, ("a", "b"), None),
    # One axis divides the rows, and the weight at rest (fully sharded training).
    "rows, and weight by classes": ("line", "a", "a", None),
    "rows, and weight by features": ("line", "a", None, "a", None),
    "rows and weight by features over the grid": ("grid", "a", "b", "a", None),
}

# Logits have rows and classes only.
OF_LOGITS = (
    "rows",
    "classes",
    "rows and classes",
    "rows over the grid",
    "classes over the grid",
)

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
either_mesh = pytest.mark.parametrize("axis_type", AXIS_TYPES)
# The statistics meet each division with one kind of mesh, the loss with both.
STATISTICS_CASES = [
    pytest.param(
        source,
        division,
        axis_type,
        marks=pytest.mark.slow if (i + j) % 2 else (),
    )
    for source, divisions in (("linear", DIVISIONS), ("logits", OF_LOGITS))
    for i, division in enumerate(divisions)
    for j, axis_type in enumerate(AXIS_TYPES)
]


def make_mesh(division, axis_type):
    shape, names = MESHES[DIVISIONS[division][0]]
    return jax.make_mesh(shape, names, (axis_type,) * len(shape))


def place(mesh, division, vocab_axis, arrays):
    """Every array with its rows, classes and features where the division wants them."""
    _, rows, classes, features, *of_hidden = DIVISIONS[division]
    weight = P(classes, features) if vocab_axis == 0 else P(features, classes)
    specs = {
        "hidden": P(rows, of_hidden[0] if of_hidden else features),
        "weight": weight,
        "bias": P(classes),
        "scale": P(),
        "class_where": P(classes),
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
        "scale": np.float32(0.7),
        "temperature": random.uniform(1, 2, ROWS).astype(np.float32),
    }


def assert_equal(actual, expected):
    """To 1e-6, where `expected` has the exact numbers."""
    expected = np.asarray(expected, np.float64)
    bound = 1e-6 * max(1, np.max(np.abs(expected)))
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=bound
    )


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


@either_mesh
@pytest.mark.parametrize("division", DIVISIONS)
def test_linear_softmax_cross_entropy(division, axis_type):
    # Each division has both layouts, one with either kind of mesh.
    explicit = axis_type == AxisType.Explicit
    vocab_axis = (list(DIVISIONS).index(division) + explicit) % 2
    arrays = problem(vocab_axis)
    weights = np.linspace(-1, 2, ROWS, dtype=np.float32)
    labels = np.arange(ROWS) * 3
    where = np.arange(ROWS) != 5
    class_where = np.arange(CLASSES) % 9 != 4  # no label is excluded
    options = {"label_smoothing": 0.1, "logsumexp_penalty": 0.01}

    def function(arrays, labels, where, class_where, weights):
        loss, lse = losses.linear_softmax_cross_entropy(
            **arrays,
            labels=labels,
            where=where,
            class_where=class_where,
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
        {
            "labels": labels,
            "where": where,
            "class_where": class_where,
            "weights": weights,
        },
        in_context=explicit or vocab_axis == 1,
    )
    expected = token_metrics(
        labels,
        where=where,
        class_where=class_where,
        vocab_axis=vocab_axis,
        cotangents={"loss": weights, "lse": weights},
        **options,
        **arrays,
    )
    for name, value in values.items():
        assert_equal(value, expected.values[name])
    for name, gradient in gradients.items():
        assert_equal(gradient, expected.gradients[name])


@pytest.mark.parametrize(("source", "division", "axis_type"), STATISTICS_CASES)
def test_row_statistics(source, division, axis_type):
    arrays = problem(0)
    logits = arrays["hidden"] @ arrays["weight"].T
    # Classes in the order of the final logits.
    order = arrays["scale"] * logits + arrays["bias"]
    if source == "logits":
        del arrays["hidden"], arrays["weight"]
        arrays["logits"] = logits
    weights = np.linspace(-1, 2, ROWS, dtype=np.float32)
    labels = np.arange(ROWS) * 3
    linear = functools.partial(of_head.row_statistics, vocab_chunk=20)
    operation = linear if source == "linear" else of_stored.row_statistics

    def function(arrays, labels, weights):
        found = operation(
            **arrays,
            labels=labels,
            softcap=5.0,
            statistics=(*STATISTICS, "label_rank"),
        )._asdict()
        return {name: leaf.astype(jnp.float32) for name, leaf in found.items()}, weights

    gradients, values = run(
        function,
        make_mesh(division, axis_type),
        division,
        0,
        arrays,
        {"labels": labels, "weights": weights},
        in_context=True,
    )
    expected = row_statistics(
        labels,
        cotangents=dict.fromkeys(STATISTICS[:6], weights),
        softcap=5.0,
        **arrays,
    )
    for name in STATISTICS:
        assert_equal(values[name], expected.values[name])
    assert_equal(
        values["label_rank"], (order > order[range(ROWS), labels, None]).sum(1)
    )
    for name, gradient in gradients.items():
        assert_equal(gradient, expected.gradients[name])


@either_mesh
def test_a_weight_divided_over_features_is_gathered_slice_by_slice(axis_type):
    rows, features, classes = 512, 128, 65536
    mesh = jax.make_mesh((8,), ("a",), (axis_type,))
    struct = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    operands = (
        struct((rows, features), jnp.float32, "a", None),
        struct((classes, features), jnp.float32, None, "a"),
        struct((rows,), jnp.int32, "a"),
    )
    loss = lambda *operands: losses.linear_softmax_cross_entropy(*operands).mean()
    gradient = jax.jit(
        jax.grad(loss, argnums=(0, 1)),
        out_shardings=tuple(operand.sharding for operand in operands[:2]),
    )
    with jax.set_mesh(mesh):
        program = gradient.lower(*operands).compile()
    memory = program.memory_analysis()
    assert memory is not None
    weight = 4 * classes * features
    assert memory.argument_size_in_bytes < weight // 8 + 4 * rows * features
    assert memory.output_size_in_bytes < weight // 8 + 4 * rows * features
    assert memory.temp_size_in_bytes < weight // 3
    gathered = re.findall(
        r"f32\[(\d+),(\d+)\]\S* all-gather\(", program.as_text() or ""
    )
    assert gathered
    assert max(int(a) * int(b) for a, b in gathered) <= classes * features // 8
