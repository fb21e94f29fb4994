"""Time of a training step of the output layer against the number of classes.

`make bench-spherical` measures in some minutes and writes benchmarks/spherical.md and
docs/images/spherical.png; `--quick` prints only. Three heads take the same hidden rows
and labels to an SGD step: cross-entropy and Z-loss of a stored weight, streamed over
the vocabulary, and the Z-loss of a head in factors. The rebase of the latter, which
does grow with the classes, is timed on its own.

All programs run in turn. A median says what a step takes on this machine as busy as it
was; the least time is the one that others disturbed least, and the exponents are fitted
to it.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from softlib import LinearLogits, losses

from .measure import exponent, machine, take_turns
from .report import table

REPOSITORY = pathlib.Path(__file__).parents[1]
FIGURE = "docs/images/spherical.png"
ROWS, FEATURES = 128, 64
CLASSES = (8_192, 32_768, 131_072, 262_144, 524_288, 1_048_576)
# Larger stored heads take minutes to time.
LARGEST_STORED = 262_144
LEARNING_RATE = 0.1
STORED = {
    "cross-entropy, stored": losses.softmax_cross_entropy,
    "Z-loss, stored": functools.partial(losses.z_loss, a=1.0, b=10.0),
}
FACTORED, REBASE = "Z-loss, in factors", "rebase"
STYLES = {
    "cross-entropy, stored": ("#D55E00", "s-"),
    "Z-loss, stored": ("#0072B2", "^-"),
    FACTORED: ("#009E73", "o-"),
    REBASE: ("#888888", "o--"),
}


def period(classes: int) -> int:
    """Steps between rebases, as `FactoredSphericalState.rebase` recommends them."""
    return max(1000, classes // 16)


@dataclasses.dataclass(frozen=True)
class Line:
    """One program at one number of classes, in seconds."""

    program: str
    classes: int
    least: float
    median: float


# ---------------------------------------------------------------------------- programs
def stored_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    def step(weight, hidden, labels):
        mean = lambda h, w: loss(LinearLogits(h, w), labels).mean()
        of_hidden, of_weight = jax.grad(mean, (0, 1))(hidden, weight)
        return weight - LEARNING_RATE * of_weight, of_hidden

    return step


def factored_step(state, hidden, labels):
    step = state.sgd_step(
        hidden,
        labels,
        lambda s: s.z_loss(a=1.0, b=10.0).mean(),
        learning_rate=LEARNING_RATE,
    )
    return step.state, step.hidden_cotangents


def rebase_step(state, hidden, labels):
    return state.rebase(), hidden


def calls_of(classes: int, seed: int = 0) -> dict[str, Callable[[], Any]]:
    """Programs by name; each goes on from the weight that its last call left."""
    key = jax.random.key(seed)
    weight = jax.random.normal(key, (classes, FEATURES)) / FEATURES**0.5
    hidden = jax.random.normal(jax.random.key(seed + 1), (ROWS, FEATURES))
    random = np.random.default_rng(seed)
    batches = itertools.cycle(
        [jnp.asarray(random.integers(0, classes, ROWS)) for _ in range(16)]
    )
    programs: dict[str, Callable[..., Any]] = {}
    if classes <= LARGEST_STORED:
        programs |= {name: stored_step(loss) for name, loss in STORED.items()}
    programs |= {FACTORED: factored_step, REBASE: rebase_step}
    init = jax.jit(losses.FactoredSphericalState.init)
    return {
        name: _going_on(
            program, weight + 0 if name in STORED else init(weight), hidden, batches
        )
        for name, program in programs.items()
    }


def _going_on(program: Callable[..., Any], start: Any, hidden: Any, batches: Any):
    step = jax.jit(program, donate_argnums=0)
    ready = [start]

    def call() -> Any:
        ready[0], of_hidden = step(ready[0], hidden, next(batches))
        return jax.block_until_ready((ready[0], of_hidden))[1]

    for _ in range(3):  # the first call compiles, the next find their pages
        call()
    return call


# --------------------------------------------------------------------------- measuring
def measure(classes: Sequence[int], rounds: int) -> list[Line]:
    """Fast programs are repeated more often; all sizes of a program take turns."""
    made = {n: calls_of(n) for n in classes}
    lines = []
    fast = {f"{FACTORED}|{n}": made[n][FACTORED] for n in classes}
    slow = {
        f"{name}|{n}": call
        for n in classes
        for name, call in made[n].items()
        if name != FACTORED
    }
    for calls, count in ((fast, 20 * rounds), (slow, rounds)):
        turns = take_turns(calls, rounds=count, pause=0, shuffled=True)
        for key, seconds in turns.seconds.items():
            name, size = key.split("|")
            lines.append(
                Line(name, int(size), min(seconds), statistics.median(seconds))
            )
    return lines


def exponents(lines: Sequence[Line]) -> dict[str, float]:
    """P of `least time = constant * classes^p` for every program."""
    found = {}
    for name in STYLES:
        mine = [line for line in lines if line.program == name]
        if len(mine) > 1:
            sizes = [line.classes for line in mine]
            found[name] = exponent(sizes, [line.least for line in mine])
    return found


# --------------------------------------------------------------------------- reporting
def markdown(lines: Sequence[Line], *, figure: str | None = None) -> str:
    known = machine()
    by_name = {(line.program, line.classes): line for line in lines}
    sizes = sorted({line.classes for line in lines})
    rows = []
    for size in sizes:
        row = [f"{size:,}"]
        for name in (*STORED, FACTORED):
            line = by_name.get((name, size))
            text = f"{1e3 * line.least:.2f} ({1e3 * line.median:.2f})" if line else "-"
            row.append(text)
        step, rebase = by_name[FACTORED, size], by_name[REBASE, size]
        row.append(f"{1e3 * rebase.least:.1f} ({1e3 * rebase.median:.1f})")
        share = rebase.least / (rebase.least + period(size) * step.least)
        row += [f"{period(size):,}", f"{share:.1%}"]
        rows.append(row)
    heads = ["classes", *STORED, FACTORED, REBASE, "period", "share"]
    powers = ", ".join(f"{name} {p:.2f}" for name, p in exponents(lines).items())
    alternative = "Time of a step against the classes, logarithmic: stored heads rise, "
    parts = [
        "<!-- Written by `make bench-spherical`; do not edit. -->",
        f"Measured on {known['cores']} cores of {known['device']}; jax {known['jax']}, "
        f"float32, {ROWS} rows of {FEATURES} features.",
        *([f"![{alternative}the head in factors is flat]({figure})"] if figure else []),
        table(heads, rows),
        "Milliseconds of a step with gradients and SGD: the least of all rounds, the "
        "median in brackets; programs and sizes take turns. *rebase* is one call, "
        "*period* the steps between two of them that its docstring recommends, *share* "
        "its part of the time of the steps between.",
        f"Exponents of the least time in the number of classes: {powers}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(lines: Sequence[Line], path: pathlib.Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    axes = figure.subplots()
    found = exponents(lines)
    for name, (colour, style) in STYLES.items():
        mine = sorted(
            (line.classes, 1e3 * line.least) for line in lines if line.program == name
        )
        label = f"{name}: classes^{found[name]:.2f}" if name in found else name
        axes.plot(*zip(*mine, strict=True), style, color=colour, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="classes",
        ylabel="milliseconds, least of all rounds",
    )
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; prints only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, default=REPOSITORY)
    options = parser.parse_args(arguments)
    sizes = (512, 2048) if options.quick else CLASSES
    lines = measure(sizes, 1 if options.quick else options.rounds)
    page = markdown(lines, figure=None if options.quick else f"../{FIGURE}")
    print(page, end="")
    if not options.quick:
        draw(lines, options.output / FIGURE)
        (options.output / "benchmarks" / "spherical.md").write_text(page)


if __name__ == "__main__":
    main()
