"""A sequence divided over eight devices against one device, and what moves."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import softlib
from softlib import masks
from softlib.attention import (
    dot_product_attention,
    sequence_order,
    sequence_parallel_attention,
)
from softlib.attention._devices.ring import ring_of
from softlib.testing import assert_close
from tests import operations
from tests.compiled import f32
from tests.host import jnp
from tests.lowered import lowered

LENGTH, DEVICES = 64, 4
BLOCKS: Any = {"block_query": 8, "block_key": 8}
MASKS: dict[str, Any] = {
    "none": None,
    "causal": masks.Causal(),
    "window": masks.Window(9, 0),
    "far": masks.Window(3, 3) | (masks.Window(44, None) & ~masks.Window(36, None)),
    "radial": masks.Radial(8, rule="pow2", min_window=4),
    "segments": masks.Segments(jax.device_put(np.arange(LENGTH) // 20)),
    "empty rows": masks.Causal(-20),
}
CASES = [
    ("none", "ring", "paired", True),
    ("window", "ring", "contiguous", False),
    ("radial", "ring", "contiguous", True),
    ("segments", "ring", "paired", False),
    ("empty rows", "ring", "contiguous", True),
    ("radial", "all_to_all", "paired", True),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("causal", "ring", "contiguous", True),
            ("causal", "ring", "paired", False),
            ("far", "ring", "contiguous", True),
            ("far", "ring", "paired", True),
            ("radial", "ring", "paired", True),
            ("segments", "all_to_all", "contiguous", False),
        )
    ),
]


def arrays(dtype: Any = jnp.float32, heads=(8, 2), seed=0) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    n, k = heads
    shapes = ((2, LENGTH, n, 4), (2, LENGTH, k, 4), (2, LENGTH, k, 3))
    return [draw(*shape) for shape in shapes], draw(n)


def divided(mask, method, layout, check_vma, mesh=None, **options):
    """The whole sequence in, the whole sequence out."""
    order = sequence_order(LENGTH, DEVICES, layout=layout)
    back = np.argsort(order)
    spec = P("data", "sequence")
    if mesh is None:
        kinds = (AxisType.Auto, AxisType.Auto)
        mesh = jax.make_mesh((2, DEVICES), ("data", "sequence"), axis_types=kinds)

    def call(query, key, value, sinks):
        def local(query, key, value, sinks, mask):
            return sequence_parallel_attention(
                query,
                key,
                value,
                axis_name="sequence",
                method=method,
                layout=layout,
                mask=mask,
                sinks=sinks,
                return_lse=True,
                **{**BLOCKS, **options},
            )

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, spec, spec, P(), P()),
            out_specs=spec,  # of both results
            check_vma=check_vma,
        )
        q, k, v = (x[:, order] for x in (query, key, value))
        return tuple(x[:, back] for x in mapped(q, k, v, sinks, mask))

    return call


def with_gradients(call, weights):
    def total(*arguments):
        out, lse = call(*arguments)
        finite = jnp.where(lse == -jnp.inf, 0, lse)
        return (out * weights[0]).sum() + (finite * weights[1]).sum(), (out, lse)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))


@pytest.mark.parametrize(("mask", "method", "layout", "check_vma"), CASES)
def test_equals_one_device(mask, method, layout, check_vma):
    (query, key, value), sinks = arrays()
    if mask == "empty rows":
        sinks[:2] = -np.inf
    rng = np.random.default_rng(1)
    shapes = ((2, LENGTH, 8, 3), (2, LENGTH, 8))
    weights = [f32(rng.normal(size=s)) for s in shapes]
    alone = functools.partial(
        dot_product_attention, mask=MASKS[mask], return_lse=True, **BLOCKS
    )
    one = with_gradients(lambda q, k, v, s: alone(q, k, v, sinks=s), weights)
    many = with_gradients(divided(MASKS[mask], method, layout, check_vma), weights)
    expected = jax.tree.leaves(one(query, key, value, sinks))
    got = jax.tree.leaves(many(query, key, value, sinks))
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y, dtype=jnp.float32, length=LENGTH, c=8)


def permutations(jaxpr):
    """(from, to) of every exchange in a traced program, in its order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            found.append(set(map(tuple, equation.params["perm"])))
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += permutations(inner)
    return found


