"""Exponentials that plain JAX keeps on accelerators for the backward pass.

Programs run on a CPU in the steps of an accelerator, and are lowered for those.
"""

import contextlib
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec as P

from softlib import LinearLogits, losses
from softlib.logits._engine import accelerator, chunks, kept
from softlib.logits._engine.head import Head
from softlib.logits._engine.tile import NO_MODIFIERS, Options
from softlib.testing import assert_close
from tests.host import jnp
from tests.lowered import loops, lowered, products
from tests.operations import in_steps_of_accelerators
from tests.oracles.cross_entropy import token_metrics

ROWS, FEATURES, CLASSES = 48, 16, 704
# Of the first two of three steps.
KEPT = 512


@contextlib.contextmanager
def _keeping(monkeypatch, keeps=True):
    """Runs steps of accelerators that keep `KEPT` classes of float32, or nothing."""
    with monkeypatch.context() as small:
        small.setattr(accelerator, "LEAST", 128)
        small.setattr(accelerator, "STEP_BYTES", 4 * 128 * 128)
        small.setattr(accelerator, "KEPT_BYTES", keeps * 4 * ROWS * 600)
        small.setattr(chunks, "KEPT_FEATURES", 8)
        with in_steps_of_accelerators():
            yield


@pytest.fixture
def keeping(monkeypatch):
    with _keeping(monkeypatch):
        yield


def _problem(dtype=jnp.float32, largest=5.0):
    """Operands whose largest logit is about +-`largest`, and weights of the rows."""
    random = np.random.default_rng(5)
    hidden = random.normal(size=(ROWS, FEATURES))
    weight = random.normal(size=(CLASSES, FEATURES))
    weight *= largest / np.abs(hidden @ weight.T).max()
    labels = random.integers(0, CLASSES, ROWS)
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(weight, dtype),
        jnp.asarray(labels),
    ), jnp.asarray(np.linspace(-1, 1, ROWS), jnp.float32)


OF_HEAD = ("class_where", "implementation", "softcap", "vocab_axis")


def _gradients(arrays, labels, weights, **options) -> dict[str, Any]:
    """Gradients, by name, of a weighted sum of losses."""
    head = {name: options.pop(name) for name in OF_HEAD if name in options}

    def loss(arrays):
        logits = LinearLogits(**arrays, **head)
        return (weights * losses.softmax_cross_entropy(logits, labels, **options)).sum()

    return jax.jit(jax.grad(loss))(arrays)


def _error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# ------------------------------------------------------------------- what is kept
def _count(dtype=jnp.float32, options=None, labels=1, **modifiers):
    arrays, _ = _problem(dtype)
    given = NO_MODIFIERS._replace(**modifiers)
    head = Head(*arrays[:2], jnp.zeros((ROWS, labels), jnp.int32), given)
    options = options or Options(("lse", "label_logits"))
    return kept.classes_of_exponentials(options, head)


def test_what_is_kept(keeping):
    ones = jnp.ones(ROWS)
    assert _count() == KEPT
    assert _count(jnp.bfloat16) == CLASSES  # of half the size
    assert _count(bias=jnp.zeros(CLASSES)) == KEPT
    assert _count(class_where=jnp.zeros(CLASSES, bool)) == KEPT
    assert _count(labels=2) == 0
    assert _count(scale=ones) == _count(temperature=ones) == 0
    refused = (
        Options(("lse", "label_logits"), softcap=3.0),
        Options(("lse", "label_logits"), vocab_chunk=128),
        Options(("lse", "label_logits"), exclude_labels=True),
        Options(("lse", "mean_logit")),
        Options(("label_logits",)),
    )
    assert not any(_count(options=options) for options in refused)


