"""Full-batch training of one network, in pieces of epochs, with exact resume."""

import contextlib
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tqdm
from flax import nnx
from jax import lax
from language_model.checkpoints import Checkpoints, Record
from language_model.training import Stop

from softlib.metrics import (
    naive_loss_minimization_alignment,
    softmax_collapse_fraction,
    zero_loss_fraction,
)

from . import methods, task
from .options import IDENTITY, Options


class Plan(NamedTuple):
    """What is trained how long.

    Attributes:
        method: Out of `methods.METHODS`.
        modulus: Of the sums.
        train_percent: Of them that are trained on.
        epochs: Full-batch steps.
        b2: The decay of Adam's second moment.
    """

    method: str
    modulus: int
    train_percent: int
    epochs: int
    b2: float

    @property
    def name(self) -> str:
        return f"{self.method}-{self.modulus}"


def plans(options: Options) -> list[Plan]:
    """The trainings of a run, in order."""
    o = options
    large = [
        Plan(
            method,
            o.modulus,
            o.train_percent,
            o.perp_epochs if method == "perp" else o.epochs,
            b2=0.99,
        )
        for method in o.methods
    ]
    small = [
        Plan(method, o.small_modulus, o.small_train_percent, o.small_epochs, b2=0.999)
        for method in o.small_methods
    ]
    return large + small


def train(
    plan: Plan, options: Options, *, folder: pathlib.Path, stop: Stop
) -> list[Record]:
    """The curve: one record for every `epochs / points` epochs."""
    sums = task.sums(plan.modulus, plan.train_percent, options.seed)
    model = task.build(plan.modulus, options.width, options.seed)
    method = methods.METHODS[plan.method]
    transformation = methods.optimiser(method, options.learning_rate, plan.b2)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    identity = {name: getattr(options, name) for name in IDENTITY} | plan._asdict()
    store = Checkpoints(folder / plan.name, identity)
    bar = tqdm.tqdm(
        total=plan.epochs,
        desc=f"{plan.name:>18}",
        dynamic_ncols=True,
        disable=None,  # nothing without a terminal
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        "[{elapsed}, {remaining} left] {postfix}",
    )
    piece = plan.epochs // options.points
    with contextlib.closing(store), bar:
        progress = store.restore(model, optimizer)
        bar.update(progress.step)
        if not progress.history:
            progress.history.append(_record(0, method.loss, model, *sums))
        while progress.step < plan.epochs:
            begin = time.perf_counter()
            epochs = min(piece, plan.epochs - progress.step)
            advance(method.loss, model, optimizer, sums[0], epochs)
            progress.step += epochs
            record = _record(progress.step, method.loss, model, *sums)
            record["seconds"] = time.perf_counter() - begin
            progress.history.append(record)
            bar.set_postfix_str(f"held out {record['test_accuracy']:.3f}", False)
            bar.update(epochs)
            if progress.step == plan.epochs or stop.signal_number:
                store.save(progress, model, optimizer)
            if progress.step < plan.epochs:
                stop.raise_if_asked(
                    f"stopped at epoch {progress.step} of {plan.epochs} of "
                    f"`{plan.name}`; checkpoint written, the same command resumes."
                )
    stop.raise_if_asked(f"stopped after `{plan.name}`; the same command goes on.")
    return progress.history


@functools.partial(nnx.jit, static_argnums=(0, 4))
def advance(
    loss: methods.Loss,
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    train: task.Sums,
    epochs: int,
) -> None:
    """So many epochs in place."""
    graph, state = nnx.split((model, optimizer))

    def epoch(_: Any, state: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(_mean_loss)(model, loss, train))
        return nnx.state((model, optimizer))

    nnx.update((model, optimizer), lax.fori_loop(0, epochs, epoch, state))


def _mean_loss(model: Any, loss: methods.Loss, sums: task.Sums) -> jax.Array:
    return loss(model(sums.inputs), sums.labels).mean()


def _record(epoch: int, *arguments: Any) -> Record:
    found = _measured(*arguments)
    return {"epoch": epoch, **{name: float(value) for name, value in found.items()}}


@functools.partial(nnx.jit, static_argnums=0)
def _measured(
    loss: methods.Loss, model: Any, train: task.Sums, held_out: task.Sums
) -> dict[str, jax.Array]:
    logits = model(train.inputs)
    losses = loss(logits, train.labels)
    right = lambda logits, sums: (logits.argmax(-1) == sums.labels).mean()
    gradient = nnx.grad(_mean_loss)(model, loss, train)
    weights = nnx.state(model, nnx.Param)
    cosines = naive_loss_minimization_alignment(gradient, weights)
    return {
        "train_loss": losses.mean(),
        "train_accuracy": right(logits, train),
        "test_accuracy": right(model(held_out.inputs), held_out),
        "collapse_fraction": softmax_collapse_fraction(logits),
        "zero_loss_fraction": zero_loss_fraction(losses),
        "alignment": jnp.stack(jax.tree.leaves(cosines)).mean(),
    }
