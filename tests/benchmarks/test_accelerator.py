"""The command for accelerators: limits, reports, and what may be timed at all."""

import dataclasses
import functools
import json
import re
import sys
import time

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import softlib
from benchmarks.accelerator import (
    __main__ as command,
    check,
    device,
    kernels,
    oracles,
    process,
    times,
    worker,
)
from benchmarks.accelerator.outcome import PLAIN_ONLY, RIGHT, Case, Outcome, Time
from benchmarks.accelerator.problem import CHECKED, Size
from benchmarks.accelerator.problems import BY_NAME, PROBLEMS
from benchmarks.accelerator.report import Report, markdown
from softlib import masks
from tests.host import jnp

LOGSUMEXP = BY_NAME["logsumexp"]
KEPT = Size(((256, 4096),))  # the fewest elements for a kernel
TINY = Size(((5, 130),))
DEVICE = {
    "platform": "cuda",
    "target": "hopper",
    "kind": "NVIDIA H100 80GB HBM3",
    "devices": 1,
    "machine": {"device": "NVIDIA H100 80GB HBM3", "jax": "1.2.3", "driver": "580.1"},
}


# --------------------------------------------------------------------------- processes
def run(code: str, seconds: float = 60.0):
    command = (sys.executable, "-c", code)
    return process.run({"a": 1}, seconds=seconds, environment={}, command=command)


