"""The flagship example: a short real run, exact resume, clean stops, clear errors."""

import csv
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
import train_language_model
from flax import nnx
from language_model import corpus as corpus_, options as options_, session, training
from language_model.checkpoints import Checkpoints, Progress
from language_model.failures import Failure, reason
from language_model.model import LanguageModel, rotate

from tests import children
from tests.examples import smoke as smoke_
from tests.host import jnp

SCRIPT = pathlib.Path(options_.EXAMPLES) / "train_language_model.py"
# Long enough to be stopped half-way, at milliseconds a step.
LONG = ("--steps", "200", "--checkpoint-every", "20", "--evaluate-every", "40")
SHORT_REPORT = ("--compare", "0", "--no-memory-chart", "--sample-tokens", "0")

command = functools.partial(smoke_.command, SCRIPT)
finish = functools.partial(smoke_.finish, SCRIPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def smoke(folder):
    """One complete run of the smoke preset and what it printed."""
    done = finish("--out", folder / "smoke", "--cache", folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "smoke", done


@pytest.fixture(scope="module")
def uninterrupted(folder, smoke):
    out = folder / "uninterrupted"
    done = finish(*LONG, *SHORT_REPORT, "--out", out, "--cache", folder / "cache")
    assert done.returncode == 0, done.stderr
    return out


def copy_of(smoke, tmp_path) -> options_.Options:
    """Options of a run in a copy of the smoke run's folder."""
    out = tmp_path / "copy"
    shutil.copytree(smoke[0], out)
    cache = smoke[0].parent / "cache"
    return options_.parse(
        ["--preset", "smoke", "--out", str(out), "--cache", str(cache), *SHORT_REPORT]
    )


# ------------------------------------------------------------------------ a whole run
def test_smoke_run_learns_and_leaves_metrics_and_a_picture(smoke):
    out, done = smoke
    assert done.stderr == ""
    assert str(out / "report.png") in done.stdout.splitlines()[-1]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((out / "metrics.json").read_text())
    assert [int(row["step"]) for row in rows] == list(range(13))
    assert [row["train_loss"] for row in rows[1:]] == [
        str(record["train_loss"]) for record in content["history"][1:]
    ]
    summary = content["summary"]
    uniform = 1024
    assert summary["held_out_perplexity_before"] == pytest.approx(uniform, rel=0.05)
    assert summary["held_out_perplexity_after"] < 0.9 * uniform
    for sizes in (m["temporary_bytes"] for m in summary["memory"]):
        assert 0 < sizes["softlib"] < sizes["optax"]


def test_softlib_and_optax_losses_agree_along_the_run(smoke):
    summary = json.loads((smoke[0] / "metrics.json").read_text())["summary"]
    assert summary["compared_steps"] == 12
    assert summary["largest_difference_of_losses"] < 1e-3


def test_loss_optax_trains_the_same_model(smoke, tmp_path):
    out, _ = smoke
    o = options_.parse(
        [
            "--preset",
            "smoke",
            "--loss",
            "optax",
            "--out",
            str(tmp_path / "optax"),
            "--cache",
            str(out.parent / "cache"),
            *SHORT_REPORT,
        ]
    )
    session.run(o)
    curves = [
        [r.get("held_out_loss", r.get("train_loss")) for r in json.loads(text)]
        for text in (
            json.dumps(json.loads((p / "metrics.json").read_text())["history"])
            for p in (out, o.out)
        )
    ]
    np.testing.assert_allclose(*curves, rtol=0, atol=1e-3)


def test_complete_run_is_not_trained_again(smoke, tmp_path, capsys):
    o = copy_of(smoke, tmp_path)
    session.run(o)
    printed = capsys.readouterr().out
    assert "is complete; --fresh starts anew" in printed
    assert "tokens/s" not in printed
    assert (o.out / "metrics.csv").read_bytes() == (
        smoke[0] / "metrics.csv"
    ).read_bytes()


def test_fresh_starts_anew(smoke, tmp_path, capsys):
    o = copy_of(smoke, tmp_path)
    (o.out / "mine.txt").write_text("not the run's")
    session.run(dataclasses.replace(o, fresh=True, seed=1, steps=4))
    assert "resume" not in capsys.readouterr().out
    assert len((o.out / "metrics.csv").read_text().splitlines()) == 1 + 5
    assert (o.out / "mine.txt").exists()


# ----------------------------------------------------------------------- exact resume
def assert_equal_runs(
    one: pathlib.Path, other: pathlib.Path, cache: pathlib.Path, *arguments: str
) -> None:
    metrics, expected_metrics = (
        (path / "metrics.csv").read_bytes() for path in (one, other)
    )
    assert metrics == expected_metrics
    actual, expected = (state_after(out, cache, *arguments) for out in (one, other))
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.tobytes() == expected[name].tobytes(), name


def state_after(
    out: pathlib.Path, cache: pathlib.Path, *arguments: str
) -> dict[str, np.ndarray]:
    """Every array of model and optimiser in the last checkpoint."""
    o = options_.parse(["--preset", "smoke", "--cache", str(cache), *arguments])
    corpus = corpus_.load(o)
    identity = {name: getattr(o, name) for name in options_.IDENTITY}
    checkpoints = Checkpoints(
        out / "checkpoints", {**identity, "corpus": corpus.digest[:16]}
    )
    model, optimizer = training.build(o, corpus.vocabulary_size)
    progress = checkpoints.restore(model, optimizer)
    checkpoints.close()
    assert progress.step == o.steps
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(nnx.state((model, optimizer)))
    }


def latest_checkpoint(out: pathlib.Path) -> int:
    return max((int(p.name) for p in out.glob("checkpoints/*[0-9]")), default=0)


def test_run_that_a_signal_stops_resumes_to_the_bit(
    smoke, tmp_path, monkeypatch, capsys
):
    """In this process, with a signal in the middle of a step."""
    cache, step, left = smoke[0].parent / "cache", training.train_step, [10**9]
    before = signal.getsignal(signal.SIGINT)

    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)
        return step(*arguments, **options)

    def run(out: pathlib.Path) -> int:
        arguments = ["--preset", "smoke", *SHORT_REPORT, "--cache", str(cache)]
        return train_language_model.main([*arguments, "--out", str(out)])

    monkeypatch.setattr(training, "train_step", counted)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    number: signal.Signals = signal.SIGTERM
    try:
        assert run(whole) == 0
        for number, exit_code, steps in (
            (signal.SIGTERM, 143, 3),
            (signal.SIGINT, 130, 6),
        ):
            left[0] = 3
            assert run(stopped) == exit_code
            printed = capsys.readouterr()
            assert printed.err == (
                f"stopped: {number.name}: stopped after step {steps} of 12; "
                "checkpoint written, the same command resumes.\n"
            )
            assert ("at step 3 of 12" in printed.out) == (steps > 3)
            lines = (stopped / "metrics.csv").read_text().splitlines()
            assert len(lines) == steps + 2
        assert run(stopped) == 0
        assert "at step 6 of 12" in capsys.readouterr().out
    finally:
        signal.signal(signal.SIGINT, before)
    assert_equal_runs(stopped, whole, cache)


