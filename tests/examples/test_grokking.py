"""The grokking example: a short real run, exact resume, the promises of its parts."""

import dataclasses
import functools
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from grokking_study import methods, options as options_, report, session, task, training
from language_model.failures import Failure, Interrupted
from language_model.training import Stop
from matplotlib import image
from study.command_line import EXAMPLES

from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "grokking.py"
SMOKE = options_.Options(**options_.PRESETS["smoke"])
TINY = options_.Options(width=8, points=3)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One complete run of the smoke preset: folder, curves and what it printed."""
    return run(tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is long enough for sums of the paper's kind, and all methods."""
    arguments = (
        "--epochs 200 --perp-epochs 200 --points 20 "
        "--small-methods stablemax-plain,stablemax --small-epochs 300"
    )
    return run(tmp_path_factory.mktemp("runs") / "trained", *arguments.split())


def run(out, *arguments):
    out, metrics, printed = complete_run(SCRIPT, out, *arguments)
    curves = {f"{r['method']}-{r['modulus']}": r["curve"] for r in metrics["results"]}
    return out, curves, printed


# ------------------------------------------------------------------------ a whole run
@pytest.mark.slow
def test_perpendicular_gradients_generalise_where_plain_ones_do_not(trained):
    """Of the paper: within 200 epochs, from the same weights with the same rate."""
    _, curves, printed = trained
    assert curves["perp-59"][-1]["epoch"] == 200
    assert curves["perp-59"][-1]["test_accuracy"] > 0.99
    for name in ("plain-59", "exact-59"):
        assert curves[name][-1]["train_accuracy"] == 1
        assert curves[name][-1]["test_accuracy"] < 0.05
    assert "perpGrad, modulo 59: 99% of the held-out sums at epoch 1" in printed


@pytest.mark.slow
def test_all_methods_of_the_small_sums_are_trained(trained):
    _, curves, _ = trained
    check_starts(curves, "stablemax-plain-11", "stablemax-11", points=20)


def test_all_methods_start_from_the_same_network(smoke):
    _, curves, _ = smoke
    check_starts(curves, "stablemax-11", points=SMOKE.points)


def check_starts(curves, *small, points):
    assert list(curves) == ["plain-59", "exact-59", "perp-59", *small]
    for name in ("exact-59", "perp-59"):
        for number in ("train_loss", "test_accuracy", "alignment"):
            first = curves["plain-59"][0][number]
            assert curves[name][0][number] == pytest.approx(first, rel=1e-4)
    for curve in curves.values():
        assert len(curve) == points + 1


def test_perpendicular_gradients_train_otherwise(smoke):
    _, curves, _ = smoke
    last = {name: curve[-1]["train_loss"] for name, curve in curves.items()}
    for name, curve in curves.items():
        assert last[name] < curve[0]["train_loss"], name
    assert last["exact-59"] == pytest.approx(last["plain-59"], rel=1e-2)
    assert last["perp-59"] != pytest.approx(last["plain-59"], rel=1e-3)


def test_run_leaves_a_picture_that_shows_something(smoke):
    out, _, printed = smoke
    assert printed.splitlines()[-1] == f"picture  {out / 'report.png'}"
    pixels = image.imread(out / "report.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    # No panel is empty: each quarter of the picture has a coloured line.
    for rows in np.array_split(pixels, 2):
        for quarter in np.array_split(rows, 2, axis=1):
            assert (np.ptp(quarter, axis=-1) > 0.3).sum() > 100


def test_table_has_a_row_for_every_training(smoke):
    _, curves, printed = smoke
    table = printed[printed.index("\ntable ") :].splitlines()[2 : 2 + len(curves)]
    for line, curve in zip(table, curves.values(), strict=True):
        assert f"{curve[-1]['test_accuracy']:7.1%}" in line


def test_complete_run_is_not_trained_again(smoke, capsys):
    out, _, printed = smoke
    session.run(dataclasses.replace(SMOKE, out=out, methods=("perp",)))
    line = next(x for x in printed.splitlines() if "trained  perpGrad" in x)
    # With the seconds: these are the epochs of the first run.
    assert line in capsys.readouterr().out


# --------------------------------------------------------------------------- the losses
@pytest.mark.slow
def test_plain_softmax_collapses_and_does_not_generalise(tmp_path):
    """8,000 epochs of the paper's problem: minutes."""
    plan = training.Plan("plain", 113, 40, 8000, b2=0.99)
    options = options_.Options(points=80)
    curve = training.train(plan, options, folder=tmp_path, stop=Stop())
    column = functools.partial(report.column, curve)
    assert column("test_accuracy").max() < 0.05
    # It comes and goes: Adam's memory of squares fades while gradients are 0.
    assert column("collapse_fraction").max() > 0.4
    assert column("zero_loss_fraction").max() > 0.9
    assert curve[-1]["train_accuracy"] > 0.9


def test_methods_differ_in_rounding_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), "float32")
    labels = jnp.arange(5)
    loss = {n: jax.jit(m.loss)(logits, labels) for n, m in methods.METHODS.items()}
    np.testing.assert_allclose(loss["plain"], loss["exact"], rtol=1e-5)
    np.testing.assert_array_equal(loss["plain"], loss["perp"])
    np.testing.assert_allclose(loss["stablemax-plain"], loss["stablemax"], rtol=1e-5)
    assert jnp.abs(loss["plain"] - loss["stablemax"]).min() > 1e-4


