"""The triple example: a short real run, and the promises of its parts."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from flax import nnx
from matplotlib import image
from study.command_line import EXAMPLES
from triple_detection_model import (
    cost,
    hand_set,
    maps,
    model as model_,
    options as options_,
    session,
    task,
)

from tests.examples.smoke import colours, complete_run

SCRIPT = EXAMPLES / "triple_detection.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is long enough to learn the task."""
    arguments = "--steps 240 --evaluate-every 60 --test-sequences 1024"
    more = "--hand-set-lengths 8,16 --hand-set-answers 512"
    out = tmp_path_factory.mktemp("runs") / "trained"
    return complete_run(SCRIPT, out, *arguments.split(), *more.split())


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 1000
    # No panel is empty.
    for rows in np.array_split(pixels, 2):
        for cell in np.array_split(rows, 3, axis=1):
            assert colours(cell) > 10


@pytest.mark.slow
def test_tensor_attention_learns_more_than_pairwise_with_more_parameters(trained):
    _, metrics, _ = trained
    results = check_sizes_and_steps(metrics, [0, 60, 120, 180, 240])
    last = {name: result["accuracy"][-1] for name, result in results.items()}
    assert last["tensor"] > last["pairwise"] + 0.05
    assert last["pairwise"] > metrics["majority"]["0"] > 0.5


def test_tensor_attention_has_fewer_parameters_than_pairwise(smoke):
    _, metrics, _ = smoke
    results = check_sizes_and_steps(metrics, [0, 10, 20])
    assert results["tensor"]["accuracy"] != results["pairwise"]["accuracy"]
    assert metrics["majority"]["0"] > 0.5


def check_sizes_and_steps(metrics, steps):
    results = {k: by_seed["0"] for k, by_seed in metrics["results"].items()}
    size = {name: result["parameters"] for name, result in results.items()}
    assert size["tensor"] < size["pairwise"]
    for result in results.values():
        assert result["steps"] == steps
        assert result["accuracy"][-1] > result["accuracy"][0]
    return results


def test_head_that_is_set_by_hand_is_never_wrong(smoke):
    check_hand_set(smoke[1], [8, 8])


@pytest.mark.slow
def test_head_that_is_set_by_hand_is_never_wrong_at_more_lengths(trained):
    check_hand_set(trained[1], [8, 16, 8, 16])


def check_hand_set(metrics, lengths):
    assert [s["length"] for s in metrics["hand_set"]] == lengths
    for scores in metrics["hand_set"]:
        assert scores["false_positives"] == scores["false_negatives"] == 0
        assert scores["most_other"] < 0.05 < 0.95 < scores["least_match"]
        assert 0.3 < scores["positive"] < 0.5


def test_errors_of_the_polynomials_are_below_what_is_certified(smoke):
    _, metrics, _ = smoke
    for found in metrics["cost"]:
        assert found["seconds"] > 0
        if found["rtol"] is None:
            assert found["error"] is None
        else:
            assert 0 < found["error"] < cost.certified(found["rtol"])


@pytest.mark.slow
def test_trained_heads_attend_to_triples_that_sum_to_zero(trained):
    attended = trained[1]["attended"]
    assert max(attended["on_matches"]) > 2 * attended["by_chance"] > 0
    assert np.array(attended["by_sum"]).max(0).argmax() == 0


def test_attention_is_told_by_the_sums_of_triples(smoke):
    _, metrics, printed = smoke
    attended = metrics["attended"]
    assert len(attended["on_matches"]) == SMALL.tensor_heads
    assert 0 < attended["by_chance"] < 1
    by_sum = np.array(attended["by_sum"])
    assert by_sum.shape == (SMALL.tensor_heads, SMALL.modulus)
    assert (by_sum > 0).all()
    assert "\nlimits   A task made for tensor attention" in printed


