"""Errors of every program against float64 at a few rows and real vocabularies."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from . import torch_process
from .cases import Case, as_float, operands
from .measure import reason_of
from .programs import PROGRAMS, Program
from .results import Errors

# GPT-2's and Llama-2's vocabularies, no multiples of the usual block sizes, and one
# whose log-sum-exp bfloat16 cannot hold.
CASES = (
    Case(64, 64, 50_257),
    Case(64, 64, 32_000),
    Case(64, 64, 131_072, dtype="bfloat16"),
)

type Found = tuple[Any, Any, Any]


def reference(case: Case, arrays: tuple[jax.Array, ...]) -> Found:
    """Mean loss and both gradients in float64, of the rounded operands."""
    hidden, weight = (as_float(array).astype(np.float64) for array in arrays[:2])
    labels = np.asarray(arrays[2])
    table = weight if case.vocab_axis == 0 else weight.T
    logits = hidden @ table.T
    rows = np.arange(case.rows)
    largest = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(axis=1, keepdims=True)
    loss = np.mean((largest + np.log(total))[:, 0] - logits[rows, labels])
    share = exponentials / total
    share[rows, labels] -= 1
    dtable = share.T @ hidden / case.rows
    dhidden = share @ table / case.rows
    return loss, dhidden, dtable if case.vocab_axis == 0 else dtable.T


def errors(found: Found, true: Found) -> tuple[float, float, float]:
    """Of the loss in nats; of each gradient, the largest by its largest element."""
    loss, *gradients = (as_float(part).astype(np.float64) for part in found)
    relative = [
        float(np.abs(own - right).max() / np.abs(right).max())
        for own, right in zip(gradients, true[1:], strict=True)
    ]
    return float(loss - true[0]), relative[0], relative[1]


def run(
    case: Case,
    *,
    torch: torch_process.TorchProcess | None = None,
    programs: Sequence[Program] = PROGRAMS,
) -> list[Errors]:
    """One record per program; of its layouts the one with the larger loss error."""
    by_program: dict[str, list[Errors]] = {}
    for axis in (0, 1):
        here = case.with_layout(axis)
        arrays = operands(here)
        true = reference(here, arrays)
        found = list(_in_this_process(here, arrays, programs))
        if torch and axis == torch_process.LAYOUT:
            torch.load(here, arrays)
            found += torch.gradients().items()
            found += [(name, why) for name, why in torch.reasons.items() if why]
        for name, result in found:
            record = (
                Errors(name, here, reason=result)
                if isinstance(result, str)
                else Errors(name, here, *errors(result, true))
            )
            by_program.setdefault(name, []).append(record)
    return [max(records, key=_badness) for records in by_program.values()]


def _in_this_process(
    case: Case, arrays: tuple[jax.Array, ...], programs: Sequence[Program]
) -> Iterator[tuple[str, Found | str]]:
    for program in programs:
        if case.vocab_axis not in program.layouts or program.loss is None:
            continue
        try:
            loss, (hidden, weight) = jax.jit(program.make(case))(*arrays)
            yield program.name, (loss, hidden, weight)
        except Exception as error:  # whatever stops a peer is a row of the table
            yield program.name, reason_of(error)


def _badness(record: Errors) -> float:
    # A NaN is worse than any number, and that a program does not run says most.
    if record.loss is None:
        return float("inf")
    return abs(record.loss) if record.loss == record.loss else float("inf")
