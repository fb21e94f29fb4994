"""The classifier example: a short real run, and the promises of its parts."""

import dataclasses
import hashlib
import lzma

import numpy as np
import pytest
from extreme_classifier import (
    glosses as glosses_,
    mining,
    model as model_,
    objectives,
    options as options_,
    scores,
)
from flax import nnx
from language_model.failures import Failure
from language_model.training import stop_signals
from matplotlib import image
from study.command_line import EXAMPLES

from tests.examples.smoke import colours, complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "train_extreme_classifier.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def glosses():
    return glosses_.load(SMALL)


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 1000
    # No panel is empty.
    for rows in np.array_split(pixels, 2):
        for cell in np.array_split(rows, 2, axis=1):
            assert colours(cell) > 10


def test_every_objective_learns_more_than_the_most_frequent_labels(smoke):
    check_learned(smoke[1], *SMALL.objectives)


@pytest.mark.slow
def test_yes_or_no_for_every_label_learns(tmp_path):
    names = ("softmax", "one-versus-all")
    run = complete_run(SCRIPT, tmp_path / "run", "--objectives", ",".join(names))
    check_learned(run[1], *names)


def check_learned(metrics, *names):
    base = metrics["baseline"]
    assert list(metrics["results"]) == list(names)
    for found in metrics["results"].values():
        assert found["steps"] == [0, 30, 60]
        assert found["precision"][-1] == found["scores"]["precision"][0]
        assert found["scores"]["precision"][0] > 1.5 * base["precision"][0]
        assert found["scores"]["recall"][-1] > 1.5 * base["recall"][-1]
        for measure in found["scores"].values():
            assert all(0 <= value <= 1 for value in measure)


def test_clusters_hold_more_of_the_nearest_than_random_batches(smoke):
    _, metrics, _ = smoke
    random, clusters = (metrics["batches"][kind] for kind in mining.KINDS)
    assert [stretch["cluster_size"] for stretch in clusters] == [1, 64]
    # Before the first refresh both are the same to the bit.
    assert random[0] == clusters[0]
    assert clusters[1]["recall"] > 2 * random[1]["recall"]


@pytest.mark.slow
def test_clusters_train_at_least_as_well_as_random_batches(tmp_path):
    """20,000 definitions, 500 steps; clusters once random batches have begun."""
    small = dataclasses.replace(
        options_.Options(),
        items=20_000,
        held_out=2000,
        least=10,
        buckets=8192,
        width=32,
        refreshes=(1, 1, 4, 8),
        refresh_steps=125,
        probes=1024,
    )
    gains = []
    for seed in range(3):
        options = dataclasses.replace(small, seed=seed, out=tmp_path / str(seed))
        glosses = glosses_.load(options)
        with stop_signals() as stop:
            random, clusters = (
                mining.train(kind, glosses, options, {}, stop)[-1]
                for kind in mining.KINDS
            )
        assert clusters.recall > 2 * random.recall
        assert random.scores.precision[0] > 0.3
        gains.append(clusters.scores.precision[0] - random.scores.precision[0])
    assert np.mean(gains) > 0


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--objectives softmax,hinge", "--objectives: must be of softmax, decoupled"),
        (
            "--objectives top-k,top-k",
            "--objectives must name none twice, got top-k,top",
        ),
        ("--most 2", "--most must be a share of at most 1, got 2"),
        ("--items 100", "--items must be at least --held-out and --probes"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(arguments.split())
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_what_are_not_nouns_is_a_failure(tmp_path):
    wrong = tmp_path / "wrong.xz"
    options = dataclasses.replace(SMALL, nouns=wrong)
    for content, message in (
        (b"no xz", "is not a whole xz text"),
        (lzma.compress(b"dog\t\n"), "lines must hold lemmas, parents and a gloss"),
        (lzma.compress(b"dog\t\ta pet\n"), "has 1 definitions, fewer than --items"),
    ):
        wrong.write_bytes(content)
        with pytest.raises(Failure, match=message):
            glosses_.load(options)
    with pytest.raises(Failure, match="No such file"):
        glosses_.load(dataclasses.replace(SMALL, nouns=tmp_path / "none.xz"))
    with pytest.raises(Failure, match="--least 2000 or --most"):
        glosses_.load(dataclasses.replace(SMALL, least=2000))


# ---------------------------------------------------------------------------- pieces
def test_vendored_nouns_are_what_their_sum_says(glosses):
    digest = "d67c676ea9caf01fd8a104715ed89916b6ad6a030addf7d3b349b87063ea52da"
    path = SMALL.nouns
    assert glosses.digest == hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert f"{digest}  {path.name}" in (path.parent / "SHA256SUMS").read_text()


def test_labels_are_ancestors_that_are_neither_rare_nor_everywhere(glosses):
    counts = np.bincount(glosses.positives[glosses.positives >= 0])
    assert counts.min() >= SMALL.least
    assert counts.max() <= SMALL.most * SMALL.items
    assert (np.diff(counts) <= 0).all()  # frequent ones first
    assert "entity" not in glosses.names
    assert ((glosses.positives >= 0).sum(1) > 0).all()
    trained = glosses.positives[glosses.held_out :]
    np.testing.assert_array_equal(
        glosses.counts,
        np.bincount(trained[trained >= 0], minlength=len(glosses.names)),
    )


def test_batches_depend_on_seed_and_step_alone_and_held_out_ones_are_not_seen(glosses):
    batches = objectives.Batches(glosses, 64, 0)
    for a, b in zip(batches.at(5)[:2], batches.at(5)[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert (batches.at(5)[0] != batches.at(6)[0]).any()
    clusters = jnp.asarray(np.arange(len(glosses.training))[:, None])
    mined = mining.Batches(glosses, clusters, SMALL, batches.at(0)[2])
    seen = {tuple(row) for row in np.concatenate([mined.at(i)[0] for i in range(9)])}
    held_out = {tuple(row) for row in glosses.words[: glosses.held_out]}
    trained = {tuple(row) for row in glosses.words[glosses.held_out :]}
    assert seen <= trained
    assert len(seen - held_out) > 1000


def test_every_objective_is_finite_and_positive(glosses):
    classifier = model_.build(len(glosses.names), 0.0, SMALL)
    words, positives, key = objectives.Batches(glosses, 16, 0).at(0)
    for name in options_.OBJECTIVES:
        loss = nnx.jit(objectives.of(name, SMALL))(
            classifier, jnp.asarray(words), jnp.asarray(positives), key
        )
        assert np.isfinite(loss), name
        assert loss > 0, name


def test_the_most_frequent_labels_are_the_first_ones(glosses):
    found = scores.always_the_most_frequent(glosses)
    positives = glosses.positives[: glosses.held_out]
    first = int(np.argmax(glosses.counts))
    assert found.precision[0] == pytest.approx((positives == first).any(1).mean())
