"""Softmax and logsumexp of rows on TPUs, in the interpreter, against the oracle."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import softlib
from pallas_kernels._devices import ANY_TPU, V4, V5E, V5P, V6E, V7X
from pallas_kernels.tpu import softmax as kernels, softmax_tiles
from pallas_kernels.tpu.softmax_tiles import Tiles
from softlib.softmax import _kernels, logsumexp, softmax
from softlib.softmax._row_blocks import Options, Rows
from softlib.testing import assert_close
from tests import operations
from tests.host import jnp
from tests.oracles import softmax as oracle

SIMULATED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
# A fourth of the time, and what lies behind the end is NaN in it.
PLAIN: Any = True
INF, NAN = np.inf, np.nan


def rows(shape: tuple[int, int], dtype: Any, scale: float = 3.0) -> jax.Array:
    x = scale * np.random.default_rng(0).normal(size=shape)
    x[:, ::5] = -INF
    x[shape[0] // 2] = -INF
    x[-1, 1] = 3e4  # of a vocabulary that is sure
    return jnp.asarray(x, dtype)


# Shape, tiles, dtype and dtype of the result.
CASES = {
    "whole rows": ((16, 256), Tiles(8, 256, 8, 128), "float32", None),
    "ragged whole rows": ((37, 300), Tiles(16, 384, 8, 128), "float32", None),
    "fewer columns than a chunk": ((11, 150), Tiles(8, 256, 8, 256), "float32", None),
    "streamed": ((16, 512), Tiles(8, 256, 8, 128), "float32", None),
    "ragged streamed": ((21, 1003), Tiles(16, 256, 8, 128), "float32", None),
    "a last tile of some lanes": ((9, 516), Tiles(8, 256, 8, 256), "float32", None),
    "bfloat16": ((37, 300), Tiles(32, 384, 16, 256), "bfloat16", None),
    "bfloat16 streamed": ((37, 777), Tiles(16, 256, 16, 128), "bfloat16", None),
    "wider result": ((37, 300), Tiles(16, 384, 16, 128), "bfloat16", "float32"),
    "narrower result": ((37, 700), Tiles(16, 256, 16, 128), "float32", "bfloat16"),
    "more rows than lanes": ((140, 130), Tiles(136, 256, 8, 128), "float32", None),
}


def both(
    x: Any, tiles: Tiles, mode: Any, out_dtype: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax and logsumexp by one program."""

    @jax.jit
    def call(x):
        y = kernels.softmax(x, out_dtype=out_dtype, tiles=tiles, interpret=mode)
        return y, kernels.logsumexp(x, tiles=tiles, interpret=mode)

    return call(x)


# These with races.
SIMULATED_CASES = ("more rows than lanes", "bfloat16 streamed")


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name):
    check(name, SIMULATED if name in SIMULATED_CASES else PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CASES} - {*SIMULATED_CASES}))
def test_nothing_races_anywhere(name):
    check(name, SIMULATED)