@pytest.mark.parametrize("layout", ["contiguous", "paired"])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "far", "radial"])
def test_no_pair_of_devices_that_the_mask_leaves_empty_moves_anything(mask, layout):
    value = masks.All() if MASKS[mask] is None else MASKS[mask]
    order = sequence_order(LENGTH, DEVICES, layout=layout)
    dense = value.materialize(LENGTH)[order][:, order]
    part = LENGTH // DEVICES
    needed = dense.reshape(DEVICES, part, DEVICES, part).any((1, 3))

    ring = ring_of(value, (part, part), DEVICES, layout, (8, 8), 2 * 8)
    arrived, held = [], {}  # device -> whose keys it has besides its own
    for step in ring.steps:
        source = held if step.relay else {d: d for d in range(DEVICES)}
        held = {to: source[start] for start, to in step.moves}
        arrived += held.items()
    assert len(arrived) == len(set(arrived)), "keys move once"
    others = {(d, s) for d, s in np.argwhere(needed).tolist() if d != s}
    assert set(arrived) == others

    (query, key, values), sinks = arrays()
    call = divided(MASKS[mask], "ring", layout, True)
    jaxpr = operations.make_jaxpr(call)(query, key, values, sinks).jaxpr
    moves = [set(step.moves) for step in ring.steps if step.shift]
    assert permutations(jaxpr) == [m for m in moves for _ in ("key", "value")]


@pytest.mark.parametrize("layout", ["contiguous", "paired"])
@pytest.mark.parametrize("mask", ["causal", "far", "radial", "empty rows"])
def test_a_block_of_a_step_is_whole_or_empty_on_every_device_that_works(mask, layout):
    part = LENGTH // DEVICES
    ring = ring_of(MASKS[mask], (part, part), DEVICES, layout, (8, 8), 1)
    order = sequence_order(LENGTH, DEVICES, layout=layout).reshape(DEVICES, part)
    seen = set()
    for i, step in enumerate(ring.steps):
        pairs = [(d, (d - step.shift) % DEVICES) for d in range(DEVICES)]
        dense = {
            pair: MASKS[mask](order[pair[0]][:, None], order[pair[1]][None, :])
            for pair, works in zip(pairs, ring.works(i), strict=True)
            if works
        }
        for pair in dense:
            placed = ring.placed(i, MASKS[mask], *pair)
            index = np.arange(part)
            np.testing.assert_array_equal(
                placed(index[:, None], index[None, :]), dense[pair]
            )
            blocks = masks.block_map(placed, (part, part), (8, 8))
            tiles = np.stack(list(dense.values())).reshape(
                -1, part // 8, 8, part // 8, 8
            )
            every, some = tiles.all((0, 2, 4)), tiles.any((0, 2, 4))
            assert every[blocks == masks.Block.ALL].all()
            assert not some[blocks == masks.Block.NONE].any()
            seen |= {*blocks.ravel().tolist()}
        idle = [pair for pair in pairs if pair not in dense]
        assert not any(
            MASKS[mask](order[d][:, None], order[s][None, :]).any() for d, s in idle
        )
    assert len(seen) > 1


def test_a_program_for_a_tpu_runs_kernels_in_every_step():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("sequence",))
    spec = P(None, "sequence")

    def local(query, key, value):
        attend: Any = functools.partial(
            sequence_parallel_attention, axis_name="sequence", mask=masks.Causal()
        )
        squares = lambda *arrays: (attend(*arrays).astype(jnp.float32) ** 2).sum()
        return jax.grad(squares, (0, 1, 2))(query, key, value)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    array = jax.ShapeDtypeStruct((1, DEVICES * 256, 2, 128), jnp.bfloat16)
    text = lowered("tpu", mapped, array, array, array)
    # Forward, and gradients of queries and of keys: of what plain JAX would stream
    # nothing is left.
    assert text.count("tpu_custom_call") >= 3 * DEVICES
    assert "stablehlo.while" not in text
    assert text.count("stablehlo.case") == 2 * (DEVICES - 1)


