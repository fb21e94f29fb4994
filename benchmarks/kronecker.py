"""Attention over tuples of keys: against its own products, in windows, by polynomials.

`make bench-kronecker` measures in about a minute on two cores and writes
benchmarks/kronecker.md and docs/images/kronecker.png; `--quick` prints only.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softlib.attention import (
    block_plan,
    kronecker_attention,
    kronecker_attention_polynomial,
    two_simplicial_attention,
)

from . import tuple_products
from .measure import exponent, machine, prepare, ratio, take_turns
from .report import mebibytes, table

REPOSITORY = pathlib.Path(__file__).parents[1]
FIGURE = "docs/images/kronecker.png"
FEATURES = 64
WINDOWS = (512, 32)
# Of the polynomial: few features, as its rank grows fast with them.
NARROW, BOUND, TOLERANCE = 4, 1.0, 1e-2


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass at one length, beside what it cannot do without.

    Attributes:
        tokens: Queries, and keys of both axes.
        name: Of the pass.
        seconds: Least over the rounds.
        to_bare: Text of its time by that of the bare loop with one exponential.
        to_products: Text of its time by that of the products alone.
        temporary_bytes: Scratch memory of the compiled program.
    """

    tokens: int
    name: str
    seconds: float
    to_bare: str
    to_products: str
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Point:
    """One program at one length; `blocks` is 0 where it visits none."""

    tokens: int
    seconds: float
    temporary_bytes: int
    blocks: int = 0


def arrays(tokens: int, features: int, count: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), count)
    shape = (tokens, 1, features)
    return [jax.random.normal(key, shape, jnp.float32) for key in keys]


def exact(query, key1, key2, value1, value2):
    return kronecker_attention(query, (key1, key2), (value1, value2))


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    def program(*operands):
        *operands, cotangent = operands
        out, pull = jax.vjp(attend, *operands)
        return out, pull(cotangent)

    return program


def against_products(lengths: Sequence[int], rounds: int) -> list[Pass]:
    """Both passes in turn with the bare loops of the same tiles."""
    found = []
    for tokens in lengths:
        operands = arrays(tokens, FEATURES, 6)
        plan = block_plan(None, tokens, (tokens, tokens))
        query, _, key, _, value, _ = operands
        bare = {"query": query[:, 0], "key": key[:, 0], "value": value[:, 0]}

        def both(exponential, bare=bare, plan=plan):
            passes = (tuple_products.forward, tuple_products.backward)
            return lambda *_: [p(plan, exponential=exponential, **bare) for p in passes]

        def one(exponential, bare=bare, plan=plan):
            return lambda *_: tuple_products.forward(
                plan, exponential=exponential, **bare
            )

        cases = {
            "forward": (exact, operands[:-1], one),
            "forward and backward": (with_gradients(exact), operands, both),
        }
        for name, (program, given, loop) in cases.items():
            ready = {
                "softlib": prepare(program, *given),
                "bare": prepare(loop(True), *given),
                "products": prepare(loop(False), *given),
            }
            turns = take_turns({n: r.call for n, r in ready.items()}, rounds=rounds)
            ours = turns.seconds["softlib"]
            text = lambda other, ours=ours, turns=turns: _text(
                ratio(ours, turns.seconds[other])
            )
            memory = ready["softlib"].temporary_bytes or 0
            found.append(
                Pass(tokens, name, min(ours), text("bare"), text("products"), memory)
            )
            _say(f"  {tokens} tokens, {name}: {found[-1].to_bare} bare loops")
    return found


def windowed(lengths: Sequence[int], rounds: int) -> list[Point]:
    """Forward and backward in two windows."""

    def attend(query, key1, key2, value1, value2):
        first, second = WINDOWS
        return two_simplicial_attention(
            query, key1, key2, value1, value2, window1=first, window2=second
        )

    found = []
    for tokens in lengths:
        ready = prepare(with_gradients(attend), *arrays(tokens, FEATURES, 6))
        turns = take_turns({"windows": ready.call}, rounds=rounds)
        seconds = min(turns.seconds["windows"])
        found.append(Point(tokens, seconds, ready.temporary_bytes or 0))
        _say(f"  {tokens} tokens: {seconds:.2f} s")
    return found


def polynomial(query, key1, key2, value1, value2):
    return kronecker_attention_polynomial(
        query, (key1, key2), (value1, value2), logit_bound=BOUND, rtol=TOLERANCE
    )


