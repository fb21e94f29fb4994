"""The video example: a short real run, and the promises of its parts."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from matplotlib import image
from radial_video_model import (
    extension,
    model as model_,
    options as options_,
    task,
    video,
)
from study.command_line import EXAMPLES

from softlib import masks
from tests.examples.smoke import colours, complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "radial_video.py"
SMALL = dataclasses.replace(
    options_.Options(**options_.PRESETS["smoke"]), width=12, components=3
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is long enough to learn something, and extends its clips."""
    arguments = "--steps 120 --evaluate-every 40 --extension 2 --adapter-steps 8"
    more = "--train-frames 96 --cost-frames 2,8"
    out = tmp_path_factory.mktemp("runs") / "trained"
    return complete_run(SCRIPT, out, *arguments.split(), *more.split())


@pytest.fixture(scope="module")
def patches():
    return video.load(options_.Options.video)


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 1000
    # No panel is empty: each cell of a coarse grid over the picture has two colours.
    for rows in np.array_split(pixels, 3):
        for cell in np.array_split(rows, 3, axis=1):
            assert colours(cell) > 10


def curves_of(metrics: dict[str, Any]) -> dict[str, list[float]]:
    return {
        name: [r["held_out_loss"] for r in history if "held_out_loss" in r]
        for name, history in metrics["histories"].items()
    }


def test_both_attentions_start_from_the_copy_and_differ_when_trained(smoke):
    _, metrics, _ = smoke
    curves, copy = curves_of(metrics), metrics["held_out"][0]["error"]
    for name in ("dense", "radial"):
        assert curves[name][0] == pytest.approx(copy, rel=1e-5)
        assert curves[name][-1] != pytest.approx(copy, rel=1e-4)
    assert curves["dense"] != curves["radial"]


@pytest.mark.slow
def test_both_attentions_learn(trained):
    _, metrics, _ = trained
    curves, copy = curves_of(metrics), metrics["held_out"][0]["error"]
    for name in ("dense", "radial"):
        assert curves[name][0] == pytest.approx(copy, rel=1e-5)
        assert curves[name][-1] < 0.99 * copy


def adapters_change(metrics: dict[str, Any], long: int) -> tuple[float, float]:
    """The error before and after the adapters were trained, as two places say."""
    error = {(r["name"], r["frames"]): r["error"] for r in metrics["held_out"]}
    history = metrics["histories"]["adapters"]
    before = error["dense under the radial mask, not adapted", long]
    after = error["dense under the radial mask, adapters", long]
    assert history[0]["held_out_loss"] == pytest.approx(before, rel=1e-4)
    assert history[-1]["held_out_loss"] == pytest.approx(after, rel=1e-4)
    return before, after


def test_adapters_start_as_no_change_and_are_trained(smoke):
    _, metrics, _ = smoke
    before, after = adapters_change(metrics, SMALL.frames)
    assert after != pytest.approx(before, rel=1e-4)
    parameters = metrics["parameters"]
    assert 0 < parameters["adapters"] < 0.1 * parameters["all"]


@pytest.mark.slow
def test_adapters_mend_longer_clips(trained):
    before, after = adapters_change(trained[1], 2 * SMALL.frames)
    assert after < before


def test_stored_scores_take_the_memory_that_streaming_saves(smoke):
    _, metrics, _ = smoke
    size = {(c["attention"], c["tokens"]): c for c in metrics["cost"]}
    tokens = max(n for _, n in size)
    stored, dense, radial = (
        size[name, tokens]["temporary_bytes"] for name in ("stored", "dense", "radial")
    )
    assert stored > 5 * max(dense, radial) > 0
    assert size["radial", tokens]["seconds"] > 0


def test_kept_pairs_grow_with_the_logarithm_of_the_frames(smoke):
    _, metrics, _ = smoke
    kept = [p["kept"] for p in metrics["pairs"]]
    # Frames double from entry to entry: about a constant is added each time.
    added = np.diff(kept)
    assert added[2:].max() < 1.5 * added[2:].min()
    assert all(
        p["visited"] is None or p["visited"] > p["kept"] for p in metrics["pairs"]
    )