# --------------------------------------------------------------------------- the pieces
def test_sums_are_all_pairs_once():
    train, held_out = task.sums(7, 40, seed=0)
    assert len(train.labels) == 20  # of 49
    inputs, labels = (
        np.concatenate(both) for both in zip(train, held_out, strict=True)
    )
    left, right = inputs[:, :7].argmax(1), inputs[:, 7:].argmax(1)
    assert inputs.sum() == 2 * 49
    assert len(set(zip(left.tolist(), right.tolist(), strict=True))) == 49
    np.testing.assert_array_equal(labels, (left + right) % 7)
    assert (task.sums(7, 40, seed=1)[0].inputs != train.inputs).any()


def test_logits_grow_with_the_third_power_of_the_weights():
    model = task.build(5, 8, seed=0)
    inputs = task.sums(5, 50, seed=0)[0].inputs
    before = model(inputs)
    for layer in (model.one, model.two, model.three):
        assert jnp.abs(layer.kernel[...]).max() <= layer.kernel.shape[0] ** -0.5
        layer.kernel[...] = 2 * layer.kernel[...]
    np.testing.assert_allclose(model(inputs), 8 * before, rtol=1e-5)


def test_pieces_of_epochs_are_one_training():
    train, _ = task.sums(5, 50, seed=0)
    networks = []
    for pieces in ((3,), (2, 1)):
        model = task.build(5, 8, seed=0)
        method = methods.METHODS["perp"]
        optimizer = nnx.Optimizer(
            model, methods.optimiser(method, 0.01, 0.99), wrt=nnx.Param
        )
        for epochs in pieces:
            training.advance(method.loss, model, optimizer, train, epochs)
        networks.append(model)
    a, b = (jax.tree.leaves(nnx.state(model, nnx.Param)) for model in networks)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def without_times(curve: list) -> list:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in curve]


def test_training_stopped_half_way_resumes_to_the_bit(tmp_path, monkeypatch):
    plan = training.Plan("perp", 5, 50, 7, b2=0.99)
    whole = training.train(plan, TINY, folder=tmp_path / "whole", stop=Stop())
    assert [record["epoch"] for record in whole] == [0, 2, 4, 6, 7]
    stop, advance, pieces = Stop(), training.advance, []

    def stopping(*arguments):
        advance(*arguments)
        pieces.append(arguments[-1])
        if len(pieces) == 2:
            stop(signal.SIGTERM, None)

    monkeypatch.setattr(training, "advance", stopping)
    with pytest.raises(Interrupted, match="stopped at epoch 4 of 7 of `perp-5`; check"):
        training.train(plan, TINY, folder=tmp_path / "stopped", stop=stop)
    resumed = training.train(plan, TINY, folder=tmp_path / "stopped", stop=Stop())
    assert without_times(resumed) == without_times(whole)


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    plan = training.Plan("plain", 5, 50, 3, b2=0.99)
    training.train(plan, TINY, folder=tmp_path, stop=Stop())
    other = plan._replace(train_percent=60)
    with pytest.raises(Failure, match=r"other settings \(train_percent 50, not 60\)"):
        training.train(other, TINY, folder=tmp_path, stop=Stop())


def test_every_method_has_a_name_and_a_look():
    for name in {*options_.LARGE, *options_.SMALL}:
        assert {name} <= methods.METHODS.keys() & report.LABEL.keys()
        assert name in report.LOOK


# -------------------------------------------------------------------------- one line
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods plain,mine", "--methods: must be of plain, exact, perp, got"),
        ("--modulus 2", "--modulus: must be an integer of at least 3, got '2'"),
        ("--train-percent 100", "--train-percent must be below 100, got 100"),
        ("--perp-epochs 50", "--points must be at most --perp-epochs, got 120 and 50"),
        ("--small-modulus 113", "--small-modulus must not be --modulus, got 113"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(arguments.split())
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1
