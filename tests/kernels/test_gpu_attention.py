"""Block-sparse attention for Hopper, in the interpreter, against the dense oracle."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels._devices import H100
from pallas_kernels.gpu_mosaic import (
    attention as forward_pass,
    attention_backward,
    attention_key_gradients,
    attention_tiles,
)
from pallas_kernels.gpu_mosaic.attention_lists import lists
from pallas_kernels.gpu_mosaic.attention_mask import evaluate, missing
from softlib import attention, explain, masks
from softlib.attention._engine import kernels_gpu
from softlib.attention._engine.plan import plan_of
from softlib.attention._engine.scores import LogSoftplus, Softplus, StableMax
from softlib.attention._engine.tiles import Operands
from tests.host import jnp
from tests.kernels import attention_problems as problems
from tests.kernels.attention_problems import Problem

SIMULATED = plgpu.InterpretGPUParams(detect_races=True)
# Rings of two slots, which three tiles wrap.
SMALL = attention_tiles.Tiles(keys=64, stages=2)

# No key for the first queries, a whole tile of them, no query for the last keys.
LATE = masks.Causal(-140)
BANDED = ~masks.Window(90, 20)
PROBLEMS = {
    "heads in groups": Problem(masks.Causal(60), N=2, E=128),
    "empty tile, sinks": Problem(LATE, T=264, sinks=True),
    "float16, overhang": Problem(BANDED, T=135, S=203, dtype="float16", H=96),
    "log softplus, softcap": Problem(
        masks.Radial(70), T=72, S=140, kind=LogSoftplus(), softcap=3.0, spread=4.0
    ),
    "lengths, extreme scores": Problem(
        masks.All(), T=64, S=136, B=2, lengths=(0, 70), spread=300.0
    ),
}
# Some queries find no segment of theirs, and a few keys no query.
IDS_OF_QUERIES = np.sort(np.random.default_rng(3).integers(0, 5, (2, 72)), axis=1)
IDS_OF_KEYS = np.sort(np.random.default_rng(4).integers(1, 6, (2, 136)), axis=1)
SEGMENTS = masks.Segments(IDS_OF_QUERIES.astype(np.int32), IDS_OF_KEYS.astype(np.int32))
EXTRAS = {
    "segments, heads in groups": Problem(
        SEGMENTS & masks.Causal(40), T=72, S=136, B=2, N=2
    ),
    "segments from an offset, sinks": Problem(
        SEGMENTS.shift(np.array([-3, 5], np.int32)) & masks.Causal(70),
        *(72, 136),
        B=2,
        sinks=True,
    ),
    "array, heads in groups, empty rows": Problem(
        masks.Causal(30), T=72, S=136, B=2, N=2, dense="bts", dtype="float16"
    ),
    "array per head, aligned, float32 results": Problem(
        T=128, S=128, N=2, E=128, dense="nts", sinks=True, wide=True
    ),
    "array of keys, queries": Problem(BANDED, T=72, S=136, B=2, dense="bs", bias="nt"),
    "bias, float32 results": Problem(
        *(masks.Causal(), 135, 203, 2), bias="nts-", bias_dtype="bfloat16", wide=True
    ),
    "bias, softcap": Problem(
        masks.All(), T=72, S=136, B=2, bias="bts", softcap=2.0, spread=3.0
    ),
    "bias of keys": Problem(masks.All(), T=72, S=136, N=2, bias="ns", dense="t"),
}
SLOW_EXTRAS = {
    "segments or a window, softcap": Problem(
        masks.Segments(SEGMENTS.query[0], SEGMENTS.key) | masks.Window(3, 3),
        *(72, 136),
        B=2,
        N=2,
        softcap=3.0,
        dtype="float16",
    ),
    "no segment, array, bias": Problem(
        ~SEGMENTS & masks.Window(60, 20),
        *(72, 136),
        B=2,
        N=2,
        K=2,
        dense="nts",
        bias="bs",
    ),
    "array and bias": Problem(
        *(LATE, 264, 200, 2, 1),
        dense="bnts",
        bias="bnts-",
        bias_dtype="float16",
        sinks=True,
    ),
    "numbers": Problem(B=2, N=2, dense="b", bias="bn"),
    "array, one slot, kernels apart": Problem(
        T=128, S=128, H=256, E=256, N=2, dense="ts"
    ),
    "lengths, softplus, bias": Problem(
        *(masks.All(), 64, 136),
        B=2,
        kind=Softplus(),
        lengths=(0, 70),
        bias="ns",
        dense="bts",
    ),
    "log softplus, softcap, bias": Problem(
        kind=LogSoftplus(), softcap=3.0, spread=4.0, bias="nts", N=2
    ),
    "stablemax, bias": Problem(BANDED, kind=StableMax(), bias="ts-", dense="nt", N=2),
}
SLOW = {
    "lengths, softplus": Problem(
        masks.All(), T=64, S=136, B=2, kind=Softplus(), lengths=(0, 70)
    ),
    "stablemax": Problem(masks.Radial(5), B=2, kind=StableMax()),
    "whole": Problem(masks.All(), T=256, S=256, H=128, E=128),
    "softcap": Problem(softcap=2.0, E=72, spread=3.0, dtype="float16"),
    "log softplus": Problem(LATE, T=264, kind=LogSoftplus(), spread=20.0),
    "softplus": Problem(BANDED, kind=Softplus(), softcap=2.0, N=2, K=2),
    "lengths and sinks": Problem(
        BANDED, B=2, N=4, K=2, lengths=(0, 100), sinks=True, dtype="float16"
    ),
    "empty rows": Problem(LATE, T=264, kind=StableMax()),
    "one slot, kernels apart": Problem(T=128, S=128, H=256, E=256, N=2),
    "float32 results, kernels apart": Problem(
        T=128, S=128, H=256, E=256, dtype="float16", wide=True
    ),
    "ragged, float32 results": Problem(T=135, S=203, N=2, H=72, sinks=True, wide=True),
    "looked up by tile": Problem(
        masks.Blocks(np.array([[1, 0], [0, 1], [1, 1]], bool), 128), T=290, S=201
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels in the interpreter, with small tiles."""
    for module, name in (
        (forward_pass, "attention"),
        (attention_backward, "query_gradient"),
        (attention_key_gradients, "key_gradients"),
    ):
        kernel = functools.partial(getattr(module, name), interpret=SIMULATED)
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(kernels_gpu, "choose_tiles", lambda *_: SMALL)