def approximated(
    lengths: Sequence[int], exact_until: int, rounds: int
) -> tuple[list[Point], list[Point]]:
    """The polynomial and, up to a length, the exact method, forward, in turn."""
    fast, slow = [], []
    for tokens in lengths:
        # Entries in [-1, 1]: the scores stay in [-BOUND, BOUND] at the scale 1/H.
        operands = [jnp.tanh(array) for array in arrays(tokens, NARROW, 5)]
        ready = {"polynomial": prepare(polynomial, *operands)}
        if tokens <= exact_until:
            ready["exact"] = prepare(exact, *operands)
        turns = take_turns({n: r.call for n, r in ready.items()}, rounds=rounds)
        for name, points in (("polynomial", fast), ("exact", slow)):
            if name in ready:
                memory = ready[name].temporary_bytes or 0
                points.append(Point(tokens, min(turns.seconds[name]), memory))
        _say(f"  {tokens} tokens")
    return fast, slow


def crossover(fast: list[Point], slow: list[Point]) -> float | None:
    """Tokens from which the polynomial is faster, on the lines between the points."""
    ratios = [
        (p.tokens, math.log(p.seconds / q.seconds))
        for p, q in zip(fast, slow, strict=False)
    ]
    for (n, before), (m, after) in itertools.pairwise(ratios):
        if before > 0 >= after:
            share = before / (before - after)
            return n * (m / n) ** share
    return None


# --------------------------------------------------------------------------- the report
def markdown(
    passes: list[Pass], windows: list[Point], fast: list[Point], slow: list[Point]
) -> str:
    known = machine()
    parts = [
        "<!-- Written by `make bench-kronecker`; do not edit. -->",
        f"Measured on {known['cores']} cores of {known['device']}; jax {known['jax']}.",
        "![Time over the number of tokens: exact, in windows, by a polynomial]"
        f"({FIGURE})".replace("docs", "../docs"),
        f"### Order 3, float32, one head of {FEATURES}",
        table(
            ["tokens", "pass", "s", "x bare loop", "x products", "MiB"],
            (
                [
                    f"{p.tokens}",
                    p.name,
                    f"{p.seconds:.3f}",
                    p.to_bare,
                    p.to_products,
                    mebibytes(p.temporary_bytes),
                ]
                for p in passes
            ),
        ),
        "The bare loop visits the same tiles and does nothing but the matrix products "
        "and one exponential per score and pass; *products* has no exponential.",
        f"### Windows of {WINDOWS[0]} and {WINDOWS[1]}, forward and backward",
        _points(windows),
        f"### By a polynomial: {NARROW} features, scores in [-{BOUND:g}, {BOUND:g}], "
        f"within {TOLERANCE:g}",
        _points(fast),
        "The exact method:",
        _points(slow),
    ]
    met = crossover(fast, slow)
    if met is not None:
        parts.append(f"The polynomial is faster from {met:.0f} tokens on.")
    return "\n\n".join(parts) + "\n"


def _points(points: list[Point]) -> str:
    rows = [
        [f"{p.tokens}", f"{p.seconds:.4f}", mebibytes(p.temporary_bytes)]
        for p in points
    ]
    text = table(["tokens", "s", "MiB"], rows)
    # Of short sequences the time is that of a call.
    points = points[-4:]
    if len(points) > 2:
        tokens = [float(p.tokens) for p in points]
        time = exponent(tokens, [p.seconds for p in points])
        memory = exponent(tokens, [float(p.temporary_bytes) for p in points])
        text += (
            f"\n\nPower of the tokens over the last {len(points)} lengths: time "
            f"{time:.2f}, scratch {memory:.2f}."
        )
    return text


def draw(
    windows: list[Point], fast: list[Point], slow: list[Point], path: pathlib.Path
) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, lines, title in (
        (left, {"windows": windows}, f"Windows of {WINDOWS[0]} and {WINDOWS[1]}"),
        (right, {"polynomial": fast, "exact": slow}, f"{NARROW} features, forward"),
    ):
        for name, points in lines.items():
            axes.loglog(
                [p.tokens for p in points],
                [p.seconds for p in points],
                "o-",
                label=name,
            )
        first = next(iter(lines.values()))
        guide = [first[0].seconds * p.tokens / first[0].tokens for p in first]
        axes.loglog([p.tokens for p in first], guide, "k:", lw=1, label="$n$")
        axes.set_xticks([p.tokens for p in first][:: 1 if len(first) < 5 else 3])
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel("seconds")
        axes.set_title(title)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; prints only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=REPOSITORY)
    options = parser.parse_args(arguments)
    power = lambda first, last: [1 << i for i in range(first, last + 1)]
    quick, rounds = options.quick, 3 if options.quick else options.rounds
    _say("order 3 against its products")
    passes = against_products((64,) if quick else (256, 512), rounds)
    _say("in windows")
    windows = windowed(power(7, 9) if quick else power(11, 14), 3)
    _say("by a polynomial")
    lengths, most = (power(4, 6), 64) if quick else (power(4, 15), 512)
    fast, slow = approximated(lengths, most, rounds)
    page = markdown(passes, windows, fast, slow)
    print(page, end="")
    if quick:
        return
    (options.output / "benchmarks" / "kronecker.md").write_text(page)
    draw(windows, fast, slow, options.output / FIGURE)


def _text(found: Any) -> str:
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
