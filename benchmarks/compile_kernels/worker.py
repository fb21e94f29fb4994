"""Compiles cases for one target and writes a line of JSON for each.

A process of its own: dumps of compilers are switched on once per process, GPUs of two
generations cannot share one, and a compiler that aborts takes its process along.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from . import targets, traffic
from .case import Case
from .cases import chosen
from .compiled import Compiled, Kernel, collectives, gpu_kernels, tpu_kernels
from .launches import Launches, count
from .program import Program

# Set before jax is imported; the folder of dumps is appended.
TPU_FLAGS = (
    "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final "
    "--xla_jf_dump_to="
)
GPU_ENVIRONMENT = {
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
    "MOSAIC_GPU_DUMP_SASS": "1",
}
# Kernels of a GPU that this process has compiled, by their hash.
_KNOWN: dict[str, Kernel] = {}
_TABLE = "*-{name}-*final_hlo-static-per-bundle-utilization.txt"


def environment(dumps: str) -> dict[str, str]:
    """What the process of a worker needs."""
    flags = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), TPU_FLAGS + dumps])
    return {
        **os.environ,
        **targets.ENVIRONMENT,
        **GPU_ENVIRONMENT,
        "LIBTPU_INIT_ARGS": flags.strip(),
    }


def main(target: str, dumps: str, *which: str) -> None:
    """`which`: what `chosen` takes, then the number of cases that are done."""
    family, name, every, start = which
    answer(chosen(family, name, target, int(every))[int(start) :], target, dumps)


def answer(cases: Sequence[Case], target: str, dumps: str) -> None:
    """Writes a line for each case to standard output, as it was when this is called."""
    with os.fdopen(os.dup(1), "w") as answers:
        for case in cases:
            try:
                compiled = _compile(case, target, pathlib.Path(dumps))
            except Exception as error:  # the table has a row for it
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error}"[:2000]
                text += f" [{pathlib.Path(where.filename).name}:{where.lineno}]"
                compiled = Compiled(case.family, case.name, target, text)
            answers.write(json.dumps(dataclasses.asdict(compiled)) + "\n")
            answers.flush()


def _compile(case: Case, target: str, dumps: pathlib.Path) -> Compiled:
    for file in dumps.iterdir():
        file.unlink()

    def table_of(kernel: str) -> str:
        found = sorted(dumps.glob(_TABLE.format(name=kernel)))
        return found[0].read_text() if found else ""

    with _standard_output() as printed:
        program = targets.lower(case, target).compile()
        text = program.as_text() or ""
        kernels: tuple[Kernel, ...]
        if targets.is_tpu(target):
            kernels = tpu_kernels(text, table_of)
        else:
            kernels = gpu_kernels(text, printed(), _KNOWN)
    memory = program.memory_analysis()
    assert memory is not None
    counted = program.cost_analysis() or {}
    launches, moved = Launches(0, ()), 0
    if case.most is not None:
        launches = count(text)
        moved = traffic.of_program(Program.of(text))
        if targets.is_tpu(target):  # one core runs the whole program
            loops = [dataclasses.replace(loop, launches=0) for loop in launches.loops]
            launches = Launches(0, tuple(loops))
    return Compiled(
        case.family,
        case.name,
        target,
        None,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        counted.get("flops", 0.0),
        counted.get("bytes accessed", 0.0),
        kernels,
        collectives(text),
        launches.total,
        launches.loops,
        moved,
    )


@contextlib.contextmanager
def _standard_output() -> Iterator[Callable[[], str]]:
    """Keeps what is written to file descriptor 1, by C++ too."""
    sys.stdout.flush()
    saved = os.dup(1)
    sink: IO[bytes]
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)

        def read() -> str:
            sink.seek(0)
            return sink.read().decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(saved, 1)
            os.close(saved)


if __name__ == "__main__":
    main(*sys.argv[1:])
