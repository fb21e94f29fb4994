"""Softmax and logsumexp of rows on GPUs, in the interpreter, against the oracle."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

import softlib
from pallas_kernels._devices import B200, H100
from pallas_kernels.gpu_mosaic import softmax as kernels
from pallas_kernels.gpu_mosaic.softmax_tiles import Tiles, choose_tiles
from softlib.softmax import _kernels, logsumexp, softmax
from softlib.softmax._row_blocks import Options, Rows
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import softmax as oracle

SIMULATED = plgpu.InterpretGPUParams(detect_races=True)
INF, NAN = np.inf, np.nan


def rows(shape: tuple[int, int], dtype: Any) -> jax.Array:
    x = 3 * np.random.default_rng(0).normal(size=shape)
    x[:, ::5] = -INF
    x[shape[0] // 2] = -INF
    x[-1, 1] = 3e4  # of a vocabulary that is sure
    return jnp.asarray(x, dtype)


# Columns, tiles, dtype and dtype of the result.
CASES = {
    "one piece": (128, Tiles(128, 1, 1, True), "float32", None),
    "a ragged piece": (131, Tiles(128, 1, 1, True), "float32", None),
    "groups": (1024, Tiles(128, 1, 3, True), "float32", None),
    "ragged groups": (1003, Tiles(256, 1, 2, True), "float32", None),
    "read twice": (1003, Tiles(256, 1, 2, False), "float32", None),
    "bfloat16": (1032, Tiles(512, 4, 1, True), "bfloat16", None),
    "bfloat16 read twice": (777, Tiles(256, 1, 3, False), "bfloat16", None),
    "float16": (513, Tiles(256, 1, 2, True), "float16", None),
    "wider result": (516, Tiles(256, 2, 2, True), "bfloat16", "float32"),
    "narrower result": (516, Tiles(256, 2, 2, True), "float32", "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name):
    columns, tiles, dtype, out_dtype = CASES[name]
    x = rows((5, columns), dtype)
    y = kernels.softmax(x, out_dtype=out_dtype, tiles=tiles, interpret=SIMULATED)
    lse = kernels.logsumexp(x, tiles=tiles, interpret=SIMULATED)
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.dtype(out_dtype or dtype)
    assert lse.dtype == jnp.float32
    assert_close(y, oracle.softmax(wide), dtype=y.dtype, length=columns)
    assert_close(lse, oracle.logsumexp(wide), dtype="float32", length=columns)
    assert (y[2] == 0).all()
    assert lse[2] == -INF


@pytest.mark.parametrize("keeps", [True, False])
def test_special_values_stay_in_their_row(keeps):
    columns = 300
    x = np.zeros((7, columns), np.float32)
    x[0] = -INF
    x[1, -1] = INF
    x[2, 5] = NAN
    x[3, columns // 2] = -INF
    x[4], x[5] = 3.4e38, -3.4e38
    call = {"tiles": Tiles(128, 1, 2, keeps), "interpret": SIMULATED}
    z = jnp.asarray(x)
    y, lse = kernels.softmax(z, **call), kernels.logsumexp(z, **call)
    assert (y[0] == 0).all()
    assert np.isnan(y[1:3]).all()
    assert y[3, columns // 2] == 0
    np.testing.assert_allclose(y[4:], np.full((3, columns), 1 / columns), 1e-5)
    np.testing.assert_array_equal(lse[:3], [-INF, INF, NAN])
    np.testing.assert_allclose(lse[4:6], [3.4e38, -3.4e38], 1e-6)


# --------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("device", [H100, B200], ids=lambda device: device.name)
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("columns", [128, 129, 1000, 32_768, 50_257, 4_000_037])
def test_tiles_fit(device, writes, columns):
    for dtype in ("float32", "bfloat16", "float16"):
        tiles = choose_tiles(columns, dtype, device, writes=writes)
        assert columns % tiles.vector == 0
        assert tiles.piece % (128 * tiles.vector) == 0
        assert tiles.piece * tiles.group <= columns
        assert writes or not tiles.keeps


def test_a_row_is_kept_while_it_fits():
    choose = functools.partial(choose_tiles, device=H100, writes=True)
    assert choose(50_257, "bfloat16").keeps
    assert not choose(50_257, "float32").keeps


# ----------------------------------------------------------------------------- dispatch
LARGE = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)


def machine(kind: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return AbstractMesh((), (), abstract_device=device)


def lowered(call: Any, *arguments: Any, platform: str = "cuda") -> str:
    return (
        jax.jit(call).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    )


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA B200"])
def test_the_program_of_a_gpu_has_the_kernels(kind):
    both = lambda x: (softmax(x), logsumexp(x))
    with jax.sharding.use_abstract_mesh(machine(kind)):
        text = lowered(both, LARGE)
    assert text.count("@mosaic_gpu") == 2
    assert "xf32>" not in text.split("logsumexp")[0]


def test_other_machines_have_none():
    both = lambda x: (softmax(x), logsumexp(x))
    assert "custom_call" not in lowered(both, LARGE)
    assert "custom_call" not in lowered(both, LARGE, platform="cpu")
    with jax.sharding.use_abstract_mesh(machine("NVIDIA A100-SXM4-40GB")):
        assert "custom_call" not in lowered(both, LARGE)


def test_derivatives_of_every_order_have_kernels():
    loss = lambda x: (softmax(x).astype(jnp.float32) ** 2).sum() + logsumexp(x).sum()
    jvp = lambda x, dx: jax.jvp(loss, (x,), (dx,))
    hessian = lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,))
    with jax.sharding.use_abstract_mesh(machine("NVIDIA H100 80GB HBM3")):
        for call in (jvp, hessian):
            assert "@mosaic_gpu" in lowered(call, LARGE, LARGE)
        assert "@mosaic_gpu" in lowered(jax.grad(loss), LARGE)


def explained(call: Any, shape: tuple[int, ...], dtype: Any) -> str:
    with jax.sharding.use_abstract_mesh(machine("NVIDIA H100 80GB HBM3")):
        return str(softlib.explain(call, jax.ShapeDtypeStruct(shape, dtype)))


def test_explain_tells_the_tiles():
    text = explained(lambda x: (softmax(x), logsumexp(x)), *_known(LARGE))
    assert text.count("cuda: pallas_gpu") == 2
    assert "pallas_gpu: 1 pieces of 1024 columns at a time, kept in shared" in text


def _known(x: Any) -> tuple[Any, Any]:
    return x.shape, x.dtype


REFUSALS = {
    "256 elements are too few": (lambda x: softmax(x), (2, 128), "float32"),
    "the axes (0,) of a row are not": (
        lambda x: softmax(x, 0),
        (2048, 1024),
        "float32",
    ),
    "rows of 100 columns do not": (lambda x: logsumexp(x), (20_000, 100), "float32"),
    "100 rows leave some of 132": (lambda x: logsumexp(x), (100, 20_000), "float32"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    text = explained(*REFUSALS[reason])
    assert f"not pallas_gpu: {reason}" in text


def test_other_gpus_are_refused():
    text = str(softlib.explain(softmax, LARGE))
    assert "not pallas_gpu: it is written for Hopper and Blackwell" in text


@pytest.mark.parametrize("shape", [(3, 5, 130), (140,)])
def test_any_number_of_axes_before_the_row(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    options = Options((len(shape) - 1,), jnp.float32)
    operands = Rows(x)
    with plgpu.force_gpu_interpret_mode(SIMULATED):
        y, lse = (
            _kernels.implementations(name)[1].call(options, operands)
            for name in ("softmax", "logsumexp")
        )
    assert_close(y, oracle.softmax(np.asarray(x)), dtype="float32", length=130)
    assert_close(lse, oracle.logsumexp(np.asarray(x)), dtype="float32", length=130)
