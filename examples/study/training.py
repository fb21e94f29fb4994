"""Training of one of the models that a study compares: a loop that resumes exactly."""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import tqdm
from flax import nnx
from language_model.checkpoints import Checkpoints, Progress, Record
from language_model.failures import Failure
from language_model.training import Stop

type Loss = Callable[..., jax.Array]


class Plan(NamedTuple):
    """How a model is trained; batches depend on nothing but the number of the step.

    Attributes:
        name: Of the model: names its folder and its line of progress.
        steps: Optimiser steps.
        batch_at: The arguments of the loss after the model, at a step.
        loss: Mean loss of a batch.
        evaluate: Loss on held-out data, or several numbers by name.
        evaluate_every: Steps between evaluations.
        learning_rate: The peak.
        wrt: The kind of variables that are trained.
    """

    name: str
    steps: int
    batch_at: Callable[[int], tuple[Any, ...]]
    loss: Loss
    evaluate: Callable[[Any], float | dict[str, float]]
    evaluate_every: int
    learning_rate: float
    wrt: type[nnx.Variable] = nnx.Param


def train(
    model: nnx.Module,
    plan: Plan,
    *,
    folder: pathlib.Path,
    identity: dict[str, Any],
    stop: Stop,
) -> list[Record]:
    """Trains `model` in place, or restores it; returns one record for each step.

    Args:
        model: With its initial weights.
        plan: How to train it.
        folder: Of the checkpoints of all models of the study.
        identity: What has to be equal for an earlier checkpoint to be used.
        stop: Asked after every step; if set, a checkpoint is written first.
    """
    transformation = _transformation(plan.steps, plan.learning_rate)
    optimizer = nnx.Optimizer(model, transformation, wrt=plan.wrt)
    step = _step_of(plan.loss, plan.wrt)
    store = Checkpoints(folder / plan.name, identity)
    bar = tqdm.tqdm(
        total=plan.steps,
        desc=f"{plan.name:>10}",
        dynamic_ncols=True,
        disable=None,  # nothing without a terminal
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        "[{elapsed}, {remaining} left] {postfix}",
    )
    with contextlib.closing(store), bar:
        progress = store.restore(model, optimizer)
        bar.update(progress.step)
        if not progress.history:
            progress.history.append({"step": 0, **_evaluated(plan, model)})
        while progress.step < plan.steps:
            _advance(model, optimizer, plan, step, progress)
            record = progress.history[-1]
            bar.set_postfix_str(f"loss {record['train_loss']:.3f}", refresh=False)
            bar.update()
            if progress.step == plan.steps or stop.signal_number:
                store.save(progress, model, optimizer)
            if progress.step < plan.steps:
                stop.raise_if_asked(
                    f"stopped at step {progress.step} of {plan.steps} of "
                    f"`{plan.name}`; checkpoint written, the same command resumes."
                )
    stop.raise_if_asked(f"stopped after `{plan.name}`; the same command goes on.")
    return progress.history


def seconds_per_step(history: list[Record]) -> float:
    """The median over the steps of a training, so that compilation does not count."""
    seconds = sorted(r["seconds"] for r in history if "seconds" in r)
    return seconds[len(seconds) // 2] if seconds else math.nan


def _advance(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    plan: Plan,
    step: Callable[..., jax.Array],
    progress: Progress,
) -> None:
    begin = time.perf_counter()
    value = float(step(model, optimizer, *plan.batch_at(progress.step)))
    seconds = time.perf_counter() - begin
    progress.step += 1
    if not math.isfinite(value):
        raise Failure(
            f"the loss of `{plan.name}` is not finite at step {progress.step}; a lower "
            "--learning-rate may help."
        )
    record: Record = {"step": progress.step, "train_loss": value, "seconds": seconds}
    if progress.step % plan.evaluate_every == 0 or progress.step == plan.steps:
        record |= _evaluated(plan, model)
    progress.history.append(record)


def _evaluated(plan: Plan, model: nnx.Module) -> Record:
    found = plan.evaluate(model)
    return {**found} if isinstance(found, dict) else {"held_out_loss": found}


# One object for equal trainings of one loss, which then compile once.
@functools.cache
def _step_of(loss: Loss, wrt: type[nnx.Variable]) -> Callable[..., jax.Array]:
    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, *batch):
        differentiated = nnx.DiffState(0, wrt)
        value, gradient = nnx.value_and_grad(loss, argnums=differentiated)(
            model, *batch
        )
        optimizer.update(model, gradient)
        return value

    return step


@functools.cache
def _transformation(steps: int, peak: float) -> optax.GradientTransformation:
    schedule = _schedule(steps, peak)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))


def _schedule(steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up over a tenth, then half a cosine down to a twentieth."""
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / 10,
        peak_value=peak,
        warmup_steps=max(1, steps // 10),
        decay_steps=max(2, steps),
        end_value=peak / 20,
    )
