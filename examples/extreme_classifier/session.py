"""A whole run in order: data, objectives, kinds of batches, report."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from language_model.training import Stop
from study import output, training, wordnet
from study.session import stoppable

from softlib import LinearLogits

from . import glosses as glosses_, mining, model as model_, objectives, report, scores
from .glosses import Glosses
from .model import Classifier
from .options import IDENTITY, Options


class Result(NamedTuple):
    """Of one objective.

    Attributes:
        steps: At which precision was measured.
        precision: At 1, of held-out definitions.
        scores: At the end.
        seconds_per_step: The median.
    """

    steps: list[int]
    precision: list[float]
    scores: scores.Scores
    seconds_per_step: float


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    glosses = glosses_.load(options)
    labels = (glosses.positives >= 0).sum(1)
    print(
        f"data     {len(glosses.words):,} definitions, {len(glosses.names):,} labels, "
        f"{labels.mean():.1f} each ({labels.max()} at most)",
        flush=True,
    )
    stop.raise_if_asked("nothing is trained yet; the same command begins.")
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity["nouns"] = glosses.digest
    results, surest = {}, {}
    for name in options.objectives:
        results[name], classifier = _train(name, glosses, options, identity, stop)
        print(f"trained  {_line(name, results[name])}", flush=True)
        if not surest:
            surest = _surest(classifier, glosses)
    mined = {}
    for kind in mining.KINDS:
        mined[kind] = mining.train(kind, glosses, options, identity, stop)
        last = mined[kind][-1]
        print(
            f"batches  {kind}: P@1 {last.scores.precision[0]:.1%}, "
            f"{last.recall:.1%} of the nearest definitions in the batch",
            flush=True,
        )
    stop.raise_if_asked("all models are trained, the same command makes the report.")
    baseline = scores.always_the_most_frequent(glosses)
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "definitions": len(glosses.words),
            "labels": len(glosses.names),
            "labels_each": float(labels.mean()),
            "baseline": baseline._asdict(),
            "results": {
                name: {**found._asdict(), "scores": found.scores._asdict()}
                for name, found in results.items()
            },
            "batches": {
                kind: [
                    {**stretch._asdict(), "scores": stretch.scores._asdict()}
                    for stretch in stretches
                ]
                for kind, stretches in mined.items()
            },
            "credit": wordnet.CREDIT,
        },
    )
    report.draw(
        options.out / "report.png",
        results=results,
        mined=mined,
        surest=surest,
        glosses=glosses,
        options=options,
    )
    _print_summary(results, mined, baseline, options)
    print(f"picture  {options.out / 'report.png'}")


def _train(
    name: str,
    glosses: Glosses,
    options: Options,
    identity: dict[str, Any],
    stop: Stop,
) -> tuple[Result, Classifier]:
    count = len(glosses.names)
    classifier = model_.build(count, objectives.bias_of(name, count), options)
    batches = objectives.Batches(glosses, options.batch, options.seed)
    history = training.train(
        classifier,
        training.Plan(
            name=name,
            steps=options.steps,
            batch_at=batches.at,
            loss=objectives.of(name, options),
            evaluate=lambda model: 1 - scores.measure(model, glosses).precision[0],
            evaluate_every=options.evaluate_every,
            learning_rate=options.learning_rate,
        ),
        folder=options.out / "checkpoints",
        identity=identity,
        stop=stop,
    )
    measured = [r for r in history if "held_out_loss" in r]
    result = Result(
        [int(r["step"]) for r in measured],
        [1 - r["held_out_loss"] for r in measured],
        scores.measure(classifier, glosses),
        training.seconds_per_step(history),
    )
    return result, classifier


def _surest(classifier: Classifier, glosses: Glosses) -> dict[str, np.ndarray]:
    """Of held-out definitions of several labels: the surest label, and its slopes.

    Scores of the same trained model, so that only the losses differ.
    """
    rows = np.flatnonzero((glosses.positives[: glosses.held_out] >= 0).sum(1) == 4)
    words, ids = glosses.words[rows[:512]], glosses.positives[rows[:512], :4]
    found = np.asarray(_logits(classifier, jnp.asarray(words)).materialize())
    own = np.take_along_axis(found, ids, axis=1)
    ids = np.take_along_axis(ids, np.argsort(-own, axis=1), axis=1)
    first = np.exp(np.take_along_axis(found, ids[:, :1], axis=1)[:, 0])
    share = first / np.exp(found).sum(1)
    return {"share": share, **objectives.gradients_of_the_surest(found, ids)}


@nnx.jit
def _logits(classifier: Classifier, words: Any) -> LinearLogits:
    return classifier(words)


def _line(name: str, result: Result) -> str:
    at = lambda values: " / ".join(f"{100 * x:.1f}" for x in values)
    return (
        f"{name}: P@1/3/5 {at(result.scores.precision)}, PSP "
        f"{at(result.scores.scored)}, {1e3 * result.seconds_per_step:.0f} ms a step"
    )


def _print_summary(
    results: dict[str, Result],
    mined: dict[str, list[mining.Stretch]],
    baseline: scores.Scores,
    options: Options,
) -> None:
    print("\nWhat this run showed (of held-out definitions, in per cent)")
    head = [f"{kind}@{k}" for kind in ("P", "PSP", "R") for k in scores.PLACES]
    print(f"         {'':15} " + " ".join(f"{name:>6}" for name in head))
    rows = {"most frequent": baseline}
    rows |= {name: result.scores for name, result in results.items()}
    rows |= {f"batch: {kind}": found[-1].scores for kind, found in mined.items()}
    for name, found in rows.items():
        values = [*found.precision, *found.scored, *found.recall]
        print(f"losses   {name:15} " + " ".join(f"{100 * x:6.1f}" for x in values))
    for kind, found in mined.items():
        sizes = ", ".join(str(stretch.cluster_size) for stretch in found)
        shares = ", ".join(f"{100 * stretch.recall:.0f}" for stretch in found)
        print(f"batches  {kind}: clusters of {sizes}; {shares} % of the nearest there")
    print(
        "limits   One seed, a bag of words and one learning rate for all: an order of "
        f"losses on\n         labels of {options.least} definitions or more here, not "
        "of losses."
    )
