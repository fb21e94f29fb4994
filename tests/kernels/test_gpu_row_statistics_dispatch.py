"""When the row-statistics kernels for GPUs run, and in what tiles."""

import functools
import itertools
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec as P

from pallas_kernels._devices import H100
from pallas_kernels.gpu_mosaic import _row_tiles
from pallas_kernels.gpu_mosaic._row_tiles import BLOCK, Shapes
from softlib import explain, losses
from softlib.logits._engine import kernels_gpu
from softlib.logits._engine.head import Head
from softlib.logits._engine.stream import BackwardOperands
from softlib.logits._engine.tile import Modifiers, Options, RowStatistics
from softlib.logits._engine.tile_gradient import RowCotangents
from tests.host import jnp
from tests.oracles.row_statistics import STATISTICS as ALL

FEW = ("lse", "label_logits")
F32, F16, BF16 = jnp.float32, jnp.float16, jnp.bfloat16


# --------------------------------------------------------------------------- tile sizes
SIZES = [
    Shapes(8192, 2304, 256_000, 4),
    Shapes(1000, 760, 50_257, 9),
    Shapes(64, 64, 2048, 18),
    Shapes(65_536, 4096, 128_256, 4),
    Shapes(16_384, 4096, 151_936, 5, vocab_axis=1, rounded=True),
    Shapes(4001, 1000, 100_280, 5, vocab_axis=1, filtered=True),
    Shapes(100, 20_480, 2056, 5, rounded=True),
]


@pytest.mark.parametrize("shapes", SIZES)
def test_tiles_fit_and_no_split_is_empty(shapes):
    forward = _row_tiles.choose_tiles(shapes, H100)
    backward = _row_tiles.choose_backward_tiles(shapes, H100)
    assert forward is not None
    assert backward is not None
    assert backward.chunk % 256 == 0
    assert backward.chunk - 256 < shapes.vocabulary
    visited = shapes.vocabulary
    if shapes.rounded:
        assert forward.chunk is not None
        assert forward.chunk % 256 == 0
        assert 2 * forward.chunk * shapes.features <= _row_tiles.COPY_BYTES
        visited = forward.chunk
    for tiles, classes in (
        (forward.logits, visited),
        (backward.logits, backward.chunk),
    ):
        count = -(-classes // tiles.classes)
        assert -(-count // tiles.splits) * (tiles.splits - 1) < count
        assert tiles.classes <= 256
        assert tiles.stages >= 3
        slots = tiles.stages * (BLOCK + tiles.classes) * 128
        assert slots < H100.smem_bytes
    assert backward.chunk % backward.logits.classes == 0
    for product in (backward.hidden, backward.weight):
        assert product.stages >= 3
        assert product.stages * (BLOCK + product.columns) * 128 < H100.smem_bytes
    if shapes.vocab_axis == 1:
        assert backward.chunk % backward.weight.columns == 0


def test_more_numbers_make_narrower_tiles():
    choose = _row_tiles.choose_backward_tiles
    found = [choose(Shapes(8192, 2304, 256_000, n), H100) for n in (4, 10, 18, 19)]
    assert [t and t.logits.classes for t in found] == [256, 128, 64, None]


def test_what_is_stored_is_little():
    rows, vocabulary = 8192, 256_000
    chosen = _row_tiles.choose_backward_tiles(Shapes(rows, 2304, vocabulary), H100)
    assert chosen is not None
    assert 2 * rows * chosen.chunk <= 0.01 * 4 * rows * vocabulary


# ----------------------------------------------------------------------------- dispatch


def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


HEAD = (
    array(BF16, 256, 128),
    array(BF16, 50_257, 128),
    array(jnp.int32, 256),
)


def machine(kind: str, devices: int | None = None) -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    sizes, names = ((), ()) if devices is None else ((devices,), ("d",))
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, names, axis_types=types, abstract_device=device)


HOPPER = machine("NVIDIA H100 80GB HBM3")


def lowered(function: Any, *arguments: Any, mesh: Any = HOPPER) -> str:
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def training(hidden, weight, labels, **options):
    loss = losses.linear_softmax_cross_entropy(hidden, weight, labels, **options)
    return loss.mean()


STEP = jax.grad(training, argnums=(0, 1))


def test_lowered_for_hopper_a_training_step_is_four_kernels():
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(STEP).trace(*HEAD)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        plain = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("@mosaic_gpu") == 4
    assert text.count("stablehlo.while") == 1  # over the chunks
    assert "custom_call" not in plain


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-40GB"])
def test_other_gpus_get_no_kernel(kind):
    with jax.sharding.use_abstract_mesh(machine(kind)):
        text = str(explain(training, *HEAD))
    found = "a Blackwell" if kind.endswith("B200") else "another device"
    assert f"not pallas_gpu: it is written for Hopper GPUs, this is {found}" in text
    assert "custom_call" not in lowered(training, *HEAD, mesh=machine(kind))


def test_it_can_be_transformed():
    several = array(BF16, 3, 256, 128), HEAD[1], array(jnp.int32, 3, 256)
    over_batch = jax.vmap(STEP, (0, None, 0))
    assert "mosaic_gpu" in lowered(over_batch, *several)
    assert "mosaic_gpu" in lowered(jax.grad(jax.checkpoint(training)), *HEAD)

    def curvature(hidden, weight, labels):
        slope = lambda hidden: jax.grad(training)(hidden, weight, labels)
        return jax.jvp(slope, (hidden,), (hidden,))

    lowered(curvature, *HEAD)


# The float32 weight is rounded in several chunks.
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "weight", [HEAD[1], array(F32, 600_000, 128)], ids=["bfloat16", "float32"]
)
def test_in_shard_map(check_vma, weight):
    mesh = machine("NVIDIA H100 80GB HBM3", 4)

    def loss(hidden, weight, labels):
        each = jax.shard_map(
            losses.linear_softmax_cross_entropy,
            mesh=mesh,
            in_specs=(P("d"), P(), P("d")),
            out_specs=P("d"),
            check_vma=check_vma,
        )
        return each(hidden, weight, labels).mean()

    arguments = array(jnp.bfloat16, 1024, 128), weight, array(jnp.int32, 1024)
    text = lowered(jax.grad(loss, (0, 1)), *arguments, mesh=mesh)
    assert text.count("@mosaic_gpu") == 4


