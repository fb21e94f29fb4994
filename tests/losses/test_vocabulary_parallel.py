"""A vocabulary divided over devices gives the numbers and gradients of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import losses
from softlib.losses import RowStatistics
from softlib.testing import assert_close

ROWS, FEATURES, CLASSES = (4, 8), 16, 48
ROW, CLASS = P("data"), P("classes")
METRICS = ("loss", "log_prob", "entropy", "correct", "lse")


def arguments(dtype="float32"):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    labels = jnp.asarray(rng.integers(0, CLASSES, ROWS), jnp.int32)
    return {
        "hidden": array(*ROWS, FEATURES),
        "weight": array(CLASSES, FEATURES),
        "bias": array(CLASSES),
        "temperature": jnp.exp(array(*ROWS)),
        "labels": labels.at[0, 0].set(-100),
        # The first device of the axis has no class of its own.
        "class_where": jnp.arange(CLASSES) >= CLASSES // 4,
    }


SPECS = {
    "hidden": ROW,
    "weight": CLASS,
    "bias": CLASS,
    "temperature": ROW,
    "labels": ROW,
    "class_where": CLASS,
}
FLOATING = ("hidden", "weight", "bias", "temperature")


def metrics(axis_name=None, vocab_axis=0, **operands):
    """Every number per token, with every option that looks at single classes."""
    if vocab_axis == 1:
        operands["weight"] = operands["weight"].T
    found = losses.linear_token_metrics(
        **operands,
        vocab_axis=vocab_axis,
        where=operands["labels"] >= 0,
        label_smoothing=0.1,
        logsumexp_penalty=0.01,
        vocab_chunk=5,
        metrics=METRICS,
        axis_name=axis_name,
    )
    assert found.loss is not None
    assert found.log_prob is not None
    # A label on an excluded class costs infinity, on one device or on many.
    excluded = jnp.isinf(found.loss)
    return found._replace(
        loss=jnp.where(excluded, 99, found.loss),
        log_prob=jnp.where(excluded, 99, found.log_prob),
    )


def divided(function, mesh, check_vma):
    """`function` of keywords under shard_map, compiled, with its gradients."""
    mapped = jax.shard_map(
        lambda operands: function(axis_name="classes", **operands),
        mesh=mesh,
        in_specs=(SPECS,),
        out_specs=ROW,
        check_vma=check_vma,
    )

    def call(operands):
        with jax.set_mesh(mesh):
            placed = {
                name: jax.device_put(array, NamedSharding(mesh, SPECS[name]))
                for name, array in operands.items()
            }
            return jax.device_get(jax.jit(with_gradients(mapped))(placed))

    return call


def with_gradients(function):
    def call(operands):
        def total(floating):
            found = function({**operands, **floating})
            leaves = [x for x in jax.tree.leaves(found) if x.dtype != bool]
            # Different weights, so that no error in one number hides another.
            return sum(((i + 1) * leaf**2).sum() for i, leaf in enumerate(leaves))

        floating = {name: operands[name] for name in FLOATING}
        return function(operands), jax.grad(total)(floating)

    return call


MESHES = list(
    itertools.product(((2, 4), (1, 8)), ("Auto", "Explicit"), (True, False), (0, 1))
)
# Every pair of values; the full product is slow to compile.
PAIRS = [
    ((2, 4), "Auto", True, 0),
    ((2, 4), "Explicit", False, 1),
    ((1, 8), "Auto", False, 0),
    ((1, 8), "Explicit", True, 1),
]


@pytest.mark.parametrize(
    ("shape", "kind", "check_vma", "vocab_axis"),
    [
        pytest.param(*case, marks=() if case in PAIRS else pytest.mark.slow)
        for case in MESHES
    ],
)
def test_metrics_and_gradients_equal_one_device(shape, kind, check_vma, vocab_axis):
    function = functools.partial(metrics, vocab_axis=vocab_axis)
    kinds = (getattr(AxisType, kind),) * 2
    mesh = jax.make_mesh(shape, ("data", "classes"), axis_types=kinds)
    actual = divided(function, mesh, check_vma)(arguments())
    one = with_gradients(lambda operands: function(**operands))
    expected = jax.jit(one)(arguments())
    for found, wanted in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert_close(found, np.asarray(wanted), dtype=jnp.float32, length=CLASSES)


def test_all_statistics_in_float64():
    names = RowStatistics._fields

    def statistics(axis_name=None, **operands):
        return losses.linear_row_statistics(
            **operands, statistics=names, logit_softcap=3.0, axis_name=axis_name
        )

    with jax.enable_x64():
        mesh = jax.make_mesh((2, 4), ("data", "classes"))
        actual = divided(statistics, mesh, True)(arguments("float64"))
        one = with_gradients(lambda operands: statistics(**operands))
        expected = jax.jit(one)(arguments("float64"))
    for found, wanted in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert_close(found, np.asarray(wanted), dtype=jnp.float64, length=CLASSES)


def test_ties_of_the_maximum_go_to_the_lowest_class_of_all():
    mesh = jax.make_mesh((1, 8), ("data", "classes"))
    operands = arguments()
    operands["weight"] = jnp.zeros_like(operands["weight"])
    operands["bias"] = jnp.zeros(CLASSES).at[0].set(-1)
    operands["class_where"] = jnp.ones(CLASSES, bool)

    def best(axis_name=None, **operands):
        return losses.linear_row_statistics(
            **operands, statistics=("argmax",), axis_name=axis_name
        ).argmax

    mapped = jax.shard_map(
        lambda operands: best("classes", **operands),
        mesh=mesh,
        in_specs=(SPECS,),
        out_specs=ROW,
    )
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(array, NamedSharding(mesh, SPECS[name]))
            for name, array in operands.items()
        }
        actual = jax.device_get(jax.jit(mapped)(placed))
    np.testing.assert_array_equal(actual, best(**operands))
    np.testing.assert_array_equal(actual, 1)


def test_no_class_selected_on_any_device():
    mesh = jax.make_mesh((2, 4), ("data", "classes"))
    operands = arguments()
    operands["class_where"] = jnp.zeros(CLASSES, bool)
    found, gradient = divided(metrics, mesh, True)(operands)
    where = np.asarray(operands["labels"]) >= 0
    np.testing.assert_array_equal(found.loss, 0)
    np.testing.assert_array_equal(found.lse, np.where(where, -np.inf, 0))
    without_lse = lambda **operands: metrics(**operands)._replace(lse=None)
    _, gradient = divided(without_lse, mesh, True)(operands)
    for leaf in gradient.values():
        np.testing.assert_array_equal(leaf, 0)


def test_memory_of_a_device_is_its_share_of_the_vocabulary():
    rows, features, classes = 512, 128, 65536
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))

    def loss(hidden, weight, labels):
        cross_entropy = losses.linear_softmax_cross_entropy
        return cross_entropy(hidden, weight, labels, axis_name="classes")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(P(), CLASS, P()), out_specs=P())
    total = lambda *operands: mapped(*operands).mean()
    struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    operands = (
        struct((rows, features), jnp.float32, P()),
        struct((classes, features), jnp.float32, CLASS),
        struct((rows,), jnp.int32, P()),
    )
    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*operands).compile()
    memory = program.memory_analysis()
    assert memory is not None
    own = 4 * classes * features // 8
    assert memory.output_size_in_bytes < 1.1 * (own + 4 * rows * features)
    assert memory.temp_size_in_bytes < 4 * rows * classes // 8  # no logits either
    assert "all-gather" not in (program.as_text() or "")


@pytest.mark.usefixtures("untyped")
def test_an_unknown_axis_is_named():
    operands = arguments()
    with pytest.raises(ValueError, match=r"`axis_name` must name an axis.*got 'model'"):
        losses.linear_entropy(operands["hidden"], operands["weight"], axis_name="model")
