"""How time and scratch memory grow, and the memory of heads too large to run here."""

import dataclasses
from collections.abc import Mapping, Sequence

from .cases import Case, operand_shapes, operands
from .measure import (
    PAUSE,
    exponent,
    prepare,
    reason_of,
    take_turns,
    temporary_bytes,
)
from .programs import NAIVE, PROGRAMS, SOFTLIB, SOFTLIB_SUM, Program
from .results import Growth, Temporaries

HEADS = {
    "Gemma 2 2B": Case(8192, 2304, 256_000),
    "Llama 3 8B": Case(8192, 4096, 128_256),
}
# The largest of each sweep; the others halve the size four times.
SWEEPS = {"N": Case(8192, 256, 32_768), "V": Case(1024, 256, 131_072)}
STEPS = 5
_FIELDS = {"N": "rows", "V": "vocabulary"}


def heads(
    cases: Mapping[str, Case] = HEADS,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    programs: Sequence[Program] = PROGRAMS,
) -> list[Temporaries]:
    """Compiles loss and gradients for shapes alone, each in a layout it takes."""
    found = []
    for head, base in cases.items():
        for dtype in dtypes:
            for program in programs:
                if program.loss is None or program.make is program.loss:
                    continue
                case = dataclasses.replace(
                    base, dtype=dtype, vocab_axis=program.layouts[0]
                )
                record = Temporaries(program.name, head, case)
                try:
                    size = temporary_bytes(program.make(case), *operand_shapes(case))
                    found.append(dataclasses.replace(record, bytes=size))
                except Exception as error:  # whatever stops a peer is a row
                    found.append(dataclasses.replace(record, reason=reason_of(error)))
    return found


def sweep(largest: Case, size: str, steps: int = STEPS) -> list[Case]:
    """Cases that differ in one size, in rising order, each twice the last."""
    most = getattr(largest, _FIELDS[size])
    sizes = [most >> step for step in reversed(range(steps))]
    return [dataclasses.replace(largest, **{_FIELDS[size]: n}) for n in sizes]


def run(
    sweeps: Mapping[str, Case] = SWEEPS,
    *,
    rounds: int,
    seconds: float,
    steps: int = STEPS,
    pause: float = PAUSE,
) -> list[Growth]:
    """Exponents of the time of softlib, and of the scratch memory beside optax's."""
    found = []
    by_name = {program.name: program for program in PROGRAMS}
    for size, largest in sweeps.items():
        cases = sweep(largest, size, steps)
        sizes = [getattr(case, _FIELDS[size]) for case in cases]

        def record(
            name, quantity, values, size=size, largest=largest, sizes=sizes
        ) -> None:
            power = exponent(sizes, values)
            found.append(Growth(name, quantity, size, largest, sizes, values, power))

        make = by_name[SOFTLIB].make
        calls = {
            str(n): prepare(make(case), *operands(case)).call
            for n, case in zip(sizes, cases, strict=True)
        }
        turns = take_turns(calls, rounds=rounds, seconds=seconds, pause=pause)
        # The least of the rounds: what is asked is the cost, not the noise on it.
        record(SOFTLIB, "seconds", [min(turns.seconds[str(n)]) for n in sizes])
        for name in (SOFTLIB, SOFTLIB_SUM, NAIVE):
            try:
                values = [
                    temporary_bytes(by_name[name].make(case), *operand_shapes(case))
                    for case in cases
                ]
            except Exception:  # the table of speed gives the reason
                continue
            if all(values):
                record(name, "temporary bytes", values)
    return found