def test_complete_run_is_not_trained_again(smoke, capsys, monkeypatch):
    out, metrics, _ = smoke
    # What follows the training, as the first run measured it.
    by_hand = (hand_set.Scores(**found) for found in metrics["hand_set"])
    monkeypatch.setattr(hand_set, "measure", lambda *_: next(by_hand))
    costs = [cost.Cost(**found) for found in metrics["cost"]]
    monkeypatch.setattr(cost, "costs", lambda _: costs)
    session.run(dataclasses.replace(SMALL, out=out, attentions=("tensor",)))
    again = json.loads((out / "metrics.json").read_text())["results"]
    # With the times of the steps: these are the steps of the first run.
    assert again == {"tensor": metrics["results"]["tensor"]}
    assert "seed 0: " in capsys.readouterr().out


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0,x", "--seeds: must be an integer of at least 0, got 'x'"),
        ("--seeds 1,2,1", "--seeds must name none twice, got 1,2,1"),
        ("--attentions pairwise", "--attentions must contain tensor, which the"),
        ("--modulus 1", "--modulus: must be an integer of at least 2, got '1'"),
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


# ---------------------------------------------------------------------------- pieces
def test_answers_are_those_of_the_definition():
    tokens, answers = task.Sequences(5, 12, seed=3).at(7, 4)
    assert tokens.shape == answers.shape == (4, 5)
    for row, found in zip(tokens, answers, strict=True):
        expected = [
            any((x + y + z) % 12 == 0 for y, z in itertools.product(row, repeat=2))
            for x in row
        ]
        assert found.tolist() == expected


def test_sequences_depend_on_seed_and_draw_alone_and_fresh_ones_are_others():
    one, two = (task.Sequences(6, 1000, seed=5) for _ in range(2))
    two.at(3, 8)  # what came before does not matter
    np.testing.assert_array_equal(one.at(4, 8)[0], two.at(4, 8)[0])
    assert (one.at(4, 8)[0] != one.at(5, 8)[0]).any()
    assert (one.at(0, 8)[0] != one.fresh(8)[0]).any()
    other = dataclasses.replace(one, seed=6)
    assert (one.fresh(8)[0] != other.fresh(8)[0]).any()


def test_logits_of_the_hand_set_head_are_cosines_of_the_sums():
    """A single token: the weight of its own triple against that of the blank."""
    modulus, n = 9, 1
    tokens = np.arange(modulus, dtype=np.int32)[:, None]
    found = hand_set.scores(tokens, modulus, "float64")[:, 0]
    gap = 1 - np.cos(2 * np.pi / modulus)
    beta = 2 / gap * np.log(n**2 / hand_set.DELTA)
    match = beta * np.cos(3 * 2 * np.pi / modulus * tokens[:, 0])
    # The blank pair, and two pairs of the blank and the token with logit 0.
    others = np.exp(beta * (1 - gap / 2)) + 2
    np.testing.assert_allclose(found, np.exp(match) / (np.exp(match) + others))
    assert ((found > 0.5) == (3 * tokens[:, 0] % modulus == 0)).all()


def test_seed_decides_the_weights():
    small = dataclasses.replace(SMALL, width=8, mlp_features=4, head_features=2)
    one, other = (model_.build("tensor", small, seed) for seed in (0, 1))
    kernel, another = (m.layers[0].query.kernel[...] for m in (one, other))
    assert not np.allclose(kernel, another)


def test_models_differ_in_their_attention():
    def orders(name):
        make = lambda: model_.TripleModel(model_.KINDS[name], SMALL, rngs=nnx.Rngs(0))
        return [layer.order for layer in nnx.eval_shape(make).layers]

    found = {name: orders(name) for name in options_.ATTENTIONS}
    assert found == {"tensor": [3], "pairwise": [2], "deeper": [2, 2]}


def test_map_is_of_the_first_query_with_one_match():
    tokens, _ = task.Sequences(6, 16, seed=0).fresh(64)
    match = task.matches(tokens, 16)
    row, query = maps.first_with_one_match(match)
    assert match[row, query].sum() == 2
    assert not (match[:row].sum((-2, -1)) == 2).any()
    (j, k), (_, _) = np.argwhere(match[row, query])
    assert tokens[row, [query, j, k]].sum() % 16 == 0


def test_sums_of_even_weights_are_alike():
    tokens, _ = task.Sequences(6, 5, seed=0).fresh(8)
    found = maps._by_sum(tokens, np.ones((8, 2, 6, 6, 6)), 5)
    np.testing.assert_allclose(found, np.ones((2, 5)))