def test_the_balanced_layout_evens_out_the_work_of_a_radial_mask():
    frames, places, devices = 128, 32, 8
    mask = masks.Radial(places, rule="pow2", min_window=16)
    work = {}
    for layout in ("contiguous", "paired"):
        length = frames * places // devices
        ring = ring_of(mask, (length, length), devices, layout, (16, 16), 1)
        per_device = np.sum([counts.sum(1) for counts in ring.counts], axis=0)
        assert per_device.shape == (devices,)
        work[layout] = per_device.max() / per_device.mean()
    assert work["contiguous"] > 1.05
    assert work["paired"] < 1.05


def test_sequence_order_is_a_permutation_and_its_parts_are_chunks():
    for shards, layout in ((1, "paired"), (4, "paired"), (8, "contiguous")):
        order = sequence_order(64, shards, layout=layout)
        np.testing.assert_array_equal(np.sort(order), np.arange(64))
    order = sequence_order(64, 4)
    np.testing.assert_array_equal(order[:16], [*range(8), *range(32, 40)])


def test_lengths_that_are_no_multiple_of_a_block_and_unequal_lengths():
    (query, key, value), _ = arrays()
    query = query[:, :24]  # six queries and sixteen keys on each device
    mask = masks.Causal(40)
    spec = P(None, "sequence")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("sequence",))
    local = lambda q, k, v: sequence_parallel_attention(
        q, k, v, axis_name="sequence", mask=mask, block_query=4, block_key=5
    )
    call = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    )
    expected = jax.jit(functools.partial(dot_product_attention, mask=mask))(
        query, key, value
    )
    assert_close(
        call(query, key, value), expected, dtype=jnp.float32, length=LENGTH, c=8
    )


def test_bfloat16_partials_are_merged_in_float32():
    (query, key, value), sinks = arrays(jnp.bfloat16)
    wide = [x.astype(np.float32) for x in (query, key, value, sinks)]
    out, lse = jax.jit(divided(None, "ring", "contiguous", True))(
        query, key, value, sinks
    )
    expected = dot_product_attention(*wide[:3], sinks=wide[3])
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    # One rounding, at the end: half a unit in the last place.
    np.testing.assert_allclose(
        np.asarray(out).astype(np.float32), expected, rtol=2.0**-8, atol=1e-5
    )


def test_key_heads_that_divide_the_devices_are_repeated():
    (query, key, value), sinks = arrays(heads=(8, 2))
    out, _ = jax.jit(divided(None, "all_to_all", "contiguous", True))(
        query, key, value, sinks
    )
    expected = dot_product_attention(query, key, value, sinks=sinks)
    assert_close(out, expected, dtype=jnp.float32, length=LENGTH, c=8)


def test_explain_shows_what_each_step_runs():
    (query, key, value), sinks = arrays()
    call = divided(masks.Causal(), "ring", "contiguous", True)
    text = str(softlib.explain(call, query, key, value, sinks))
    assert "dot_product_attention" in text
    assert "xla" in text


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"method": "tree"},
            ValueError,
            "`method` must be one of 'ring', 'all_to_all'",
        ),
        ({"layout": "zigzag"}, ValueError, "`layout` must be one of"),
        ({"mask": np.ones((4, 4), bool)}, TypeError, "`mask` must be a mask value"),
        ({"sinks": jnp.ones(3)}, ValueError, r"`sinks` must have shape \(6,\)"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be positive"),
        ({"method": "all_to_all"}, ValueError, "`query` must have a multiple of 4"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    query = jnp.ones((1, 8, 6, 4))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("sequence",))
    spec = P(None, "sequence")
    local = lambda x: sequence_parallel_attention(
        x, x, x, axis_name="sequence", **change
    )
    with pytest.raises(error, match=message):
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(query)
