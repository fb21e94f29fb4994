"""The sum with gradients in the forward pass is the sum of the loss per row."""

import functools
import re
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import softlib
from softlib.testing import assert_close
from tests.compiled import losses, of_head
from tests.host import jnp
from tests.losses.problems import as_jax
from tests.oracles.weighted_cross_entropy import target_of, weighted_cross_entropy
from tests.pairwise import name, pairwise

FEATURES, CLASSES = 5, 130
CASES = pairwise(
    {
        "rows": (1, 12, 300),
        "token_chunk": (None, 1, 5, 128),
        "vocab_axis": (0, 1),
        "bias": (False, True),
        "scale": (None, "scalar", "rows"),
        "softcap": (None, 4.0),
        "smoothing": (0.0, 0.1, "traced"),
        "penalty": (0.0, 0.01, "traced"),
        "classes": (None, "where", "weights"),
        "where": (False, True),
        "weights": ("one", "scalar", "rows"),
        "dtype": ("float32", "float64", "bfloat16"),
    },
    # Chunks of one row are a loop over 300 blocks; weights exclude smoothing.
    lambda case: (
        (case.get("rows") != 300 or case.get("token_chunk") != 1)
        and (case.get("classes") != "weights" or not case.get("smoothing"))
    ),
)


def problem(case):
    """Differentiable arguments by name, and the others."""
    random = np.random.default_rng(len(str(case)))
    rows, dtype = case["rows"], case["dtype"]
    normal = lambda *shape: random.normal(size=shape)
    shape = (CLASSES, FEATURES) if case["vocab_axis"] == 0 else (FEATURES, CLASSES)
    arrays = {"hidden": normal(rows, FEATURES), "weight": normal(*shape)}
    if case["bias"]:
        arrays["bias"] = normal(CLASSES)
    if case["scale"]:
        per_row = () if case["scale"] == "scalar" else (rows,)
        arrays["scale"] = 1 + 0.1 * normal(*per_row)
        arrays["temperature"] = 1 + np.abs(normal(*per_row))
    if case["classes"] == "weights":
        arrays["class_weights"] = np.abs(normal(CLASSES))
    if case["weights"] != "one":
        per_row = () if case["weights"] == "scalar" else (rows,)
        arrays["row_weights"] = normal(*per_row)
    others: dict[str, Any] = {"labels": random.integers(0, CLASSES, rows)}
    for option, key in (
        ("label_smoothing", "smoothing"),
        ("logsumexp_penalty", "penalty"),
    ):
        if case[key] == "traced":
            arrays[option] = np.asarray(0.05)
        else:
            others[option] = case[key]
    if case["classes"] == "where":
        keep = random.random(CLASSES) < 0.7
        keep[others["labels"][: rows // 2 + 1]] = True
        others["class_where"] = keep
    if case["where"]:
        others["where"] = random.random(rows) < 0.6
        others["labels"] = np.where(others["where"], others["labels"], -100)
    if case["softcap"]:
        others["softcap"] = case["softcap"]
    others["vocab_axis"] = case["vocab_axis"]
    arrays = {key: jnp.asarray(array, dtype) for key, array in arrays.items()}
    return arrays, as_jax(others)


def sum_of_rows(arrays, others):
    """The sum and its gradients by the oracle of the loss per row, in float64."""
    given = {key: np.asarray(array, np.float64) for key, array in arrays.items()}
    given |= others
    row_weights = given.pop("row_weights", np.float64(1))
    labels = np.asarray(given.pop("labels"))
    kept = np.asarray(given.get("where", np.ones(labels.shape, bool)))
    target, broken = target_of(labels[:, None], CLASSES, kept=kept[:, None])
    per_row = np.where(kept, row_weights, 0)

    def loss(**changed):
        options = {**given, **changed}
        return weighted_cross_entropy(
            target, broken=broken, cotangent=per_row, **options
        )

    found = loss()
    rows, gradients = found.values["loss"], dict(found.gradients)
    # A label on an excluded class costs infinity whatever multiplies it.
    weighted = lambda rows: (per_row * np.where(kept, rows, 0)).sum()
    by_row = np.where(kept, rows, 0)
    with np.errstate(invalid="ignore"):  # infinities of either sign add up to NaN
        value = weighted(rows)
    gradients["row_weights"] = by_row if row_weights.ndim else by_row.sum()
    for option in ("label_smoothing", "logsumexp_penalty"):
        # The loss is affine in either. Where it is infinite it has no slope.
        at = {x: loss(**{option: x}).values["loss"] for x in (0.0, 1.0)}
        finite = np.isfinite(rows)
        slope = np.subtract(at[1.0], at[0.0], where=finite, out=np.zeros_like(rows))
        gradients[option] = weighted(slope)
    return value, {key: gradients[key] for key in arrays}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_the_sum_of_rows(case):
    with jax.enable_x64(case["dtype"] == "float64"):
        arrays, others = problem(case)

        def at_once(arrays):
            return of_head.softmax_cross_entropy_sum(
                **arrays, **others, token_chunk=case["token_chunk"], vocab_chunk=48
            )

        value, gradients = jax.jit(jax.value_and_grad(at_once))(arrays)
        wanted, expected = sum_of_rows(arrays, others)
        computed = jnp.promote_types(case["dtype"], jnp.float32)
        assert value.dtype == computed
        length = case["rows"] * CLASSES
        assert_close(value, wanted, dtype=computed, length=length, c=16)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            assert gradient.dtype == arrays[key].dtype
            finite = np.isfinite(expected[key])  # a row that costs infinity has none
            assert_close(
                np.where(finite, gradient, 0),
                np.where(finite, expected[key], 0),
                dtype=gradient.dtype,
                length=length,
                c=16,
            )


def small(rows=12):
    random = np.random.default_rng(0)
    return (
        jnp.asarray(random.normal(size=(rows, FEATURES)), jnp.float32),
        jnp.asarray(random.normal(size=(CLASSES, FEATURES)), jnp.float32),
        jnp.asarray(random.integers(0, CLASSES, rows), jnp.int32),
    )


def mean(hidden, weight, labels, **options):
    return of_head.softmax_cross_entropy_sum(
        hidden, weight, labels, row_weights=1 / labels.size, **options
    )


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_three_products_in_the_compiled_program(vocab_axis):
    """Per step of the vocabulary; a loss per row needs a fourth, for the logits."""
    rows, features, classes = 256, 256, 2048
    struct = jax.ShapeDtypeStruct
    shape = (classes, features) if vocab_axis == 0 else (features, classes)
    arrays = (struct((rows, features), jnp.float32), struct(shape, jnp.float32))
    labels = struct((rows,), jnp.int32)

    def products(loss):
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays, labels)
        text = program.as_text()
        return len(re.findall(r"stablehlo\.dot_general", text))

    options = {"vocab_axis": vocab_axis, "vocab_chunk": 512}
    per_row = lambda *a: losses.linear_softmax_cross_entropy(*a, **options).mean()
    assert products(lambda *a: mean(*a, **options)) == 3
    assert products(per_row) == 4


def test_a_bad_label_makes_the_sum_nan_and_leaves_gradients_finite():
    hidden, weight, labels = small()
    labels = labels.at[3].set(CLASSES)
    value, gradient = jax.value_and_grad(mean)(hidden, weight, labels)
    assert jnp.isnan(value)
    np.testing.assert_array_equal(gradient[3], 0)
    assert jnp.isfinite(gradient).all()
    assert jnp.isfinite(mean(hidden, weight, labels, where=labels < CLASSES))


def test_rows_that_do_not_count_may_hold_anything():
    hidden, weight, labels = small()
    where = jnp.arange(12) != 4
    spoilt = hidden.at[4].set(jnp.nan)
    run = jax.value_and_grad(mean, argnums=(0, 1))
    value, gradients = run(spoilt, weight, labels.at[4].set(-100), where=where)
    wanted, expected = run(hidden, weight, labels, where=where)
    np.testing.assert_array_equal(value, wanted)
    chex.assert_trees_all_equal(gradients, expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_count_is_zero(rows):
    hidden, weight, labels = small(rows)
    where = jnp.zeros(rows, bool)
    run = jax.value_and_grad(
        lambda h, w: of_head.softmax_cross_entropy_sum(h, w, labels, where=where),
        argnums=(0, 1),
    )
    value, gradients = run(hidden, weight)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_batch_axes_and_a_single_row():
    hidden, weight, labels = small()
    run = jax.grad(mean, argnums=(0, 1))
    flat = run(hidden, weight, labels)
    several = run(hidden.reshape(3, 4, -1), weight, labels.reshape(3, 4))
    chex.assert_trees_all_close(several[0].reshape(12, -1), flat[0], rtol=1e-6)
    one = mean(hidden[0], weight, labels[0])
    assert one.shape == ()
    np.testing.assert_allclose(
        jax.grad(mean)(hidden[0], weight, labels[0]),
        jax.grad(mean)(hidden[:1], weight, labels[:1])[0],
        rtol=1e-6,
    )


def test_scaling_the_loss_scales_the_gradients():
    hidden, weight, labels = small()
    plain = jax.grad(mean)(hidden, weight, labels)
    scaled = jax.grad(lambda h: 2.0**15 * mean(h, weight, labels))(hidden)
    np.testing.assert_array_equal(scaled, plain * 2.0**15)


def test_vmap_and_checkpoint():
    hidden, weight, labels = small()
    stacked = jnp.stack([hidden, 2 * hidden])
    run = jax.grad(jax.checkpoint(mean))
    mapped = jax.vmap(run, in_axes=(0, None, None))(stacked, weight, labels)
    for one, alone in zip(mapped, stacked, strict=True):
        np.testing.assert_allclose(one, run(alone, weight, labels), rtol=2e-5)


def test_hessian_vector_products():
    hidden, weight, labels = small()
    tangent = jnp.ones_like(hidden)

    def product(implementation):
        loss = lambda h: mean(h, weight, labels, implementation=implementation)
        return jax.jvp(jax.grad(loss), (hidden,), (tangent,))[1]

    assert_close(
        product("xla"), np.asarray(product("reference")), dtype=jnp.float32, length=130
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_divided_by_shard_map(check_vma):
    hidden, weight, labels = small(16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def loss(hidden, weight, labels):
        part = of_head.softmax_cross_entropy_sum(hidden, weight, labels)
        return jax.lax.psum(part, "data")

    divided = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(rows, whole, rows),
        out_specs=whole,
        check_vma=check_vma,
    )
    found = jax.jit(jax.value_and_grad(divided, argnums=(0, 1)))(hidden, weight, labels)
    total = of_head.softmax_cross_entropy_sum
    wanted = jax.value_and_grad(total, argnums=(0, 1))(hidden, weight, labels)
    chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", ["rows", "classes", "features"])
def test_arrays_divided_under_plain_jit(spec, kind):
    hidden, weight, labels = small(16)
    hidden, weight = jnp.tile(hidden, (1, 4)), jnp.tile(weight, (1, 4))[:128]
    labels = labels % 128
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    specs = {
        "rows": (("x",), ()),
        "classes": ((), ("x",)),
        "features": ((None, "x"), (None, "x")),
    }[spec]
    place = lambda a, s: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*s)))
    total = of_head.softmax_cross_entropy_sum
    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    wanted = run(hidden, weight, labels)
    row_spec = ("x",) if spec == "rows" else ()
    found = run(
        place(hidden, specs[0]), place(weight, specs[1]), place(labels, row_spec)
    )
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(wanted), rtol=2e-5, atol=1e-5
    )


