"""A vocabulary divided over devices gives the numbers and gradients of one device."""

import functools
import inspect
import itertools
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import softlib
from softlib.logits import RowStatistics
from softlib.testing import assert_close
from tests.compiled import losses, of_head
from tests.heads import function_of, logits_of
from tests.host import jnp
from tests.losses.divided import (
    CLASSES,
    FLOATING,
    OPERANDS,
    assert_equal,
    check,
    metrics,
    one_device,
    place,
    problem,
    specs,
    vocabulary_parallel,
    with_gradients,
)

WHERE = specs("data", "classes")
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


def grid(*shape, kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    names = ("data", "classes")[-len(shape) :]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


@pytest.mark.parametrize(
    ("shape", "kind", "check_vma", "vocab_axis"),
    [
        pytest.param(*case, marks=() if case in PAIRS else pytest.mark.slow)
        for case in MESHES
    ],
)
def test_metrics_and_gradients_equal_one_device(shape, kind, check_vma, vocab_axis):
    mesh = grid(*shape, kind=getattr(AxisType, kind))
    where = specs("data", "classes", vocab_axis=vocab_axis)
    function = vocabulary_parallel(mesh, where, check_vma, vocab_axis)
    gradients = check(mesh, where, function, vocab_axis)
    # The gradient of a class lies where the class lies.
    for name in ("weight", "bias"):
        expected = NamedSharding(mesh, where[name])
        actual = gradients[name].sharding
        assert actual.is_equivalent_to(expected, gradients[name].ndim)


@pytest.mark.usefixtures("eager")
def test_without_jit():
    """What `shard_map` cannot do of the derivative rules, it cannot do here."""
    hidden, weight = jnp.ones((2, 3)), jnp.eye(8, 3)
    labels = jnp.array([0, 7])
    mesh = jax.make_mesh((8,), ("classes",), (AxisType.Auto,))
    specs = (P(), P("classes"), P())
    own = functools.partial(losses.linear_softmax_cross_entropy, axis_name="classes")
    divided = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P())
    wanted = losses.linear_softmax_cross_entropy(hidden, weight, labels)
    assert_close(divided(hidden, weight, labels), wanted, dtype=jnp.float32, length=8)


