"""Gradients where only one of the two passes has a kernel, or a kernel may not run.

Residuals have one structure on every platform. What the forward pass of a platform does
not keep must be read by none of its backward passes: a stand-in of NaN would be seen.
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from softlib import losses
from softlib._dispatch import Implementation
from softlib.logits._engine import operations, stream as _stream
from softlib.logits._engine.accelerator import Accelerator
from softlib.logits._engine.head import Head
from softlib.logits._engine.tile import Modifiers, Options
from tests.host import jnp
from tests.operations import in_steps_of_accelerators

ROWS, FEATURES, CLASSES, CHUNK = 8, 512, 4500, 512
# Of the platform that runs here, and of those that have kernels of their own.
PLATFORMS = ("cpu", "tpu", "cuda")


def _refused(options, operands):
    return "this test refuses it"


def _kernel(call, platform, accepted):
    """Stands for a kernel: it keeps nothing and reads nothing that is kept."""
    why_not = (lambda options, operands: None) if accepted else _refused
    return Implementation("pallas_test", call, why_not, platform)


def _divided(problem):
    """The problem with its rows divided over devices."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    hidden, weight, labels = problem
    return put(hidden, "rows"), put(weight), put(labels, "rows")


def _forward(options, head):
    return _stream.forward(options, head)


def _backward(options, operands):
    return _stream.backward(options, operands._replace(kept=None))


@pytest.fixture
def kernels(monkeypatch):
    """Gives the engine kernels, on the platforms and sides that are named.

    A CPU with a kernel stands for an accelerator.
    """
    monkeypatch.setattr(operations, "_PLACEHOLDER", jnp.nan)
    jax.clear_caches()
    contexts = contextlib.ExitStack()

    def give(forward, backward):
        if "cpu" in (*forward, *backward):
            contexts.enter_context(in_steps_of_accelerators())
        for name, call, platforms in (
            ("LINEAR", _forward, forward),
            ("LINEAR_GRADIENT", _backward, backward),
        ):
            operation = getattr(operations, name)
            given = tuple(_kernel(call, p, p in platforms) for p in PLATFORMS)
            plain = tuple(i for i in operation.implementations if i.platform is None)
            monkeypatch.setattr(
                operations,
                name,
                dataclasses.replace(operation, implementations=given + plain),
            )

    with contexts:
        yield give
    jax.clear_caches()


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (ROWS, FEATURES))
    weight = jax.random.normal(keys[1], (CLASSES, FEATURES)) / 8
    return hidden, weight, jnp.arange(ROWS) * 497


def _loss(hidden, weight, labels, chunk):
    bias = jnp.linspace(-1, 1, CLASSES)
    found = losses.linear_softmax_cross_entropy(
        hidden, weight, labels, bias=bias, vocab_chunk=chunk
    )
    return found.sum()


def _gradients(chunk=CHUNK):
    return jax.grad(functools.partial(_loss, chunk=chunk), (0, 1))


def _assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.fixture(scope="module")
def expected(problem):
    reference = lambda *a: losses.linear_softmax_cross_entropy(
        *a, bias=jnp.linspace(-1, 1, CLASSES), implementation="reference"
    ).sum()
    return jax.jit(jax.grad(reference, (0, 1)))(*problem)


def test_the_problem_keeps_products(problem):
    hidden, weight, _ = problem
    head = Head(hidden, weight, None, Modifiers(None, None, None, None))
    on_cpu, elsewhere = Options(("lse",), vocab_chunk=CHUNK), Options(("lse",))
    assert _stream.kept_buffers(on_cpu, head) is not None
    assert _stream.kept_buffers(elsewhere.on(Accelerator()), head) is not None


SIDES = list(itertools.product([(), ("cpu",)], repeat=2))


@pytest.mark.parametrize(("forward", "backward"), SIDES)
def test_gradients_where_one_pass_is_a_kernel(
    kernels, problem, expected, forward, backward
):
    kernels(forward, backward)
    _assert_close(jax.jit(_gradients())(*problem), expected)


def test_eager_gradients_where_the_forward_pass_alone_is_a_kernel(
    kernels, problem, expected
):
    kernels(("cpu",), ())
    _assert_close(_gradients()(*problem), expected)


@pytest.mark.parametrize(("forward", "backward"), SIDES)
def test_gradients_where_the_compiler_divides_the_program(
    kernels, problem, expected, forward, backward
):
    kernels(forward, backward)
    _assert_close(jax.jit(_gradients())(*_divided(problem)), expected)


# Traced for a platform without kernels, so that all platforms have its residuals: the
# kernels of another one, here, do not keep them.
@pytest.mark.parametrize("traced_for", ["cpu", "cuda"])
@pytest.mark.parametrize(("forward", "backward"), SIDES)
def test_exponentials_where_one_pass_is_a_kernel(
    kernels, problem, expected, forward, backward, traced_for
):
    kernels(forward, backward)
    with in_steps_of_accelerators(traced_for):
        traced = jax.jit(_gradients(chunk=None)).trace(*problem)
        text = traced.lower(lowering_platforms=("cpu",)).as_text()
        _assert_close(jax.jit(_gradients(chunk=None))(*problem), expected)
    is_read = not forward and not backward
    assert text.count("dot_general") == (3 if is_read else 4)
    # One maximum for 256 classes: no residual where it is known that none is kept.
    assert ("8x18xf32" in text) == (traced_for == "cuda" or not forward)


@pytest.mark.parametrize("traced_for", ["cpu", "cuda"])
def test_exponentials_where_the_compiler_divides_the_program(
    kernels, problem, expected, traced_for
):
    kernels(("cpu",), ())
    with in_steps_of_accelerators(traced_for):
        found = jax.jit(_gradients(chunk=None))(*_divided(problem))
    _assert_close(found, expected)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_only_a_cpu_keeps_products(kernels, monkeypatch, problem, platform):
    """Accelerators have the stand-in, with a kernel and without."""
    stand_in = 4242.0
    monkeypatch.setattr(operations, "_PLACEHOLDER", stand_in)
    jax.clear_caches()
    for forward, backward in itertools.product([(), (platform,)], repeat=2):
        kernels(forward, backward)
        traced = jax.jit(_gradients()).trace(*problem)
        found = {
            name: "dense<4.242000e+03>"
            in traced.lower(lowering_platforms=(name,)).as_text()
            for name in PLATFORMS
        }
        assert found == {"cpu": False, "tpu": True, "cuda": True}
