"""A whole run in order: a language model, tuned to preferences, then made to forget."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from language_model.failures import Failure
from language_model.training import Stop
from study import output, training
from study.session import stoppable

from . import (
    model as model_,
    pairs as pairs_,
    report,
    text as text_,
    tuning,
    unlearning,
)
from .options import IDENTITY, MODEL_IDENTITY, Options
from .text import Text


@stoppable
def run(options: Options, stop: Stop) -> None:
    """Trains (or resumes, or finds complete) the run in `options.out` and reports."""
    text = text_.load(options)
    folder = options.out / "checkpoints"
    identity = {"corpus": text.digest[:16]}
    identity |= {name: getattr(options, name) for name in MODEL_IDENTITY}
    print(
        f"text     {text.train[:, 1:].size:,} tokens of {options.vocabulary_size:,} "
        f"kinds to train on; {text.forget[:, 1:].size:,} of the address of "
        f"{options.forget_year}"
    )
    base = model_.build(options)
    plan = _plan(text, options)
    history = training.train(base, plan, folder=folder, identity=identity, stop=stop)
    identity |= {name: getattr(options, name) for name in IDENTITY}
    common: dict[str, Any] = {"folder": folder, "identity": identity, "stop": stop}
    before = unlearning.evaluate(base, text)
    print(
        f"trained  {before['retain']:.2f} nats a token of later addresses, "
        f"{history[0]['held_out_loss']:.2f} before",
        flush=True,
    )

    prompts, held_out = _prompts(text, options)
    pairs = pairs_.draw(base, prompts, held_out, text.tokenizer, options)
    first, second = (
        pairs_.rewards(pairs.tokens[:, i], options.prompt, text.tokenizer).mean()
        for i in range(2)
    )
    print(
        f"pairs    {len(pairs.tokens):,}; words of {-first:.2f} letters preferred to "
        f"{-second:.2f}"
    )
    tuned = tuning.run(base, pairs, text, options, **common)

    start = unlearning.memorised(base, text, options, **common)
    learned = unlearning.evaluate(start, text)
    print(
        f"learned  the address of {options.forget_year}: {before['forget']:.2f} nats a "
        f"token before, {learned['forget']:.2f} after",
        flush=True,
    )
    forgotten = unlearning.run(start, text, options, **common)

    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "history": history,
            "before": before,
            "learned": learned,
            "tuned": [t._asdict() for t in tuned],
            "forgotten": forgotten,
        },
    )
    report.draw(
        options.out / "report.png",
        tuned=tuned,
        forgotten=forgotten,
        before=before,
        learned=learned,
        options=options,
    )
    _print_summary(tuned, forgotten, before, learned, options)
    print(f"picture  {options.out / 'report.png'}")


def _plan(text: Text, options: Options) -> training.Plan:
    held_out = text.retain[:: max(1, len(text.retain) // 128)]

    def batch_at(step: int) -> tuple[Any, ...]:
        rows = text_.rows_at(step, len(text.train), options.batch, options.seed)
        return (jnp.asarray(text.train[rows]),)

    return training.Plan(
        name="base",
        steps=options.steps,
        batch_at=batch_at,
        loss=model_.language_loss,
        evaluate=lambda model: model_.nats_per_token(model, held_out),
        evaluate_every=max(1, options.steps // 4),
        learning_rate=options.learning_rate,
    )


def _prompts(text: Text, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of windows: of training text, and of later addresses."""
    found = []
    for windows, count in ((text.train, options.pairs), (text.retain, options.groups)):
        if len(windows) < count:
            raise Failure(
                f"there are {len(windows)} windows to take prompts from, fewer than "
                f"the {count} that --pairs or --groups asks for."
            )
        rows = np.linspace(0, len(windows) - 1, count).astype(int)
        found.append(windows[rows, : options.prompt])
    return found[0], found[1]


def _print_summary(
    tuned: list[tuning.Tuned],
    forgotten: dict[str, list],
    before: dict[str, float],
    learned: dict[str, float],
    options: Options,
) -> None:
    at = {(t.loss, t.flips): t for t in tuned}
    worst = options.flips[-1]
    clean, dpo, cdpo, rdpo = (
        at["dpo", 0],
        *(at[name, worst] for name in ("dpo", "cdpo", "rdpo")),
    )
    print(
        f"flips    {worst} % of the pairs in the wrong order: the reward's scale falls "
        f"from {clean.scale:.2f} to {dpo.scale:.2f} (DPO) and {cdpo.scale:.2f} (cDPO); "
        f"rDPO has {rdpo.scale:.2f}.\n         Pairs in order: {clean.accuracy:.1%} "
        f"without flips; {dpo.accuracy:.1%}, {cdpo.accuracy:.1%}, {rdpo.accuracy:.1%}."
    )
    for method, history in forgotten.items():
        there = unlearning.when_forgotten(history, before["forget"])
        reached = "never reaches the level before learning"
        if there is not None:
            reached = (
                f"is back at {before['forget']:.2f} by step {there['step']}, where "
                f"others cost {there['retain'] - learned['retain']:+.2f} nats"
            )
        cost = history[-1]["retain"] - learned["retain"]
        print(f"forget   {method:13} {reached}; at the end {cost:+.2f}")
    print(
        "limits   One seed, a small model that overfits its pairs: compare the scales "
        "with\n         each other. The learning rate falls along the steps, which "
        "flattens\n         every curve of forgetting. Forgotten is unlikely, not gone."
    )
