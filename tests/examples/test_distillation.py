"""The distillation example: a short real run, and the promises of its parts."""

import dataclasses

import jax
import numpy as np
import pytest
from distillation_study import (
    glyph_losses,
    glyphs,
    memory,
    options as options_,
    text_losses,
)
from matplotlib import image
from study.command_line import EXAMPLES

from softlib import LinearLogits
from tests.examples.smoke import colours, complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "distillation.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


# -------------------------------------------------------------------------- a whole run
@pytest.mark.slow  # ten models, each with its own program
def test_run_leaves_numbers_and_a_picture_that_shows_something(smoke):
    out, metrics, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    assert "\nlimits " in printed
    assert glyphs.CREDIT in printed
    assert metrics["glyph_accuracy"].keys() == set(SMALL.glyph_methods)
    chance = 1 / len(glyphs.CHARACTERS)
    assert metrics["teacher_accuracy"]["MLL"] > 2 * chance
    assert metrics["teacher_cmi"].keys() == {"MLL", "MCMI"}
    for name in SMALL.text_methods:
        assert np.isfinite(list(metrics["text"][name].values())).all()
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 700
    # No panel is empty.
    for rows in np.array_split(pixels, 2):
        for cell in np.array_split(rows, 3, axis=1):
            assert colours(cell) > 10


# ---------------------------------------------------------------------------- the parts
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shots 0", "--shots: must be an integer of at least 1, got '0'"),
        ("--glyph-methods CE,X", "must be of CE, KD, DKD, NKD, USKD, got 'X'"),
        ("--text-student-width 30", "must be multiples of 4"),
        ("--preset huge", "invalid choice: 'huge'"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(arguments.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_method_can_be_named():
    assert tuple(glyph_losses.METHODS) == options_.GLYPH_METHODS
    assert tuple(text_losses.METHODS) == options_.TEXT_METHODS


def test_glyphs_are_of_every_class_and_fonts_are_not_shared():
    seen, held_out = glyphs.load(0)
    count = len(glyphs.CHARACTERS)
    for images in (seen, held_out):
        assert images.pixels.shape == (len(images.labels), glyphs.SIZE**2)
        copies = np.bincount(images.labels, minlength=count)
        assert (copies == copies[0]).all()
        assert copies[0] >= 3 * glyphs.COPIES
        assert images.pixels.std() > 0.3
    few = seen.few(3, 0)
    np.testing.assert_array_equal(np.bincount(few.labels), 3)
    for a, b in zip(seen.at(5, 8, 0), glyphs.load(0)[0].at(5, 8, 0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_streamed_distillation_takes_a_small_part_of_the_logits():
    options = dataclasses.replace(SMALL, tokens=65536, memory_rows=512)
    sizes = memory.measure(options)
    streamed, stored = sizes.values()
    assert streamed is not None
    assert stored is not None
    one = 4 * options.tokens * options.memory_rows
    assert streamed < one / 4
    assert stored > 2 * one


def test_both_ways_of_the_memory_comparison_are_the_same_loss():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((5, 4), (30, 4), (5, 6), (30, 6))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    student, teacher = LinearLogits(*arrays[:2]), LinearLogits(*arrays[2:])
    a, b = (jax.grad(f)(student, teacher) for f in (memory.streamed, memory.stored))
    np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-6)
    np.testing.assert_allclose(a.weight, b.weight, atol=1e-6)
    assert jnp.abs(a.hidden).max() > 1e-3
