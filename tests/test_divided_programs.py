"""Everyday programs of several devices: arrays placed on a mesh, then `jax.jit`.

No mesh is in context. What is divided by rows, batch entries or heads must not be
gathered. A kernel, which the compiler cannot divide, runs on parts or not at all.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import attention, explain, losses, masks, softmax
from softlib.attention._engine import operations as attention_engine
from softlib.logits._engine import operations as losses_engine
from softlib.softmax import _softmax as softmax_file
from tests.host import jnp

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def place(kind, array, *spec):
    mesh = jax.make_mesh((8,), ("device",), axis_types=(getattr(AxisType, kind),))
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def collectives(function, *arrays):
    text = jax.jit(function).lower(*arrays).compile().as_text() or ""
    found = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text)
    return {name: found.count(name) for name in set(found)}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss_and_gradients(hidden, weight, labels):
    loss = lambda h, w: losses.linear_softmax_cross_entropy(h, w, labels).mean()
    return jax.value_and_grad(loss, (0, 1))(hidden, weight)


def attend(query, key, value):
    return attention.dot_product_attention(query, key, value, mask=masks.Causal())


def attention_gradients(*arrays):
    return jax.grad(lambda *a: (attend(*a) ** 2).sum(), (0, 1, 2))(*arrays)


def decode(query, key, value):
    return attention.decode_attention(query[:, :1], key, value)


HEAD = (normal(0, 64, 32), normal(1, 3000, 32), jnp.arange(64) * 40)
QUERIES = tuple(normal(seed, 8, 64, 8, 16) for seed in range(3))
ROWS = (normal(0, 64, 1000),)
BATCH, HEADS = ("device",), (None, None, "device")

# function, arrays, how each is divided, collectives that the mathematics needs
PROGRAMS = {
    "loss": (loss_and_gradients, HEAD, (BATCH, (), BATCH), {"all-reduce"}),
    "fully sharded loss": (
        loss_and_gradients,
        HEAD,
        (BATCH, BATCH, BATCH),
        {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"},
    ),
    "softmax": (softmax.softmax, ROWS, (BATCH,), set()),
    "logsumexp": (softmax.logsumexp, ROWS, (BATCH,), set()),
    "attention": (attend, QUERIES, (BATCH,) * 3, set()),
    "attention, heads": (attend, QUERIES, (HEADS,) * 3, set()),
    "attention, gradients": (attention_gradients, QUERIES, (BATCH,) * 3, set()),
    "decode": (decode, QUERIES, (BATCH,) * 3, set()),
    "decode, heads": (decode, QUERIES, (HEADS,) * 3, set()),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_explicit_axes_are_worked_on_part_by_part(name):
    function, arrays, division, needed = PROGRAMS[name]
    divided = [place("Explicit", x, *d) for x, d in zip(arrays, division, strict=True)]
    assert set(collectives(function, *divided)) <= needed
    found, expected = jax.jit(function)(*divided), jax.jit(function)(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------- where kernels run
OPERATIONS = [
    (losses_engine, "LINEAR"),
    (losses_engine, "LINEAR_GRADIENT"),
    (attention_engine, "ATTENTION"),
    (attention_engine, "ATTENTION_GRADIENT"),
    (softmax_file, "SOFTMAX"),
    (softmax_file, "LOGSUMEXP"),
]


def _marked(operation, platform):
    """A kernel that does what plain JAX does, beside an operation to find."""
    plain = operation.plain

    def call(options, operands):
        mark = lambda x: x + 0 * jnp.cbrt(x) if x.dtype == jnp.float32 else x
        return jax.tree.map(mark, plain.call(options, operands))

    return dataclasses.replace(
        plain, name=f"pallas_{platform}", call=call, platform=platform, note=_no_note
    )


def _no_note(options, operands):
    return None


@pytest.fixture
def kernels(monkeypatch):
    """Gives every operation a kernel for this machine and one for TPUs."""
    jax.clear_caches()
    for module, name in OPERATIONS:
        operation = getattr(module, name)
        own = tuple(_marked(operation, platform) for platform in ("cpu", "tpu"))
        plain = tuple(i for i in operation.implementations if i.platform is None)
        made = dataclasses.replace(operation, implementations=own + plain)
        monkeypatch.setattr(module, name, made)
    yield
    jax.clear_caches()


KERNELS = [name for name in PROGRAMS if not name.startswith("decode")]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_run_on_parts_of_explicit_axes_and_nowhere_on_auto_axes(name):
    function, arrays, division, needed = PROGRAMS[name]
    for kind, marks in (("Explicit", True), ("Auto", False)):
        divided = [place(kind, x, *d) for x, d in zip(arrays, division, strict=True)]
        for platform in ("cpu", "tpu"):
            traced = jax.jit(function).trace(*divided)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("cbrt" in text) == marks, (kind, platform)
        if kind == "Explicit":
            assert set(collectives(function, *divided)) <= needed
    assert "cbrt" in jax.jit(function).lower(*arrays).as_text()


@pytest.mark.usefixtures("kernels")
def test_explain_sees_the_mesh_on_which_arrays_lie():
    rows = place("Auto", ROWS[0], "device")
    text = str(explain(softmax.softmax, rows))
    assert "everywhere: xla" in text
    assert "not pallas_tpu: mesh axis 'device' is not manual" in text
    parts = str(explain(softmax.softmax, place("Explicit", ROWS[0], "device")))
    assert parts.startswith("softmax\n  cpu: pallas_cpu")


def test_a_division_that_tracing_does_not_see_is_left_to_the_compiler(kernels):
    """`in_shardings` of arrays that lie nowhere: known only when lowered."""
    mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
    by_rows = NamedSharding(mesh, P("device"))
    function = jax.jit(softmax.softmax, in_shardings=by_rows)
    assert "cbrt" not in function.lower(ROWS[0]).as_text()
    assert set(collectives(function, ROWS[0])) == set()


@pytest.mark.usefixtures("kernels")
def test_a_kernel_asked_for_by_name_is_not_replaced_in_a_divided_program():
    mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
    call = lambda x: softmax.softmax(x, implementation="pallas")
    function = jax.jit(call, in_shardings=NamedSharding(mesh, P("device")))
    with pytest.raises(NotImplementedError, match="divided by the compiler"):
        function.lower(ROWS[0])
    with pytest.raises(NotImplementedError, match="'device' is not manual"):
        call(place("Auto", ROWS[0], "device"))