def test_explain_tells_the_tiles():
    with jax.sharding.use_abstract_mesh(HOPPER):
        text = str(explain(STEP, *HEAD))
    assert text.count("cuda: pallas_gpu") == 2
    assert "pallas_gpu: tiles of 128 rows x 256 classes in 66 splits" in text
    assert "cotangents of 1024 classes at a time" in text


def test_explain_tells_what_a_float32_weight_costs():
    arguments = array(BF16, 256, 1024), array(F32, 150_000, 1024), HEAD[2]
    with jax.sharding.use_abstract_mesh(HOPPER):
        text = str(explain(STEP, *arguments))
    assert "not pallas" not in text
    rounded = "the float32 weight is rounded to bfloat16 in copies of"
    assert f"{rounded} 50176 classes, 98 MiB" in text
    assert f"{rounded} 2304 classes, 4.5 MiB" in text


REFUSALS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "8 rows are too few": (array(BF16, 8, 128), HEAD[1], {}),
    "100 classes are too few": (HEAD[0], array(BF16, 100, 128), {}),
    "`hidden` is float32, not bfloat16": (array(F32, 256, 128), HEAD[1], {}),
    "it rounds a float32 `weight` to bfloat16": (
        *(HEAD[0], array(F32, 50_257, 128)),
        {"precision": "highest"},
    ),
    "`hidden` is float16, `weight` is bf": (array(F16, 256, 128), HEAD[1], {}),
    "132 features are not a multiple": (
        *(array(BF16, 256, 132), array(BF16, 50_257, 132)),
        {},
    ),
    "50257 classes, which are the rows": (
        *(HEAD[0], array(BF16, 128, 50_257)),
        {"vocab_axis": 1},
    ),
    "it chooses its own tiles": (*HEAD[:2], {"vocab_chunk": 1000}),
    "it has no precision": (*HEAD[:2], {"precision": "BF16_BF16_F32"}),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    hidden, weight, options = REFUSALS[reason]
    labels = array(jnp.int32, *hidden.shape[:1])
    call = functools.partial(training, implementation="pallas_gpu", **options)
    with (
        jax.sharding.use_abstract_mesh(HOPPER),
        pytest.raises(NotImplementedError, match=reason),
    ):
        jax.eval_shape(call, hidden, weight, labels)


def test_it_refuses_what_only_the_engine_asks_for():
    hidden, weight = jnp.zeros((64, 64), BF16), jnp.zeros((2048, 64), BF16)
    labels = jnp.zeros((64, 9), jnp.int32)
    head = Head(hidden, weight, labels, Modifiers(None, None, None, None))
    one = head._replace(labels=labels[:, :1])
    excluding = Options(FEW, exclude_labels=True)
    eight = head._replace(
        labels=labels[:, :8],
        modifiers=Modifiers(*(jnp.ones(n) for n in (2048, 64, 64, 2048))),
    )
    row = jnp.ones(64)
    g = RowStatistics(row, jnp.ones((64, 8)), row, row, row)
    everything = BackwardOperands(eight, RowCotangents(row, row, g))
    with jax.sharding.use_abstract_mesh(HOPPER):
        reasons = [
            kernels_gpu.FORWARD.why_not(options, head)
            for options, head in ((Options(FEW), head), (excluding, one))
        ]
        reasons.append(kernels_gpu.BACKWARD.why_not(Options(ALL), everything))
    assert reasons[0] == "9 labels a row are more than 8"
    assert reasons[1] == "it does not leave the labels out of the sums"
    assert reasons[2] == kernels_gpu.NO_TILES


def test_what_it_accepts_it_lowers():
    rows, features, classes = (64, 137), (64, 72, 776), (2048, 2049, 50_264)
    layouts = itertools.product((0, 1), (F16, F32))
    sizes = list(itertools.product(rows, features, classes, layouts))
    # (D, V) needs classes in multiples of 8.
    sizes = [s for s in sizes if s[3][0] == 0 or s[2] % 8 == 0]
    chosen = sizes[6::13]
    assert len({layout for *_, layout in chosen}) == 4
    for count, size, vocabulary, (axis, dtype) in chosen:
        own = functools.partial(training, implementation="pallas_gpu", vocab_axis=axis)
        shape = (vocabulary, size) if axis == 0 else (size, vocabulary)
        arguments = array(F16, count, size), array(dtype, *shape)
        step = jax.grad(own, argnums=(0, 1))
        text = lowered(step, *arguments, array(jnp.int32, count))
        assert text.count("@mosaic_gpu") == 4
