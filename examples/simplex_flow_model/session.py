"""A whole run in order: two trainings, free samples, guided samples, report."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from language_model.failures import Failure
from language_model.training import Stop
from study import output, training
from study.session import stoppable

from . import exact, model as model_, report, sites as sites_, task, toy
from .options import IDENTITY, Options

EVALUATED = 4096
SPACES = {"logit": "in the logarithm", "simplex": "on the simplex"}


class Guided(NamedTuple):
    """Samples at one strength of guidance.

    Attributes:
        space: Where the steps are added.
        strength: In hundredths; 0 for none.
        believed: Mean chance of being common that the classifier gives them.
        common: Share that is common in the genome.
        known: Share that occurs in the genome at all.
        distinct: Different sequences, as a share of the sample.
        letters: Largest total variation of a position from the common sites.
    """

    space: str
    strength: int
    believed: float
    common: float
    known: float
    distinct: float
    letters: float


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    sites = sites_.load(options.sites)
    common = sites.of_count(options.common)
    if not 0 < len(common.tokens) < len(sites.tokens):
        raise Failure(
            f"--common {options.common}: {len(common.tokens)} of {len(sites.tokens)} "
            "sites are common; there must be some of both kinds."
        )
    print(
        f"sites    {sites.counts.sum():,} splice sites, {len(sites.tokens):,} distinct "
        f"ones; {len(common.tokens)} occur {options.common} times or more: common, "
        f"{common.counts.sum() / sites.counts.sum():.0%} of all\n"
        f"credit   {sites_.CREDIT}"
    )
    noised, labelled = task.of(sites, options)
    identity = {name: getattr(options, name) for name in IDENTITY}
    identity["sites"] = sites.digest[:16]
    histories: dict[str, list] = {}

    def train[Model: nnx.Module](kind: type[Model], plan: training.Plan) -> Model:
        model = model_.build(kind, options)
        folder = options.out / "checkpoints"
        histories[plan.name] = training.train(
            model, plan, folder=folder, identity=identity, stop=stop
        )
        print(f"trained  {_line(plan.name, histories[plan.name])}", flush=True)
        return model

    classifier = train(model_.Classifier, _classifier_plan(labelled, options))
    denoiser = train(model_.Denoiser, _denoiser_plan(noised, options))
    accuracy = _accuracy(classifier, labelled)
    best = exact.denoiser(sites, options)
    bound = exact.loss(best, noised.at(task.FRESH, EVALUATED), options)

    random = np.random.default_rng([options.seed, 1])
    samples = {
        "independent": sites_.independent(sites, options.samples, random),
        "network": model_.draw(denoiser, options.samples, options),
        "exact": model_.draw(best, options.samples, options),
        "sites": sites.draw(options.samples, random),
    }
    stop.raise_if_asked("both models are trained, the same command makes the report.")
    near = {name: sites_.nearness(tokens, sites) for name, tokens in samples.items()}
    guided, drawn = _guided(denoiser, classifier, sites, common, options, stop)
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "samples": {name: n._asdict() for name, n in near.items()},
            "guided": [g._asdict() for g in guided],
            "classifier_accuracy": accuracy,
            "exact_loss": bound,
            "histories": histories,
        },
    )
    report.draw(
        options.out / "report.png",
        toy=toy.draw(options.seed),
        sites=sites,
        common=common,
        samples=samples,
        near=near,
        guided=guided,
        drawn=drawn,
        options=options,
    )
    _print_summary(near, guided, histories, accuracy, bound, options)
    print(f"picture  {options.out / 'report.png'}")


def _denoiser_plan(noised: task.Noised, options: Options) -> training.Plan:
    fresh = [jnp.asarray(x) for x in noised.at(task.FRESH, EVALUATED)]
    evaluate = nnx.jit(model_.denoiser_loss)
    return training.Plan(
        name="denoiser",
        steps=options.steps,
        batch_at=lambda step: noised.at(step, options.batch),
        loss=model_.denoiser_loss,
        evaluate=lambda model: float(evaluate(model, *fresh)),
        evaluate_every=options.evaluate_every,
        learning_rate=options.learning_rate,
    )


def _classifier_plan(labelled: task.Labelled, options: Options) -> training.Plan:
    fresh = [jnp.asarray(x) for x in labelled.held_out(EVALUATED)]
    evaluate = nnx.jit(model_.classifier_loss)
    return training.Plan(
        name="classifier",
        steps=options.classifier_steps,
        batch_at=lambda step: labelled.at(step, options.batch),
        loss=model_.classifier_loss,
        evaluate=lambda model: float(evaluate(model, *fresh)),
        evaluate_every=options.evaluate_every,
        learning_rate=options.learning_rate,
    )


def _accuracy(classifier: model_.Classifier, labelled: task.Labelled) -> float:
    """Share of right answers to held-out sequences, as often as in the genome."""
    tokens, is_common = labelled.held_out(EVALUATED)
    found = np.asarray(model_.log_odds(classifier, jnp.asarray(tokens))) > 0
    return float((found == is_common).mean())


def _guided(
    denoiser: model_.Denoiser,
    classifier: model_.Classifier,
    sites: sites_.Sites,
    common: sites_.Sites,
    options: Options,
    stop: Stop,
) -> tuple[list[Guided], dict[tuple[str, int], np.ndarray]]:
    """All strengths in both spaces, and the samples themselves."""
    target = sites_.frequencies(common.tokens, common.share)
    found, drawn = [], {}
    runs = [(space, strength) for space in SPACES for strength in options.strengths]
    for space, strength in tqdm.tqdm(runs, desc="  guidance", disable=None):
        tokens = model_.draw(
            denoiser,
            options.guided_samples,
            options,
            classifier=classifier,
            strength=strength / 100,
            space=space,
        )
        odds = np.asarray(model_.log_odds(classifier, jnp.asarray(tokens)), float)
        counts = sites.count_of(tokens)
        drawn[space, strength] = tokens
        found.append(
            Guided(
                space,
                strength,
                believed=float((1 / (1 + np.exp(-odds))).mean()),
                common=float((counts >= options.common).mean()),
                known=float((counts > 0).mean()),
                distinct=len(np.unique(sites_.number(tokens))) / len(tokens),
                letters=float(
                    abs(sites_.frequencies(tokens) - target).sum(-1).max() / 2
                ),
            )
        )
        stop.raise_if_asked("both models are trained, the same command goes on.")
    return found, drawn


def _line(name: str, history: list) -> str:
    losses = [r["held_out_loss"] for r in history if "held_out_loss" in r]
    return (
        f"{name:10} held-out loss {losses[0]:.3f} -> {losses[-1]:.3f} nats in "
        f"{history[-1]['step']:,} steps, "
        f"{1e3 * training.seconds_per_step(history):.1f} ms a step"
    )


def _print_summary(
    near: dict[str, sites_.Nearness],
    guided: list[Guided],
    histories: dict[str, list],
    accuracy: float,
    bound: float,
    options: Options,
) -> None:
    last = [r["held_out_loss"] for r in histories["denoiser"] if "held_out_loss" in r]
    print("\nWhat this run showed")
    print(
        f"denoiser {last[-1]:.3f} nats a letter, {bound:.3f} is the least possible; "
        f"classifier {accuracy:.0%} right on\n         sequences that it never saw"
    )
    print(
        f"samples  {options.samples:,} sequences    missing bits  worst position  "
        "pairs of positions  real sites"
    )
    for name, n in near.items():
        print(
            f"         {report.LABEL[name]:22} {n.missing_bits:8.3f} {n.letters:15.3f} "
            f"{n.pairs:19.3f} {n.known:11.1%}"
        )
    print(
        f"guided   {options.guided_samples:,} sequences    strength  believed  common  "
        "real sites  distinct  worst position against common sites"
    )
    shown = {"not guided": guided[0]}
    shown |= {name: report.reaching(guided, space) for space, name in SPACES.items()}
    for name, g in shown.items():
        print(
            f"         {name:22} {g.strength / 100:6.2f} {g.believed:9.1%} "
            f"{g.common:7.1%} {g.known:11.1%} {g.distinct:9.1%} {g.letters:8.3f}"
        )
    gained = near["independent"].missing_bits - near["network"].missing_bits
    whole = near["independent"].missing_bits - near["sites"].missing_bits
    print(
        f"limits   The flow gains {gained:.2f} of the {whole:.2f} bits that letters "
        "drawn on their own\n         lack against as many real draws. The exact "
        "denoiser does not gain all of\n         them either: starting from pure noise "
        "is an approximation. How\n         good it is depends on --beta and --decay: "
        "the defaults are the best of ten\n         pairs, tried with the exact "
        "denoiser against these same sites."
    )
    best = max((g for g in guided if g.space == "simplex"), key=lambda g: g.common)
    strongest = guided[-1]
    if strongest.common < best.common - 0.1:
        print(
            "         On the simplex strong guidance drives points to its edge: with "
            f"{strongest.strength / 100:g} only\n         {strongest.common:.0%} are "
            f"common, {best.common:.0%} with {best.strength / 100:g}."
        )
    print(
        "         Common sites are few, and guidance by a classifier prefers the most "
        "typical\n         of them: what is gained in the class is lost in variety."
    )
