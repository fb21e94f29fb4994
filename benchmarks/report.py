"""Markdown of a run, for the documentation and for the terminal."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from . import torch_process
from .measure import ratio
from .programs import BOUNDS, OURS, PROGRAMS, SOFTLIB, SOFTLIB_SUM
from .results import Errors, Growth, Results, Speed, SpeedRow, Temporaries

FIGURE = "docs/images/benchmarks.png"
# Order of rows: those of the programs, with torch's before softlib's.
_NAMES = [program.name for program in PROGRAMS]
_NAMES[_NAMES.index(SOFTLIB) : _NAMES.index(SOFTLIB)] = torch_process.NAMES


def markdown(results: Results, *, figure: str | None = None) -> str:
    """All tables; `figure` is the address of the picture, if there is one."""
    parts = [
        "<!-- Written by `make bench`; do not edit. -->",
        _machine(results),
        *([f"![{_alternative_text(results)}]({figure})"] if figure else []),
        *_speed(results),
        *_errors(results.errors),
        *_temporaries(results.temporaries),
        *_growth(results.growth),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(results: Results) -> str:
    known = dict(results.machine)
    device, cores = known.pop("device", "?"), known.pop("cores", "?")
    system, platform = known.pop("system", "?"), known.pop("platform", "?")
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"Measured on {cores} cores of {device} ({platform}, {system}); {versions}."


def _alternative_text(results: Results) -> str:
    if not results.speed:
        return "No measurements"
    case = largest(results)[0].case
    return (
        "Bars of time, divided by that of optax on stored logits, and of scratch "
        f"memory, for each program at {case.shape}, {case.dtype}; the numbers are in "
        "the table of that shape"
    )


# ------------------------------------------------------------------------------- tables
def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    cells = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _speed(results: Results) -> Iterator[str]:
    if not results.speed:
        return
    yield "### Time and scratch memory"
    yield (
        "Loss and both gradients, or the loss alone where it says so. *x* is the time "
        "divided by that of optax on stored logits for the same result: the median of "
        "the ratios within a round, with the sign interval of that median in "
        "parentheses. MiB is scratch memory, without operands and results. *error* is "
        "the largest of the float32 errors below. A dash: the program takes the weight "
        "the other way, or does not tell its memory."
    )
    for group in _by_shape(results.speed):
        first = group[0]
        yield f"#### {first.case.shape}, {first.case.dtype}"
        yield "; ".join(_conditions(speed) for speed in group) + "."
        header = ["program"]
        for speed in group:
            header += [f"{speed.case.layout} ms", "x", "MiB"]
        yield table([*header, "error"], _speed_rows(group, results.errors))
        if notes := list(_notes(group)):
            yield "\n".join(f"- {note}" for note in notes)
    yield "#### Where others are faster"
    found = [line for speed in results.speed for line in faster(speed, results.errors)]
    if found:
        yield (
            "Time of softlib (the faster of its forms) by that of another program "
            "whose loss is right, where it is over 1 with its whole interval:"
        )
        yield "\n".join(f"- {line}" for line in found)
    else:
        yield "Nowhere in this run."


def _conditions(speed: Speed) -> str:
    coverage = max((r.ratio.coverage for r in speed.rows if r.ratio), default=0.0)
    return (
        f"{speed.case.layout}: {speed.rounds} rounds, intervals cover with "
        f"{100 * coverage:.0f} %, others used {speed.foreign_cores:.2f} cores meanwhile"
    )


def _by_shape(speeds: Sequence[Speed]) -> list[list[Speed]]:
    groups: dict[tuple[str, str], list[Speed]] = {}
    for speed in speeds:
        groups.setdefault((speed.case.shape, speed.case.dtype), []).append(speed)
    return list(groups.values())


def _speed_rows(
    group: Sequence[Speed], errors: Sequence[Errors]
) -> Iterator[list[str]]:
    for name in ordered(row.program for speed in group for row in speed.rows):
        cells = [f"{name} †" if name in torch_process.NAMES else name]
        for speed in group:
            cells += _speed_cells(speed.row(name))
        yield [*cells, _verdict(name, errors)]


def _speed_cells(row: SpeedRow | None) -> list[str]:
    if row is None or row.reason:
        return ["-" if row is None else "does not run", "-", "-"]
    milliseconds = f"{1e3 * statistics.median(row.seconds):.3g}"
    if 1e3 * statistics.median(row.seconds) >= 100:
        milliseconds = f"{1e3 * statistics.median(row.seconds):.0f}"
    size = row.temporary_bytes
    return [
        milliseconds,
        "-" if row.ratio is None else _ratio(row),
        "-" if size is None else mebibytes(size),
    ]


def _ratio(row: SpeedRow) -> str:
    assert row.ratio is not None
    if not row.ratio.coverage or row.ratio.low == row.ratio.high:
        return f"{row.ratio.median:.2f}"
    return f"{row.ratio.median:.2f} ({row.ratio.low:.2f}-{row.ratio.high:.2f})"


def _notes(group: Sequence[Speed]) -> Iterator[str]:
    rows = [row for speed in group for row in speed.rows]
    if any(row.program in torch_process.NAMES and not row.reason for row in rows):
        yield (
            "† In a process of its own, in turn with this one: *x* is the ratio of the "
            "two medians, which has no interval within rounds."
        )
    reasons = {row.program: row.reason for row in rows if row.reason}
    for name, reason in reasons.items():
        yield f"{name} does not run: {reason}"


def worst_loss(name: str, errors: Sequence[Errors]) -> Errors | None:
    """Of the float32 cases, that with the largest error of the loss."""
    mine = [e for e in errors if e.program == name and e.case.dtype == "float32"]
    known = [e for e in mine if e.loss is not None]
    size = lambda e: abs(e.loss) if not math.isnan(e.loss) else math.inf
    return max(known, key=size, default=None)


def is_wrong(name: str, errors: Sequence[Errors]) -> bool:
    worst = worst_loss(name, errors)
    return worst is not None and worst.wrong


def _verdict(name: str, errors: Sequence[Errors]) -> str:
    worst = worst_loss(name, errors)
    if worst is None or worst.loss is None:
        return "-"
    if worst.wrong:
        return f"**wrong**: {worst.loss:+.2g} at V = {worst.case.vocabulary}"
    return f"{abs(worst.loss):.0e}"


def faster(speed: Speed, errors: Sequence[Errors]) -> Iterator[str]:
    """Peers that beat the faster of softlib's forms, wherever they are right."""
    ours = [
        row
        for name in (SOFTLIB, SOFTLIB_SUM)
        if (row := speed.row(name)) is not None and row.seconds
    ]
    if not ours:
        return
    best = min(ours, key=lambda row: statistics.median(row.seconds))
    for row in speed.rows:
        compared = row.program not in (*OURS, *BOUNDS) and row.seconds
        if not compared or "alone" in row.program or is_wrong(row.program, errors):
            continue
        where = f"{speed.case.shape}, weight {speed.case.layout}"
        if row.program in torch_process.NAMES:
            value = statistics.median(best.seconds) / statistics.median(row.seconds)
            if value > 1:
                yield f"{row.program}, {where}: {value:.2f} (ratio of medians)"
            continue
        found = ratio(best.seconds, row.seconds)
        if found.low > 1:
            yield (
                f"{row.program}, {where}: {found.median:.2f} "
                f"({found.low:.2f}-{found.high:.2f})"
            )


