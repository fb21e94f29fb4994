"""Choices of tiles by measured times."""

import json
import math

import pytest

from pallas_kernels import _measured
from pallas_kernels._devices import H100, V5E, V6E
from pallas_kernels.gpu_mosaic import _row_tiles as gpu_rows, attention_tiles
from pallas_kernels.tpu import _row_tiles as tpu_rows

TPU_SHAPES = tpu_rows.Shapes(8192, 2304, 256_000, 2, 2, labels=True)
GPU_SHAPES = gpu_rows.Shapes(8192, 2304, 256_000)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Writes a file of a device, in the place of those of the package."""
    monkeypatch.setattr(_measured, "FOLDER", tmp_path)

    def write(device, **kernels):
        text = json.dumps({"kind": "a device", "kernels": kernels["kernels"]})
        (tmp_path / f"{device}.json").write_text(text)
        _measured._factors.cache_clear()

    _measured._factors.cache_clear()
    yield write
    _measured._factors.cache_clear()


def entry(*sizes, ratio, modelled=1.0):
    return _measured.record(sizes, "a head", ratio=ratio, modelled=modelled)


def test_the_factor_of_a_tile(measured):
    records = [
        entry(1, ratio=1.0),
        entry(2, ratio=3.0, modelled=1.5),
        entry(2, ratio=2.0, modelled=0.5),
        entry(3, ratio=None),
    ]
    measured("v5e", kernels={"rows": records})
    assert _measured.factor("v5e", "rows", (1,)) == 1.0
    assert _measured.factor("v5e", "rows", (2,)) == 3.0  # between 2 and 4
    assert _measured.factor("v5e", "rows", (3,)) == math.inf
    # As the median of 1 and 3.
    assert _measured.factor("v5e", "rows", (4,)) == 2.0
    assert _measured.factor("v5e", "another", (1,)) == 1.0
    assert _measured.factor("v6e", "rows", (2,)) == 1.0


@pytest.mark.parametrize("kind", tpu_rows.NAMES)
def test_a_tpu_takes_what_was_fastest(measured, kind):
    chosen = tpu_rows.choose_tiles(kind, TPU_SHAPES, V5E)
    assert chosen is not None
    other = next(
        tiles
        for tiles in tpu_rows.fitting(kind, TPU_SHAPES, V5E)
        if (tiles.rows, tiles.classes) == (256, 256)
    )
    sizes = tpu_rows.sizes_of(TPU_SHAPES, other)
    measured("v5e", kernels={tpu_rows.NAMES[kind]: [entry(*sizes, ratio=1e-3)]})
    # One record alone is the median of all: the model keeps its order.
    assert tpu_rows.choose_tiles(kind, TPU_SHAPES, V5E) == chosen
    default = entry(*tpu_rows.sizes_of(TPU_SHAPES, chosen), ratio=1.0)
    records = [default, entry(*sizes, ratio=1e-3)]
    measured("v5e", kernels={tpu_rows.NAMES[kind]: records})
    assert tpu_rows.choose_tiles(kind, TPU_SHAPES, V5E) == other
    assert tpu_rows.choose_tiles(kind, TPU_SHAPES, V6E) != other


def test_a_tile_that_does_not_run_is_not_chosen(measured):
    chosen = gpu_rows.choose_backward_tiles(GPU_SHAPES, H100)
    assert chosen is not None
    sizes = (chosen.chunk, chosen.hidden.columns)
    measured("h100", kernels={gpu_rows.NAME: [entry(*sizes, ratio=None)]})
    other = gpu_rows.choose_backward_tiles(GPU_SHAPES, H100)
    assert other is not None
    assert (other.chunk, other.hidden.columns) != sizes


def test_a_rule_gives_way_to_measured_times(measured):
    choose = lambda: attention_tiles.choose_tiles(128, 128, H100)
    rule = choose()
    assert rule is not None
    assert rule == attention_tiles.candidates(128, 128, H100)[0]
    measured(
        "h100",
        kernels={
            attention_tiles.NAME: [
                entry(rule.keys, rule.stages, ratio=1.0),
                entry(64, 2, ratio=0.8),
            ]
        },
    )
    assert choose() == attention_tiles.Tiles(64, 2)


def test_files_of_the_package_can_be_read():
    for file in _measured.FOLDER.iterdir():
        if file.name.endswith(".json"):
            device = file.name.removesuffix(".json")
            assert _measured._factors(device), f"{file.name} has no kernels"
