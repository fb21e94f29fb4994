"""The flow example: a short real run, and the promises of its parts."""

import dataclasses
import hashlib
import lzma
from typing import Any

import numpy as np
import pytest
from language_model.failures import Failure
from matplotlib import image
from simplex_flow_model import (
    exact,
    model as model_,
    options as options_,
    report,
    session,
    sites as sites_,
    task,
    toy,
)
from study.command_line import EXAMPLES

from tests.examples.smoke import colours, complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "simplex_flow.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def sites():
    return sites_.load(SMALL.sites)


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    assert "\nlimits " in printed
    assert sites_.CREDIT in printed
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    # No panel is empty.
    for rows in np.array_split(pixels, 2):
        for cell in np.array_split(rows, 3, axis=1):
            assert colours(cell) > 10


def test_both_models_learn_and_none_is_better_than_bayes(smoke):
    _, metrics, _ = smoke
    losses = {
        name: [r["held_out_loss"] for r in history if "held_out_loss" in r]
        for name, history in metrics["histories"].items()
    }
    assert losses["denoiser"][0] > np.log(4)
    assert metrics["exact_loss"] < losses["denoiser"][-1] < 0.65
    assert metrics["exact_loss"] > 0.4
    assert losses["classifier"][-1] < 0.4
    assert metrics["classifier_accuracy"] > 0.8


def test_samples_are_nearer_to_the_sites_the_better_the_denoiser(smoke):
    _, metrics, _ = smoke
    near = metrics["samples"]
    missing = {name: n["missing_bits"] for name, n in near.items()}
    assert missing["sites"] < missing["exact"] < missing["independent"]
    assert near["sites"]["known"] == 1
    assert near["exact"]["pairs"] < near["independent"]["pairs"]
    assert near["network"]["letters"] < 0.2


def test_guidance_reaches_the_class_in_both_spaces(smoke):
    _, metrics, _ = smoke
    for space in session.SPACES:
        found = [g for g in metrics["guided"] if g["space"] == space]
        assert [g["strength"] for g in found] == list(SMALL.strengths)
        assert found[0]["common"] < 0.6
        assert found[-1]["common"] > found[0]["common"] + 0.2
        assert found[-1]["believed"] > found[0]["believed"] + 0.2


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--beta -1", "--beta: must be a finite number above 0, got '-1'"),
        ("--strengths 5,10", "--strengths must begin with 0 and name another, none"),
        ("--strengths 0", "none twice, got 0"),
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


def test_what_are_not_sites_is_a_failure(tmp_path):
    wrong = tmp_path / "wrong.xz"
    for content, message in (
        (b"no xz", "is not a whole xz text"),
        (lzma.compress(b"CAGGUAAGU\n"), "lines must hold 9 letters, a count"),
        (lzma.compress(b"# nothing\n"), "lines must hold 9 letters, a count"),
    ):
        wrong.write_bytes(content)
        with pytest.raises(Failure, match=message):
            sites_.load(wrong)
    with pytest.raises(Failure, match="No such file"):
        sites_.load(tmp_path / "none.xz")
    options = dataclasses.replace(SMALL, common=1, out=tmp_path)
    with pytest.raises(Failure, match="there must be some of both kinds"):
        session.run(options)


# ---------------------------------------------------------------------------- pieces
def test_vendored_sites_are_what_their_sum_says(sites):
    digest = "b961baf5ddd4be932b96bfd9694ff435656376daa601a352449f6f6555859bdb"
    assert (
        sites.digest == hashlib.sha256(SMALL.sites.read_bytes()).hexdigest() == digest
    )
    assert sites.tokens.shape == (10_227, 9)
    assert (sites.tokens[:, 3] == sites_.LETTERS.index("G")).all()
    share = sites.share
    assert -(share * np.log2(share)).sum() == pytest.approx(9.751, abs=1e-3)
    most = sites.tokens[sites.counts.argmax()]
    assert "".join(sites_.LETTERS[i] for i in most).startswith("CAGGU")


def test_nearness_is_nothing_lacking_for_the_distribution_itself():
    tokens = np.array([[0] * 9, [1] * 9, [2] * 9])
    small = sites_.Sites(tokens, np.array([2, 1, 1]), "")
    same = sites_.nearness(tokens[[0, 0, 1, 2]], small)
    assert same == pytest.approx((0, 0, 0, 1), abs=1e-12)
    other = sites_.nearness(np.array([[0] * 9, [3] * 9]), small)
    assert other.known == 0.5
    assert other.letters == pytest.approx(0.5)
    expected = 0.5 * np.log2(0.5 / 0.5) + 2 * 0.25 * np.log2(0.25 / 0.0025)
    assert other.missing_bits == pytest.approx(expected, rel=1e-6)
    assert sites_.pairs(tokens, small.share).sum() == pytest.approx(36)
    assert small.count_of(tokens[[1, 0]]).tolist() == [1, 2]
    assert len(small.of_count(2).tokens) == 1


def test_batches_depend_on_seed_and_step_alone_and_held_out_ones_are_not_seen(sites):
    noised, labelled = task.of(sites, SMALL)
    one, two = noised.at(3, 8), task.Noised(sites, SMALL.seed).at(3, 8)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one[2] != noised.at(4, 8)[2]).any()
    held_out = set(sites_.number(labelled.held_out(2000)[0]).tolist())
    tokens, is_common = labelled.at(0, 2000)
    assert not held_out & set(sites_.number(tokens).tolist())
    np.testing.assert_array_equal(sites.count_of(tokens) >= SMALL.common, is_common)


def test_exact_denoiser_of_two_sites_is_the_rule_of_bayes():
    tokens = np.array([[0] * 9, [1] * 9])
    small = sites_.Sites(tokens, np.array([3, 1]), "")
    said = exact.denoiser(small, SMALL)
    # Nothing seen: the prior.
    prior = np.exp(said(jnp.full((1, 9, 4), 0.25), jnp.float32(0.5)))
    np.testing.assert_allclose(prior[0, 0], [0.75, 0.25, 0, 0], atol=1e-6)
    x = jnp.tile(jnp.array([0.2, 0.4, 0.2, 0.2]), (1, 9, 1))
    assert np.exp(said(x, jnp.float32(0.5)))[0, 0, 1] > 0.9


def test_toy_flow_stays_on_the_triangle_and_guidance_turns_it():
    found = toy.draw(0, points=50, paths=8)
    assert found.clouds.shape == (len(toy.TIMES), 50, 3)
    assert found.free.shape == found.guided.shape == (toy.STEPS + 1, 8, 3)
    for points in found:
        assert (points >= 0).all()
        np.testing.assert_allclose(points.sum(-1), 1, atol=1e-5)
    assert found.guided[-1, :, 2].mean() > found.free[-1, :, 2].mean() + 0.2
    assert found.free[-1].max() < 0.9  # short of the corners


def test_weakest_guidance_that_is_enough():
    make: Any = lambda strength, common: session.Guided(
        "logit", strength, 0.0, common, 0.0, 0.0, 0.0
    )
    found = [make(0, 0.3), make(5, 0.91), make(9, 0.99)]
    assert report.reaching(found, "logit").strength == 5
    assert report.reaching(found, "logit", 1.0).strength == 9


def test_draws_depend_on_the_seed_alone():
    options = dataclasses.replace(SMALL, width=8, flow_steps=2)
    denoiser = model_.build(model_.Denoiser, options)
    one, two = (model_.draw(denoiser, 30, options) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (30, 9)
    other = model_.draw(denoiser, 30, dataclasses.replace(options, seed=1))
    assert (one != other).any()
