"""Errors of softmax and its relatives, in units of the last place: table and figure.

Rows of scores of either sign from 10^k to 10^(k + 1) in absolute value, for k over the
whole range of exponents, against NumPy's longest float; beside jax.nn, optax and
PyTorch where they have the function. `make accuracy` writes benchmarks/accuracy.md and
docs/images/accuracy.png in about a minute on two cores; `--quick` prints only.
"""

import argparse
import dataclasses
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softlib import softmax as maps

from .measure import machine, prepare, ratio, reason_of, take_turns
from .report import table

REPOSITORY = pathlib.Path(__file__).parents[1]
FIGURE = "docs/images/accuracy.png"
YARDSTICK = "jax.nn"
DTYPES = {"float32": 23, "bfloat16": 7}  # bits after the point
DECADES = (-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 9, 18, 34)
COLUMNS = 256
LONG = np.longdouble
DRAWN = ("softmax", "log_softmax", "logsumexp")

type Program = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Function:
    """A map, its exact form, and who computes it.

    Attributes:
        exact: Of rows in the last axis, in the longest float.
        programs: Take an array of JAX, by name.
        torch: Name of the function in PyTorch, called with the axis; None for none.
    """

    exact: Callable[[np.ndarray], np.ndarray]
    programs: dict[str, Program]
    torch: str | None = None


@dataclasses.dataclass(frozen=True)
class Decade:
    """Errors of a program, in units of the last place, for scores from 10^low on."""

    function: str
    program: str
    dtype: str
    low: int
    worst: float
    mean: float


# -------------------------------------------------------------------------- exact forms
def log_softmax(x: np.ndarray) -> np.ndarray:
    """Right where a probability is almost 1: the sum leaves out one largest term."""
    e = np.exp(x - x.max(-1, keepdims=True))
    np.put_along_axis(e, x.argmax(-1)[:, None], 0, -1)
    return x - x.max(-1, keepdims=True) - np.log1p(e.sum(-1, keepdims=True))


def logsumexp(x: np.ndarray) -> np.ndarray:
    return x.max(-1) - log_softmax(x).max(-1)


def sparsemax(x: np.ndarray) -> np.ndarray:
    z = -np.sort(-x, -1)
    z, top = z - z[:, :1], z[:, :1]
    tau = (np.cumsum(z, -1) - 1) / np.arange(1, x.shape[-1] + 1)
    size = (tau < z).sum(-1, keepdims=True)
    return np.maximum(x - top - np.take_along_axis(tau, size - 1, -1), 0)


def entmax15(x: np.ndarray) -> np.ndarray:
    z = -np.sort(-x, -1) / 2
    z, top = z - z[:, :1], z[:, :1]
    sizes = np.arange(1, x.shape[-1] + 1)
    mean, square = np.cumsum(z, -1) / sizes, np.cumsum(z * z, -1) / sizes
    tau = mean - np.sqrt(np.maximum(1 / LONG(sizes) - (square - mean**2), 0))
    size = (tau <= z).sum(-1, keepdims=True)
    tau = np.take_along_axis(tau, size - 1, -1)
    return np.maximum(x / 2 - top - tau, 0) ** 2


def stablemax(x: np.ndarray) -> np.ndarray:
    return normalized(np.where(x >= 0, x + 1, 1 / (1 + np.abs(x))))


def normalized(y: np.ndarray) -> np.ndarray:
    return y / y.sum(-1, keepdims=True)


