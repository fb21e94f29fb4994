"""Weights of classes in cross-entropy, on both sources and over several devices."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib.testing import assert_close
from tests.compiled import losses, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import assert_agrees
from tests.oracles.weighted_cross_entropy import (
    target_of,
    weighted_cross_entropy,
)

ROWS, FEATURES, CLASSES = 6, 3, 7
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.5])
CROSS_ENTROPY: Any = of_stored.softmax_cross_entropy
LINEAR: Any = losses.linear_softmax_cross_entropy


def arrays(dtype="float64") -> dict[str, Any]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    return {"hidden": draw(ROWS, FEATURES), "weight": draw(CLASSES, FEATURES)}


def source(name, dtype="float64") -> tuple[Any, dict[str, Any]]:
    """The loss, and the arrays that stand for its logits."""
    given = arrays(dtype)
    if name == "linear":
        return functools.partial(LINEAR, vocab_chunk=3), given
    return CROSS_ENTROPY, {"logits": given["hidden"] @ given["weight"].T}


def check(call, floating, expected, cotangent):
    """Values and the gradients of `floating` agree with the oracle's, in float64."""

    @jax.jit
    def run(floating, cotangent):
        loss, pull = jax.vjp(lambda f: call(**f), floating)
        return loss, pull(cotangent)[0]

    loss, gradients = run(floating, cotangent)
    assert_agrees(loss, expected.values["loss"], jnp.float64, 0)
    for name, gradient in gradients.items():
        assert_agrees(gradient, expected.gradients[name], jnp.float64, 0)