def _errors(errors: Sequence[Errors]) -> Iterator[str]:
    if not errors:
        return
    cases = dict.fromkeys((e.case.vocabulary, e.case.dtype) for e in errors)
    example = errors[0].case
    yield "### Errors"
    yield (
        f"Against float64 on the same rounded operands, N = {example.rows}, "
        f"D = {example.features}, logits about standard normal. *loss*: mean loss "
        "minus the true one, nats; **wrong** over 0.001. *dh*, *dw*: largest error of "
        "the gradient of hidden and weight by the largest element of that gradient. Of "
        "the two layouts the worse."
    )
    header = ["program"]
    for vocabulary, dtype in cases:
        header += [f"V = {vocabulary}, {dtype}: loss", "dh", "dw"]
    known = {(e.program, e.case.vocabulary, e.case.dtype): e for e in errors}
    yield table(
        header,
        (
            [
                name,
                *(cell for case in cases for cell in _error_cells(known, name, *case)),
            ]
            for name in ordered(e.program for e in errors)
        ),
    )
    reasons = {
        f"{e.program}, {e.case.dtype}": e.reason for e in errors if e.reason is not None
    }
    if reasons:
        yield "\n".join(f"- {name}: {reason}" for name, reason in reasons.items())


def _error_cells(
    known: dict[tuple[str, int, str], Errors], name: str, vocabulary: int, dtype: str
) -> list[str]:
    found = known.get((name, vocabulary, dtype))
    if found is None or found.loss is None:
        return ["does not run" if found else "-", "-", "-"]
    loss = f"{found.loss:+.0e}"
    if found.wrong:
        loss = f"**wrong**: {found.loss:+.3g}"
    return [loss, f"{found.hidden:.0e}", f"{found.weight:.0e}"]