# ----------------------------------------------------------------------------- programs
def optax_log_softmax(x: jax.Array) -> jax.Array:
    """The cross-entropy of every label."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    labels = jnp.broadcast_to(
        jnp.arange(x.shape[1])[:, None], x.shape[::-1]
    )  # one more axis: a row of labels at a time
    return -jax.vmap(loss, (None, 0), out_axes=1)(x, labels)


def family(name: str, peer: Program, **more: Program) -> dict[str, Program]:
    two_pass = getattr(maps, f"two_pass_{name}")
    return {
        YARDSTICK: peer,
        **more,
        "softlib": getattr(maps, name),
        "softlib two-pass": functools.partial(two_pass, compensated=False),
        "softlib compensated": two_pass,
    }


FUNCTIONS = {
    "softmax": Function(
        lambda x: np.exp(log_softmax(x)),
        family("softmax", jax.nn.softmax)
        | {"softlib unified max": lambda x: maps.unified_max_softmax(x)},
        "softmax",
    ),
    "log_softmax": Function(
        log_softmax,
        family("log_softmax", jax.nn.log_softmax, optax=optax_log_softmax)
        | {"softlib unified max": lambda x: maps.unified_max_log_softmax(x)},
        "log_softmax",
    ),
    "logsumexp": Function(
        logsumexp,
        family("logsumexp", functools.partial(jax.nn.logsumexp, axis=-1)),
        "logsumexp",
    ),
    "sparsemax": Function(
        sparsemax,
        {
            "optax": jax.vmap(optax.projections.projection_simplex),
            "softlib": maps.sparsemax,
        },
    ),
    "entmax15": Function(entmax15, {"softlib": maps.entmax15}),
    "stablemax": Function(stablemax, {"softlib": maps.stablemax}),
    "log_stablemax": Function(
        lambda x: np.log(stablemax(x)), {"softlib": maps.log_stablemax}
    ),
    "spherical_softmax": Function(
        lambda x: normalized(x * x + LONG("1e-6")),
        {"softlib": maps.spherical_softmax},
    ),
    "taylor_softmax": Function(
        lambda x: normalized(1 + x + x * x / 2), {"softlib": maps.taylor_softmax}
    ),
}


def programs(function: Function) -> Iterator[tuple[str, Program | str]]:
    """Names and programs, or the reason why there is none."""
    for name, program in function.programs.items():
        yield name, jax.jit(program)
    if function.torch is not None:
        try:
            yield "PyTorch", torch_program(function.torch)
        except Exception as error:  # whatever stops a peer is a row of the table
            yield "PyTorch", reason_of(error)


def torch_program(name: str) -> Program:
    torch: Any = importlib.import_module("torch")

    def program(x: jax.Array) -> jax.Array:
        wide = torch.from_numpy(np.array(x, np.float32))
        found = getattr(torch, name)(wide.to(getattr(torch, x.dtype.name)), -1)
        return jnp.asarray(found.float().numpy())

    return program


# ------------------------------------------------------------------------------- errors
def scores(low: int, rows: int, dtype: str) -> jax.Array:
    """Of either sign, from 10^low to 10^(low + 1) in absolute value."""
    random = np.random.default_rng(low + 100)
    size = 10.0 ** (low + random.random((rows, COLUMNS)))
    return jnp.asarray(size * random.choice([-1, 1], size.shape), dtype)


def last_places(found: jax.Array, exact: np.ndarray, dtype: str) -> np.ndarray:
    """Errors in units of the last place of the exact value, where that is normal."""
    actual = np.asarray(found, np.float32).astype(LONG)
    normal = np.abs(exact) >= float(jnp.finfo(dtype).tiny)
    exponent = np.frexp(exact)[1] - 1 - DTYPES[dtype]
    error = np.abs(actual - exact)[normal]
    return error / np.ldexp(LONG(1), exponent[normal])


def measured(
    name: str, function: Function, program_name: str, program: Program, rows: int
) -> list[Decade]:
    found = []
    for dtype in DTYPES:
        for low in DECADES:
            x = scores(low, rows, dtype)
            exact = function.exact(np.asarray(x, np.float32).astype(LONG))
            error = last_places(program(x), exact, dtype)
            worst, mean = float(error.max()), float(error.mean())
            found.append(Decade(name, program_name, dtype, low, worst, mean))
    return found


def prices(name: str, function: Function, *, rows: int, rounds: int) -> dict[str, str]:
    """Time of float32 by that of jax.nn in the same round."""
    if YARDSTICK not in function.programs:
        return {}
    x = jax.random.normal(jax.random.key(0), (rows, 1024))
    # optax computes a loss, and that of every label is not what it is for.
    ours = {n: p for n, p in function.programs.items() if n != "optax"}
    calls = {n: prepare(program, x).call for n, program in ours.items()}
    seconds = take_turns(calls, rounds=rounds).seconds
    return {n: f"{ratio(seconds[n], seconds[YARDSTICK]).median:.1f}" for n in calls}


# --------------------------------------------------------------------------- the report
@dataclasses.dataclass(frozen=True)
class Results:
    """All errors, the prices of each function by program, and who is missing."""

    decades: list[Decade]
    prices: dict[str, dict[str, str]]
    missing: dict[str, str]


def markdown(results: Results) -> str:
    known = machine()
    versions = ", ".join(f"{name} {known[name]}" for name in ("jax", "optax"))
    parts = [
        "<!-- Written by `make accuracy`; do not edit. -->",
        f"Measured on {known['device']}; {versions}.",
        f"![Largest errors over the size of the scores]({FIGURE})".replace(
            "docs", "../docs"
        ),
        "Errors in units of the last place of the exact value: the largest, the size "
        f"of the scores at which it occurs, and the mean. Rows of {COLUMNS} scores of "
        "either sign, results that are normal numbers; 0.5 is the error of a correctly "
        "rounded result. *x* is the time for float32 and rows of 1024, divided by that "
        "of jax.nn in the same round.",
    ]
    for name in dict.fromkeys(decade.function for decade in results.decades):
        priced = results.prices.get(name, {})
        header = ["program"]
        for dtype in DTYPES:
            header += [dtype, "at", "mean"]
        rows = [
            [program, *cells, *([priced.get(program, "-")] if priced else [])]
            for program, cells in rows_of(name, results.decades)
        ]
        parts.append(f"### {name}")
        parts.append(table(header + (["x"] if priced else []), rows))
    parts += [f"- {name}: {reason}." for name, reason in results.missing.items()]
    return "\n\n".join(parts) + "\n"


def rows_of(name: str, decades: list[Decade]) -> Iterator[tuple[str, list[str]]]:
    mine = [decade for decade in decades if decade.function == name]
    for program in dict.fromkeys(decade.program for decade in mine):
        cells = []
        for dtype in DTYPES:
            own = [d for d in mine if (d.program, d.dtype) == (program, dtype)]
            worst = max(own, key=lambda decade: decade.worst)
            mean = sum(decade.mean for decade in own) / len(own)
            cells += [_number(worst.worst), f"1e{worst.low}", _number(mean)]
        yield program, cells


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"


COLOURS = {
    YARDSTICK: "#222222",
    "PyTorch": "#999999",
    "optax": "#cc79a7",
    "softlib": "#e69f00",
    "softlib unified max": "#009e73",
    "softlib two-pass": "#56b4e9",
    "softlib compensated": "#0072b2",
}


def draw(decades: list[Decade], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(DTYPES), len(DRAWN), sharex=True)
    lines = {}
    for row, dtype in zip(axes, DTYPES, strict=True):
        for axis, name in zip(row, DRAWN, strict=True):
            for program, colour in COLOURS.items():
                own = [
                    d
                    for d in decades
                    if (d.function, d.program, d.dtype) == (name, program, dtype)
                    and d.low <= DECADES[-3]
                ]
                if own:
                    # A result without an error has no logarithm.
                    worst = [max(d.worst, 0.05) for d in own]
                    bold = program == "softlib compensated"
                    # Dashes on top: what lies below is often the same.
                    dashed = program == YARDSTICK
                    (lines[program],) = axis.plot(
                        [d.low + 0.5 for d in own],
                        worst,
                        "o--" if dashed else "o-",
                        color=colour,
                        linewidth=2.6 if bold else 1.6,
                        markersize=3.5,
                        zorder=4 if dashed else 3 if bold else 2,
                    )
            axis.axhline(0.5, color="#222222", linestyle=":", linewidth=0.9)
            axis.set_yscale("log")
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_title(f"{name}, {dtype}", fontsize=10)
            axis.set_ylim(0.04, max(3.0, 2 * axis.get_ylim()[1]))
        row[0].set_ylabel("largest error, last places")
    for axis in axes[-1]:
        axis.set_xlabel("size of the scores")
        ticks = [-6, -3, 0, 3, 6, 9]
        axis.set_xticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=4
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


def run(rows: int, *, timed_rows: int, rounds: int) -> Results:
    decades, priced, missing = [], {}, {}
    for name, function in FUNCTIONS.items():
        print(name, file=sys.stderr, flush=True)
        for program_name, program in programs(function):
            if isinstance(program, str):
                missing[program_name] = program
            else:
                decades += measured(name, function, program_name, program, rows)
        priced[name] = prices(name, function, rows=timed_rows, rounds=rounds)
    return Results(decades, priced, missing)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; prints only")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=REPOSITORY)
    options = parser.parse_args(arguments)
    if options.quick:
        results = run(20, timed_rows=64, rounds=3)
    else:
        results = run(400, timed_rows=2048, rounds=options.rounds)
    page = markdown(results)
    print(page, end="")
    if options.quick:
        return
    (options.output / "benchmarks" / "accuracy.md").write_text(page)
    draw(results.decades, options.output / FIGURE)


if __name__ == "__main__":
    main()
