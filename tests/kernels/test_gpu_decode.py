"""Decode attention on Hopper, in the simulating interpreter, against the oracle."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

import softlib
from pallas_kernels._devices import H100
from pallas_kernels.gpu_mosaic import decode as kernels, decode_tiles
from pallas_kernels.gpu_mosaic.attention_tiles import ROWS, SPARE_BYTES
from pallas_kernels.gpu_mosaic.decode_tiles import Tiles
from softlib.attention import decode_attention
from softlib.attention._decode import kernels as _kernels
from tests import operations
from tests.attention.decode_problems import problem
from tests.host import jnp
from tests.kernels import decode_problems as problems

SIMULATED = plgpu.InterpretGPUParams(detect_races=True)
# A ring of two tiles of 64 keys that wraps, with a ragged last one.
LENGTHS = (152, 70, 0)
HOPPER = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def interpreted(monkeypatch):
    """Compiles `decode_attention` by the kernel, with two stages.

    What comes is a program of arrays, lengths and of the numbers of a unified maximum.
    """
    for name in ("LEAST_KEYS", "LEAST_FEATURES"):
        monkeypatch.setattr(_kernels, name, 1)
    monkeypatch.setattr(_kernels.devices, "gpu_generation", lambda: "hopper")
    choose: Any = decode_tiles.choose_tiles

    def few_stages(*args, **options):
        return Tiles(choose(*args, **options).splits, 2)

    monkeypatch.setattr(decode_tiles, "choose_tiles", few_stages)
    simulated = functools.partial(kernels.decode, interpret=SIMULATED)
    monkeypatch.setattr(kernels, "decode", simulated)

    def compiled(arrays, lengths, *, numbers=(), num_splits=1, **options):
        @jax.jit
        def decode(arrays, traced):
            found = decode_attention(
                **arrays,
                **traced,
                **options,
                num_splits=num_splits,
                implementation="pallas_gpu",
                return_statistics=True,
            )
            return found.output, found

        with operations.kernels_of("cuda"):
            program = decode.lower(arrays, problems.traced(lengths, numbers)).compile()
        return lambda arrays, lengths, numbers=(): program(
            arrays, problems.traced(lengths, numbers)
        )

    return compiled


def small(dtype="bfloat16", *, B=3, S=152, N=2, K=1, **sizes):
    arrays = problem(dtype, B=B, S=S, N=N, K=K, **{"H": 64, "Hv": 64, **sizes})
    return {**arrays, "scale": arrays["scale"] * 0.3}


# Sizes, options of the kernel and of the oracle, options of the kernel.
CASES: dict[str, Any] = {
    "two splits": ({}, {}, {"num_splits": 2}),
    "more splits than tiles have": ({"B": 1}, {}, {"num_splits": 3, "phi": 0.3}),
    "no lengths": ({"lengths": None, "S": 128, "B": 1}, {}, {"phi": 0.3}),
    "causal draft, softcap": (
        {"T": 5, "B": 2},
        {"is_causal": True, "softcap": 2.0},
        {"phi": 0.0},
    ),
    "features of two spans": ({"B": 1, "H": 128, "Hv": 192}, {}, {"phi": 0.3}),
    "float16, sinks": ({"dtype": "float16", "B": 2, "sinks": True}, {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name, interpreted):
    sizes, shared, options = CASES[name]
    sizes = dict(sizes)
    lengths = sizes.pop("lengths", LENGTHS[: sizes.get("B", 3)])
    arrays = small(**sizes)
    numbers = {"phi": np.float32(options["phi"])} if "phi" in options else {}
    static = {n: x for n, x in options.items() if n not in numbers} | shared
    call = interpreted(arrays, lengths, numbers=numbers, **static)
    out, statistics = call(arrays, lengths, numbers)
    check(arrays, lengths, out, statistics, **shared)
    assert not statistics.needs_recompute.any()


def check(arrays, lengths, out, statistics, scale=1, **shared):
    """Results by the oracle's; `scale` is that of the largest scores."""
    keys, features = 152, 64
    problems.check_results(
        *(arrays, lengths, out, statistics),
        # Scores of some hundreds are as exact as their products.
        keys=keys * scale**2,
        features=features * scale**2,
        out_length=keys,
        **shared,
    )


# Of NumPy, which multiplies in the interpreter.
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")

# By criterion the splits, the heads, and the valid ranges; in the last of "row_max" the
# scores of the first sequence are large.
WIDE = (-70.0, 80.0)
PROGRAMS: dict[Any, Any] = {
    None: (1, {"N": 2, "K": 1}, {}),
    "row_max": (
        2,
        {"N": 3, "K": 1},
        {"above": (-70.0, 5.0), "below": (6.0, 80.0), "overflow": (-70.0, 2e3)},
    ),
    "elementwise": (1, {"N": 6, "K": 2}, {"an element": (-4.0, 80.0)}),
}


