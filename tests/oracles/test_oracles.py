"""Oracles agree with independent vectors, and their gradients with complex steps."""

import pathlib

import numpy as np
import pytest

from tests.oracles.cross_entropy import token_metrics
from tests.oracles.row_statistics import DIFFERENTIABLE, STATISTICS, row_statistics

DATA = pathlib.Path(__file__).parent.parent / "data"
STEP = 1e-40


def close(actual, expected):
    bound = 1e-12 * np.max(np.abs(expected), initial=1e-300)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def problem(source, *, per_row, seed=0):
    """Arguments with every option, six rows in a (2, 3) batch, eleven classes."""
    random = np.random.default_rng(seed)
    batch, d, v = (2, 3), 4, 11
    shape = batch if per_row else ()
    arrays = {
        "bias": random.normal(size=v),
        "scale": random.uniform(0.5, 2, shape),
        "temperature": random.uniform(0.5, 2, shape),
    }
    if source == "linear":
        arrays["hidden"] = random.normal(size=(*batch, d))
        arrays["weight"] = random.normal(size=(v, d))
    else:
        arrays["logits"] = 2 * random.normal(size=(*batch, v))
    class_where = np.arange(v) % 4 != 1
    return random, arrays, class_where


def check_by_complex_step(function, arrays, outputs, gradients, random):
    """`function(**arrays)` has these gradients of sum_k cotangent_k output_k."""
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        direction = random.normal(size=np.shape(array))
        moved = arrays | {name: array + 1j * STEP * direction}
        values = function(**moved).values
        slope = sum((g * values[k].imag).sum() / STEP for k, g in outputs.items())
        np.testing.assert_allclose(
            slope, (gradients[name] * direction).sum(), rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("source", ["linear", "logits"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_row_statistics_gradients(source, per_row, softcap):
    random, arrays, class_where = problem(source, per_row=per_row)
    labels = random.integers(0, 11, (2, 3, 2))
    labels[0, 0] = 5, 5  # twice the same
    labels[1, 1] = -100, 1  # outside, and on a column that is not selected
    options = {
        "labels": labels,
        "class_where": class_where,
        "softcap": softcap,
    }
    call = lambda **a: row_statistics(**options, **a)
    names = (*DIFFERENTIABLE, "sum_softplus")
    for chosen in (*([name] for name in names), names):
        cotangents = {
            name: random.normal(size=labels.shape if name == "label_logits" else (2, 3))
            for name in chosen
        }
        _, gradients = row_statistics(**options, **arrays, cotangents=cotangents)
        check_by_complex_step(call, arrays, cotangents, gradients, random)


@pytest.mark.parametrize("source", ["linear", "logits"])
@pytest.mark.parametrize("kind", ["ids", "distributions"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_gradients(source, kind, softcap):
    random, arrays, class_where = problem(source, per_row=True)
    if kind == "ids":
        labels = random.choice(np.flatnonzero(class_where), (2, 3))
        labels[0, 0] = 1  # not selected: +inf, no gradient
        labels[1, 0] = -100
    else:
        labels = class_where * random.uniform(size=(2, 3, 11))
    where = np.array([[True, True, True], [False, True, True]])
    options = {
        "labels": labels,
        "class_where": class_where,
        "where": where,
        "label_smoothing": 0.2,
        "logsumexp_penalty": 0.3,
        "softcap": softcap,
    }
    call = lambda **a: token_metrics(**options, **a)
    names = ("loss", "log_prob", "entropy", "lse")
    for chosen in (*([name] for name in names), names):
        cotangents = {name: random.normal(size=(2, 3)) for name in chosen}
        _, gradients = token_metrics(**options, **arrays, cotangents=cotangents)
        if kind == "ids":
            # An infinite value has no slope: only rows with a finite one are compared.
            cotangents["loss"] = cotangents.get("loss", np.zeros((2, 3)))
            finite = np.isfinite(call(**arrays).values["loss"])
            for name in ("loss", "log_prob"):
                if name in cotangents:
                    cotangents[name] = np.where(finite, cotangents[name], 0)
            with np.errstate(invalid="ignore"):
                check_finite = lambda **a: _finite(call(**a))
                check_by_complex_step(
                    check_finite, arrays, cotangents, gradients, random
                )
        else:
            check_by_complex_step(call, arrays, cotangents, gradients, random)


def _finite(result):
    values = {name: np.where(np.isfinite(a), a, 0) for name, a in result.values.items()}
    return result._replace(values=values)


def test_row_statistics_vectors():
    data = np.load(DATA / "linear_row_statistics_case0.npz")
    source = {
        "hidden": data["in_hidden"],
        "weight": data["in_weight"],
        "bias": data["in_bias"],
        "scale": data["in_logit_scale"],
        "softcap": float(data["in_softcap"]),
    }
    cotangents = {name: data[f"in_ct_{name}"] for name in DIFFERENTIABLE}
    values, gradients = row_statistics(
        data["in_labels"], data["in_class_where"], cotangents=cotangents, **source
    )
    for name in STATISTICS:
        close(values[name], data[f"out_{name}"])
    for name in ("hidden", "weight", "bias"):
        close(gradients[name], data[f"out_grad_{name}"])


def test_cross_entropy_vectors():
    data = np.load(DATA / "cut_cross_entropy_case0.npz")
    where = data["in_labels"] >= 0
    plain = {"hidden": data["in_hidden"], "weight": data["in_weight"]}
    full = plain | {"bias": data["in_bias"], "softcap": float(data["in_softcap"])}
    options = {"labels": data["in_labels"], "where": where}
    cotangents = {"loss": data["in_cotangent"]}
    values, gradients = token_metrics(**options, **plain, cotangents=cotangents)
    close(values["loss"], data["out_loss_plain"])
    close(values["lse"], data["out_lse_plain"])
    for name in ("hidden", "weight"):
        close(gradients[name], data[f"out_grad_{name}_plain"])
    values, _ = token_metrics(**options, **full)
    close(values["loss"], data["out_loss_bias_softcap"])
    values, gradients = token_metrics(
        **options,
        **full,
        label_smoothing=float(data["in_label_smoothing"]),
        logsumexp_penalty=float(data["in_logsumexp_penalty"]),
        cotangents=cotangents,
    )
    close(values["loss"], data["out_loss_full"])
    for name in ("hidden", "weight", "bias"):
        close(gradients[name], data[f"out_grad_{name}_full"])


def test_classification_vectors():
    data = np.load(DATA / "classification_losses_case0.npz")
    call = lambda **options: (
        token_metrics(data["in_labels"], logits=data["in_logits"], **options).values
    )
    close(call()["loss"], data["out_ce"])
    close(call()["entropy"], data["out_entropy"])
    close(call()["lse"] ** 2, data["out_logsumexp_squared"])
    smooth = call(label_smoothing=float(data["in_label_smoothing"]))["loss"]
    close(smooth, data["out_ce_smooth"])


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_blocks_of_rows_and_both_layouts_agree(monkeypatch, vocab_axis):
    random, arrays, _ = problem("linear", per_row=True)
    cotangents = {name: random.normal(size=(2, 3)) for name in ("lse", "mean_logit")}
    whole = row_statistics(cotangents=cotangents, **arrays)
    if vocab_axis == 1:
        arrays["weight"] = arrays["weight"].T
        whole.gradients["weight"] = whole.gradients["weight"].T
    monkeypatch.setattr("tests.oracles.row_statistics.BLOCK", 45)  # four rows
    parts = row_statistics(cotangents=cotangents, vocab_axis=vocab_axis, **arrays)
    for one, two in zip(parts, whole, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            close(one[name], two[name])