def test_explain_names_the_operation():
    hidden, weight, labels = small()
    text = str(softlib.explain(jax.grad(mean), hidden, weight, labels))
    assert "linear_sum_with_gradients\n  everywhere: xla" in text


@pytest.mark.parametrize("features", [64, 256])
def test_keeps_no_logits_that_take_longer_to_keep_than_to_compute(features):
    rows, classes = 256, 32_768
    struct = jax.ShapeDtypeStruct
    arrays = (
        struct((rows, features), jnp.float32),
        struct((classes, features), jnp.float32),
        struct((rows,), jnp.int32),
    )

    def scratch(**options):
        loss = jax.grad(functools.partial(mean, **options), argnums=(0, 1))
        memory = jax.jit(loss).lower(*arrays).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * rows * classes
    assert (scratch() > logits) == (features == 256)
    assert scratch(token_chunk=rows) > logits


def test_scratch_is_a_block_of_logits():
    rows, features, classes = 4096, 256, 65536
    struct = jax.ShapeDtypeStruct
    program = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(
        struct((rows, features), jnp.float32),
        struct((classes, features), jnp.float32),
        struct((rows,), jnp.int32),
    )
    memory = program.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 2**25 + 48 * 2**20  # of 1 GiB of logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "data"}, "`axis_name` must"),
        ({"row_weights": jnp.ones(3)}, "`row_weights` must have shape"),
        (
            {"gradient_filter_eps": 0.1, "label_smoothing": 0.1},
            "`gradient_filter_eps` must be None",
        ),
        ({"label_smoothing": 2.0}, "`label_smoothing` must be in"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        of_head.softmax_cross_entropy_sum(*small(), **options)
