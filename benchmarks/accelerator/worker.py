"""Runs one job, given as JSON, and writes its answer into a file: a process of its own.

A file, because compilers print to the standard output. One process at a time may hold a
TPU, and a kernel that fails may leave a GPU unusable for the process that ran it.
"""

import dataclasses
import json
import logging
import pathlib
import sys
import time
from typing import Any

from . import device, sweep
from .check import check
from .kernels import NoKernel
from .outcome import Case, Outcome
from .problems import BY_NAME
from .times import measure


def main(job: str, path: str) -> None:
    # Peers log at every call that their tuning data does not cover.
    logging.getLogger("absl").setLevel(logging.ERROR)
    given = json.loads(job)
    if "candidate" in given:
        fields = given["candidate"]
        candidate = sweep.Candidate(**fields | {"sizes": tuple(fields["sizes"])})
        answer = dataclasses.asdict(sweep.answer_to(candidate))
    else:
        answer = answer_to(Case(**given)) if given else device.describe()
    pathlib.Path(path).write_text(json.dumps(answer))


def answer_to(case: Case) -> dict[str, Any]:
    start = time.perf_counter()
    outcome = _outcome_of(case)
    spent = time.perf_counter() - start
    return dataclasses.asdict(dataclasses.replace(outcome, seconds=spent))


def _outcome_of(case: Case) -> Outcome:
    problem, where = BY_NAME[case.problem], device.named(case.imitated)
    found = Outcome(case, "nothing was asked for")
    try:
        if case.check:
            found = check(case, problem, where)
        if case.rounds and (found.is_right or not case.check):
            measured = measure(case, problem, where)
            found = dataclasses.replace(
                found if case.check else measured, times=measured.times
            )
    except NoKernel as error:
        return Outcome(case, str(error))
    except Exception as error:  # whatever is wrong is a row of the report
        return Outcome(case, f"{type(error).__name__}: {error}"[:2000])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
