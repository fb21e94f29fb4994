"""Time and scratch memory of every program of a case, in turns."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from . import torch_process
from .cases import Case, operands
from .measure import PAUSE, Prepared, Ratio, prepare, ratio, reason_of, take_turns
from .programs import NAIVE, PROGRAMS, Program
from .results import Speed, SpeedRow


def run(
    case: Case,
    *,
    rounds: int,
    seconds: float,
    torch: torch_process.TorchProcess | None = None,
    programs: Sequence[Program] = PROGRAMS,
    pause: float = PAUSE,
) -> Speed:
    """Measures a case; programs that need the other layout are left out."""
    here = [program for program in programs if case.vocab_axis in program.layouts]
    arrays = operands(case)
    prepared: dict[str, Prepared] = {}
    reasons: dict[str, str | None] = {}
    for program in here:
        try:
            prepared[program.name] = prepare(program.make(case), *arrays)
        except Exception as error:  # whatever stops a peer is a row of the table
            reasons[program.name] = reason_of(error)
    beside = torch if case.vocab_axis == torch_process.LAYOUT else None
    if beside:
        beside.load(case, arrays)
    turns = take_turns(
        {name: ready.call for name, ready in prepared.items()},
        rounds=rounds,
        seconds=seconds,
        partner=beside.times if beside and beside.process else None,
        partner_process=beside.process if beside else None,
        pause=pause,
    )
    rows = [
        SpeedRow(p.name, reason=reasons[p.name])
        if p.name in reasons
        else SpeedRow(
            p.name,
            turns.seconds[p.name],
            _ratio(turns.seconds, p),
            prepared[p.name].temporary_bytes,
        )
        for p in here
    ]
    for name, reason in beside.reasons.items() if beside else ():
        times = turns.seconds.get(name, [])
        rows.append(
            SpeedRow(name, reason=reason or "its process ended")
            if reason or not times
            else SpeedRow(name, times, _across_processes(times, turns.seconds))
        )
    return Speed(case, turns.foreign_cores, rows)


def _ratio(times: Mapping[str, Sequence[float]], program: Program) -> Ratio | None:
    yardstick = times.get(program.yardstick)
    return ratio(times[program.name], yardstick) if yardstick else None


def _across_processes(
    own: Sequence[float], times: Mapping[str, Sequence[float]]
) -> Ratio | None:
    """Ratio of medians: runs of two processes are no pairs, so there is no interval."""
    if NAIVE not in times:
        return None
    value = statistics.median(own) / statistics.median(times[NAIVE])
    return Ratio(value, value, value, 0.0)


def layouts_of(case: Case) -> list[Case]:
    return [dataclasses.replace(case, vocab_axis=axis) for axis in (0, 1)]
