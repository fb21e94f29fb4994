"""A whole run in order: data, times of a step, a training for every head, report."""

import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from language_model.training import Stop
from study import output
from study.session import stoppable

from softlib import losses

from . import model as model_, pairs as pairs_, report
from .options import Options
from .pairs import Pairs

ENTROPY, FACTORED = "cross-entropy", "Z-loss, in factors"
TOGETHER = 20  # steps of one call, where they are short


class Evaluation(NamedTuple):
    """Held-out examples after some training.

    Attributes:
        seconds: What the training would take undisturbed: steps by the least time of
            a step, so that other work on the machine changes no comparison.
        step: How many steps.
        top1: Share of the examples whose pair has the highest logit.
        top10: Whose pair is among the first ten.
        rank: Geometric mean of 1 + the number of classes before the right one.
    """

    seconds: float
    step: int
    top1: float
    top10: float
    rank: float


@stoppable
def run(options: Options, stop: Stop) -> None:
    task = pairs_.load(
        options.corpus,
        context=options.context,
        every=options.every,
        classes=options.classes,
    )
    classes = len(task.classes)
    print(
        f"text     {len(task.words):,} words; {len(task.train.labels):,} examples of "
        f"{classes:,} classes, each a pair of words that follow each other, such as "
        f"`{task.name(0)}` and `{task.name(classes // 2)}`\n"
        f"held out {len(task.held_out.labels):,} examples; {task.covered:.0%} of their "
        "pairs are classes, the others are left out",
        flush=True,
    )
    times = _times(task, options, stop)
    for name, found in times.items():
        each = ", ".join(f"{1e3 * t:.1f} ms of {n:,}" for n, t in found)
        print(f"a step   {name}: {each} classes", flush=True)

    histories = {}
    weight, least = model_.weight(classes, options), times[FACTORED][-1][1]
    for b in options.scores:
        name = f"Z-loss, b = {b}"
        head = jax.jit(losses.FactoredSphericalState.init)(weight)
        step = model_.z_step(float(b), options)
        histories[name] = _train(step, head, task, options, stop, options.steps, least)
        _say(name, histories[name])
    step, least = model_.entropy_step(options), times[ENTROPY][-1][1]
    histories[ENTROPY] = _train(
        step, weight, task, options, stop, options.entropy_steps, least
    )
    _say(ENTROPY, histories[ENTROPY])
    base = _by_frequency(task, options)
    print(f"baseline the most frequent pairs, whatever comes before: {_shown(base)}")
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "classes": classes,
            "seconds_per_step": times,
            "histories": {n: [e._asdict() for e in h] for n, h in histories.items()},
            "by_frequency": base._asdict(),
        },
    )
    report.draw(options.out / "report.png", times, histories, base, classes)
    print(f"picture  {options.out / 'report.png'}")


# ---------------------------------------------------------------------------- training
def period(classes: int) -> int:
    """Steps between rebases, see `softlib.losses.FactoredSphericalState.rebase`."""
    return max(1000, classes // 16)


def _train(
    step: model_.Step,
    head: Any,
    task: Pairs,
    options: Options,
    stop: Stop,
    steps: int,
    least: float,
) -> list[Evaluation]:
    """Trains and evaluates at as many steps as options say, the first of them 0."""
    network = model_.network(len(task.words), options)
    state = (network, model_.optimizer(options).init(network), head)
    factored = isinstance(head, losses.FactoredSphericalState)
    run = model_.many(step)
    size = TOGETHER if factored else 1
    marks = [steps * (i + 1) // options.evaluations for i in range(options.evaluations)]
    found = [_evaluate(state, task, options, 0, 0.0)]
    for begin in range(0, steps, size):
        end = min(begin + size, steps)
        batches = task.train.at(range(begin, end), options.batch, options.seed)
        state, _ = run(state, *batches)
        if factored and end % period(len(task.classes)) < size:
            network, memory, head = state
            state = (network, memory, model_.rebase(head))
        while marks and end >= marks[0]:
            found.append(_evaluate(state, task, options, end, least * end))
            marks = [mark for mark in marks if mark > end]
        stop.raise_if_asked("nothing is kept of a stopped run.")
    return found


def _evaluate(
    state: model_.State, task: Pairs, options: Options, step: int, seconds: float
) -> Evaluation:
    held_out, (network, _, head) = task.held_out, state
    count = min(options.held_out, len(held_out.labels))
    chosen = np.linspace(0, len(held_out.labels) - 1, count).astype(int)
    context, labels = held_out.context[chosen], held_out.labels[chosen]
    ranks = np.asarray(model_.ranks(network, head, context, jnp.asarray(labels)))
    return _of_ranks(ranks, seconds, step)


def _of_ranks(ranks: np.ndarray, seconds: float = 0.0, step: int = 0) -> Evaluation:
    return Evaluation(
        seconds,
        step,
        float((ranks < 1).mean()),
        float((ranks < 10).mean()),
        float(np.exp(np.log1p(ranks).mean())),
    )


def _by_frequency(task: Pairs, options: Options) -> Evaluation:
    """Classes are in the order of their counts: a label is its rank."""
    labels = task.held_out.labels
    count = min(options.held_out, len(labels))
    return _of_ranks(labels[np.linspace(0, len(labels) - 1, count).astype(int)])


# ----------------------------------------------------------------------------- timing
def _times(
    task: Pairs, options: Options, stop: Stop
) -> dict[str, list[tuple[int, float]]]:
    """Seconds of a step with the first so many classes: least of steps in turns."""
    every = len(task.classes)
    sizes = sorted({min(n, every) for n in options.timed})
    runs: dict[tuple[bool, int], list[Any]] = {}
    for size, factored in itertools.product(sizes, (True, False)):
        head: Any = model_.weight(size, options)
        step = model_.entropy_step(options)
        if factored:
            head = jax.jit(losses.FactoredSphericalState.init)(head)
            step = model_.z_step(20.0, options)
        network = model_.network(len(task.words), options)
        kept = task.train.labels < size
        few = pairs_.Split(task.train.context[kept], task.train.labels[kept])
        state = (network, model_.optimizer(options).init(network), head)
        runs[factored, size] = [model_.many(step), state, few, []]
    for turn in range(options.rounds + 1):
        for (factored, _), made in runs.items():
            run, state, few, seconds = made
            count = TOGETHER if factored else 1
            batches = few.at(
                range(count * turn, count * (turn + 1)), options.batch, options.seed
            )
            begin = time.perf_counter()
            made[1], _ = jax.block_until_ready(run(state, *batches))
            if turn:  # the first compiles
                seconds.append((time.perf_counter() - begin) / count)
        stop.raise_if_asked("nothing is kept of a stopped run.")
    return {
        name: [(size, min(runs[factored, size][3])) for size in sizes]
        for name, factored in ((FACTORED, True), (ENTROPY, False))
    }


def _say(name: str, history: list[Evaluation]) -> None:
    last = history[-1]
    print(
        f"trained  {name}: {last.step:,} steps, {last.seconds:.0f} s undisturbed; "
        f"{_shown(last)}",
        flush=True,
    )


def _shown(e: Evaluation) -> str:
    return (
        f"held out top-1 {e.top1:.1%}, top-10 {e.top10:.1%}, mean place {e.rank:,.0f}"
    )