DEVICES = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA A100-SXM4-80GB", 108, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("traced_for", DEVICES)
def test_a_program_for_a_gpu_computes_fewer_products(traced_for, platform):
    def step(hidden, weight, labels):
        logits = LinearLogits(hidden, weight, implementation="xla")
        return losses.softmax_cross_entropy(logits, labels).sum()

    arguments = (
        jax.ShapeDtypeStruct((16384, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((151_936, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((16384,), jnp.int32),
    )
    mesh = AbstractMesh((), (), abstract_device=DEVICES[traced_for])
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered(platform, jax.value_and_grad(step, (0, 1)), *arguments)
    found = loops(text), len(products(text))
    # 384 MiB hold three steps of 4096 classes; the last of 38 steps is shorter.
    if traced_for == "cuda":
        assert found == ([3, 3, 34, 34], 1 + 1 + 1 + 2 + 3 + 3)
    else:
        assert found == ([37, 37], 1 + 1 + 3 + 3)
    assert ("16384x12288xbf16" in text) == (traced_for == "cuda")


# ------------------------------------------------------------------------- numbers
# Of the error without. An exponential is rounded once more than its cotangent.
FACTORS = {"float32": 4.0, "bfloat16": 1.5, "float16": 1.5}


@pytest.mark.parametrize("dtype", FACTORS)
def test_gradients_are_about_as_exact_as_without(monkeypatch, dtype):
    (hidden, weight, labels), weights = _problem(dtype, 20.0)
    arrays = {"hidden": hidden, "weight": weight, "bias": jnp.zeros(CLASSES)}
    wanted = token_metrics(labels, cotangents={"loss": weights}, **arrays).gradients

    def errors(keeps):
        with _keeping(monkeypatch, keeps):
            found = _gradients(arrays, labels, weights)
        return {name: _error(found[name], wanted[name]) for name in found}

    kept, without = errors(True), errors(False)
    assert kept != without
    for name in ("hidden", "weight"):
        assert kept[name] <= FACTORS[dtype] * without[name]
    # The cotangent of a bias is summed without being rounded, but for what is kept.
    assert kept["bias"] <= 4 * jnp.finfo(dtype).eps


BIAS = np.linspace(-1, 1, CLASSES, dtype=np.float32)
CASES: dict[str, dict[str, Any]] = {
    "large logits": {"largest": 1e4},
    "classes of -inf": {"bias": np.where(np.arange(CLASSES) % 3 == 1, -np.inf, BIAS)},
    "first classes of -inf": {"bias": np.where(np.arange(CLASSES) < 300, -np.inf, 0)},
    "rows of -inf": {"bias": np.full(CLASSES, -np.inf)},
    "selected classes": {"class_where": np.arange(CLASSES) % 3 > 0},
    "first step without a class": {"class_where": np.arange(CLASSES) >= 300},
    "empty rows": {"class_where": np.zeros(CLASSES, bool)},
    "softcap": {"softcap": 2.0},
    "smoothing": {"label_smoothing": 0.1, "logsumexp_penalty": 0.01},
    "bias, labels out of range": {"bias": BIAS, "labels": [-1, CLASSES, -(10**6)]},
    "weight (D, V)": {"vocab_axis": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(keeping, name):
    case = dict(CASES[name])
    (hidden, weight, labels), weights = _problem(largest=case.pop("largest", 5.0))
    labels = np.array(labels)
    first = case.pop("labels", [])
    labels[: len(first)] = first
    arrays = {"hidden": hidden, "weight": weight.T if "vocab_axis" in case else weight}
    if "bias" in case:
        arrays["bias"] = jnp.asarray(case.pop("bias"))
    found = _gradients(arrays, labels, weights, **case)
    wanted = _gradients(arrays, labels, weights, implementation="reference", **case)
    for each, expected in wanted.items():
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found[each], expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", FACTORS)
def test_the_small_gradient_of_a_nearly_certain_label(monkeypatch, dtype):
    """1 is subtracted from a probability of 0.997: nothing may be lost of either."""
    labels = jnp.arange(ROWS) * 9
    hidden = np.eye(ROWS)
    weight = np.random.default_rng(3).normal(size=(CLASSES, ROWS))
    weight[labels, np.arange(ROWS)] = 13
    arrays = {"hidden": hidden, "weight": weight, "bias": np.zeros(CLASSES)}
    arrays = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    weights = jnp.ones(ROWS)
    wanted = token_metrics(labels, cotangents={"loss": weights}, **arrays).gradients
    with _keeping(monkeypatch):
        found = _gradients(arrays, labels, weights)["weight"]
    at_labels = lambda x: np.asarray(x, np.float64)[labels, np.arange(ROWS)]
    exact = at_labels(wanted["weight"])
    assert np.all((exact < -1e-3) & (exact > -0.01))
    # What float32 leaves of it, and one rounding to the dtype.
    rtol = 0.002 + float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(at_labels(found), exact, rtol=rtol)


def test_small_exponentials_of_float16_do_not_vanish(monkeypatch):
    """A class of probability 1e-8 whose loss is scaled, as is usual in float16."""
    hidden, weight = np.zeros((ROWS, FEATURES)), np.zeros((CLASSES, FEATURES))
    hidden[:, 0], weight[1:, 0] = 1, -18
    arrays = {"hidden": hidden, "weight": weight}
    arrays = {name: jnp.asarray(a, jnp.float16) for name, a in arrays.items()}
    labels, weights = jnp.zeros(ROWS, int), jnp.full(ROWS, 2.0**14, jnp.float32)
    with _keeping(monkeypatch):
        found = _gradients(arrays, labels, weights)["weight"][:, 0]
    p = np.exp(-18.0) / (1 + (CLASSES - 1) * np.exp(-18.0))
    np.testing.assert_allclose(found[1:], ROWS * 2.0**14 * p, rtol=5e-3)


def test_the_gradient_is_added_to_that_of_another_term(keeping):
    (hidden, weight, labels), weights = _problem()
    teacher = LinearLogits(jnp.flip(hidden, 0), weight)

    def gradients(implementation):
        def loss(hidden, weight):
            logits = LinearLogits(hidden, weight, implementation=implementation)
            found = losses.normalized_distillation_loss(logits, teacher, labels)
            return (weights * found).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(hidden, weight)

    _assert_same(gradients("xla"), gradients("reference"))


# ------------------------------------------------------------------ transformations
def _total(implementation, weights):
    def total(hidden, weight, labels):
        logits = LinearLogits(hidden, weight, implementation=implementation)
        return (weights * losses.softmax_cross_entropy(logits, labels)).sum()

    return total


def _assert_same(found, wanted):
    for actual, expected in zip(found, wanted, strict=True):
        assert_close(actual, np.asarray(expected), dtype=jnp.float32, length=CLASSES)


@pytest.mark.parametrize("outer", ["jvp", "grad"])
def test_second_derivatives(keeping, outer):
    (hidden, weight, labels), weights = _problem()
    directions = (jnp.flip(hidden, 0), jnp.flip(weight, 1))

    def product(implementation):
        total = _total(implementation, weights)
        gradient = jax.grad(lambda h, w: total(h, w, labels), (0, 1))

        @jax.jit
        def forward(*arrays):
            return jax.jvp(gradient, arrays, directions)[1]

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def reverse(*arrays):
            pairs = zip(gradient(*arrays), directions, strict=True)
            return sum((g * v).sum() for g, v in pairs)

        return {"jvp": forward, "grad": reverse}[outer](hidden, weight)

    _assert_same(product("xla"), product("reference"))


def test_vmap_of_gradients(keeping):
    """Copies share the memory of a step, so their steps are smaller, and kept ones."""
    (hidden, weight, labels), weights = _problem()
    fold = lambda x: x.reshape(3, 16, *x.shape[1:])

    def gradients(implementation):
        def one(hidden, labels, weights):
            total = _total(implementation, weights)
            return jax.grad(total, (0, 1))(hidden, weight, labels)

        return jax.jit(jax.vmap(one))(*map(fold, (hidden, labels, weights)))

    _assert_same(gradients("xla"), gradients("reference"))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("divided", ["rows", "classes"])
def test_shard_map(keeping, divided, check_vma):
    (hidden, weight, labels), weights = _problem()
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, classes = (P("a"), P()) if divided == "rows" else (P(), P("a"))

    def loss(hidden, weight, labels, weights):
        axis_name = "a" if divided == "classes" else None
        logits = LinearLogits(hidden, weight, axis_name=axis_name)
        return weights * losses.softmax_cross_entropy(logits, labels)

    mapped = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(rows, classes, rows, rows),
        out_specs=rows,
        check_vma=check_vma,
    )
    total = lambda hidden, weight: mapped(hidden, weight, labels, weights).sum()
    found = jax.jit(jax.grad(total, (0, 1)))(hidden, weight)
    wanted = jax.grad(_total("reference", weights), (0, 1))(hidden, weight, labels)
    _assert_same(found, wanted)


def test_float64_and_wide_labels(keeping):
    (hidden, weight, labels), weights = _problem()
    with jax.enable_x64():
        hidden, weight = (np.asarray(x, np.float64) for x in (hidden, weight))
        labels = np.asarray(labels, np.int64)
        arrays = {"hidden": jnp.asarray(hidden), "weight": jnp.asarray(weight)}
        found = _gradients(arrays, jnp.asarray(labels), weights)
        wanted = token_metrics(labels, cotangents={"loss": weights}, **arrays)
        for name, value in found.items():
            assert value.dtype == jnp.float64
            assert _error(value, wanted.gradients[name]) < 1e-13
