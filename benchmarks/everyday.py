"""Time of functions that most programs call, at the sizes most programs have.

`make bench-everyday` writes benchmarks/everyday.md; `--quick` prints small shapes only.
The programs of a case run in turns in one process and compute the same (`capacity` may
drop a token); the first of them is the yardstick.
"""

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import softlib
from softlib import losses, nn, softmax

from .measure import machine, prepare, ratio, take_turns
from .report import table

REPOSITORY = pathlib.Path(__file__).parents[1]

type Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Programs that compute the same from the same arrays; the first is the yardstick.

    Samplers, which draw other samples of one law, are `random`.

    Attributes:
        name: Of what they compute.
        programs: By name.
        shapes: Sizes by which `arrays` is called.
        quick: The same, for a look that takes seconds.
        arrays: Makes the arguments.
        random: Whether results are samples.
    """

    name: str
    programs: dict[str, Program]
    shapes: tuple[tuple[int, ...], ...]
    quick: tuple[int, ...]
    arrays: Callable[..., tuple[jax.Array, ...]]
    random: bool = False


def _normal(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape, jnp.float32)


def _ids(rows: int, classes: int) -> jax.Array:
    return jax.random.randint(jax.random.key(9), (rows,), 0, classes)


def _with_gradient(loss: Program) -> Program:
    return jax.value_and_grad(lambda *arrays: loss(*arrays).mean())


# ------------------------------------------------------------------------ cross-entropy
_OF_LOGITS: dict[str, Program] = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "softlib": losses.softmax_cross_entropy,
}
_LOGITS = ((128, 50_257), (1024, 32_000))


def _logits_and_labels(rows: int, classes: int) -> tuple[jax.Array, ...]:
    return _normal(0, rows, classes), _ids(rows, classes)


# ------------------------------------------------------------------------- linear heads
def _optax_of_head(hidden: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    return _OF_LOGITS["optax"](hidden @ table.T, labels)


_OF_HEAD: dict[str, Program] = {
    "optax on logits": lambda *arrays: _optax_of_head(*arrays).mean(),
    "softlib": lambda hidden, table, labels: losses.softmax_cross_entropy(
        softlib.LinearLogits(hidden, table), labels
    ).mean(),
    "softlib, sum": lambda hidden, table, labels: losses.softmax_cross_entropy_sum(
        softlib.LinearLogits(hidden, table), labels, row_weights=1 / hidden.shape[0]
    ),
}


def _head(rows: int, features: int, classes: int) -> tuple[jax.Array, ...]:
    hidden, table = _normal(0, rows, features), _normal(1, classes, features)
    return hidden, table / features**0.5


def _head_and_labels(rows: int, features: int, classes: int) -> tuple[jax.Array, ...]:
    return *_head(rows, features, classes), _ids(rows, classes)


def _best_of_head(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(lax.top_k(hidden @ table.T, _KEPT))


def _drawn_by_definition(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return jax.random.categorical(jax.random.key(3), hidden @ table.T)


def _drawn(hidden: jax.Array, table: jax.Array) -> jax.Array:
    logits = softlib.LinearLogits(hidden, table)
    return softlib.logits.sample(jax.random.key(3), logits)


# ------------------------------------------------------------------------------ filters
_KEPT, _MASS = 50, 0.9


def _top_k(x: jax.Array) -> jax.Array:
    least = lax.top_k(x, _KEPT)[0][..., -1:]
    return jnp.where(x >= least, x, -jnp.inf)


def _top_p(x: jax.Array) -> jax.Array:
    ordered = -jnp.sort(-x, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) < _MASS
    last = jnp.take_along_axis(ordered, before.sum(-1, keepdims=True), -1)
    return jnp.where(x >= last, x, -jnp.inf)


def _filter(name: str, naive: Program, own: Program) -> Case:
    programs = {"by its definition": naive, "softlib": own}
    scores = lambda rows, classes: (2 * _normal(0, rows, classes),)
    return Case(name, programs, ((64, 50_257),), (8, 1000), scores)


def _soft_top_k(x: jax.Array) -> jax.Array:
    def halve(_: int, bounds: tuple[jax.Array, jax.Array]):
        low, high = bounds
        middle = (low + high) / 2
        more = jax.nn.sigmoid(x + middle).sum(-1, keepdims=True) > _KEPT
        return jnp.where(more, low, middle), jnp.where(more, middle, high)

    reach = abs(x).max(-1, keepdims=True) + jnp.log(x.shape[-1])
    low, high = lax.fori_loop(0, 30, halve, (-reach, reach))
    return jax.nn.sigmoid(x + (low + high) / 2)


# ------------------------------------------------------------------ mixture of experts
_CHOSEN = 2


def _experts(dispatch: str) -> Program:
    """Two products per expert; `capacity` has a quarter of the slots to spare."""

    def call(x: jax.Array, up: jax.Array, down: jax.Array, chosen: jax.Array):
        gates, number = jnp.full(chosen.shape, 1 / _CHOSEN), len(up)
        if dispatch == "dropless":
            network = lambda rows, groups: groups.linear(
                jax.nn.silu(groups.linear(rows, up)), down
            )
            return nn.dropless_experts(x, gates, chosen, network, num_experts=number)
        capacity = 5 * chosen.size // (4 * number)
        slots = nn.capacity_dispatch(chosen, number, capacity)
        network = lambda slots: jax.nn.silu(slots @ up) @ down
        sizes = {"num_experts": number, "capacity": capacity}
        return nn.capacity_experts(x, gates, chosen, slots, network, **sizes)

    return call


def _trained_experts(dispatch: str) -> Program:
    loss = lambda *arrays: (_experts(dispatch)(*arrays) ** 2).mean()
    return jax.grad(loss, (0, 1, 2))


def _tokens_and_experts(
    tokens: int, features: int, hidden: int, experts: int
) -> tuple[jax.Array, ...]:
    chosen = jax.random.randint(jax.random.key(9), (tokens, _CHOSEN), 0, experts)
    up = _normal(1, experts, features, hidden) / features**0.5
    down = _normal(2, experts, hidden, features) / hidden**0.5
    return _normal(0, tokens, features), up, down, chosen


_DISPATCHES = ("capacity", "dropless")
_EXPERTS = ((2048, 256, 512, 8), (1024, 512, 2048, 8), (512, 256, 512, 64))

CASES = (
    _filter("top-p filter", _top_p, lambda x: softmax.top_p_logits(x, p=_MASS)),
    _filter("top-k filter", _top_k, lambda x: softmax.top_k_logits(x, k=_KEPT)),
    _filter(
        "top-k softmax",
        lambda x: jax.nn.softmax(_top_k(x), -1),
        lambda x: softmax.top_k_softmax(x, k=_KEPT),
    ),
    _filter("soft top-k", _soft_top_k, lambda x: softmax.soft_top_k(x, k=_KEPT)),
    Case(
        "top-k of a linear head",
        {
            "by its definition": _best_of_head,
            "softlib": lambda hidden, table: softlib.logits.top_k(
                softlib.LinearLogits(hidden, table), k=_KEPT
            ),
        },
        ((64, 128, 50_257), (256, 512, 32_768)),
        (32, 16, 1000),
        _head,
    ),
    Case(
        "sample of a linear head",
        {"jax.random.categorical of logits": _drawn_by_definition, "softlib": _drawn},
        ((64, 128, 50_257), (256, 512, 32_768)),
        (32, 16, 1000),
        _head,
        random=True,
    ),
    Case(
        "linear cross-entropy, and gradients",
        {
            name: jax.value_and_grad(loss, argnums=(0, 1))
            for name, loss in _OF_HEAD.items()
        },
        (
            (256, 128, 1000),
            (128, 64, 50_257),
            (128, 64, 130_072),
            (256, 256, 32_000),
            (1024, 512, 32_768),
        ),
        (32, 16, 1000),
        _head_and_labels,
    ),
    Case(
        "cross-entropy of logits",
        _OF_LOGITS,
        _LOGITS,
        (32, 1000),
        _logits_and_labels,
    ),
    Case(
        "cross-entropy of logits, and gradient",
        {name: _with_gradient(loss) for name, loss in _OF_LOGITS.items()},
        _LOGITS,
        (32, 1000),
        _logits_and_labels,
    ),
    Case(
        "experts (tokens, features, hidden, experts)",
        {name: _experts(name) for name in _DISPATCHES},
        _EXPERTS,
        (64, 16, 32, 4),
        _tokens_and_experts,
    ),
    Case(
        "experts, gradients",
        {name: _trained_experts(name) for name in _DISPATCHES},
        _EXPERTS,
        (64, 16, 32, 4),
        _tokens_and_experts,
    ),
)


# ---------------------------------------------------------------------------- measuring
def measure(case: Case, shape: tuple[int, ...], rounds: int) -> list[list[str]]:
    """Rows of the table."""
    arrays = case.arrays(*shape)
    ready = {n: prepare(program, *arrays) for n, program in case.programs.items()}
    calls = {name: program.call for name, program in ready.items()}
    turns = take_turns(calls, rounds=rounds, pause=0, shuffled=True)
    yardstick = turns.seconds[next(iter(calls))]
    rows = []
    for name, seconds in turns.seconds.items():
        found = ratio(seconds, yardstick)
        scratch = ready[name].temporary_bytes
        rows.append(
            [
                case.name,
                " x ".join(map(str, shape)),
                name,
                f"{1e3 * statistics.median(seconds):.2f}",
                f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})",
                "-" if scratch is None else f"{scratch / 2**20:.1f}",
            ]
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    known = machine()
    heads = ["what", "shape", "program", "ms", "x the first", "scratch, MiB"]
    parts = [
        "<!-- Written by `make bench-everyday`; do not edit. -->",
        f"Measured on {known['cores']} cores of {known['device']}; jax {known['jax']}, "
        "float32.",
        table(heads, rows),
        "*x* is the time divided by that of the first program of the case in the same "
        "round, median and sign interval.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; prints only")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=pathlib.Path, default=REPOSITORY)
    options = parser.parse_args(arguments)
    rounds = 3 if options.quick else options.rounds
    rows: list[list[str]] = []
    for case in CASES:
        if options.only in case.name:
            for shape in (case.quick,) if options.quick else case.shapes:
                rows += measure(case, shape, rounds)
    page = markdown(rows)
    print(page, end="")
    if not options.quick and not options.only:
        (options.output / "benchmarks" / "everyday.md").write_text(page)


if __name__ == "__main__":
    main()
