"""The row-statistics kernels for GPUs, in the interpreter, against the oracle."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_mosaic import row_statistics as kernels
from pallas_kernels.gpu_mosaic._row_tiles import (
    BackwardTiles,
    ForwardTiles,
    ProductTiles,
    Tiles,
)
from softlib.logits._engine import kernels_gpu
from softlib.logits._engine.head import Head
from softlib.logits._engine.stream import BackwardOperands
from softlib.logits._engine.tile import Options, RowStatistics
from softlib.logits._engine.tile_gradient import RowCotangents
from softlib.testing import assert_close
from tests.host import jnp
from tests.kernels import row_problems as problems
from tests.kernels.row_problems import ALL, FEW, expected_of

SIMULATED = plgpu.InterpretGPUParams(detect_races=True)


@dataclasses.dataclass(frozen=True)
class Problem(problems.Problem):
    """With small tiles and chunks, so that rings wrap."""

    classes_of_tile: int = 64
    splits: int = 2
    chunk: int = 128

    def tiles(self) -> ForwardTiles:
        if self.weight_dtype is None:
            return ForwardTiles(Tiles(self.classes_of_tile, 32, 2, self.splits))
        return ForwardTiles(self._of_chunk(), self.chunk)

    def backward_tiles(self) -> BackwardTiles:
        product = ProductTiles(64 if self.vocab_axis == 0 else 128, 2)
        return BackwardTiles(self._of_chunk(), self.chunk, product, product)

    def _of_chunk(self) -> Tiles:
        splits = min(self.splits, self.chunk // self.classes_of_tile)
        return Tiles(self.classes_of_tile, 32, 2, splits)


PROBLEMS = {
    # Two tiles of rows and of features, three chunks of classes; nothing divides.
    "ragged": Problem(137, 72, 300),
    "float16, all": Problem(
        *(70, 64, 200, "float16"),
        statistics=ALL,
        labels=2,
        bias=True,
        per_row=True,
        class_where=True,
        softcap=3.0,
    ),
    "columns, ragged": Problem(137, 72, 312, vocab_axis=1, classes_of_tile=128),
    "columns, aligned": Problem(16, 128, 256, vocab_axis=1),
    "float32 weight": Problem(137, 72, 300, weight_dtype="float32"),
    "float32 weight, columns, all": Problem(
        *(70, 136, 328, "float16", "float32"),
        vocab_axis=1,
        statistics=ALL,
        labels=2,
        bias=True,
        per_row=True,
        class_where=True,
    ),
    "minus infinity": Problem(
        *(16, 64, 150),
        statistics=("lse", "mean_logit", "max_logit", "argmax"),
        bias=True,
        infinite=True,
        per_row=True,
        splits=1,
    ),
}


@pytest.fixture
def simulated(monkeypatch):
    """Runs kernels in the interpreter, in small tiles; the cost model is tested below.

    The interpreter is asked for by name and not forced from outside: there the ring
    has one view of its memory, of which the interpreter otherwise makes two memories.
    """

    def give(tiles: ForwardTiles, backward_tiles: BackwardTiles) -> None:
        for name, chosen in (("forward", tiles), ("gradient", backward_tiles)):
            call = getattr(kernels, name)
            small = functools.partial(call, tiles=chosen, interpret=SIMULATED)
            monkeypatch.setattr(kernels, name, small)

    return give


def statistics_of(options: Options, head: Head) -> RowStatistics:
    return jax.jit(functools.partial(kernels_gpu.FORWARD.call, options))(head)


def gradient_of(options: Options, head: Head, rows: RowCotangents) -> Any:
    call = functools.partial(kernels_gpu.BACKWARD.call, options)
    return jax.jit(call)(BackwardOperands(head, rows))


@pytest.mark.parametrize("name", PROBLEMS)
def test_statistics_and_gradients(name, simulated):
    problem = PROBLEMS[name]
    simulated(problem.tiles(), problem.backward_tiles())
    check(problem)


def check(problem: Problem) -> None:
    problems.check(problem, kernels_gpu)


# By the tiles that are chosen for them, of 256 classes: what lies behind an edge is
# masked there too.
SHIPPED = {"aligned": Problem(128, 128, 512), "ragged": Problem(130, 72, 300)}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_tiles_that_are_shipped(name, monkeypatch):
    for call in ("forward", "gradient"):
        simulated = functools.partial(getattr(kernels, call), interpret=SIMULATED)
        monkeypatch.setattr(kernels, call, simulated)
    check(SHIPPED[name])


def test_a_float32_weight_counts_as_rounded_and_its_gradient_does_not(simulated):
    problem = Problem(16, 64, 200, weight_dtype="float32", chunk=128)
    simulated(problem.tiles(), problem.backward_tiles())
    head, options = problem.head(), problem.options()
    noise = np.random.default_rng(2).uniform(-1e-3, 1e-3, head.weight.shape)
    head = head._replace(weight=head.weight * jnp.asarray(1 + noise, jnp.float32))
    rounded = head._replace(weight=head.weight.astype(jnp.bfloat16))
    assert (rounded.weight != head.weight).any()

    def both(head):
        found = statistics_of(options, head)
        rows = RowCotangents(found.lse, None, problems.cotangents_of(found))
        return found, gradient_of(options, head, rows)

    (found, gradient), (wanted, expected) = both(head), both(rounded)
    np.testing.assert_array_equal(found.lse, wanted.lse)
    np.testing.assert_array_equal(found.label_logits, wanted.label_logits)
    np.testing.assert_array_equal(gradient.hidden, expected.hidden)
    narrow = gradient.weight.astype(jnp.bfloat16)
    np.testing.assert_array_equal(narrow, expected.weight)
    assert (narrow != gradient.weight).mean() > 0.9


def test_extreme_logits(simulated):
    problem = Problem(16, 64, 130, splits=2)
    simulated(problem.tiles(), problem.backward_tiles())
    head = problem.head()
    head = head._replace(hidden=head.hidden * 1e4)
    found = statistics_of(problem.options(), head)
    expected = expected_of(problem, head, RowStatistics())
    for key in FEW:
        value, wanted = getattr(found, key), expected.values[key]
        assert_close(value, wanted, dtype=jnp.float32, length=problem.features)


# Tiles of 256 classes have two blocks of the filter, of 64 half of one.
@pytest.mark.parametrize(
    ("classes_of_tile", "vocab_axis"),
    [(64, 0), (64, 1), pytest.param(256, 0, marks=pytest.mark.slow)],
)
def test_the_filter_drops_the_blocks_that_the_stream_drops(
    classes_of_tile, vocab_axis, simulated
):
    problem = Problem(
        *(200, 64, 400),
        classes_of_tile=classes_of_tile,
        vocab_axis=vocab_axis,
        chunk=256,
    )
    simulated(problem.tiles(), problem.backward_tiles())
    head = problem.head()
    # Sure of the label, whose tile then has nothing to learn either; the rest is not.
    assert head.labels is not None
    hidden, weight = np.array(head.hidden), np.asarray(head.weight)
    if vocab_axis == 1:
        weight = weight.T
    hidden[:130] = 30 * weight[np.maximum(head.labels[:130, 0], 0)]
    head = head._replace(hidden=jnp.asarray(hidden))
    options = dataclasses.replace(problem.options(), gradient_filter_eps=1e-2)
    given, expected, everything = problems.filtered_and_not(options, head)
    assert np.abs(expected.weight - everything.weight).max() > 1e-3
    gradient = gradient_of(options, *given)
    for value, wanted in zip(gradient[:2], expected[:2], strict=True):
        wanted = np.asarray(wanted, np.float64)
        assert_close(value, wanted, dtype=problem.dtype, length=400)


def test_nothing_that_has_a_gradient():
    problem = Problem(16, 64, 130, statistics=("max_logit",))
    rows = RowCotangents(None, None, RowStatistics())
    gradient = gradient_of(problem.options(), problem.head(), rows)
    np.testing.assert_array_equal(gradient.hidden, 0)
    np.testing.assert_array_equal(gradient.weight, 0)
