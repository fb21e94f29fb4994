"""The length example: a short real run, exact resume, and the promises of its parts."""

import dataclasses
import json
import signal

import numpy as np
import optax
import pytest
from extrapolation import aligned, model as model_, options as options_, session, text
from flax import nnx
from language_model.checkpoints import Checkpoints
from language_model.failures import Failure, Interrupted
from language_model.training import Stop
from matplotlib import image
from study import training
from study.command_line import EXAMPLES

from tests.examples.smoke import colours, complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "length_extrapolation.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def smoke(folder):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, folder / "smoke", "--cache", folder / "cache")


@pytest.fixture(scope="module")
def corpus(folder, smoke):
    return text.load(dataclasses.replace(SMALL, cache=folder / "cache"))


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    # No panel is empty: each quarter of the picture has lines of several colours.
    for rows in np.array_split(pixels, 2):
        for quarter in np.array_split(rows, 2, axis=1):
            coloured = quarter[np.ptp(quarter, axis=-1) > 0.3]
            assert colours(coloured, 7) > 10


def test_every_attention_learns(smoke):
    check_learned(smoke[1], *SMALL.attentions)


@pytest.mark.slow
def test_attention_without_reweighting_learns(tmp_path):
    names = ("softmax", "lssa")
    run = complete_run(SCRIPT, tmp_path / "run", "--attentions", ",".join(names))
    check_learned(run[1], *names)


def check_learned(metrics, *names):
    assert list(metrics["results"]) == ["softmax", "window", *names[1:]]
    for name in names:
        history = metrics["results"][name]["history"]
        held_out = [r["held_out_loss"] for r in history if "held_out_loss" in r]
        assert held_out[0] == pytest.approx(np.log(text.VOCABULARY_SIZE), rel=0.02)
        assert held_out[-1] < 0.65 * held_out[0]
        assert len(history) == SMALL.steps + 1


def test_buckets_and_lengths_are_means_of_the_positions(smoke):
    _, metrics, _ = smoke
    for result in metrics["results"].values():
        losses = np.array(result["by_position"])
        assert losses.shape == (64,)
        expected = [losses[:16].mean(), losses[16:32].mean(), losses[32:].mean()]
        np.testing.assert_allclose(result["by_bucket"], expected)
        expected = [losses[:16].mean(), losses[:32].mean(), losses.mean()]
        np.testing.assert_allclose(result["by_length"], expected)
        assert min(result["standard_error"]) > 0
    # The window holds every key up to the training length.
    softmax, window = (
        metrics["results"][k]["by_position"] for k in ("softmax", "window")
    )
    np.testing.assert_allclose(softmax[:16], window[:16], rtol=1e-5)
    assert np.abs(np.subtract(softmax, window)[16:]).max() > 1e-3


def test_complete_run_is_not_trained_again(smoke, folder, capsys):
    out, metrics, printed = smoke
    o = dataclasses.replace(SMALL, out=out, cache=folder / "cache")
    session.run(dataclasses.replace(o, attentions=("softmax",)))
    again = json.loads((out / "metrics.json").read_text())["results"]["softmax"]
    # With the times of the steps: these are the steps of the first run.
    assert again["history"] == metrics["results"]["softmax"]["history"]
    line = next(x for x in printed.splitlines() if x.startswith("trained  softmax"))
    assert line in capsys.readouterr().out


