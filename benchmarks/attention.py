"""Attention against its peers, and what a sparse mask costs: tables and a figure.

`make bench-attention` measures in about ten minutes on two cores and writes
benchmarks/attention.md and docs/images/attention.png; `--quick` prints only.
"""

import argparse
import dataclasses
import functools
import importlib
import logging
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softlib import masks
from softlib.attention import BlockPlan, block_plan, dot_product_attention

from .measure import exponent, machine, prepare, ratio, reason_of, take_turns
from .report import mebibytes, table

REPOSITORY = pathlib.Path(__file__).parents[1]
FIGURE = "docs/images/attention.png"
FEATURES = 64
PLACES = 256  # tokens per frame
BLOCK = 128
YARDSTICK = "softlib"


@dataclasses.dataclass(frozen=True)
class Row:
    """One program at one length.

    Attributes:
        name: Its name.
        seconds: Median over the rounds; None if it does not run.
        ratio: Text of its time by the yardstick's in the same round.
        temporary_bytes: Scratch memory of the compiled program.
        reason: Why it does not run.
    """

    name: str
    seconds: float | None = None
    ratio: str = "-"
    temporary_bytes: int | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """A sparse mask at one length, forward and backward."""

    tokens: int
    visited: int
    density: float
    seconds: float
    temporary_bytes: int
    dense_ratio: float | None = None


def arrays(tokens: int, heads: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, tokens, heads, FEATURES)
    return [jax.random.normal(key, shape, jnp.float32) for key in keys]


def radial(tokens: int) -> BlockPlan:
    mask = masks.Radial(PLACES, rule="pow2", min_window=BLOCK)
    return block_plan(mask, tokens, tokens, block_query=BLOCK, block_key=BLOCK)


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    def program(query, key, value, cotangent, *rest):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, *rest), query, key, value)
        return out, pull(cotangent)

    return program


# -------------------------------------------------------------------------------- peers
def softlib_dense(query, key, value):
    return dot_product_attention(query, key, value)


def jax_nn(query, key, value):
    return jax.nn.dot_product_attention(query, key, value)


def tokamax(query, key, value):
    package: Any = importlib.import_module("tokamax")
    return package.dot_product_attention(
        query, key, value, implementation="xla_chunked"
    )


PEERS = {
    YARDSTICK: softlib_dense,
    "tokamax xla_chunked": tokamax,
    "jax.nn, XLA": jax_nn,
}


def compare(tokens: int, heads: int, *, backward: bool, rounds: int) -> list[Row]:
    """All programs in turn; the ratio is that of the same round."""
    query, key, value, cotangent = arrays(tokens, heads)
    prepared, rows = {}, []
    for name, attend in PEERS.items():
        try:
            prepared[name] = (
                prepare(with_gradients(attend), query, key, value, cotangent)
                if backward
                else prepare(attend, query, key, value)
            )
        except Exception as error:  # whatever stops a peer is a row of the table
            rows.append(Row(name, reason=reason_of(error)))
    turns = take_turns({n: p.call for n, p in prepared.items()}, rounds=rounds)
    for name, ready in prepared.items():
        found = ratio(turns.seconds[name], turns.seconds[YARDSTICK])
        text = f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"
        middle = statistics.median(turns.seconds[name])
        rows.append(Row(name, middle, text, ready.temporary_bytes))
    order = list(PEERS)
    return sorted(rows, key=lambda row: order.index(row.name))


# --------------------------------------------------------------------------- the masks
def grow(lengths: Sequence[int], *, dense_at: int, rounds: int) -> list[Point]:
    """Radial attention of one head; lists of blocks are operands.

    At one length also the same stream over all blocks, in turn with it.
    """
    attend = lambda q, k, v, plan: dot_product_attention(q, k, v, mask=plan)
    program = with_gradients(attend)
    points = []
    for tokens in lengths:
        operands = arrays(tokens, 1)
        plan = radial(tokens)
        calls = {"radial": prepare(program, *operands, _on_device(plan))}
        if tokens == dense_at:
            every = block_plan(None, tokens, tokens, block_query=BLOCK, block_key=BLOCK)
            calls["dense"] = prepare(program, *operands, _on_device(every))
        turns = take_turns(
            {name: ready.call for name, ready in calls.items()}, rounds=rounds
        )
        dense = None
        if "dense" in calls:
            dense = ratio(turns.seconds["radial"], turns.seconds["dense"]).median
        points.append(
            Point(
                tokens,
                plan.visited,
                plan.density,
                min(turns.seconds["radial"]),
                calls["radial"].temporary_bytes or 0,
                dense,
            )
        )
        _say(f"  {tokens} tokens: {points[-1].seconds:.2f} s")
    return points


def _on_device(plan: BlockPlan) -> BlockPlan:
    return jax.tree.map(jnp.asarray, plan)


