"""The example of a head in factors: a short real run, and the promises of its parts."""

import dataclasses
import lzma

import jax
import numpy as np
import pytest
from language_model.failures import Failure
from matplotlib import image
from spherical_head_model import model as model_, options as options_, pairs, session
from study.command_line import EXAMPLES

from softlib import losses
from tests.examples.smoke import colours, complete_run

SCRIPT = EXAMPLES / "train_spherical_head.py"
SMALL = options_.Options(**options_.PRESETS["smoke"])
SPEECHES = (
    "== 1900 | A | none\nOne two, one two.\n== 1901 | B | none\nOne two three four.\n"
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, metrics and what it printed."""
    return complete_run(SCRIPT, tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "speeches.xz"
    path.write_bytes(lzma.compress(SPEECHES.encode()))
    return path


# ------------------------------------------------------------------------ a whole run
def test_run_leaves_a_picture_and_numbers(smoke):
    out, metrics, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    assert metrics["classes"] == SMALL.classes
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 400
    for cell in np.array_split(pixels, 3, axis=1):
        assert colours(cell) > 10


def test_every_head_learns(smoke):
    """The right pair comes earlier by half than under the first weights."""
    _, metrics, _ = smoke
    assert set(metrics["histories"]) == {
        "Z-loss, b = 5",
        "Z-loss, b = 20",
        session.ENTROPY,
    }
    for name, history in metrics["histories"].items():
        assert len(history) == SMALL.evaluations + 1
        wanted = SMALL.entropy_steps if name == session.ENTROPY else SMALL.steps
        assert history[-1]["step"] == wanted
        assert history[-1]["rank"] < 0.5 * history[0]["rank"], name
    for found in metrics["seconds_per_step"].values():
        assert [size for size, _ in found] == list(SMALL.timed)


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be an integer of at least 1, got '0'"),
        ("--every 1", "--every: must be an integer of at least 2, got '1'"),
        ("--scores 5,5", "--scores must name none twice, got 5,5"),
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


def test_a_text_that_is_none_is_a_failure(tmp_path, few):
    with pytest.raises(Failure, match="No such file"):
        pairs.load(tmp_path / "none.xz", context=1, every=2, classes=9)
    wrong = tmp_path / "wrong.xz"
    wrong.write_bytes(b"no xz")
    with pytest.raises(Failure, match="is not a whole xz text"):
        pairs.load(wrong, context=1, every=2, classes=9)
    with pytest.raises(Failure, match="too few to divide"):
        pairs.load(few, context=1, every=3, classes=9)


# ---------------------------------------------------------------------------- pieces
def test_classes_are_the_pairs_of_the_speeches_trained_on(few):
    task = pairs.load(few, context=1, every=2, classes=9)
    assert task.words == [",", ".", "four", "one", "three", "two"]
    names = [task.name(i) for i in range(len(task.classes))]
    # Of "one two , one two .", after each first word.
    assert sorted(names) == [", one", "one two", "two ,", "two ."]
    assert task.counts.tolist() == [1, 1, 1, 1]
    # "two three" and "three four" were not seen.
    assert task.covered == 0
    assert len(task.train.labels) == 4


def test_batches_depend_on_seed_and_step_alone(few):
    split = pairs.load(few, context=1, every=2, classes=9).train
    one, two = split.at(range(3, 5), 6, 0), split.at(range(4, 5), 6, 0)
    assert one[0].shape == (2, 6, 1)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a[1], b[0])
    assert (one[1][0] != split.at(range(3, 4), 6, 1)[1][0]).any()


def test_a_rebase_between_steps_changes_no_rank(few):
    options = dataclasses.replace(SMALL, context=1, batch=4)
    task = pairs.load(few, context=1, every=2, classes=9)
    head = losses.FactoredSphericalState.init(model_.weight(4, options))
    network = model_.network(len(task.words), options)
    state = (network, model_.optimizer(options).init(network), head)
    step = model_.many(model_.z_step(1.0, options))
    (network, _, head), _ = step(state, *task.train.at(range(5), 4, 0))
    given = jax.numpy.asarray(task.train.context), jax.numpy.asarray(task.train.labels)
    before = model_.ranks(network, head, *given)
    after = model_.ranks(network, model_.rebase(head), *given)
    np.testing.assert_array_equal(before, after)