def test_credit_is_printed_and_limits_are_said(smoke):
    _, _, printed = smoke
    assert video.CREDIT in printed
    assert "(c) 2008 Blender Foundation, www.bigbuckbunny.org" in video.CREDIT
    assert "\nlimits " in printed


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--learning-rate nan", "must be a finite number above 0, got 'nan'"),
        ("--cost-frames 4,x", "--cost-frames: must be an integer of at least 1"),
        ("--heads 5", "--heads must divide --width, got 5 and 64"),
        ("--heads 16", "must be even and at least 6"),
        ("--hidden-percent 100", "must be below 100, got 100"),
        ("--tube 3", "--tube must divide --frames, got 3 and 8"),
        ("--extension 5", "must divide the held-out frames"),
        ("--components 193", "must be at most 192, got 193"),
        ("--preset huge", "invalid choice: 'huge'"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(arguments.split())
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_help_shows_every_option_and_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(["--preset", "smoke", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(options_.Options):
        assert "--" + field.name.replace("_", "-") in text
    assert "optimiser steps of each of the two models (default: 4)" in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/clip.xz", "cannot read /nowhere/clip.xz: No such file"),
        (SCRIPT, "is not a whole xz file"),
        (EXAMPLES / "data" / "sotu.txt.xz", r"must hold 5,406,720 bytes, got 10,"),
    ],
)
def test_what_is_not_the_clip_is_a_failure(path, message):
    with pytest.raises(video.Failure, match=message):
        video.load(pathlib.Path(path))


# ---------------------------------------------------------------------------- pieces
def test_patches_are_the_pixels_of_the_frames(patches):
    assert patches.shape == (128, 220, 192)
    assert 0 <= patches.min() < patches.max() <= 1
    frame = video.picture(patches[0])
    np.testing.assert_array_equal(frame[8:16, 16:24], patches[0, 22].reshape(8, 8, 3))
    # One shot: a frame is far nearer to the next than to the mean image.
    step = np.square(np.diff(patches, axis=0)).mean()
    assert step < 0.2 * np.square(patches - patches.mean(0)).mean()


def test_all_components_give_the_patches_back(patches):
    codec = video.Codec.fit(patches[::16], video.PIXELS)
    back = codec.decode(codec.encode(patches[:3]))
    np.testing.assert_allclose(back, patches[:3], atol=2e-5)
    few = video.Codec.fit(patches[::16], 4).encode(patches[::16])
    assert few.std() == pytest.approx(1, rel=1e-3)


def test_copy_is_the_nearest_visible_frame_or_the_background():
    random = np.random.default_rng(0)
    frames = 6
    latents = random.normal(size=(2, frames, video.PLACES, 2)).astype("f4")
    hidden = random.random((2, frames, video.PLACES)) < 0.7
    actual = task.nearest_visible(jnp.asarray(latents), jnp.asarray(hidden))
    expected = np.zeros_like(latents)
    for b, t, p in np.ndindex(hidden.shape):
        visible = np.flatnonzero(~hidden[b, :, p])
        if len(visible):
            nearest = min(visible, key=lambda f, t=t: (abs(f - t), f))
            expected[b, t, p] = latents[b, nearest, p]
    assert (expected[hidden] == 0).any()
    np.testing.assert_array_equal(actual, expected)


def test_a_place_stays_hidden_for_a_tube():
    options = dataclasses.replace(SMALL, tube=3, hidden_percent=40)
    hidden = task.hidden_tubes(np.random.default_rng(0), 8, options)
    assert hidden.shape == (8, video.PLACES)
    for first in (0, 3, 6):
        tube = hidden[first : first + 3]
        assert (tube == tube[:1]).all()
        assert 0.2 < tube[0].mean() < 0.6
    assert (hidden[2] != hidden[3]).any()


def test_batches_depend_on_seed_and_step_alone():
    latents = np.arange(20, dtype="f4")[:, None, None] * np.ones((1, video.PLACES, 1))
    one, two = (task.Clips(latents, 4, SMALL) for _ in range(2))
    two.at(3)  # what came before does not matter
    for a, b in zip(one.at(7), two.at(7), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.at(7)[1] != one.at(8)[1]).any()
    assert np.diff(one.at(7)[0][0, :, 0, 0]).tolist() == [1, 1, 1]


def test_held_out_error_is_relative_to_the_background():
    latents = np.random.default_rng(1).normal(size=(8, video.PLACES, 2)).astype("f4")
    held_out = task.HeldOut.of(latents, SMALL)
    nothing = held_out.predictions(lambda latents, _: 0 * latents, 4)
    assert nothing.shape == (SMALL.draws, 8, video.PLACES, 2)
    assert held_out.error(nothing) == 1
    assert held_out.error(held_out.predictions(lambda latents, _: latents, 2)) == 0
    # Errors of visible patches do not count.
    visible = np.where(held_out.hidden[..., None], latents, 100)
    assert held_out.error(visible) == 0


def test_model_starts_as_the_copy_and_hidden_patches_are_not_seen():
    model = model_.under(model_.build(SMALL), model_.radial(SMALL))
    random = np.random.default_rng(2)
    shape = (1, 3, video.PLACES)
    latents = random.normal(size=(*shape, SMALL.components)).astype("f4")
    latents, hidden = jnp.asarray(latents), jnp.asarray(random.random(shape) < 0.5)
    found = model_.predict(model, latents, hidden)
    np.testing.assert_array_equal(found, task.nearest_visible(latents, hidden))
    model.out.kernel[...] = jnp.ones_like(model.out.kernel[...])
    found = model_.predict(model, latents, hidden)
    other = jnp.where(hidden[..., None], 1e3, latents)
    np.testing.assert_array_equal(found, model_.predict(model, other, hidden))
    assert jnp.abs(found - task.nearest_visible(latents, hidden)).max() > 0.1


def test_copies_share_no_weights_and_only_adapters_are_adapters():
    model = model_.build(SMALL)
    adapted: Any = extension.with_adapters(model, SMALL)
    assert isinstance(adapted.blocks[0].mask, masks.Radial)
    assert model.blocks[0].mask == masks.All()
    own = jax.tree.leaves(nnx.state(model, nnx.Param))
    adapters = jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))
    every = jax.tree.leaves(nnx.state(adapted, nnx.Param))
    assert len(adapters) == 2 * len(extension.ADAPTED) * SMALL.layers
    assert len(every) == len(own) + len(adapters)
    before = model.blocks[0].query.kernel[...]
    base = adapted.blocks[0].query.base_module
    base.kernel[...] = base.kernel[...] + 1
    np.testing.assert_array_equal(model.blocks[0].query.kernel[...], before)


def test_vendored_data_are_what_their_sums_say():
    for line in (EXAMPLES / "data" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        with (EXAMPLES / "data" / name).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest, name
