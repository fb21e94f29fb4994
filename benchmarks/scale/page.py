"""Writes the page from the numbers: advice, tables and a picture."""

import math
from collections.abc import Iterator

from . import figure
from .advice import gib, gigabytes, ms, sentences, share
from .collectives import KINDS, total
from .divisions import DIVISIONS, HEADS
from .links import GPUS, MACHINES, TPUS
from .outcome import NUMBERS, Outcome, Results, from_json

HEADING = "<!-- Written by `make scale ARGS=--write`; do not edit. -->"
PICTURE = NUMBERS.parents[1] / "docs" / "images" / "scale.png"


def main() -> None:
    results = from_json(NUMBERS.read_text())
    NUMBERS.with_suffix(".md").write_text(markdown(results))
    figure.draw(results, PICTURE)


def markdown(results: Results) -> str:
    """Which division to take, the picture, the tables, and what compiled them."""
    parts = [HEADING, _sizes(results), *sentences(results), _PICTURE]
    for devices in sorted({each.case.devices for each in results.outcomes}):
        parts += [f"### {devices} devices", *_tables(results, devices)]
    seconds = sum(each.seconds for each in results.outcomes)
    versions = ", ".join(f"{name} {what}" for name, what in results.versions.items())
    parts.append(
        f"Compiled with {versions}: {len(results.outcomes)} programs in "
        f"{seconds / 60:.0f} minutes of two cores that did other work as well."
    )
    return "\n\n".join(parts) + "\n"


def _sizes(results: Results) -> str:
    """The model, and the links that times are made of."""
    model = results.model
    parameters = sum(map(math.prod, model.shapes.values()))
    hosts = sorted({each.case.host for each in results.outcomes})
    links = [
        f"{name} {speed / 1e9:g} GB/s"
        for machine in MACHINES
        for name, speed in (
            (machine.near, machine.near_bytes),
            (machine.far, machine.far_bytes),
        )
        if name is not None
    ]
    peaks = [f"{x.name} {x.flops / 1e12:g} TFLOP/s" for x in MACHINES]
    return (
        f"The model has {parameters / 1e9:.2f} billion parameters: {model.layers} "
        f"layers of {model.features:,} features, {model.heads} query heads and "
        f"{model.key_heads} key heads of {model.head_size}, a gated part of "
        f"{model.gated:,}, and {model.vocabulary:,} classes. Sequences have "
        f"{model.length:,} tokens. A host has {', '.join(map(str, hosts))} devices. "
        f"Stated speeds: {', '.join([*links, *peaks])}."
    )


_PICTURE = (
    "![Time of the exchanges by that of the products, and memory of a device, for each "
    "division](../docs/images/scale.png)"
)


def _tables(results: Results, devices: int) -> Iterator[str]:
    rows = [
        (f"{division.name}, {head}", found)
        for division in DIVISIONS
        for head in HEADS
        if (found := results.find(division.name, head, devices)) is not None
    ]
    memory = [
        "| division, head | tokens | parameters and states | temporaries "
        f"| of an {GPUS.name} | kernels | TFLOP | products on an {GPUS.name} |",
        "| --- |" + " ---: |" * 7,
    ]
    memory += [
        f"| {name} | {found.tokens:,} | {gib(found.argument_bytes)} GiB "
        f"| {gib(found.temporary_bytes)} GiB | {found.memory / GPUS.memory:.0%} "
        f"| {found.kernels} "
        f"| {found.flops / 1e12:,.0f} | {ms(found.flops / GPUS.flops)} ms |"
        for name, found in rows
    ]
    yield "\n".join(memory)
    head = " | ".join(f"{kind}, GB" for kind in KINDS)
    links = f"{GPUS.near} | {GPUS.far} | of products | {TPUS.near} | of products"
    exchanges = [
        f"| division, head | {head} | sent, GB | between hosts | {links} |",
        "| --- |" + " ---: |" * (len(KINDS) + 7),
    ]
    exchanges += [f"| {name} | {_exchanges(found)} |" for name, found in rows]
    yield "\n".join(exchanges)


def _exchanges(found: Outcome) -> str:
    every = found.collectives
    cells = [gigabytes(total(every, kind)) for kind in KINDS]
    cells += [
        gigabytes(sum(each.sent for each in every)),
        gigabytes(sum(each.sent_between_hosts for each in every)),
        f"{ms(GPUS.near_seconds(every))} ms",
        f"{ms(GPUS.far_seconds(every))} ms",
        f"{share(found, GPUS):.0%}",
        f"{ms(TPUS.near_seconds(every))} ms",
        f"{share(found, TPUS):.0%}",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