def test_several_axes_of_the_mesh_hold_the_vocabulary():
    mesh, axes = grid(2, 4), ("data", "classes")
    where = specs(None, axes)
    check(mesh, where, vocabulary_parallel(mesh, where, True, axes=(None, axes)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_features_divided_at_rest_are_gathered_for_the_loss(check_vma):
    mesh = grid(2, 4)
    where = {**WHERE, "weight": P("classes", "data")}

    def gathered(operands):
        weight = lax.all_gather(operands["weight"], "data", axis=1, tiled=True)
        return metrics({**operands, "weight": weight}, "classes")

    function = jax.shard_map(
        gathered,
        mesh=mesh,
        in_specs=({name: where[name] for name in OPERANDS},),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    check(mesh, where, function)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_taken_inside_shard_map(check_vma):
    mesh = grid(2, 4)

    def inside(arrays):
        values, gradients = with_gradients(
            functools.partial(metrics, axis_name="classes")
        )(arrays)
        if not check_vma:
            # Nobody knows that the four devices of "classes" have one loss: each counts
            # its own, and the sums over devices are the caller's.
            for name, gradient in gradients.items():
                elsewhere = {"data", "classes"} - set(WHERE[name])
                total = lax.psum(gradient, tuple(sorted(elsewhere)))
                gradients[name] = total / lax.axis_size("classes")
        return values, gradients

    function = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(WHERE,),
        out_specs=(P("data"), {name: WHERE[name] for name in FLOATING}),
        check_vma=check_vma,
    )
    actual = jax.jit(function)(place(mesh, WHERE, problem()))
    for found, expected in zip(actual, one_device(), strict=True):
        assert_equal(found, expected)


def mapped(function, mesh):
    """`function(axis_name=..., **operands)` of the divided operands, compiled."""
    where = {name: WHERE[name] for name in OPERANDS}
    return jax.jit(
        jax.shard_map(
            lambda operands: function(axis_name="classes", **operands),
            mesh=mesh,
            in_specs=(where,),
            out_specs=P("data"),
        )
    )


def operands_of(dtype="float32"):
    arrays = problem()
    del arrays["cotangents"]
    return {
        name: jnp.asarray(a, dtype if name in FLOATING else None)
        for name, a in arrays.items()
    }


# The functions of logits whose arguments are not (logits, labels); `other` are further
# logits over the same classes.
CALLS: dict[str, Any] = {
    "entropy": lambda f, z, y, other: f(z),
    "logsumexp": lambda f, z, y, other: f(z),
    "moments": lambda f, z, y, other: f(z),
    "row_statistics": lambda f, z, y, other: f(z, statistics=("lse", "sum_logits")),
    "gather": lambda f, z, y, other: f(z, jnp.stack([y, (y + 17) % CLASSES], -1)),
    "multi_label_cross_entropy": lambda f, z, y, other: f(
        z, jnp.stack([y, (y + 17) % CLASSES], -1)
    ),
    "decoupled_softmax_loss": lambda f, z, y, other: f(z, y[..., None]),
    "one_versus_all_loss": lambda f, z, y, other: f(z, y[..., None]),
    "top_k": lambda f, z, y, other: f(z, k=3),
    "greedy_nll": lambda f, z, y, other: f(z),
    "sequence_entropy": lambda f, z, y, other: f(z),
    "log_ratio_codes": lambda f, z, y, other: f(z, jnp.arange(5) * 9),
    "two_model_test": lambda f, z, y, other: f(z, other, y),
    "z_loss": lambda f, z, y, other: f(z, y, a=1.0, b=2.0),
    "optimal_temperature": lambda f, z, y, other: f(
        z, rho=0.5, temperature_min=0.1, temperature_max=5.0
    ),
    "robust_softmax_cross_entropy": lambda f, z, y, other: f(
        z, y, temperature=1 + z.hidden[..., 0] ** 2, rho=0.5
    ),
    "sdm_loss": lambda f, z, y, other: f(z, y, y % 5, 0.2 + y / CLASSES),
    "normalized_distillation_loss": lambda f, z, y, other: f(z, other, y),
    "decoupled_knowledge_distillation_loss": lambda f, z, y, other: f(z, other, y),
}
TWO_HEADS = {
    "kl_to_reference",
    "knowledge_distillation_loss",
    "softmax_jensen_shannon_divergence",
    "softmax_kl_divergence",
    "softmax_soft_target_cross_entropy",
}
CALLS |= dict.fromkeys(TWO_HEADS, lambda f, z, y, other: f(z, other))
ELSEWHERE = {
    "bi_tempered_logistic_loss",  # of whole rows
    "entmax_loss",  # of whole rows
    "labelled_rows",  # of which losses are made
    "sample",  # tests/logits/test_sample.py
    "smooth_adversarial_comp_sum_loss",  # of whole rows
    "soft_top_k_loss",  # of whole rows
    "softmax_cross_entropy_sum",  # refuses a divided vocabulary
    "sparsemax_loss",  # of whole rows
    "stablemax_cross_entropy",  # of whole rows
}
PACKAGES = (softlib.losses, softlib.logits, softlib.scoring)
EVERY = sorted(
    name
    for package in PACKAGES
    for name in {*package.__all__} - ELSEWHERE
    if inspect.isfunction(getattr(package, name)) and logits_of(getattr(package, name))
)


def of_losses(names, hidden, weight, labels, axis_name=None):
    """The results of the functions, by the names of these."""
    head = functools.partial(softlib.LinearLogits, axis_name=axis_name)
    logits, other = head(hidden, weight), head(hidden[..., ::-1], weight)
    call = lambda name: CALLS.get(name, lambda f, z, y, other: f(z, y))
    return {
        name: call(name)(function_of(name), logits, labels, other) for name in names
    }


def compare_with_one_device(names, change):
    """`change(function)` of the losses on a mesh and on one device."""
    arrays = problem()
    labels = np.abs(arrays["labels"]) % CLASSES
    whole = functools.partial(of_losses, names)
    divided = jax.shard_map(
        functools.partial(whole, axis_name="classes"),
        mesh=grid(2, 4),
        in_specs=(P("data"), P("classes"), P("data")),
        out_specs=P("data"),
    )
    actual, expected = (
        jax.device_get(jax.jit(change(f))(arrays["hidden"], arrays["weight"], labels))
        for f in (divided, whole)
    )
    for found, wanted in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert_close(found, wanted, dtype=jnp.float32, length=CLASSES)


def test_every_loss_takes_a_divided_vocabulary():
    assert len(EVERY) > 30
    compare_with_one_device(EVERY, lambda function: function)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_every_loss_with_a_divided_vocabulary(name):
    def differentiated(function):
        def total(hidden, weight, labels):
            leaves = jax.tree.leaves(function(hidden, weight, labels))
            floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((leaf**2).sum() for leaf in floating) / 5

        return jax.grad(total, (0, 1))

    compare_with_one_device([name], differentiated)


def test_all_statistics_in_float64():
    names = RowStatistics._fields
    given = ("hidden", "weight", "bias", "temperature", "scale")

    def statistics(axis_name=None, **operands):
        del operands["label_smoothing"], operands["logsumexp_penalty"]
        return of_head.row_statistics(
            **operands, statistics=names, softcap=3.0, axis_name=axis_name
        )

    def differentiated(function):
        def total(floating, operands):
            found = function({**operands, **floating})
            leaves = jax.tree.leaves(found)
            # Different weights, so that no error in one number hides another.
            return sum(((i + 1) * leaf**2).sum() for i, leaf in enumerate(leaves))

        def call(operands):
            floating = {name: operands[name] for name in given}
            return function(operands), jax.grad(total)(floating, operands)

        return jax.jit(call)

    with jax.enable_x64():
        operands = operands_of("float64")
        mesh = grid(2, 4)
        divided = differentiated(mapped(statistics, mesh))
        actual = jax.device_get(divided(place(mesh, WHERE, operands)))
        one = differentiated(lambda operands: statistics(**operands))
        expected = jax.device_get(one(operands))
    for found, wanted in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert_close(found, wanted, dtype=jnp.float64, length=CLASSES)


def test_ties_of_the_maximum_go_to_the_lowest_class_of_all():
    operands = operands_of()
    operands["weight"] = jnp.zeros_like(operands["weight"])
    operands["bias"] = jnp.zeros(CLASSES).at[0].set(-1)
    operands["class_where"] = jnp.ones(CLASSES, bool)

    def best(axis_name=None, **operands):
        del operands["label_smoothing"], operands["logsumexp_penalty"]
        return of_head.row_statistics(
            **operands, statistics=("argmax",), axis_name=axis_name
        ).argmax

    mesh = grid(1, 8)
    actual = mapped(best, mesh)(place(mesh, WHERE, operands))
    np.testing.assert_array_equal(actual, best(**operands))
    np.testing.assert_array_equal(actual, 1)


def test_no_class_selected_on_any_device():
    mesh = grid(2, 4)
    arrays = problem()
    arrays["class_where"] = np.zeros(CLASSES, bool)
    placed = place(mesh, WHERE, arrays)
    function = vocabulary_parallel(mesh, WHERE, True)
    values, gradients = with_gradients(function)(placed)
    np.testing.assert_array_equal(values["loss"], 0)
    lse = np.where(arrays["labels"] >= 0, -np.inf, 0)
    np.testing.assert_array_equal(values["lse"], lse)
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


# ------------------------------------------------------------------------------- memory
ROWS, FEATURES, VOCABULARY = 512, 128, 65536
WEIGHT = 4 * VOCABULARY * FEATURES


@functools.cache
def program(shape, vocab_axis):
    """Loss and gradients, compiled for a mesh of `shape`."""
    mesh = grid(*shape)
    rows = P("data") if len(shape) == 2 else P()
    classes = P(None, "classes") if vocab_axis else P("classes")

    def loss(hidden, weight, labels):
        return losses.linear_softmax_cross_entropy(
            hidden, weight, labels, vocab_axis=vocab_axis, axis_name="classes"
        )

    mapped = jax.shard_map(
        loss, mesh=mesh, in_specs=(rows, classes, rows), out_specs=rows
    )
    total = lambda *operands: mapped(*operands).mean()
    struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    weight = (FEATURES, VOCABULARY) if vocab_axis else (VOCABULARY, FEATURES)
    operands = (
        struct((ROWS, FEATURES), jnp.float32, rows),
        struct(weight, jnp.float32, classes),
        struct((ROWS,), jnp.int32, rows),
    )
    gradient = jax.value_and_grad(total, argnums=(0, 1))
    return jax.jit(gradient).lower(*operands).compile()


def memory(shape, vocab_axis):
    """Bytes per device: arguments, results, scratch."""
    found = program(shape, vocab_axis).memory_analysis()
    assert found is not None
    return (
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
    )


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_memory_of_a_device_is_its_share_of_the_vocabulary(devices, vocab_axis):
    whole, share = memory((1,), vocab_axis), memory((devices,), vocab_axis)
    # The weight and its gradient are divided; hidden, labels and scratch stay.
    saved = WEIGHT - WEIGHT // devices
    assert whole[0] - share[0] == saved
    assert whole[1] - share[1] == saved
    assert share[0] < WEIGHT // devices + 1.1 * 4 * ROWS * FEATURES
    assert share[1] < WEIGHT // devices + 1.1 * 4 * ROWS * FEATURES
    # A few tiles, whatever the vocabulary: less than the logits of one of 8 devices.
    assert max(whole[2], share[2]) < 4 * ROWS * VOCABULARY // 8


def test_memory_where_rows_are_divided_too():
    arguments, results, scratch = memory((2, 4), 0)
    for size in (arguments, results):
        assert size < WEIGHT // 4 + 1.1 * 4 * ROWS // 2 * FEATURES
    # The gradient of the own classes is added over the rows of the other devices.
    assert scratch < WEIGHT // 4 + 4 * ROWS // 2 * VOCABULARY // 4


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_devices_exchange_numbers_per_row_and_gradients_only(shape):
    text = program(shape, 0).as_text() or ""
    collectives = re.findall(r"= (.*?) (all-|reduce-scatter|collective-)", text)
    sizes = {
        int(np.prod([int(n) for n in dimensions.split(",") if n]))
        for result, _ in collectives
        for dimensions in re.findall(r"\w+\[([\d,]*)\]", result)
    }
    rows = ROWS // (shape[0] if len(shape) == 2 else 1)
    of_classes = {VOCABULARY // 4 * FEATURES} if len(shape) == 2 else set()
    assert sizes - {1} == {rows, rows * FEATURES} | of_classes
    assert "all-gather" not in text


@pytest.mark.usefixtures("untyped")
def test_an_unknown_axis_is_named():
    operands = problem()
    with pytest.raises(ValueError, match=r"`axis_name` must name an axis.*got 'model'"):
        of_head.entropy(operands["hidden"], operands["weight"], axis_name="model")