@NOT_FINITE
@pytest.mark.parametrize("criterion", PROGRAMS)
def test_one_program_of_several_problems(criterion, interpreted):
    """Within its range, out of it, and with NaN; the running maximum has no range."""
    splits, heads, ranges = PROGRAMS[criterion]
    arrays, lengths = small(**heads), (152, 20, 0)
    phi = np.full(heads["N"], problems.PHI, np.float32)
    options = {"criterion": criterion} if criterion else {}

    numbers = functools.partial(problems.unified, criterion, valid_range=WIDE)
    call = interpreted(
        arrays, lengths, numbers=numbers(phi), num_splits=splits, **options
    )
    spread = np.linspace(-2, 2, heads["N"], dtype=np.float32)
    out, statistics = call(arrays, lengths, numbers(spread))
    check(arrays, lengths, out, statistics)
    assert not statistics.needs_recompute.any()
    for name, valid_range in ranges.items():
        given = numbers(phi, valid_range=valid_range)
        problems.check_rows_that_leave_the_range(
            name, call, check, arrays, lengths, criterion, given, overflow=64
        )
    if criterion != "elementwise":
        problems.check_what_lies_behind_the_length(
            call, check, arrays, lengths, numbers(0 * phi)
        )
    if criterion == "row_max":
        check_a_reference_that_is_no_number(call, arrays, lengths, numbers)


def check_a_reference_that_is_no_number(call, arrays, lengths, numbers):
    """It is not used, those of other heads are."""
    phi = np.full(arrays["query"].shape[2], 0.5, np.float32)
    phi[:2] = np.nan, -np.inf
    out, statistics = call(arrays, lengths, numbers(phi))
    check(arrays, lengths, out, statistics)
    some = np.asarray(statistics.max_score) > -np.inf
    np.testing.assert_array_equal(statistics.needs_recompute, some & ~np.isfinite(phi))


# --------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("features", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_tiles_fit(features):
    tiles = decode_tiles.choose_tiles(4, 8, 32_768, features, H100)
    assert tiles is not None
    ring = tiles.stages * 2 * decode_tiles.KEYS * sum(features)
    rest = 2 * ROWS * features[0] + 4 * ROWS * decode_tiles.COLUMNS
    assert ring + rest + SPARE_BYTES <= H100.smem_bytes
    assert tiles.stages >= 2


def test_splits_fill_the_device():
    choose: Any = functools.partial(
        decode_tiles.choose_tiles, heads=8, features=(128, 128), device=H100
    )
    assert choose(64, keys=32_768).splits == 1
    assert choose(1, keys=32_768).splits * 8 >= 2 * 132
    assert choose(1, keys=1024).splits == 2  # of 16 tiles
    assert choose(1, keys=1024, splits=5).splits == 5
    assert choose(1, keys=128, splits=128).splits == 2


# ----------------------------------------------------------------------------- dispatch
def machine(kind: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return AbstractMesh((), (), abstract_device=device)


def arrays_of(*, key=(4, 4096, 8, 128), dtype=jnp.bfloat16, **shapes):
    shapes = {"query": (4, 1, 32, key[3]), "key": key, "value": key, **shapes}
    return {n: jax.ShapeDtypeStruct(shape, dtype) for n, shape in shapes.items()}


def lowered(call: Any, platform: str, kind: str) -> str:
    with jax.sharding.use_abstract_mesh(machine(kind)):
        traced = jax.jit(call).trace(**arrays_of())
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("phi", [None, 0.0])
def test_the_program_of_hopper_has_the_kernel_and_no_other_has(phi):
    call = functools.partial(decode_attention, phi=phi)
    text = lowered(call, "cuda", HOPPER)
    assert text.count("@mosaic_gpu") == 1
    assert "stablehlo.dot_general" not in text
    assert "@mosaic_gpu" not in lowered(call, "cuda", "NVIDIA B200")
    assert "custom_call" not in lowered(call, "cpu", "cpu")


def test_derivatives_have_the_kernel():
    def loss(arrays):
        out = decode_attention(**arrays, phi=0.0)
        return (out.astype(jnp.float32) ** 2).sum()

    call = lambda **arrays: jax.grad(loss)(arrays)
    assert "@mosaic_gpu" in lowered(call, "cuda", HOPPER)


def explained(arrays, **options):
    with jax.sharding.use_abstract_mesh(machine(HOPPER)):
        return str(
            softlib.explain(functools.partial(decode_attention, **options), **arrays)
        )


def test_explain_tells_the_splits():
    for phi in (None, 0.0):
        text = explained(arrays_of(), phi=phi)
        assert "cuda: pallas_gpu" in text
        assert "pallas_gpu: 8 splits of the keys, " in text


REFUSALS: dict[str, Any] = {
    "512 keys are too few": (arrays_of(key=(4, 512, 8, 128)), {}),
    "4098 keys are not a multiple of 8": (arrays_of(key=(4, 4098, 8, 128)), {}),
    "`query` is float32, not bfloat16 or float16": (arrays_of(dtype=jnp.float32), {}),
    "96 features of a key are not a multiple": (arrays_of(key=(4, 4096, 8, 96)), {}),
    "320 features of a key are more than": (arrays_of(key=(4, 4096, 8, 320)), {}),
    "80 rows of queries of a head": (arrays_of(query=(4, 20, 32, 128)), {}),
    "weights relative to phi": (arrays_of(dtype=jnp.float16), {"phi": 0.0}),
    "products are those of the bfloat16": (arrays_of(), {"precision": "highest"}),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    arrays, options = REFUSALS[reason]
    assert f"not pallas_gpu: {reason}" in explained(arrays, **options)


def test_other_machines_are_refused():
    call = lambda arrays: decode_attention(**arrays)
    text = str(softlib.explain(call, arrays_of()))
    assert "not pallas_gpu: it is written for Hopper GPUs" in text