def ended(process_id: int, seconds: float) -> bool:
    """Returns whether a killed process is gone, or a zombie, within so many seconds.

    One that has been killed may be listed for a moment, as running, on a busy machine.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_process_answers_by_its_file_whatever_it_prints():
    code = "import sys; print('noise'); open(sys.argv[2], 'w').write(sys.argv[1])"
    assert run(code) == {"a": 1}


def test_a_case_that_hangs_is_killed_with_its_children(tmp_path):
    note = tmp_path / "child"
    shell = f"sleep 99 & echo $! >{note}; wait"
    start = time.monotonic()
    found = process.run({}, seconds=3, environment={}, command=("/bin/sh", "-c", shell))
    assert found == "no answer within 3 s; killed"
    assert time.monotonic() - start < 30
    assert ended(int(note.read_text()), seconds=10)


def test_a_case_that_ends_its_process_says_how():
    code = "import os, signal; print('before', flush=True); os.kill(os.getpid(), 11)"
    assert run(code) == "the process ended with SIGSEGV: before"
    assert run("raise SystemExit('no memory')") == (
        "the process ended with status 1: no memory"
    )


# ----------------------------------------------------------------------------- kernels
def imitated(platform, size, program=softlib.softmax.logsumexp):
    machine = device.Imitated(platform)
    (array,) = size.shapes_and_dtypes(jnp.float32)
    with machine.context():
        explained = softlib.explain(program, array)
    return machine.text(program, array), explained


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_are_counted_in_the_lowered_text(platform):
    text, explained = imitated(platform, KEPT)
    assert kernels.require([text], explained) == [1]
    (tiles,) = kernels.tiles_of(explained, platform)
    assert tiles.startswith("logsumexp: ")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_program_without_a_kernel_fails_with_the_reason(platform):
    text, explained = imitated(platform, TINY)
    with pytest.raises(kernels.NoKernel, match=r"^0 kernels .* too few to gain"):
        kernels.require([text], explained)


def test_gradients_need_kernels_of_their_own():
    text, explained = imitated("tpu", KEPT)
    with pytest.raises(kernels.NoKernel, match="1, then 1 kernels"):
        kernels.require([text, text], explained)


def test_xla_is_neither_checked_nor_timed_in_the_name_of_a_kernel(monkeypatch):
    problem = dataclasses.replace(LOGSUMEXP, sizes={"dry": TINY})
    monkeypatch.setitem(worker.BY_NAME, "logsumexp", problem)
    case = Case("logsumexp", "float32", "dry", rounds=1, imitated="tpu")
    for checks in (True, False):
        given = dataclasses.replace(case, check=checks)
        found = Outcome.of(worker.answer_to(given))
        assert not found.is_right
        assert found.verdict.startswith("0 kernels in the program")
        assert found.times == ()


def explained(problem, size, dtype, kind, platform):
    program = problem.program(None, **size.options)
    shapes = size.shapes_and_dtypes(dtype)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, platform))
    with jax.sharding.use_abstract_mesh(mesh):
        cotangent = jax.eval_shape(program, *shapes)
        whole, arrays = check.whole_of(problem, program, cotangent, shapes)
        return softlib.explain(whole, *arrays)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("kind", "platform"), [("TPU v5 lite", "tpu"), ("NVIDIA H100", "gpu")]
)
def test_every_size_reaches_kernels_and_the_shipped_tiles(problem, kind, platform):
    name = {"tpu": "tpu", "gpu": "cuda"}[platform]
    first, *others = problem.dtypes[name]
    found = {
        (size, dtype): explained(problem, problem.sizes[size], dtype, kind, platform)
        for size, dtype in (
            *((size, first) for size in (*CHECKED, "dry", "large")),
            *(("ragged", dtype) for dtype in others),
        )
    }
    for where, explanation in found.items():
        for operation in explanation.operations:
            assert name in operation.runs, (where, operation)
    # On a GPU the numbers of splits and of classes at a time grow with the problem.
    shipped, large = (
        [
            re.sub(r"\d+ (?=splits|classes at a time)", "", tiles)
            for tiles in kernels.tiles_of(found[size, first], name)
        ]
        for size in ("shipped", "large")
    )
    assert shipped == large


# ----------------------------------------------------------------------------- results
def test_a_wrong_entry_and_an_error_everywhere_are_found():
    random = np.random.default_rng(0)
    right = random.normal(size=(100, 50))
    size = Size(((100, 50),))
    compare = functools.partial(check.compare, dtype="bfloat16", size=size)
    errors, verdict = compare([right * 1.001], [right])
    assert verdict == RIGHT
    assert errors[0][1] == pytest.approx(1e-3)
    wrong = right.copy()
    wrong[3, 4] += 0.5
    assert "index (3, 4)" in compare([wrong], [right])[1]
    # Within the bound for each entry, as one of them is large.
    uneven = right / 50
    uneven[0, 0] = 1.0
    _, verdict = compare([right, 1.03 * uneven], [right, uneven])
    assert verdict.startswith("gradient 1: errors of norm")
    wrong[3, 4] = np.nan
    assert compare([wrong], [right])[1] != RIGHT
    assert "shapes differ" in compare([right[:9]], [right])[1]


def test_the_answer_of_some_queries_is_that_of_all_whose_cotangents_vanish():
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(2, 9, n, 4)) for n in (4, 2, 2))
    chosen = np.array([0, 3, 8])
    g = np.zeros_like(query)
    g[:, chosen] = random.normal(size=(2, 3, 4, 4))
    arrays, mask = [query, key, value], masks.Causal()
    every = oracles.attention(arrays, g, mask=mask)
    some = oracles.attention(arrays, g, mask=mask, queries=chosen)
    np.testing.assert_allclose(some[0], every[0][:, chosen])
    for one, other in zip(some[1:], every[1:], strict=True):
        assert other.any()
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_a_kernel_is_checked_and_timed_in_an_interpreter():
    case = Case("logsumexp", "bfloat16", "dry", rounds=1, imitated="tpu")
    found = Outcome.of(json.loads(json.dumps(worker.answer_to(case))))
    assert found.case == case
    assert (found.verdict, found.kernels) == (RIGHT, (1,))
    assert 0 < found.errors[0][0] < 0.01
    timed = {row.program: row for row in found.times}
    assert set(timed) == {times.OURS, times.PLAIN, "jax.nn"}
    assert timed[times.PLAIN].ratio == (1, 1, 1)
    difference = timed[times.OURS].difference
    assert difference is not None
    assert difference < 0.01


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    wrong = dataclasses.replace(
        LOGSUMEXP,
        sizes={"dry": KEPT},
        program=lambda name: lambda x: 1.5 * softlib.softmax.logsumexp(x),
    )
    monkeypatch.setitem(worker.BY_NAME, "logsumexp", wrong)
    case = Case("logsumexp", "float32", "dry", rounds=1, imitated="tpu")
    found = Outcome.of(worker.answer_to(case))
    assert "largest error" in found.verdict
    assert found.times == ()


def test_without_a_kernel_for_the_device_plain_jax_is_checked_in_its_own_name():
    found = check.check(
        Case("logsumexp", "float32", "dry"),
        dataclasses.replace(LOGSUMEXP, sizes={"dry": TINY}),
        device.Here(),
    )
    assert (found.verdict, found.kernels) == (PLAIN_ONLY, ())
    assert found.is_right


def test_a_peer_that_is_missing_or_fails_is_said():
    def missing():
        raise ModuleNotFoundError("No module named 'tokamax'", name="tokamax")

    def refuses():
        raise RuntimeError("cuDNN is not detected.")

    x = jnp.ones((4, 8))
    plain = jax.jit(jnp.sum).lower(x).compile()
    makers = {times.PLAIN: lambda: plain, "tokamax": missing, "cuDNN": refuses}
    ready, reasons = times.those_that_run(makers, [x])
    assert list(ready) == [times.PLAIN]
    assert reasons == {
        "tokamax": "not installed: tokamax",
        "cuDNN": "RuntimeError: cuDNN is not detected.",
    }


# ------------------------------------------------------------------------------ report
CASE = Case("logsumexp", "bfloat16", "ragged")
TIMED = dataclasses.replace(CASE, size="large", check=False, rounds=3)
OUTCOMES = (
    Outcome(CASE, RIGHT, (1,), ("logsumexp: tiles",), ((0.001, 0.0005),), seconds=2.4),
    Outcome(dataclasses.replace(CASE, size="shipped"), "no answer within 9 s; killed"),
    Outcome(
        TIMED,
        RIGHT,
        (1,),
        ("logsumexp: tiles",),
        times=(
            Time("forward", "softlib", (0.25, 0.5, 0.3), (0.5, 0.4, 0.6), "80% of x"),
            Time("forward", "tokamax", reason="not installed: tokamax"),
        ),
    ),
)


def test_a_report_names_the_card_the_faults_and_the_peers_that_are_missing():
    text = markdown(Report(DEVICE, False, 4, OUTCOMES))
    assert "on NVIDIA H100 80GB HBM3" in text
    assert "jax 1.2.3, driver 580.1." in text
    assert "3 of 4 cases, 2 right, 1 not. **The run was not finished.**" in text
    assert "- logsumexp, bfloat16, shipped size: no answer within 9 s; killed" in text
    assert (
        "| logsumexp | bfloat16 | ragged | right | 1 | 1.0e-03 | 5.0e-04 | 2 |" in text
    )
    assert "| softlib | 300 | 0.50 (0.40 to 0.60) | 80% of x | - | - |" in text
    assert "| tokamax | not installed: tokamax | - | - | - | - |" in text
    assert "Dry" not in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| log")}
    assert widths == {9, 8}


def test_a_dry_report_says_so():
    text = markdown(Report(DEVICE, True, 3, OUTCOMES))
    assert "on a dry run" in text
    assert "**Dry: no kernel ran on a device.**" in text


def test_a_report_survives_json():
    report = Report(DEVICE, False, 4, OUTCOMES)
    assert Report.from_json(report.to_json()) == report


# ----------------------------------------------------------------------------- command
def answers(monkeypatch, machine, verdict=RIGHT):
    """The command, whose processes give these answers; the jobs that it gave."""
    jobs = []

    def run(job, *, seconds, environment):
        jobs.append((job, environment))
        if not job:
            return machine
        return dataclasses.asdict(Outcome(Case(**job), verdict))

    monkeypatch.setattr(process, "run", run)
    return jobs


def test_a_run_checks_every_dtype_and_size_then_times(monkeypatch, tmp_path, capsys):
    jobs = answers(monkeypatch, DEVICE)
    assert command.main(["--only", "logsumexp", "--output", str(tmp_path)]) == 0
    cases = [Case(**job) for job, environment in jobs if job]
    assert [(c.dtype, c.size) for c in cases] == [
        *((d, s) for d in ("bfloat16", "float16", "float32") for s in CHECKED),
        ("bfloat16", "large"),
    ]
    assert [bool(c.rounds) for c in cases] == [False] * 9 + [True]
    path = tmp_path / "accelerator-nvidia-h100-80gb-hbm3.md"
    assert path.read_text() == capsys.readouterr().out
    report = Report.from_json(path.with_suffix(".json").read_text())
    assert len(report.outcomes) == report.planned == 10


def test_what_is_wrong_is_not_timed_and_fails(monkeypatch, tmp_path, capsys):
    jobs = answers(monkeypatch, DEVICE, "largest error 3")
    assert command.main(["--only", "logsumexp", "--output", str(tmp_path)]) == 1
    assert not any(job.get("rounds") for job, _ in jobs)
    assert "not timed, as it is not right at its aligned" in capsys.readouterr().out


def test_a_dry_run_needs_no_device(monkeypatch, tmp_path, capsys):
    jobs = answers(monkeypatch, DEVICE | {"platform": "cpu"})
    assert command.main(["--dry-run", "--output", str(tmp_path)]) == 0
    cases = [Case(**job) for job, _ in jobs if job]
    assert {(c.problem, c.imitated) for c in cases} == {
        (p.name, platform) for p in PROBLEMS for platform in ("tpu", "cuda")
    }
    assert all(environment == {"JAX_PLATFORMS": "cpu"} for _, environment in jobs)
    assert "Dry" in capsys.readouterr().out


def test_without_an_accelerator_it_says_so(monkeypatch, capsys):
    answers(monkeypatch, DEVICE | {"platform": "cpu"})
    assert command.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_device_that_does_not_answer_is_no_crash(monkeypatch, capsys):
    answers(monkeypatch, "the process ended with status 1: no libtpu")
    assert command.main([]) == 2
    assert "no libtpu" in capsys.readouterr().err


def test_the_description_of_this_machine_has_versions():
    found = device.describe()
    assert (found["platform"], found["target"]) == ("cpu", "cpu")
    assert found["machine"]["jax"] == jax.__version__
