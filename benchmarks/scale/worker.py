"""Compiles one training step, in a process of its own, and writes what it read.

The number of devices of a CPU is chosen before JAX starts, and compilers for other
machines abort more than their own work.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

from benchmarks.compile_kernels import targets

from .outcome import Case, Outcome


def environment(case: Case) -> dict[str, str]:
    """What has to be set before JAX is imported."""
    if case.target != "cpu":
        return targets.ENVIRONMENT
    flags = f"--xla_force_host_platform_device_count={case.devices}"
    given = os.environ.get("XLA_FLAGS", "")
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{given} {flags}".strip()}


def main(job: str, answer: str) -> None:
    values = json.loads(job)
    found = _compiled(Case(**values["case"]), values["model"], values["text"])
    pathlib.Path(answer).write_text(json.dumps(dataclasses.asdict(found)))


def _compiled(case: Case, sizes: dict[str, int], text: str | None) -> Outcome:
    import jax
    import numpy as np

    from benchmarks.compile_kernels.program import Program

    from . import collectives, divisions, flops
    from .model import Model

    start = time.monotonic()
    model = Model(**sizes)
    devices: Any = jax.devices()
    if case.target != "cpu":
        devices = targets.devices(case.target, case.devices, host=case.host)
    grid = np.array(devices[: case.devices]).reshape(-1, case.host)
    mesh = jax.sharding.Mesh(grid, divisions.AXES)
    division = next(d for d in divisions.DIVISIONS if d.name == case.division)
    compiled = divisions.lower(model, division, case.head, mesh).compile()
    printed = compiled.as_text() or ""
    if text is not None:
        pathlib.Path(text).write_text(printed)
    program = Program.of(printed)
    memory = compiled.memory_analysis()
    assert memory is not None
    return Outcome(
        case,
        None,
        division.sequences(mesh) * model.length // case.devices,
        flops.of_program(program),
        program.unknown_loops,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        program.kernels,
        tuple(collectives.of_program(program, case.devices, case.host)),
        round(time.monotonic() - start, 1),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
