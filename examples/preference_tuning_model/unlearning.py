"""The second study: a model that has learned one address by heart is to forget it."""

import functools
import pathlib
from typing import Any

import jax.numpy as jnp
from language_model.checkpoints import Record
from language_model.model import LanguageModel
from language_model.training import Stop
from study import training

from . import model as model_
from .options import Options
from .text import Text, rows_at

METHODS = ("ascent", "npo", "ascent+retain", "npo+retain")


def memorised(
    base: LanguageModel,
    text: Text,
    options: Options,
    *,
    folder: pathlib.Path,
    identity: dict[str, Any],
    stop: Stop,
) -> LanguageModel:
    """The model after more training, on as much of the address as of the others."""

    def batch_at(step: int) -> tuple[Any, ...]:
        half = options.batch // 2
        address = rows_at(step, len(text.forget), half, options.seed)
        others = rows_at(step, len(text.train), half, options.seed + 1)
        return (jnp.concatenate([text.forget[address], text.train[others]]),)

    model = model_.copy_of(base)
    plan = training.Plan(
        name="memorised",
        steps=options.memorise_steps,
        batch_at=batch_at,
        loss=model_.language_loss,
        evaluate=functools.partial(evaluate, text=text),
        evaluate_every=options.memorise_steps,
        learning_rate=options.learning_rate / 2,
    )
    training.train(model, plan, folder=folder, identity=identity, stop=stop)
    return model


def run(
    start: LanguageModel,
    text: Text,
    options: Options,
    *,
    folder: pathlib.Path,
    identity: dict[str, Any],
    stop: Stop,
) -> dict[str, list[Record]]:
    """What each method does to the address and to others, along its steps."""
    reference = model_.all_log_probs(start, text.forget)

    def batch_at(step: int) -> tuple[Any, ...]:
        half = options.batch // 2
        address = rows_at(step, len(text.forget), half, options.seed)
        others = rows_at(step, len(text.train), half, options.seed + 2)
        return tuple(
            map(
                jnp.asarray,
                (text.forget[address], reference[address], text.train[others]),
            )
        )

    found = {}
    for method in METHODS:
        model = model_.copy_of(start)
        plan = training.Plan(
            name=method,
            steps=options.forget_steps,
            batch_at=batch_at,
            loss=functools.partial(
                model_.forgetting_loss,
                beta=options.forget_beta if method.startswith("npo") else None,
                retains=method.endswith("retain"),
            ),
            evaluate=functools.partial(evaluate, text=text),
            evaluate_every=options.evaluate_every,
            learning_rate=options.forget_rate,
        )
        history = training.train(
            model, plan, folder=folder, identity=identity, stop=stop
        )
        found[method] = [record for record in history if "forget" in record]
        last = found[method][-1]
        print(
            f"forgot   {method:13} {last['forget']:6.2f} nats a token of the address, "
            f"{last['retain']:6.2f} of others",
            flush=True,
        )
    return found


def evaluate(model: LanguageModel, text: Text) -> dict[str, float]:
    """Nats a token of the address, and of addresses that nobody trains on."""
    some = lambda windows: windows[:: max(1, len(windows) // 256)]
    return {
        "forget": model_.nats_per_token(model, some(text.forget)),
        "retain": model_.nats_per_token(model, some(text.retain)),
    }


def when_forgotten(history: list[Record], target: float) -> Record | None:
    """The first evaluation at which the address is as unlikely as before learning."""
    return next((r for r in history if r["forget"] >= target), None)