def check(name: str, mode: Any) -> None:
    shape, tiles, dtype, out_dtype = CASES[name]
    x = rows(shape, dtype)
    y, lse = both(x, tiles, mode, out_dtype)
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.dtype(out_dtype or dtype)
    assert lse.dtype == jnp.float32
    assert_close(y, oracle.softmax(wide), dtype=y.dtype, length=shape[1])
    assert_close(lse, oracle.logsumexp(wide), dtype="float32", length=shape[1])
    assert (np.asarray(y)[shape[0] // 2] == 0).all()
    assert np.asarray(lse)[shape[0] // 2] == -INF


@pytest.mark.parametrize("columns", [256, 768], ids=["whole", "streamed"])
def test_special_values_stay_in_their_row(columns):
    x = np.zeros((16, columns), np.float32)
    x[0] = -INF
    x[1, -1] = INF
    x[2, 5] = NAN
    x[3, columns // 2] = -INF
    x[4], x[5] = 3.4e38, -3.4e38
    y, lse = (np.asarray(a) for a in both(x, Tiles(8, 256, 8, 128), PLAIN))
    assert (y[0] == 0).all()
    assert np.isnan(y[1:3]).all()
    assert y[3, columns // 2] == 0
    np.testing.assert_allclose(y[4:], np.full((12, columns), 1 / columns), 1e-5)
    np.testing.assert_array_equal(lse[:3], [-INF, INF, NAN])
    np.testing.assert_allclose(lse[4:6], [3.4e38, -3.4e38], 1e-6)


def test_what_lies_behind_the_end_does_not_matter():
    mode = pltpu.InterpretParams(uninitialized_memory="nan")
    x = rows((21, 700), jnp.float32)
    for tiles in (Tiles(16, 768, 8, 256), Tiles(16, 256, 8, 128)):
        y = kernels.softmax(x, tiles=tiles, interpret=mode)
        assert_close(y, oracle.softmax(np.asarray(x)), dtype="float32", length=700)


# --------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("device", [V4, V5E, V5P, V6E, V7X, ANY_TPU], ids=str)
@pytest.mark.parametrize("out", [None, "float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 128), (8192, 128_256), (5003, 50_257), (300, 4_000_037)]
)
def test_tiles_fit(device, out, shape):
    for dtype in ("float32", "bfloat16"):
        rows, columns = shape
        tiles = softmax_tiles.choose_tiles(rows, columns, dtype, out, device)
        held = softmax_tiles.held_bytes(dtype, out) * tiles.rows * tiles.columns
        assert held + softmax_tiles.SLACK_BYTES <= device.vmem_bytes
        assert tiles.rows % tiles.strip == 0
        narrow = "bfloat16" in (dtype, out)
        assert tiles.strip % (16 if narrow else 8) == 0
        assert tiles.columns % 128 == tiles.chunk % 128 == 0
        whole = tiles.columns >= columns
        assert whole or tiles.columns % tiles.chunk == 0


def test_a_row_is_streamed_only_where_it_does_not_fit():
    choose = functools.partial(
        softmax_tiles.choose_tiles, 8192, 128_256, "bfloat16", "bfloat16"
    )
    assert choose(V6E).columns >= 128_256
    assert choose(V4).columns < 128_256


# ----------------------------------------------------------------------------- dispatch
LARGE = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)


def lowered(call: Any, *arguments: Any, platform: str = "tpu") -> str:
    return (
        jax.jit(call).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    )


def test_the_program_of_a_tpu_has_the_kernels_and_no_other_has():
    both = lambda x: (softmax(x), logsumexp(x))
    text = lowered(both, LARGE)
    assert text.count("@tpu_custom_call") == 2
    assert "exponential" not in text
    assert "custom_call" not in lowered(both, LARGE, platform="cpu")


def test_bfloat16_is_neither_copied_nor_widened_for_the_kernel():
    where = jax.ShapeDtypeStruct(LARGE.shape, bool)
    assert "xf32>" not in lowered(softmax, LARGE)
    assert "2048x1024xf32" not in lowered(
        lambda x, w: softmax(x, where=w), LARGE, where
    )


def test_derivatives_of_every_order_have_kernels():
    """Forward, reverse, and one over the other; the kernel itself has no rule."""
    loss = lambda x: (softmax(x).astype(jnp.float32) ** 2).sum() + logsumexp(x).sum()
    jvp = lambda x, dx: jax.jvp(loss, (x,), (dx,))
    hessian = lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,))
    for call, arguments in (
        (jvp, (LARGE, LARGE)),
        (jax.grad(loss), (LARGE,)),
        (hessian, (LARGE, LARGE)),
        (jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()), (LARGE,)),
    ):
        assert "@tpu_custom_call" in lowered(call, *arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_by_the_kernel_are_those_of_plain_jax(dtype, monkeypatch):
    monkeypatch.setattr(_kernels, "LEAST", 1)
    x, dx, g = (rows((5, 150), dtype) for _ in range(3))
    dx, g = (jnp.where(jnp.isfinite(a), a, 0) for a in (dx[::-1], g[:, ::-1]))

    def derivatives(call):
        tangent = lambda x: jax.jvp(call, (x,), (dx,))[1]
        pulled = lambda x: jax.vjp(call, x)[1](g)[0]
        return tangent(x), pulled(x), jax.jvp(pulled, (x,), (dx,))[1]

    plain = jax.jit(lambda: derivatives(softmax))()
    interpreted = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    with interpreted, operations.kernels_of("tpu"):
        program = jax.jit(lambda: derivatives(softmax)).lower()
    assert "callback" in program.as_text()  # of the interpreter
    found = program.compile()()
    for a, b in zip(found, plain, strict=True):
        assert_close(a, np.asarray(b, np.float64), dtype=dtype, length=150)


@pytest.mark.parametrize("shape", [(3, 5, 130), (2, 16, 128), (140,)])
def test_any_number_of_axes_before_the_row(shape, monkeypatch):
    monkeypatch.setattr(_kernels, "LEAST", 1)
    of_softmax, of_logsumexp = (
        _kernels.implementations(name)[0] for name in ("softmax", "logsumexp")
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    options = Options((len(shape) - 1,), jnp.float32)
    operands = Rows(x)
    with pltpu.force_tpu_interpret_mode(PLAIN):  # the simulating one has no vmap
        y, lse = jax.jit(
            lambda given: (
                of_softmax.call(options, given),
                of_logsumexp.call(options, given),
            )
        )(operands)
    assert_close(y, oracle.softmax(np.asarray(x)), dtype="float32", length=130)
    assert_close(lse, oracle.logsumexp(np.asarray(x)), dtype="float32", length=130)


def test_explain_tells_the_tiles():
    text = str(softlib.explain(lambda x: (softmax(x), logsumexp(x)), LARGE))
    assert text.count("tpu: pallas_tpu") == 2
    assert "pallas_tpu: tiles of 512 rows x 1024 columns" in text


REFUSALS = {
    "256 elements are too few": (lambda x: softmax(x), (2, 128), "float32"),
    "the axes (0,) of a row are not": (
        lambda x: softmax(x, 0),
        (2048, 1024),
        "float32",
    ),
    "it has no float16": (lambda x: softmax(x), (2048, 1024), "float16"),
    "rows of 100 columns do not": (lambda x: logsumexp(x), (20_000, 100), "float32"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    call, shape, dtype = REFUSALS[reason]
    text = str(softlib.explain(call, jax.ShapeDtypeStruct(shape, dtype)))
    assert f"not pallas_tpu: {reason}" in text


def test_inside_shard_map_rows_stay_on_their_device(monkeypatch):
    monkeypatch.setattr(_kernels, "LEAST", 1)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    for call, spec in ((softmax, P("i", None)), (logsumexp, P("i"))):
        mapped = jax.shard_map(call, mesh=mesh, in_specs=P("i", None), out_specs=spec)
        assert "@tpu_custom_call" in lowered(mapped, LARGE)
