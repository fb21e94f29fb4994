"""The Fourier head example: a short real run, and the promises of its parts."""

import dataclasses
import hashlib
import lzma

import numpy as np
import pytest
from fourier_head_study import options as options_, series as series_, session
from language_model.failures import Failure
from matplotlib import image
from study.command_line import EXAMPLES

from tests.examples.smoke import colours, complete_run

SCRIPT = EXAMPLES / "fourier_head.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is long enough to forecast, with two numbers of frequencies."""
    arguments = "--frequencies 2,8 --steps 200 --evaluate-every 100"
    out = tmp_path_factory.mktemp("runs") / "trained"
    return complete_run(SCRIPT, out, *arguments.split())


@pytest.fixture(scope="module")
def data():
    return series_.load(SMALL.data)


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    assert "\nlimits " in printed
    assert series_.CREDIT in printed
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    for rows in np.array_split(pixels, 2):
        for cell in np.array_split(rows, 3, axis=1):
            assert colours(cell) > 8


def test_few_frequencies_have_fewer_parameters_and_every_head_learns(smoke):
    _, metrics, _ = smoke
    found = {(r["series"], r["frequencies"]): r for r in metrics["results"]}
    assert len(found) == 4
    for name in options_.SERIES:
        linear, few = (found[name, n] for n in (None, 2))
        assert few["parameters"] < linear["parameters"]
        assert few["roughness"][0] < linear["roughness"][0]
        for result in (linear, few):
            assert result["lowest"][0] <= result["likelihood"][0]
            assert result["likelihood"][0] < np.log(SMALL.bins)


@pytest.mark.slow
def test_few_frequencies_are_smoother_and_forecast_sunspots_better(trained):
    _, metrics, _ = trained
    found = {(r["series"], r["frequencies"]): r for r in metrics["results"]}
    assert len(found) == 6
    for name in options_.SERIES:
        linear, few, many = (found[name, n] for n in (None, 2, 8))
        rough = [r["roughness"][0] for r in (few, many, linear)]
        assert rough[0] < rough[1] < rough[2]
        assert few["parameters"] < many["parameters"] < linear["parameters"]
        for result in (linear, few, many):
            assert result["lowest"][0] <= result["likelihood"][0]
            assert result["likelihood"][0] < np.log(SMALL.bins)
    spots = [found["sunspots", n]["likelihood"][0] for n in (2, None)]
    assert spots[0] < spots[1] - 0.1
    assert spots[0] < metrics["unigram"]["sunspots"] - 0.1


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--frequencies 4,4", "--frequencies must name none twice, got 4,4"),
        ("--frequencies 51", "must be at most half of --bins (50), got 51"),
        ("--series gold", "must be of brent, sunspots, got 'gold'"),
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


def test_what_are_not_series_is_a_failure(tmp_path):
    wrong = tmp_path / "wrong.xz"
    for content, message in (
        (b"no xz", "is not a whole xz text"),
        (lzma.compress(b"== brent\n1\nx\n"), "'x' is not a number"),
        (lzma.compress(b"== brent\n1\nnan\n"), "'nan' is not a number"),
        (lzma.compress(b"== brent\n1\n"), "`brent` must have 200 values or more"),
    ):
        wrong.write_bytes(content)
        with pytest.raises(Failure, match=message):
            session.run(dataclasses.replace(SMALL, data=wrong, out=tmp_path / "out"))
    with pytest.raises(Failure, match="No such file"):
        series_.load(tmp_path / "none.xz")


# ---------------------------------------------------------------------------- pieces
def test_vendored_series_are_what_their_sum_says(data):
    digest = "699f4512538dc53db8c0368910a2c7d8adee24835f526ac5475f81234ec865b0"
    raw = SMALL.data.read_bytes()
    assert data["brent"].digest == hashlib.sha256(raw).hexdigest() == digest
    text = lzma.decompress(raw).decode().splitlines()
    assert text[1].startswith("== brent | daily spot price")
    assert text[2] == "18.63"
    assert len(text) == 3 + 8195 + 3120


def test_windows_hold_the_past_and_the_target_lies_ahead(data):
    text = lzma.decompress(SMALL.data.read_bytes()).decode()
    spots = np.array(text.partition("== sunspots")[2].split("\n")[1:-1], float)
    forecast = data["sunspots"]
    assert forecast.past.shape == (3120 - 36 - 11, 36)
    np.testing.assert_allclose(
        130 + 130 * forecast.target[:5], spots[36 + 11 : 36 + 16], rtol=1e-6
    )
    first, second = forecast.past[0], spots[:36]
    assert np.corrcoef(first, second)[0, 1] > 0.9999
    assert forecast.outside == 0
    # No window of the later part saw, or asks for, a value of the earlier one.
    later = forecast.part(held_out=True).start
    assert later - forecast.train >= 36 + 11
    assert 0 < data["brent"].outside < 0.01


def test_labels_are_the_bins_of_the_targets(data):
    forecast = data["brent"]
    labels, centres = forecast.labels(40), forecast.centres(40)
    assert labels.min() == 0
    assert labels.max() == 39
    inside = abs(forecast.target) < 1
    target = forecast.middle + forecast.scale * forecast.target[inside]
    assert (abs(centres[labels[inside]] - target) <= 0.2 + 1e-9).all()
    assert session.unigram(forecast, 40) < np.log(40)
