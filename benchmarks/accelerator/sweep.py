"""Times the sizes of tiles on the device here, and writes them for the cost models.

Each candidate is timed in turn with the default tile, in a process of its own. The file
is `pallas_kernels/measured/<device>.json`: commit it, and softlib on such a device
chooses by it.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tqdm

from benchmarks.measure import ratio, reason_of, take_turns
from pallas_kernels import _measured

from . import process
from .device import named
from .kernels import NoKernel, count
from .swept import SWEPT, Swept

# Candidates of a kernel at a shape: those that the model holds to be best.
MOST = 24


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The job of one process.

    Attributes:
        kernel: Its name in the file.
        shape: A name among its shapes.
        sizes: Of the tile.
        rounds: Of the measurement.
        imitated: The platform whose kernels an interpreter runs; None for the device.
    """

    kernel: str
    shape: str
    sizes: tuple[int, ...]
    rounds: int
    imitated: str | None = None

    def __str__(self) -> str:
        return f"{self.kernel}, {self.shape}: {' x '.join(map(str, self.sizes))}"


@dataclasses.dataclass(frozen=True)
class Timed:
    """The answer of a process.

    Attributes:
        modelled: The model's time by that of the default tile.
        ratio: The median over the rounds of the time by the default tile's.
        seconds: The median time.
        reason: Why there is no time; None if there is one.
    """

    modelled: float
    ratio: float | None = None
    seconds: float | None = None
    reason: str | None = None


def main(options: argparse.Namespace, device: dict[str, Any], limit: float) -> int:
    """Times all candidates of the kernels of this device and writes the file."""
    environment = {"JAX_PLATFORMS": "cpu"} if options.dry_run else {}
    records: dict[str, list[dict[str, Any]]] = {}
    candidates = list(candidates_of(options, device["platform"]))
    if not candidates:
        print("No kernel of this device has tiles to sweep.", file=sys.stderr)
        return 2
    path, failures = _path(options, device), 0
    for candidate in tqdm.tqdm(candidates, dynamic_ncols=True, disable=None):
        job = {"candidate": dataclasses.asdict(candidate)}
        answer = process.run(job, seconds=limit, environment=environment)
        timed = (
            Timed(1.0, reason=answer) if isinstance(answer, str) else Timed(**answer)
        )
        if timed.reason is not None:
            failures += 1
            print(f"{candidate}: {timed.reason}", file=sys.stderr)
        entry = _measured.record(
            candidate.sizes,
            candidate.shape,
            ratio=timed.ratio,
            modelled=timed.modelled,
        )
        # A dry run has the kernels of both platforms.
        where = f" on {candidate.imitated}" if candidate.imitated else ""
        records.setdefault(candidate.kernel + where, []).append(entry)
        written = {"kind": device["kind"], **device["machine"], "kernels": records}
        path.write_text(json.dumps(written, indent=1) + "\n")
    print(table(records))
    print(f"wrote {path}", file=sys.stderr)
    return int(failures == len(candidates))


def _path(options: argparse.Namespace, device: dict[str, Any]) -> pathlib.Path:
    if options.dry_run:
        folder = options.output or process.REPOSITORY / "build"
        name = "dry"
    else:
        folder = options.output or process.REPOSITORY / "pallas_kernels" / "measured"
        name = device["name"]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def candidates_of(options: argparse.Namespace, platform: str) -> Iterator[Candidate]:
    """The default and the best by the model first; two of each in a dry run."""
    for swept in SWEPT:
        if options.only not in swept.kernel:
            continue
        if options.dry_run:
            imitated = swept.platform
            with named(imitated).context():
                best = ranked(swept, "dry")[:2]
            for sizes in best:
                yield Candidate(swept.kernel, "dry", sizes, 1, imitated)
        elif swept.platform == platform:
            for shape in swept.shapes:
                if shape != "dry":
                    for sizes in ranked(swept, shape)[:MOST]:
                        yield Candidate(swept.kernel, shape, sizes, options.rounds)


def ranked(swept: Swept, shape: str) -> list[tuple[int, ...]]:
    """Sizes, the cheapest by the model first."""
    modelled = swept.modelled(shape)
    return sorted(modelled, key=modelled.__getitem__)


def answer_to(candidate: Candidate) -> Timed:
    """Times a candidate in turn with the default tile; in a process of its own."""
    swept = find(candidate.kernel, candidate.imitated)
    where = named(candidate.imitated)
    with where.context():
        modelled = swept.modelled(candidate.shape)
        default = ranked(swept, candidate.shape)[0]
        programs = {
            sizes: swept.program(candidate.shape, sizes)
            for sizes in (default, candidate.sizes)
        }
    relative = modelled[candidate.sizes] / modelled[default]
    arrays = swept.size(candidate.shape).arrays("bfloat16")
    calls = {}
    for sizes, program in programs.items():
        # Nothing that was traced for one tile may be found again for another.
        jax.clear_caches()
        try:
            text, compiled = where.compiled(program, *arrays)
            if not count(text):
                raise NoKernel("no kernel in the program")
            jax.block_until_ready(compiled(*arrays))
        except Exception as error:  # a tile that cannot run is not chosen
            return Timed(relative, reason=reason_of(error))
        run = functools.partial(_run, compiled, arrays)
        calls[" x ".join(map(str, sizes))] = run
    names = list(calls)
    seconds = take_turns(
        calls, rounds=candidate.rounds, pause=0.0, shuffled=True
    ).seconds
    own, base = seconds[names[-1]], seconds[names[0]]
    return Timed(relative, ratio(own, base).median, statistics.median(own))


def _run(compiled: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    return jax.block_until_ready(compiled(*arrays))


def find(kernel: str, imitated: str | None) -> Swept:
    """The kernel of this name for the platform that is here, or imitated."""
    if imitated is None:
        imitated = "tpu" if jax.devices()[0].platform == "tpu" else "cuda"
    return next(s for s in SWEPT if (s.kernel, s.platform) == (kernel, imitated))


def table(records: dict[str, list[dict[str, Any]]]) -> str:
    """For each kernel and shape the fastest tile beside the default one."""
    lines = [
        "| kernel | shape | fastest | of the default |",
        "| --- | --- | --- | --- |",
    ]
    for kernel, entries in records.items():
        for shape in dict.fromkeys(entry["shape"] for entry in entries):
            ran = [e for e in entries if e["shape"] == shape and e["ratio"] is not None]
            if ran:
                best = min(ran, key=lambda entry: entry["ratio"])
                sizes = " x ".join(map(str, best["sizes"]))
                lines.append(f"| {kernel} | {shape} | {sizes} | {best['ratio']:.2f} |")
    return "\n".join(lines)