# --------------------------------------------------------------------------- the report
def markdown(
    forward: list[Row], both: list[Row], points: list[Point], shape: str
) -> str:
    known = machine()
    versions = ", ".join(
        f"{name} {known[name]}" for name in ("jax", "tokamax") if name in known
    )
    parts = [
        "<!-- Written by `make bench-attention`; do not edit. -->",
        f"Measured on {known['cores']} cores of {known['device']}; {versions}.",
        f"![Time of dense attention beside its peers, and of radial attention over the "
        f"number of tokens]({FIGURE})".replace("docs", "../docs"),
        f"### Dense attention, float32, {shape}",
        table(
            ["program", "forward s", "x", "MiB", "and backward s", "x", "MiB"],
            (
                [one.name, *_cells(one), *_cells(two)]
                for one, two in zip(forward, both, strict=True)
            ),
        ),
        "*x* is the time divided by softlib's in the same round: median and sign "
        "interval.",
        f"### Radial attention, {PLACES} tokens a frame, one head, blocks of {BLOCK}",
        table(
            ["tokens", "blocks", "of all", "s", "us a block", "MiB"],
            (
                [
                    f"{p.tokens}",
                    f"{p.visited}",
                    f"{p.density:.3f}",
                    f"{p.seconds:.2f}",
                    f"{1e6 * p.seconds / p.visited:.0f}",
                    mebibytes(p.temporary_bytes),
                ]
                for p in points
            ),
        ),
        *_summary(points),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(points: list[Point]) -> list[str]:
    lines = []
    if len(points) > 1:
        fit = lambda xs, ys: exponent([float(x) for x in xs], [float(y) for y in ys])
        tokens = [p.tokens for p in points]
        blocks = [p.visited for p in points]
        seconds = [p.seconds for p in points]
        memory = [p.temporary_bytes for p in points]
        lines.append(
            "Forward and backward grow with the power "
            f"{fit(blocks, seconds):.2f} of the visited blocks, "
            f"{fit(tokens, seconds):.2f} of the tokens (the mask's own blocks: "
            f"{fit(tokens, blocks):.2f}); scratch memory with "
            f"{fit(tokens, memory):.2f} of the tokens."
        )
    for p in points:
        if p.dense_ratio is not None:
            lines.append(
                f"At {p.tokens} tokens the time is {p.dense_ratio:.3f} of that of all "
                f"blocks by the same stream, {p.dense_ratio / p.density:.2f} times the "
                "visited fraction. No list is padded."
            )
    return lines


def _cells(row: Row) -> list[str]:
    if row.seconds is None:
        return ["does not run", "-", "-"]
    size = "-" if row.temporary_bytes is None else mebibytes(row.temporary_bytes)
    return [f"{row.seconds:.2f}", row.ratio, size]


def draw(both: list[Row], points: list[Point], path: pathlib.Path) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    shown = [row for row in both if row.seconds is not None]
    left.barh([r.name for r in shown][::-1], [r.seconds for r in shown][::-1])
    left.set_xlabel("seconds, forward and backward")
    left.set_title("Dense")
    tokens = [p.tokens for p in points]
    right.loglog(tokens, [p.seconds for p in points], "o-", label="radial")
    first = points[0]
    for power, style in ((1, ":"), (2, "--")):
        guide = [first.seconds * (t / first.tokens) ** power for t in tokens]
        name = "$n$" if power == 1 else f"$n^{power}$"
        right.loglog(tokens, guide, f"k{style}", lw=1, label=name)
    blocks = [first.seconds * p.visited / first.visited for p in points]
    right.loglog(tokens, blocks, "C1-", lw=1, label="visited blocks")
    right.set_xticks(tokens, [f"{t // 1024} k" for t in tokens])
    right.minorticks_off()
    right.set_xlabel("tokens")
    right.set_ylabel("seconds, forward and backward")
    right.set_title(f"Radial, {PLACES} tokens a frame")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; prints only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=REPOSITORY)
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    tokens, heads, rounds = (512, 2, 3) if options.quick else (8192, 4, options.rounds)
    lengths = (512, 1024) if options.quick else (4096, 8192, 16384, 32768, 65536)
    run = functools.partial(compare, tokens, heads, rounds=rounds)
    _say("dense, forward")
    forward = run(backward=False)
    _say("dense, forward and backward")
    both = run(backward=True)
    _say("radial")
    points = grow(lengths, dense_at=lengths[-2], rounds=3)
    shape = f"{tokens} tokens, {heads} heads of {FEATURES}"
    page = markdown(forward, both, points, shape)
    print(page, end="")
    if options.quick:
        return
    (options.output / "benchmarks" / "attention.md").write_text(page)
    draw(both, points, options.output / FIGURE)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
