"""The losses agree with the oracle: values, and gradients of every argument."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.losses.problems import (
    OPTIONS,
    SHAPES,
    Problem,
    assert_agrees,
    is_small,
    precision,
    values_and_gradients,
)
from tests.oracles.cross_entropy import token_metrics
from tests.pairwise import name, pairwise

DATA = pathlib.Path(__file__).parent.parent / "data"
MORE = {
    "where": (True, False),
    "label_smoothing": (0.1, 0.0),
    "logsumexp_penalty": (0.01, 0.0),
    "return_lse": (True, False),
}
KINDS = ("ids", "distributions")
OPERATIONS = ("token_log_probs", "entropy", "top1_correct", "token_metrics")


def is_valid(case):
    linear = case.get("source", "logits") != "logits"
    return is_small(case) and not (linear and case.get("labels") == "distributions")


IMPLEMENTATIONS = ("reference", "xla")
CASES = pairwise(
    {
        **SHAPES,
        **OPTIONS,
        **MORE,
        "labels": KINDS,
        "implementation": IMPLEMENTATIONS,
    },
    is_valid,
)
LARGE = [
    case
    for case in pairwise({"V": (50257, 151936), "N": (1000, 7), **OPTIONS, **MORE})
    if not is_small(case)
]
OTHERS = pairwise(
    {
        "operation": OPERATIONS,
        **SHAPES,
        "V": (1, 127, 1000, 50257),  # the stream is that of the loss
        **OPTIONS,
        "where": (True, False),
    },
    is_small,
)


def masked(problem, labels):
    """A mask, and rows that hold what must not matter where it is False."""
    keep = problem.random.uniform(size=problem.batch) < 0.7
    keep[..., 0] = problem.rows > 1  # a single row is masked
    source = "hidden" if problem.linear else "logits"
    array = problem.arrays[source]
    problem.arrays[source] = jnp.where(keep[..., None], array, jnp.nan)
    if labels is not None and labels.ndim == keep.ndim:
        labels[~keep] = -100
    return jnp.asarray(keep)


def distributions(problem):
    """Floating labels that sum to 1 over the selected classes."""
    q = problem.random.uniform(size=(*problem.batch, problem.classes)) ** 8
    if problem.class_where is not None:
        q = q * np.asarray(problem.class_where)
    q = q / q.sum(axis=-1, keepdims=True)
    return q.astype(np.promote_types(problem.arrays["logits"].dtype, np.float32))


def check_cross_entropy(case, implementation):
    with precision(case["dtype"]):
        problem = Problem(case)
        if case.get("labels") == "distributions":
            labels = distributions(problem)
        else:
            labels = problem.labels()
            if problem.rows > 1:
                labels[..., -1] = problem.classes  # outside: NaN, no gradient
        where = masked(problem, labels) if case["where"] else None
        options = {
            "label_smoothing": case["label_smoothing"],
            "logsumexp_penalty": case["logsumexp_penalty"],
            "class_where": problem.class_where,
            "where": where,
        }
        operation = (
            losses.linear_softmax_cross_entropy
            if problem.linear
            else of_stored.softmax_cross_entropy
        )
        cotangents = {"loss": problem.cotangent()}
        if case["return_lse"]:
            cotangents["lse"] = problem.cotangent()
            if labels.dtype == int:
                # Only the loss of such a row is broken; its lse takes no part here.
                ok = (labels >= 0) & (labels < problem.classes)
                cotangents["lse"] = np.where(ok, cotangents["lse"], 0)

        def function(labels, **arrays):
            got = operation(
                **arrays,
                **problem.options,
                **options,
                labels=labels,
                return_lse=case["return_lse"],
                implementation=implementation,
            )
            if case["return_lse"]:
                loss, lse = got
                return {"loss": loss, "lse": lse}
            return {"loss": got}

        values, gradients = values_and_gradients(
            function, problem.arrays, cotangents, labels=labels
        )
        expected = token_metrics(
            labels, cotangents=cotangents, **options, **problem.source()
        )
        problem.check(values, gradients, expected)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_oracle(case):
    check_cross_entropy(case, case["implementation"])


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=name)
def test_large_shapes_match_oracle(case):
    check_cross_entropy(case, "xla")


@pytest.mark.parametrize("case", OTHERS, ids=name)
def test_companions_match_oracle(case):
    with precision(case["dtype"]):
        problem = Problem(case)
        labels = problem.labels()
        if problem.rows > 1:
            labels[..., -1] = -1
        operation = case["operation"]
        outputs = {
            "token_log_probs": ("log_prob",),
            "entropy": ("entropy",),
            "top1_correct": ("correct",),
            "token_metrics": softlib.logits.TokenMetrics._fields,
        }[operation]
        takes_labels = operation != "entropy"
        options = {
            "class_where": problem.class_where,
            "where": masked(problem, labels) if case["where"] else None,
        }
        if operation == "token_metrics":
            options |= {"label_smoothing": 0.1, "logsumexp_penalty": 0.01}
        call = getattr(of_head if problem.linear else of_stored, operation)

        def function(labels=None, **arrays):
            more = {"labels": labels} if takes_labels else {}
            if operation == "token_metrics":
                more["metrics"] = outputs
            got = call(**arrays, **problem.options, **options, **more)
            if operation != "token_metrics":
                return {outputs[0]: got}
            assert isinstance(got, softlib.logits.TokenMetrics)
            return got._asdict()

        cotangents = {n: problem.cotangent() for n in outputs if n != "correct"}
        inside = (labels >= 0) & (labels < problem.classes)
        if takes_labels:
            cotangents = {n: np.where(inside, g, 0) for n, g in cotangents.items()}
        values, gradients = values_and_gradients(
            function,
            problem.arrays,
            cotangents,
            **({"labels": labels} if takes_labels else {}),
        )
        expected = token_metrics(
            labels, cotangents=cotangents, **options, **problem.source()
        )
        assert set(values) == set(outputs)
        problem.check(values, gradients, expected)


def test_matches_independent_vectors():
    """Made by another program, with every option of the linear loss."""
    data = np.load(DATA / "cut_cross_entropy_case0.npz")
    with jax.enable_x64():
        labels = jnp.asarray(data["in_labels"])
        for vocab_axis in (0, 1):
            arrays = {"hidden": data["in_hidden"], "weight": data["in_weight"]}
            if vocab_axis:
                arrays["weight"] = arrays["weight"].T
            options: dict[str, Any] = {
                "vocab_axis": vocab_axis,
                "vocab_chunk": 16,
                "where": jnp.asarray(data["in_labels"] >= 0),
            }
            full: dict[str, Any] = {
                "softcap": float(data["in_softcap"]),
                "label_smoothing": float(data["in_label_smoothing"]),
                "logsumexp_penalty": float(data["in_logsumexp_penalty"]),
            }
            for kind, more in (("plain", {}), ("full", full)):
                if kind == "full":
                    arrays["bias"] = data["in_bias"]

                def loss(arrays, options=options, more=more):
                    return losses.linear_softmax_cross_entropy(
                        **arrays, labels=labels, **options, **more
                    )

                value, pullback = jax.vjp(jax.jit(loss), arrays)
                (gradients,) = pullback(jnp.asarray(data["in_cotangent"]))
                assert_agrees(value, data[f"out_loss_{kind}"], value.dtype, 0)
                for argument, gradient in gradients.items():
                    wanted = data[f"out_grad_{argument}_{kind}"]
                    if argument == "weight" and vocab_axis:
                        wanted = wanted.T
                    assert_agrees(gradient, wanted, gradient.dtype, 0)


def test_losses_of_logits_match_independent_vectors():
    data = np.load(DATA / "classification_losses_case0.npz")
    smoothing = float(data["in_label_smoothing"])
    with jax.enable_x64():
        z, labels = jnp.asarray(data["in_logits"]), jnp.asarray(data["in_labels"])
        loss: Any = functools.partial(of_stored.softmax_cross_entropy, z, labels)
        plain, lse = loss(return_lse=True)
        penalised = loss(logsumexp_penalty=1.0)
        for actual, wanted in (
            (plain, data["out_ce"]),
            (lse**2, data["out_logsumexp_squared"]),
            (penalised - plain, data["out_logsumexp_squared"]),
            (loss(label_smoothing=smoothing), data["out_ce_smooth"]),
            (of_stored.entropy(z), data["out_entropy"]),
            (-of_stored.token_log_probs(z, labels), data["out_ce"]),
        ):
            assert_agrees(actual, wanted, jnp.float64, 0)