@pytest.mark.parametrize("name", ["linear", "logits"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_ids_match_oracle(name, implementation):
    """Rows: as usual, excluded, excluded with weight 0, outside, masked, as usual."""
    with jax.enable_x64():
        loss, given = source(name)
        labels = jnp.array([0, 4, 2, -1, -100, 6])
        where = jnp.arange(ROWS) != 4
        chosen = np.isin(np.arange(CLASSES), [2, 4], invert=True)
        target, broken = target_of(labels[:, None], CLASSES, kept=where[:, None])
        cotangent = np.random.default_rng(1).normal(size=ROWS)
        rows = next(iter(given))
        given[rows] = given[rows].at[4].set(jnp.nan)
        expected = weighted_cross_entropy(
            target,
            class_weights=WEIGHTS,
            logsumexp_penalty=0.1,
            class_where=chosen,
            where=where,
            broken=broken,
            cotangent=cotangent,
            **given,
        )
        call = functools.partial(
            loss,
            labels=labels,
            where=where,
            class_where=jnp.asarray(chosen),
            logsumexp_penalty=0.1,
            implementation=implementation,
        )
        floating = given | {"class_weights": jnp.asarray(WEIGHTS)}
        check(call, floating, expected, cotangent)


@pytest.mark.parametrize("kind", ["ids", "distributions"])
@pytest.mark.parametrize("traced", [False, True])
def test_smoothing_matches_oracle(kind, traced):
    """sum_k a_k s_k (-log p_k) for the smoothed label s, as in PyTorch."""
    with jax.enable_x64():
        loss, given = source("logits")
        random = np.random.default_rng(1)
        chosen = random.uniform(size=(ROWS, CLASSES)) < 0.7
        chosen[:, 3] = True
        labels: Any = jnp.full(ROWS, 3)
        target = np.eye(CLASSES)[np.full(ROWS, 3)]
        if kind == "distributions":
            target = random.uniform(size=(ROWS, CLASSES)) * chosen
            labels = jnp.asarray(target)
        smoothing = 0.3
        cotangent = random.normal(size=ROWS)
        expected = weighted_cross_entropy(
            target,
            class_weights=WEIGHTS,
            label_smoothing=smoothing,
            class_where=chosen,
            cotangent=cotangent,
            **given,
        )
        call = functools.partial(
            loss,
            labels=labels,
            class_where=jnp.asarray(chosen),
            label_smoothing=jnp.asarray(smoothing) if traced else smoothing,
        )
        floating = given | {"class_weights": jnp.asarray(WEIGHTS)}
        check(call, floating, expected, cotangent)


def test_smoothing_spelled_out():
    logits = jnp.array([[0.5, -1.0, 2.0]])
    a = jnp.array([2.0, 0.5, 1.0])
    log_p = jax.nn.log_softmax(logits)[0]
    got = CROSS_ENTROPY(logits, jnp.array([1]), class_weights=a, label_smoothing=0.2)
    wanted = -(0.8 * a[1] * log_p[1] + 0.2 / 3 * (a * log_p).sum())
    assert_close(got, wanted[None], dtype=jnp.float32, length=3)


@pytest.mark.parametrize("name", ["linear", "logits"])
def test_weights_of_one_change_nothing(name):
    loss, given = source(name, "float32")
    labels = jnp.array([0, 6, -1, 3, 4, 2])
    options = {"class_where": jnp.arange(CLASSES) != 4, "logsumexp_penalty": 0.1}
    call = functools.partial(loss, **given, labels=labels, **options)
    np.testing.assert_array_equal(call(class_weights=jnp.ones(CLASSES)), call())


@pytest.mark.parametrize("name", ["linear", "logits"])
def test_weight_of_zero_on_an_infinite_cost_is_zero_with_finite_gradients(name):
    """The label's logit is -inf by its bias, the weight 0 or 1."""
    loss, given = source(name, "float32")
    bias = jnp.zeros(CLASSES).at[2].set(-jnp.inf)
    labels = jnp.array([2, 0, 1, 3, 5, 6])
    for weight, wanted in ((0.0, 0.0), (1.0, np.inf)):
        weights = jnp.ones(CLASSES).at[2].set(weight)

        def total(floating):
            found = loss(**floating, labels=labels, bias=bias)
            return found.sum(), found

        run = jax.jit(jax.grad(total, has_aux=True))
        gradients, found = run(given | {"class_weights": weights})
        assert found[0] == wanted
        assert np.isfinite(found[1:]).all()
        for gradient in jax.tree.leaves(gradients):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["linear", "logits"])
def test_bfloat16_weights_give_float32(name):
    loss, given = source(name, "bfloat16")
    weights = jnp.asarray(WEIGHTS, jnp.bfloat16)
    assert loss(**given, labels=jnp.arange(6), class_weights=weights).dtype == "float32"
    grad = jax.grad(
        lambda a: loss(**given, labels=jnp.arange(6), class_weights=a).sum()
    )
    assert grad(weights).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "kind", "check_vma"),
    [((2, 4), AxisType.Explicit, True), ((1, 8), AxisType.Auto, False)],
)
def test_divided_classes_give_the_numbers_of_one_device(shape, kind, check_vma):
    """Focal loss too: it asks for the weight of the label in the same way."""
    classes = 16
    mesh = jax.make_mesh(shape, ("data", "classes"), (kind, kind))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    given = {
        "hidden": draw(8, FEATURES),
        "weight": draw(classes, FEATURES),
        "class_weights": draw(classes),
    }
    labels = jnp.arange(8) * 2 - 2  # the first outside
    specs = {"hidden": P("data"), "weight": P("classes"), "class_weights": P("classes")}

    def both(axis_name, given, labels):
        options = {"labels": labels, "where": labels >= 0, "axis_name": axis_name}
        focal: Any = of_head.softmax_focal_loss
        return LINEAR(**given, **options), focal(**given, **options)

    mapped = jax.shard_map(
        functools.partial(both, "classes"),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, given, labels):
        def total(given):
            found = function(given, labels)
            return sum(((i + 1) * x**2).sum() for i, x in enumerate(found)), found

        return jax.grad(total, has_aux=True)(given)

    one = run(functools.partial(both, None), given, labels)
    with jax.set_mesh(mesh):
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
        placed = {name: put(array, specs[name]) for name, array in given.items()}
        results = (jax.device_get(run(mapped, placed, put(labels, P("data")))), one)
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(one, two, dtype=jnp.float32, length=classes)


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped", "eager")
@pytest.mark.parametrize("name", ["linear", "logits"])
def test_weights_of_the_wrong_kind_or_shape(name):
    loss, given = source(name, "float32")
    call = functools.partial(loss, **given, labels=jnp.arange(6))
    public = {"linear": LINEAR, "logits": CROSS_ENTROPY}[name].__name__
    with pytest.raises(
        TypeError, match=rf"^{public}: `class_weights` must .* int32\.$"
    ):
        call(class_weights=jnp.ones(CLASSES, int))
    for shape in ((3,), (ROWS, CLASSES), ()):
        with pytest.raises(
            ValueError, match=rf"^{public}: `class_weights` must have sh"
        ):
            call(class_weights=jnp.ones(shape))


@pytest.mark.usefixtures("untyped")
def test_a_linear_head_does_not_smooth_with_weights():
    given = arrays("float32")
    call = functools.partial(LINEAR, **given, labels=jnp.arange(6))
    weights = jnp.ones(CLASSES)
    pattern = (
        "^linear_softmax_cross_entropy: `label_smoothing` must be 0 with `class_we"
    )
    with pytest.raises(ValueError, match=pattern + r".*got 0\.1\."):
        call(class_weights=weights, label_smoothing=0.1)
    with pytest.raises(ValueError, match=pattern + r".*got a traced number\."):
        jax.jit(lambda e: call(class_weights=weights, label_smoothing=e))(0.0)
    call(class_weights=weights, label_smoothing=0)