def check(problem: Problem) -> Any:
    return problems.check(problem, kernels_gpu, c=4 * max(problem.spread / 10, 1))


@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_gradients(name, interpreted):
    check(PROBLEMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_outputs_and_gradients(name, interpreted):
    check(SLOW[name])


@pytest.mark.parametrize("name", EXTRAS)
def test_arrays_over_pairs(name, interpreted):
    check(EXTRAS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_EXTRAS)
def test_more_arrays_over_pairs(name, interpreted):
    check(SLOW_EXTRAS[name])


def test_nan_in_tiles_that_are_not_listed_is_not_read(interpreted):
    problem = Problem(masks.Blocks(np.array([[1, 0, 1]], bool), 64), T=64, S=192)
    operands, options = problem.operands(), problem.options()
    unread = (jnp.arange(192) // 64 == 1)[None, :, None, None]
    assert operands.value is not None
    spoilt = operands._replace(
        key=jnp.where(unread, jnp.nan, operands.key),
        value=jnp.where(unread, jnp.nan, operands.value),
    )
    call = jax.jit(functools.partial(kernels_gpu.FORWARD.call, options))
    for found, expected in zip(call(spoilt)[:2], call(operands)[:2], strict=True):
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------------- lists and masks
def test_lists_hold_every_tile_once_and_the_longest_first():
    plan = plan_of(masks.Causal(), (1000, 1000), (128, 64))
    found = lists(plan.whole, plan.partial, plan.grid[0])
    entries = {(0, *pair) for pair in plan.whole.T} | {
        (1, *pair) for pair in plan.partial.T
    }
    for tile, start, some, stop in found.tiles:
        for at in range(start, stop):
            entries.remove((int(at >= some), tile, found.others[at]))
    assert not entries
    counts = found.tiles[:, 3] - found.tiles[:, 1]
    assert (np.diff(counts) <= 0).all()
    assert sorted(found.tiles[:, 0]) == list(range(plan.grid[0]))


def test_without_any_pair_there_is_still_an_entry_to_read():
    none = np.zeros((2, 0), np.int32)
    found = lists(none, none, 3)
    assert len(found.others) == 1
    np.testing.assert_array_equal(found.tiles[:, 1:], 0)


@pytest.mark.parametrize(
    "mask",
    [
        ~masks.Window(3, 5) & masks.Dilated(3),
        masks.Radial(300, rule="pow2", min_window=96),
        (masks.Chunked(7) | masks.GlobalTokens(2, 9)).shift(3),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_masks_in_other_words_are_the_same(mask):
    query, key = jnp.arange(70)[:, None] * 11, jnp.arange(90)[None] * 7
    query, key = (jnp.broadcast_to(x, (70, 90)) for x in (query, key))
    found = evaluate(lambda *at: mask(*at), query, key)
    np.testing.assert_array_equal(found, mask(query, key))
    assert missing(lambda *at: mask(*at), 0) == []


# -------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("features", [64, 128, 192, 256])
@pytest.mark.parametrize("value_features", [64, 128, 192, 256])
def test_tiles_fit(features, value_features):
    for choose in (attention_tiles.choose_tiles, attention_tiles.choose_backward_tiles):
        tiles = choose(features, value_features, H100)
        assert tiles is not None
        assert tiles.smem_bytes(features, value_features) <= H100.smem_bytes


def test_no_tiles_for_features_that_do_not_fit():
    assert attention_tiles.choose_tiles(1024, 64, H100) is None
    assert attention_tiles.choose_tiles(64, 320, H100) is None
    assert attention_tiles.choose_backward_tiles(256, 320, H100) is None


# ----------------------------------------------------------------------------- dispatch
def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


QUERY, KEY = array(2, 256, 4, 64), array(2, 384, 2, 64)


def machine(kind: str) -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def hopper() -> Any:
    return machine("NVIDIA H100 80GB HBM3")


def training(query: Any, key: Any, value: Any, **options: Any) -> Any:
    out = attention.dot_product_attention(query, key, value, **options)
    return out.astype(jnp.float32).sum()


def test_lowered_for_hopper_a_training_step_is_three_kernels():
    step = jax.jit(jax.grad(functools.partial(training, is_causal=True), (0, 1, 2)))
    with hopper():
        traced = step.trace(QUERY, KEY, KEY)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        plain = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("@mosaic_gpu") == 3
    assert "stablehlo.while" not in text
    assert "custom_call" not in plain


def test_lowered_for_hopper_arrays_over_pairs_are_read_by_kernels():
    bias, dense = array(2, 1, 256, 384), array(1, 4, 256, 384, dtype=jnp.bool_)

    def loss(query: Any, key: Any, value: Any, bias: Any, dense: Any) -> Any:
        mask = masks.Causal(), dense
        return training(query, key, value, mask=mask, bias=bias)

    arguments = (QUERY, KEY, KEY, bias, dense)
    with hopper():
        text = str(explain(jax.grad(loss, (0, 1, 2, 3)), *arguments))
        trained = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arguments)
        lowered = trained.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("cuda: pallas_gpu") == 2
    assert "not pallas_gpu" not in text
    assert "the gradient of `bias`" in text
    assert lowered.count("@mosaic_gpu") == 3


def test_lowered_for_hopper_packed_sequences_from_an_offset_are_read_by_kernels():
    def loss(query: Any, key: Any, value: Any, ids: Any, offset: Any) -> Any:
        mask = masks.Segments(ids[:, :256], ids) & masks.Causal()
        return training(query, key, value, mask=mask, query_offset=offset)

    ids, offset = array(2, 384, dtype=jnp.int32), array(dtype=jnp.int32)
    arguments = (QUERY, KEY, KEY, ids, offset)
    with hopper():
        text = str(explain(jax.grad(loss, (0, 1, 2)), *arguments))
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("cuda: pallas_gpu") == 2
    assert "not pallas_gpu" not in text
    assert lowered.count("@mosaic_gpu") == 3
    assert "stablehlo.while" not in lowered


@pytest.mark.parametrize("check_vma", [True, False])
def test_lowered_inside_shard_map(check_vma):
    """The interpreter does not run there: what is declared of results is checked."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    call = functools.partial(training, mask=masks.Window(30, 0))

    def step(sinks: Any, *arrays: Any) -> Any:
        lengths = jnp.full(arrays[0].shape[0], 99)
        loss = lambda sinks, *qkv: call(
            *qkv, sinks=sinks, key_value_seq_lengths=lengths
        )
        return jax.grad(loss, (0, 1, 2, 3))(sinks, *arrays)

    rows = PartitionSpec("data")
    specs = PartitionSpec(), rows, rows, rows
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma
        )
        traced = jax.jit(sharded).trace(array(4, dtype=jnp.float32), QUERY, KEY, KEY)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 3


def test_lowered_for_hopper_a_ring_is_kernels_with_float32_results():
    """Two steps: of a device's own keys, and of those of the device before it."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((2,), ("keys",), (AxisType.Auto,), abstract_device=device)
    attend = functools.partial(
        attention.sequence_parallel_attention, axis_name="keys", mask=masks.Causal()
    )

    def loss(query: Any, key: Any, value: Any) -> Any:
        spec = PartitionSpec(None, "keys")
        call = lambda *arrays: attend(*arrays)
        divided: Any = jax.shard_map(
            call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec
        )
        return divided(query, key, value).astype(jnp.float32).sum()

    query, key = array(1, 512, 2, 64), array(1, 512, 1, 64)
    with jax.sharding.use_abstract_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key)
        lowered = step.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu") == 6
    assert "stablehlo.while" not in lowered


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-40GB"])
def test_other_gpus_get_no_kernel(kind):
    with machine(kind):
        text = str(explain(training, QUERY, KEY, KEY))
        program = jax.jit(training).trace(QUERY, KEY, KEY)
        lowered = program.lower(lowering_platforms=("cuda",)).as_text()
    found = "a Blackwell" if kind.endswith("B200") else "another device"
    assert f"not pallas_gpu: it is written for Hopper GPUs, this is {found}" in text
    assert "custom_call" not in lowered


def test_explain_tells_the_tiles_and_the_padding():
    odd = array(1, 300, 2, 80), array(1, 301, 2, 80)
    with hopper():
        text = str(explain(jax.grad(training, (0, 1, 2)), *odd, odd[1]))
        aligned = str(explain(training, QUERY, KEY, KEY))
    assert text.count("cuda: pallas_gpu") == 2
    tiles = "tiles of 128 queries x 128 keys in 2 stages"
    assert f"pallas_gpu: {tiles}; arrays are copied to pad" in text
    assert "pad" not in aligned
    with hopper():
        mask = np.ones((2, 1, 256, 380), bool)
        short = array(2, 380, 2, 64)
        text = str(explain(functools.partial(training, mask=mask), QUERY, short, short))
    assert "arrays over pairs are copied to pad them" in text


IDS = np.zeros((5, 256), np.int32)
REFUSALS: dict[str, dict[str, Any]] = {
    "`query` is float32, not bfloat16 or float16": {"dtype": jnp.float32},
    "`key` is float16, `query` is bfloat16": {"key_dtype": jnp.float16},
    "64 queries are too few": {"T": 64},
    "16 features of a query are too few": {"H": 16},
    "320 features of a query and 320 of a value": {"H": 320},
    "the mask reads 5 numbers per query": {
        "mask": functools.reduce(lambda x, y: x | y, map(masks.Segments, IDS))
    },
    "the mask looks into an array inside of tiles of 128 x 128": {
        "mask": masks.Blocks(np.eye(8, dtype=bool), 32)
    },
    "may leave the range of float16": {
        "dtype": jnp.float16,
        "key_dtype": jnp.float16,
        "normalizer": "stablemax",
    },
    "weights are rounded to the bfloat16": {"precision": "highest"},
    "it chooses its own blocks": {"block_query": 128},
    "or a BlockPlan are given": {"mask": attention.block_plan(None, 256, 256)},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    given = dict(REFUSALS[reason])
    T, H = given.pop("T", 256), given.pop("H", 64)
    dtype = given.pop("dtype", jnp.bfloat16)
    query = array(1, T, 2, H, dtype=dtype)
    key = array(1, 256, 2, H, dtype=given.pop("key_dtype", jnp.bfloat16))
    with hopper():
        text = str(explain(functools.partial(training, **given), query, key, key))
        assert "cuda: pallas_gpu" not in text
        assert reason in text
        with pytest.raises(NotImplementedError, match="pallas_gpu"):
            jax.eval_shape(
                functools.partial(training, implementation="pallas_gpu", **given),
                *(query, key, key),
            )


class Curved(masks.Mask):
    """A mask that takes a sine."""

    def attends(self, query_index, key_index):
        return jnp.sin(query_index + key_index) > 0


def reason_of(mask: masks.Mask, length: int, block: int) -> str | None:
    """Why there is no kernel for the mask, of arrays that are not there."""
    plan = plan_of(mask, (length, length), (block, block))
    found = []

    def call(query: Any, key: Any, value: Any) -> None:
        operands = Operands(query, key, value, plan)
        found.append(kernels_gpu.FORWARD.why_not(Problem().options(), operands))

    with hopper():
        jax.eval_shape(call, *(array(1, length, 1, 64),) * 3)
    return found[0]


def test_operations_that_kernels_lack_are_named():
    reason = reason_of(Curved(), 256, 128)
    assert reason == "the mask takes operations that it lacks: sin"


def test_lists_that_are_too_long():
    reason = reason_of(masks.Causal(), 1 << 21, 1 << 14)
    assert reason is not None
    assert "is longer than" in reason