def test_limits_are_said(smoke):
    assert "\nlimits   softmax that sees only the last 16 keys has" in smoke[2]


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--attentions softmax,mine", "--attentions: must be of softmax, lssa, "),
        ("--attentions lssa", "--attentions must contain softmax"),
        ("--heads 3", "--heads must divide --width, got 3 and 128"),
        ("--width 36 --heads 12", "must be even (rotary embedding), got 36 / 12"),
        ("--factor 1", "--factor: must be an integer of at least 2, got '1'"),
        ("--learning-rate 0", "must be a finite number above 0, got '0'"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(arguments.split())
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_folder_that_cannot_be_made_is_a_failure():
    options = options_.parse(["--preset", "smoke", "--out", "/dev/null/run"])
    with pytest.raises(Failure, match="cannot use --out /dev/null/run"):
        session.run(options)


# ---------------------------------------------------------------------------- pieces
def test_tokens_are_the_bytes_of_the_text(corpus):
    start = bytes(corpus.train[:25].astype(np.uint8))
    assert start == b"Fellow-Citizens of the Se"
    assert corpus.held_out.max() < text.VOCABULARY_SIZE


def test_batches_depend_on_seed_and_step_alone_and_labels_follow_inputs():
    one, two = (text.Batches(np.arange(100), 3, 8, seed=5) for _ in range(2))
    two.at(1)  # what came before does not matter
    inputs, labels = one.at(4)
    np.testing.assert_array_equal(inputs, two.at(4)[0])
    np.testing.assert_array_equal(labels, inputs + 1)
    assert inputs.shape == (3, 8)
    assert (one.at(5)[0] != inputs).any()


@pytest.fixture(scope="module")
def models():
    options = dataclasses.replace(SMALL, width=16)
    return {name: model_.build(name, options) for name in ("softmax", "lssar-15")}


def test_all_attentions_start_from_the_same_weights(models):
    one, two = (nnx.state(model, nnx.Param) for model in models.values())
    np.testing.assert_array_equal(one.embedding.embedding, two.embedding.embedding)
    np.testing.assert_array_equal(one.blocks[0].up.kernel, two.blocks[0].up.kernel)


@pytest.mark.parametrize("attention", ["softmax", "lssar-15"])
def test_a_prefix_has_the_losses_of_a_shorter_sequence(attention, models):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))
    long = model_.losses_by_position(models[attention], tokens)
    short = model_.losses_by_position(models[attention], tokens[:, :14])
    np.testing.assert_allclose(long[:, :13], short, rtol=2e-5)


@pytest.mark.parametrize(
    ("attention", "keys", "weight", "entropy"),
    [
        ("softmax", 64, (0.92, 0.96), (0.0, 0.2)),
        ("softmax", 1024, (0.4, 0.6), (0.4, 0.7)),
        ("lssa", 64, (0.15, 0.19), (0.8, 0.9)),
        ("lssar-15", 1024, (0.99, 1.0), (0.0, 0.01)),
    ],
)
def test_only_reweighting_keeps_the_key_that_matches(attention, keys, weight, entropy):
    found = aligned.measure(attention, keys, seed=0)
    assert weight[0] <= found.weight <= weight[1] + 1e-6
    assert entropy[0] <= found.entropy <= entropy[1]


# ------------------------------------------------------------------- the training loop
class Line(nnx.Module):
    """One number, pulled to 3 by its loss."""

    def __init__(self):
        self.value = nnx.Param(jnp.zeros(()))


def plan_of(steps: int, stop: Stop | None = None, stop_at: int = -1) -> training.Plan:
    def batch_at(step: int) -> tuple[float]:
        if stop is not None and step == stop_at:
            stop(signal.SIGTERM, None)
        return (1 + step % 3,)

    return training.Plan(
        name="line",
        steps=steps,
        batch_at=batch_at,
        loss=lambda model, factor: factor * optax.l2_loss(model.value[...], 3.0),
        evaluate=lambda model: float(model.value[...]),
        evaluate_every=4,
        learning_rate=0.1,
    )


def without_times(history: list) -> list:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in history]


def test_training_stopped_half_way_resumes_to_the_bit(tmp_path):
    whole = training.train(
        Line(), plan_of(9), folder=tmp_path / "whole", identity={}, stop=Stop()
    )
    assert [r["step"] for r in whole if "held_out_loss" in r] == [0, 4, 8, 9]
    assert whole[-1]["held_out_loss"] > whole[0]["held_out_loss"] == 0
    folder, stop = tmp_path / "stopped", Stop()
    with pytest.raises(Interrupted, match="stopped at step 6 of 9 of `line`; checkp"):
        training.train(
            Line(), plan_of(9, stop, 5), folder=folder, identity={}, stop=stop
        )
    resumed = training.train(
        Line(), plan_of(9), folder=folder, identity={}, stop=Stop()
    )
    assert without_times(resumed) == without_times(whole)
    assert training.seconds_per_step(resumed) > 0


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    Checkpoints(tmp_path / "line", {"width": 1}).close()
    run = lambda width: training.train(
        Line(), plan_of(1), folder=tmp_path, identity={"width": width}, stop=Stop()
    )
    run(1)
    with pytest.raises(Failure, match=r"other settings \(width 1, not 2\)"):
        run(2)


def test_loss_that_is_not_finite_is_a_failure(tmp_path):
    plan = plan_of(2)._replace(loss=lambda model, _: model.value[...] + jnp.nan)
    with pytest.raises(Failure, match="loss of `line` is not finite at step 1;"):
        training.train(Line(), plan, folder=tmp_path, identity={}, stop=Stop())