def _temporaries(found: Sequence[Temporaries]) -> Iterator[str]:
    if not found:
        return
    heads = dict.fromkeys((t.head, t.case.dtype) for t in found)
    shapes = {t.head: t.case.shape for t in found}
    yield "### Scratch memory of large heads"
    yield (
        "MiB of the compiled program, loss and both gradients, not run; "
        + "; ".join(f"{head}: {shape}" for head, shape in shapes.items())
        + ". Weight (V, D), or (D, V) for a program that takes only that."
    )
    known = {(t.program, t.head, t.case.dtype): t for t in found}
    cell = lambda t: "-" if t is None or t.bytes is None else mebibytes(t.bytes)
    yield table(
        ["program", *(f"{head}, {dtype}" for head, dtype in heads)],
        (
            [name, *(cell(known.get((name, *head))) for head in heads)]
            for name in ordered(t.program for t in found)
        ),
    )
    reasons = {t.program: t.reason for t in found if t.reason is not None}
    if reasons:
        yield "\n".join(f"- {name}: {reason}" for name, reason in reasons.items())


def _growth(growth: Sequence[Growth]) -> Iterator[str]:
    if not growth:
        return
    yield "### Growth"
    yield (
        "The p of the best fit of a power, number ~ size^p, in float32 with weight "
        "(V, D), loss and both gradients; of the time the least of the rounds. "
        "1 is proportional, 0 does not grow."
    )
    yield table(
        ["what", "from", "to", "with", "p"],
        (
            [
                f"{g.program}: {g.quantity}",
                f"{g.size} = {g.sizes[0]}",
                f"{g.size} = {g.sizes[-1]}",
                f"D = {g.case.features}, "
                + (
                    f"V = {g.case.vocabulary}"
                    if g.size == "N"
                    else f"N = {g.case.rows}"
                ),
                f"{g.exponent:.2f}",
            ]
            for g in growth
        ),
    )


def ordered(names: Iterable[str]) -> list[str]:
    """Each once, in the order of the tables; names that are not known come last."""
    return sorted(
        dict.fromkeys(names),
        key=lambda name: _NAMES.index(name) if name in _NAMES else len(_NAMES),
    )


def mebibytes(size: int) -> str:
    value = size / 2**20
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def largest(results: Results) -> list[Speed]:
    """The speeds, one per layout, of the shape with most work."""
    return max(_by_shape(results.speed), key=lambda group: group[0].work)