@pytest.mark.slow
def test_run_stopped_three_times_equals_the_uninterrupted_to_the_bit(
    folder, uninterrupted
):
    out, cache = folder / "stopped", folder / "cache"
    arguments = (*LONG, *SHORT_REPORT, "--out", out, "--cache", cache)
    resumed_at = 0
    for number, exit_code, when in (
        (signal.SIGTERM, 143, 40),
        (signal.SIGINT, 130, 80),
        (signal.SIGKILL, -9, 120),
    ):
        process = subprocess.Popen(
            command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=children.environment(),
        )
        while latest_checkpoint(out) < when and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == exit_code, stderr
        saved = latest_checkpoint(out)
        assert when <= saved < 200
        assert (f"at step {resumed_at} of 200" in stdout) == (resumed_at > 0)
        if number == signal.SIGKILL:
            assert stderr == ""
        else:
            assert stderr == (
                f"stopped: {number.name}: stopped after step {saved} of 200; "
                "checkpoint written, the same command resumes.\n"
            )
            assert len((out / "metrics.csv").read_text().splitlines()) == saved + 2
        resumed_at = saved

    done = finish(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"at step {resumed_at} of 200" in done.stdout
    assert_equal_runs(out, uninterrupted, cache, *LONG)


@pytest.mark.slow
def test_killed_while_saving_leaves_a_checkpoint_to_resume_from(folder, smoke):
    # A checkpoint at every step, so that nearly every kill falls into a save.
    every = ("--steps", "60", "--checkpoint-every", "1", "--evaluate-every", "20")
    killed, whole = folder / "killed", folder / "whole"
    run = lambda out: (*every, *SHORT_REPORT, "--out", out, "--cache", folder / "cache")
    assert finish(*run(whole)).returncode == 0
    delays = np.random.default_rng(0).uniform(0, 0.3, 8)
    for delay in delays:
        before = latest_checkpoint(killed)
        process = subprocess.Popen(
            command(*run(killed)), stdout=subprocess.DEVNULL, env=children.environment()
        )
        while latest_checkpoint(killed) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.wait()
    done = finish(*run(killed))
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout
    metrics, expected = (
        (path / "metrics.csv").read_bytes() for path in (killed, whole)
    )
    assert metrics == expected
    left = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert left == ["59", "60"]


# -------------------------------------------------------------------------- one line
def test_wrong_path_is_one_line_and_exit_code_2(tmp_path):
    done = finish("--corpus", "/nowhere/sotu.txt.xz", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot read /nowhere/sotu.txt.xz: No such file or directory "
        "(/nowhere/sotu.txt.xz).\n"
    )


def test_a_disk_that_is_full_at_the_seal_leaves_the_earlier_checkpoint(
    tmp_path, monkeypatch
):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    saved = Checkpoints(tmp_path, {"seed": 1})
    saved.save(Progress(1), model, optimizer)
    write = pathlib.Path.write_text

    def half(path, text, *args):
        write(path, text[: len(text) // 2], *args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(Failure, match=r"No space left .* of step 1 is whole"):
        saved.save(Progress(2), model, optimizer)
    saved.close()
    monkeypatch.undo()
    again = Checkpoints(tmp_path, {"seed": 1})
    assert again.restore(model, optimizer).step == 1
    again.close()


def test_file_that_cannot_grow_is_one_line_and_keeps_the_earlier_checkpoint(
    smoke, tmp_path
):
    o = copy_of(smoke, tmp_path)
    shutil.rmtree(o.out / "checkpoints" / "12")
    limited = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    run = command("--out", o.out, "--cache", o.cache, *SHORT_REPORT)
    # The cache of compiled programs would be the first that cannot grow.
    cached = "JAX_COMPILATION_CACHE_DIR"
    environment = {k: v for k, v in children.environment().items() if k != cached}
    done = subprocess.run(
        [sys.executable, "-c", limited, *run],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot write the checkpoint of step 12 in {o.out / 'checkpoints'}: "
        "File too large; the one of step 8 is whole, and the same command resumes "
        "from it.\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_while_writing_metrics(smoke, tmp_path):
    o = copy_of(smoke, tmp_path)
    (o.out / "metrics.csv.partial").symlink_to("/dev/full")
    with pytest.raises(Failure, match=r"metrics.csv: No space left on device\.$"):
        session.run(o)


def test_full_disk_is_found_in_a_long_text_of_another_library():
    text = 'RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error="28"]'
    assert reason(ValueError(text)) == "No space left on device"


@pytest.mark.parametrize(
    ("damage", "what"),
    [("flip", "arrays"), ("truncate", "about"), ("delete", "arrays")],
)
def test_corrupt_checkpoint(damage, what, smoke, tmp_path):
    o = copy_of(smoke, tmp_path)
    files = (o.out / "checkpoints" / "12" / what).rglob("*")
    largest = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flip":
        largest.write_bytes(content)
    elif damage == "truncate":
        largest.write_bytes(content[: len(content) // 2])
    else:
        largest.unlink()
    with pytest.raises(
        Failure, match=r"12 is damaged \(.*\); delete that folder to resume from step 8"
    ):
        session.run(o)


def test_checkpoint_of_other_settings(smoke, tmp_path):
    o = dataclasses.replace(copy_of(smoke, tmp_path), width=8)
    with pytest.raises(Failure, match=r"other settings \(width 16, not 8\).*--fresh"):
        session.run(o)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": pathlib.Path("/dev/null/run")}, "cannot use --out /dev/null/run"),
        ({"cache": pathlib.Path("/dev/null/cache")}, "cannot write the token cache"),
        ({"vocabulary": SCRIPT}, "is not a whole xz file"),
        ({"vocabulary": options_.Options.corpus}, "not a vocabulary of this format"),
        ({"corpus": options_.Options.vocabulary}, "has no speech"),
        ({"train_years": (1600, 1700)}, "--train-years 1600-1700 selects 0 tokens"),
        ({"batch": 1_000_000}, "--batch 1000000 is more than"),
        ({"vocabulary_size": 200_000}, "at most 130,072"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_run_refuses(changed, message, smoke, tmp_path):
    o = dataclasses.replace(
        options_.Options(**options_.PRESETS["smoke"]),
        **{"out": tmp_path / "run", "cache": tmp_path / "cache", **changed},
    )
    with pytest.raises(Failure, match=message):
        session.run(o)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps many", "--steps: must be an integer of at least 1, got 'many'"),
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--learning-rate nan", "must be a finite number of at least 0, got 'nan'"),
        ("--learning-rate 0", "must be above 0, got '0'"),
        ("--train-years 1990-1950", "must look like 1950-1990"),
        ("--train-years 1950-2000", "must not overlap, got 1950-2000 and 1991-2021"),
        ("--width 65", "--heads must divide --width, got 4 and 65"),
        ("--width 12", "must be even .rotary embedding., got 12 / 4"),
        ("--warmup 9 --steps 9", "--warmup must be below --steps, got 9 and 9"),
        ("--vocabulary-size 3", "must be 0 or at least 256"),
        ("--preset huge", "invalid choice: 'huge'"),
        ("--loss mine", "invalid choice: 'mine'"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(arguments.split())
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr.replace("(", ".").replace(")", ".") or message in stderr
    assert len(stderr.splitlines()) == 1


def test_help_shows_every_option_and_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(["--preset", "demo", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(options_.Options):
        assert "--" + field.name.replace("_", "-") in text
    demo = options_.parse(["--preset", "demo"])
    assert f"optimiser steps of the whole run (default: {demo.steps})" in text


def test_without_options_it_is_the_demo_and_takes_minutes():
    found, full = options_.parse([]), options_.parse(["--preset", "full"])
    assert found == options_.parse(["--preset", "demo"])
    assert (found.steps, found.width, found.out.name) == (480, 64, "demo")
    tokens = lambda options: options.steps * options.batch * options.context
    assert tokens(full) > 100 * tokens(found)


def test_not_finite_loss_is_a_failure(smoke, tmp_path):
    o = dataclasses.replace(
        copy_of(smoke, tmp_path), fresh=True, learning_rate=1e30, clip=1e30
    )
    with pytest.raises(Failure, match=r"not finite at step .*--learning-rate"):
        session.run(o)


# ---------------------------------------------------------------------------- pieces
def test_tokens_read_back_as_the_text(smoke):
    cache = smoke[0].parent / "cache"
    o = options_.parse(["--preset", "smoke", "--cache", str(cache)])
    corpus = corpus_.load(o)
    text = corpus.tokenizer.decode(corpus.train[:50].tolist())
    assert text.startswith("Mr. Speaker, Mr. President")
    assert corpus.train.max() < corpus.vocabulary_size == 1024


def test_damaged_token_cache_is_made_again(smoke, tmp_path):
    o = options_.parse(["--preset", "smoke", "--cache", str(tmp_path)])
    first = corpus_.load(o)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(first.train, corpus_.load(o).train)


def test_an_epoch_visits_every_window_once_and_labels_follow_inputs():
    batches = corpus_.Batches(np.arange(61), batch=3, context=5, seed=0)
    epochs = [[batches.at(4 * epoch + i) for i in range(4)] for epoch in range(2)]
    for epoch in epochs:
        for inputs, labels in epoch:
            np.testing.assert_array_equal(inputs + 1, labels)
        seen = np.concatenate([inputs.ravel() for inputs, _ in epoch])
        np.testing.assert_array_equal(np.sort(seen), np.arange(60))
    assert any((a[0] != b[0]).any() for a, b in zip(*epochs, strict=True))


def test_model_is_causal():
    model = LanguageModel(
        vocabulary_size=11,
        width=8,
        layers=2,
        heads=2,
        feed_forward=12,
        rngs=nnx.Rngs(0),
    )
    tokens = jnp.arange(6)[None]
    changed = tokens.at[0, 4].set(9)
    formed = jax.jit(lambda tokens: model(tokens).materialize())
    one, two = formed(tokens), formed(changed)
    np.testing.assert_array_equal(one[:, :4], two[:, :4])
    assert (jnp.abs(one - two)[:, 4:].max(-1) > 1e-4).all()


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    key_q, key_k = jax.random.split(jax.random.key(0))
    length = 7
    query, key = (
        rotate(jnp.broadcast_to(jax.random.normal(k, (1, 8)), (length, 1, 8)))[:, 0]
        for k in (key_q, key_k)
    )
    np.testing.assert_allclose(
        jnp.linalg.norm(query, axis=-1), jnp.linalg.norm(query[0]), rtol=1e-5
    )
    score = np.asarray(query @ key.T)
    for distance in range(1, length):
        diagonal = np.diagonal(score, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(score[0]) > 0.1
