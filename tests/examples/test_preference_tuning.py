"""The preference example: a short real run, and the promises of its parts."""

import dataclasses

import jax
import numpy as np
import pytest
from language_model.failures import Failure
from matplotlib import image
from preference_tuning_model import (
    model as model_,
    options as options_,
    pairs as pairs_,
    session,
    text as text_,
    tuning,
    unlearning,
)
from study.command_line import EXAMPLES

from tests.examples.smoke import colours, complete_run

SCRIPT = EXAMPLES / "preference_tuning.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])
TINY = dataclasses.replace(SMALL, vocabulary_size=300, width=8, heads=2, context=12)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    return complete_run(SCRIPT, out, "--cache", out / "cache")


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    assert "\nlimits " in printed
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    # No panel is empty.
    for rows in np.array_split(pixels, 2):
        for cell in np.array_split(rows, 3, axis=1):
            assert colours(cell) > 10


def test_the_language_model_learns(smoke):
    _, metrics, _ = smoke
    losses = [r["held_out_loss"] for r in metrics["history"] if "held_out_loss" in r]
    assert losses[0] == pytest.approx(np.log(SMALL.vocabulary_size), abs=0.1)
    assert losses[-1] < losses[0] - 1


def test_preferences_are_learned_and_flips_make_it_harder(smoke):
    _, metrics, _ = smoke
    tuned = {(t["loss"], t["flips"]): t for t in metrics["tuned"]}
    base, clean = tuned["base", 0], tuned["dpo", 0]
    assert base["accuracy"] == 0.5  # its ratio to itself is 1
    assert base["scale"] == 0
    assert clean["accuracy"] > 0.55
    assert clean["drawn"] > base["drawn"] + 0.3  # shorter words
    for loss in tuning.LOSSES:
        assert tuned[loss, 30]["scale"] < clean["scale"]
    assert tuned["cdpo", 30]["scale"] < tuned["rdpo", 30]["scale"]


def test_forgetting_forgets(smoke):
    _, metrics, _ = smoke
    learned, found = metrics["learned"], metrics["forgotten"]
    assert learned["forget"] < metrics["before"]["forget"]
    assert list(found) == list(unlearning.METHODS)
    for history in found.values():
        assert history[0]["forget"] == pytest.approx(learned["forget"], abs=1e-4)
        assert history[-1]["forget"] > learned["forget"]
    last = {method: history[-1] for method, history in found.items()}
    assert last["npo"]["forget"] < last["ascent"]["forget"]
    for method in ("ascent", "npo"):
        assert last[f"{method}+retain"]["retain"] < last[method]["retain"]


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--beta -1", "--beta: must be a finite number above 0, got '-1'"),
        ("--flips 10,30", "--flips must begin with 0 and name another below 50"),
        ("--flips 0,50", "none twice, got 0,50"),
        ("--heads 3", "must be an even integer (rotary embedding), got 64 / 3"),
        ("--response 32", "must fit into --context + 1, got 8 + 32 and 32"),
        ("--pairs 8", "--pairs must be at least --batch, got 8 and 32"),
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


def test_too_few_prompts_are_a_failure():
    windows = np.zeros((5, 13), np.int32)
    text = text_.Text(windows, windows, windows, None, "")  # pyrefly: ignore
    with pytest.raises(Failure, match="5 windows to take prompts from, fewer than"):
        session._prompts(text, SMALL)


# ---------------------------------------------------------------------------- pieces
def test_the_reward_is_the_length_of_words():
    assert pairs_.reward("We the people, 1788") == -(2 + 3 + 6) / 3
    assert pairs_.reward(" 12, 13") == 0


def test_batches_see_every_row_once_an_epoch():
    rows = [text_.rows_at(step, 10, 4, seed=1) for step in range(4)]
    assert len(set(np.concatenate(rows[:2]).tolist())) == 8
    np.testing.assert_array_equal(rows[0], text_.rows_at(0, 10, 4, seed=1))
    assert (rows[0] != text_.rows_at(0, 10, 4, seed=2)).any()
    assert len(text_.rows_at(0, 3, 4, seed=1)) == 3


def test_accuracy_and_scale_are_within_prompts():
    rewards = np.array([[0.0, 1.0, 3.0], [5.0, 5.0, 6.0]])
    offset = np.array([[100.0], [-100.0]])  # of a prompt: means nothing
    implicit = 0.25 * rewards + offset
    assert tuning.accuracy(implicit, rewards) == 1
    assert tuning.accuracy(-implicit, rewards) == 0
    assert tuning.accuracy(np.zeros_like(rewards), rewards) == 0.5
    assert tuning.scale(implicit, rewards) == pytest.approx(0.25)


def test_a_higher_rate_flips_more_of_the_same_pairs():
    empty = np.zeros((0, 4, 6), np.int32)
    flip = np.linspace(0, 0.99, 100)
    pairs = pairs_.Pairs(np.zeros((100, 2, 6)), flip, empty, np.zeros((0, 4)))
    few, many = pairs.flipped(10), pairs.flipped(30)
    assert (few.sum(), many.sum()) == (10, 30)
    assert not (few & ~many).any()
    assert not pairs.flipped(0).any()


def test_responses_are_drawn_behind_their_prompts_by_the_seed_alone():
    model = model_.build(TINY)
    prompts = np.arange(12, dtype=np.int32).reshape(3, 4)
    one, two = (model_.respond(model, prompts, 5, jax.random.key(0)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[:, :4], prompts)
    assert one.shape == (3, 9)
    assert len(np.unique(one[:, 4:])) > 3


def test_the_response_is_what_counts_and_sums_are_of_tokens():
    model = model_.build(TINY)
    tokens = np.random.default_rng(0).integers(0, 300, (3, 9)).astype(np.int32)
    where = model_.response_where(9, prompt=4)
    assert where.sum() == 5
    of_tokens = model_.all_token_log_probs(model, tokens, where)
    np.testing.assert_array_equal(of_tokens[:, :3], 0)
    of_sequences = model_.all_log_probs(model, tokens, where)
    np.testing.assert_allclose(of_tokens.sum(1), of_sequences, rtol=1e-5)


def test_a_copy_is_not_the_model():
    model = model_.build(TINY)
    copy = model_.copy_of(model)
    np.testing.assert_array_equal(copy.table, model.table)
    assert copy.table.unsafe_buffer_pointer() != model.table.unsafe_buffer_pointer()


def test_when_something_is_forgotten():
    history = [{"step": i, "forget": float(i), "retain": 0.0} for i in range(4)]
    assert unlearning.when_forgotten(history, 1.5) == history[2]
    assert unlearning.when_forgotten(history, 9.0) is None
