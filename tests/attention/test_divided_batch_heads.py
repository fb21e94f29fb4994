"""Arrays divided over devices, no mesh in context: the compiled program of a device.

The devices are those of the host; what they exchange is read from the program.
"""

import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import attention, masks
from softlib.attention._engine import batch_heads as _batch_heads
from tests.compiled import f32

LENGTH, FEATURES = 16, 8
# Per batch head one block, so that no loop but that over batch heads has several steps.
BATCH_HEAD = LENGTH * LENGTH
# Name: shape of mesh, batch, heads, what is divided, batch heads per step and device.
CASES = {
    "batch": ((8,), 32, 3, P("x"), 3),
    "batch, part of an entry": ((8,), 16, 12, P("x"), 4),
    "heads": ((8,), 3, 32, P(None, None, "x"), 2),
    "both": ((4, 2), 16, 16, P("x", None, "y"), 8),
    "two axes for the batch": ((4, 2), 16, 3, P(("x", "y")), 3),
    "one axis of two": ((2, 4), 8, 6, P("x"), 3),
}
ATTEND = {
    "plain": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    "stream": lambda q, k, v: attention.dot_product_attention(q, k, v, is_causal=True),
}


def placed(case, shapes):
    mesh_shape, _, _, spec, _ = CASES[case]
    names = ("x", "y")[: len(mesh_shape)]
    mesh = jax.make_mesh(mesh_shape, names, (AxisType.Auto,) * len(names))
    random = np.random.default_rng(0)
    array = lambda shape: f32(random.normal(size=shape))
    return [jax.device_put(array(s), NamedSharding(mesh, spec)) for s in shapes]


def training(attend):
    return jax.jit(jax.grad(lambda *a: (attend(*a) ** 2).sum(), (0, 1, 2)))


def exchanges(compiled):
    found = re.findall(r"(all-\w+|collective-\w+|reduce-scatter)[\w-]*\(", compiled)
    return sorted(set(found))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pass_", ["forward", "gradient"])
def test_nothing_is_gathered_and_no_device_does_the_work_of_others(
    case, pass_, monkeypatch
):
    _, batch, heads, _, at_once = CASES[case]
    monkeypatch.setattr(_batch_heads, "SCORES", at_once * BATCH_HEAD)
    arrays = placed(case, [(batch, LENGTH, heads, FEATURES)] * 3)
    wrap = jax.jit if pass_ == "forward" else training
    flops, results = {}, {}
    for name, attend in ATTEND.items():
        compiled = wrap(attend).lower(*arrays).compile()
        assert exchanges(compiled.as_text()) == []
        cost: Any = compiled.cost_analysis()
        flops[name] = cost["flops"]
        results[name] = compiled(*arrays)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4),
        results["stream"],
        results["plain"],
    )
    # What is counted of a loop is one step of it.
    steps = batch * heads // 8 // at_once
    assert steps > 1
    assert 0.5 * flops["plain"] < steps * flops["stream"] < 1.5 * flops["plain"]


@pytest.mark.parametrize("case", ["batch", "heads", "both"])
def test_arrays_over_pairs_sinks_and_masks_stay_where_they_are(case, monkeypatch):
    """Groups of query heads, a bias per head, and a mask that holds arrays."""
    _, batch, heads, spec, at_once = CASES[case]
    monkeypatch.setattr(_batch_heads, "SCORES", 2 * at_once * BATCH_HEAD)
    random = np.random.default_rng(1)
    query, key, value = placed(
        case, [(batch, LENGTH, n, FEATURES) for n in (2 * heads, heads, heads)]
    )
    array = lambda *shape: f32(random.normal(size=shape))
    mesh, axes = query.sharding.mesh, (*spec, None, None, None)[:3]
    bias = jax.device_put(
        array(batch, 2 * heads, LENGTH, LENGTH),
        NamedSharding(mesh, P(axes[0], axes[2])),
    )
    ids = random.integers(0, 3, (batch, LENGTH))
    ids = jax.device_put(ids, NamedSharding(mesh, P(axes[0])))
    sinks = jax.device_put(array(2 * heads), NamedSharding(mesh, P(axes[2])))
    arrays = (query, key, value, bias, sinks)

    def total(arrays, ids):
        query, key, value, bias, sinks = arrays
        out = attention.dot_product_attention(
            *(query, key, value), bias=bias, sinks=sinks, mask=masks.Segments(ids)
        )
        return (out**2).sum()

    step = jax.jit(jax.grad(total))
    compiled = step.lower(arrays, ids).compile()
    found = compiled(arrays, ids)
    # Sinks are shared by the batch: their gradient is a sum over devices.
    divided_batch = axes[0] is not None
    assert exchanges(compiled.as_text()) == ["all-reduce"] * divided_batch
    alone = jax.device_put((arrays, ids), jax.devices()[0])
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4),
        found,
        step(*alone),
    )
