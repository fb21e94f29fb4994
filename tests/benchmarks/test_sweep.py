"""The sweep of tiles, without a device."""

import dataclasses
import json

import jax
import pytest

import softlib
from benchmarks.accelerator import __main__ as command, device, process, sweep
from benchmarks.accelerator.swept import ATTENTION, CAUSAL, HEADS, SWEPT, TpuRows
from pallas_kernels import _devices
from pallas_kernels.gpu_mosaic import _row_tiles as gpu_rows
from pallas_kernels.tpu import _row_tiles as tpu_rows
from tests.host import jnp

NAMED = {
    "platform": "cuda",
    "target": "hopper",
    "kind": "NVIDIA H100 80GB HBM3",
    "name": "h100",
    "machine": {"jax": "1.2.3"},
}


def options(*words, path):
    return command.parse(["--sweep", "--output", str(path), *words])


@pytest.mark.parametrize("shape", HEADS)
def test_the_first_candidate_of_a_head_is_the_default(shape):
    own = tpu_rows.Shapes(*HEADS[shape], 2, 2, labels=True)
    with device.Imitated("tpu").context():
        for kind in tpu_rows.NAMES:
            chosen = tpu_rows.choose_tiles(kind, own, _devices.tpu())
            assert chosen is not None
            (first, *_) = sweep.ranked(TpuRows(kind), shape)
            assert first == tpu_rows.sizes_of(own, chosen)
    shapes = gpu_rows.Shapes(*HEADS[shape])
    chosen = gpu_rows.choose_backward_tiles(shapes, _devices.H100)
    assert chosen is not None
    with device.Imitated("cuda").context():
        (first, *_) = sweep.ranked(sweep.find(gpu_rows.NAME, "cuda"), shape)
        assert first == (chosen.chunk, chosen.hidden.columns)
    sizes = (chosen.chunk, chosen.hidden.columns)
    assert gpu_rows.backward_tiles(shapes, sizes, _devices.H100) == chosen


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("shape", ATTENTION)
def test_the_first_candidate_of_attention_is_the_default(platform, shape):
    swept = sweep.find("attention", platform)
    array = jax.ShapeDtypeStruct(ATTENTION[shape], jnp.bfloat16)
    call = lambda q, k, v: softlib.attention.dot_product_attention(q, k, v, mask=CAUSAL)
    with device.Imitated(platform).context():
        (first, *_) = sweep.ranked(swept, shape)
        explained = softlib.explain(call, array, array, array)
    (operation,) = explained.operations
    note = operation.notes["pallas_tpu" if platform == "tpu" else "pallas_gpu"]
    if platform == "tpu":
        assert note == "tiles of {} queries x {} keys".format(*first)
    else:
        assert note == "tiles of 128 queries x {} keys in {} stages".format(*first)


def test_there_are_candidates_for_each_device(tmp_path):
    given = options(path=tmp_path)
    with device.Imitated("tpu").context():
        on_tpu = list(sweep.candidates_of(given, "tpu"))
    with device.Imitated("cuda").context():
        on_gpu = list(sweep.candidates_of(given, "cuda"))
    assert {candidate.kernel for candidate in on_tpu} == {
        *tpu_rows.NAMES.values(),
        "attention",
    }
    assert {candidate.kernel for candidate in on_gpu} == {gpu_rows.NAME, "attention"}
    for found in (on_tpu, on_gpu):
        assert len(set(found)) == len(found)
        assert "dry" not in {candidate.shape for candidate in found}
        most = [(c.kernel, c.shape) for c in found]
        assert max(map(most.count, most)) <= sweep.MOST
    dry = list(sweep.candidates_of(options("--dry-run", path=tmp_path), "cpu"))
    assert {(c.kernel, c.imitated) for c in dry} == {
        (swept.kernel, swept.platform) for swept in SWEPT
    }


def test_the_file_has_what_was_timed_and_what_failed(tmp_path, monkeypatch, capsys):
    def run(job, **limits):
        sizes = job["candidate"]["sizes"]
        if sizes == (64, 1):
            return "killed"
        timed = sweep.Timed(1.0, 0.5 if sizes == (64, 2) else 1.0, 1e-3)
        return dataclasses.asdict(timed)

    monkeypatch.setattr(process, "run", run)
    with device.Imitated("cuda").context():
        given = options("--only", "attention", path=tmp_path)
        assert sweep.main(given, NAMED, 1.0) == 0
    written = json.loads((tmp_path / "h100.json").read_text())
    assert (written["kind"], written["jax"]) == (NAMED["kind"], "1.2.3")
    ratios = {tuple(e["sizes"]): e["ratio"] for e in written["kernels"]["attention"]}
    assert ratios[64, 1] is None
    assert ratios[64, 2] == 0.5
    printed = capsys.readouterr()
    assert "| attention | 8k tokens | 64 x 2 | 0.50 |" in printed.out
    assert "killed" in printed.err


def test_nothing_to_sweep_is_said(tmp_path, capsys):
    given = options("--only", "no such kernel", path=tmp_path)
    assert sweep.main(given, NAMED, 1.0) == 2
    assert "No kernel of this device" in capsys.readouterr().err


def test_a_candidate_is_timed_beside_the_default():
    name = tpu_rows.NAMES["forward"]
    timed = sweep.answer_to(sweep.Candidate(name, "dry", (64, 256, 1), 1, "tpu"))
    assert timed.reason is None
    assert timed.modelled > 1
    assert (timed.ratio or 0) > 0
    assert (timed.seconds or 0) > 0


def test_a_tile_that_cannot_run_says_why(monkeypatch):
    def refuse(self, shape, sizes):
        def program(*arrays):
            raise ValueError("out of memory")

        return program

    monkeypatch.setattr(TpuRows, "program", refuse)
    name = tpu_rows.NAMES["forward"]
    timed = sweep.answer_to(sweep.Candidate(name, "dry", (64, 256, 1), 1, "tpu"))
    assert timed.ratio is None
    assert "out of memory" in str(timed.reason)
