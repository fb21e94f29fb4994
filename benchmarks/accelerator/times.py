"""Times of the kernels, of plain JAX and of the peers, in turn in one process."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import softlib
from benchmarks.measure import ratio, reason_of, take_turns
from pallas_kernels import _devices

from . import kernels
from .device import Here
from .outcome import RIGHT, Case, Outcome, Time
from .problem import Problem, Program, Size, with_gradients

OURS, PLAIN = "softlib", "softlib xla"


@dataclasses.dataclass(frozen=True)
class Ready:
    """A program that has run once.

    Attributes:
        call: Runs it and waits for the result.
        temporary_bytes: Beside arguments and results; None where it is not told.
        difference: From the results of plain JAX; None without results to compare.
    """

    call: Callable[[], Any]
    temporary_bytes: int | None
    difference: float | None


def measure(case: Case, problem: Problem, device: Here) -> Outcome:
    """All programs of each pass.

    Raises:
        NoKernel: The device has kernels for the problem, and the program does not.
    """
    size = problem.sizes[case.size]
    arrays = size.arrays(case.dtype)
    program = lambda name: problem.program(name, **size.options)
    times: list[Time] = []
    counts: list[int] = []
    tiles: list[str] = []
    for name, pass_, factor in passes(problem):
        programs = {PLAIN: program("xla"), **problem.peers}
        make = {
            peer: functools.partial(_compiled, pass_(of), arrays)
            for peer, of in programs.items()
        }
        if device.target in problem.targets:
            ours = pass_(program(None))
            text, compiled = device.compiled(ours, *arrays)
            with device.context():
                explained = softlib.explain(ours, *arrays)
            counts += kernels.require([text], explained)
            tiles = kernels.tiles_of(explained, device.platform)
            make[OURS] = lambda compiled=compiled: compiled
        ready, reasons = those_that_run(make, arrays)
        times += in_turn(name, ready, case.rounds, size, factor)
        times += [Time(name, peer, reason=reason) for peer, reason in reasons.items()]
    return Outcome(case, RIGHT, tuple(counts), tuple(tiles), times=tuple(times))


def _compiled(program: Program, arrays: Sequence[jax.Array]) -> Any:
    return jax.jit(program).lower(*arrays).compile()


def passes(problem: Problem) -> list[tuple[str, Callable[[Program], Program], int]]:
    """Name, what makes the program, and its products as a multiple of the forward."""
    found: list[tuple[str, Callable[[Program], Program], int]] = [
        ("forward", lambda program: program, 1)
    ]
    if problem.differentiated:
        step = lambda program: _step(program, problem.differentiated)
        found.append(("forward and gradients", step, 3))
    return found


def _step(program: Program, positions: tuple[int, ...]) -> Program:
    both = with_gradients(program, positions)

    def step(*arrays: Any) -> Any:
        value = jax.eval_shape(program, *arrays)
        return both(jnp.ones(value.shape, value.dtype), *arrays)

    return step


def those_that_run(
    make: Mapping[str, Callable[[], Any]], arrays: Sequence[jax.Array]
) -> tuple[dict[str, Ready], dict[str, str]]:
    """Runs what `make` compiles, and says why the others cannot run, by name.

    Plain JAX comes first in `make`: the others are compared with its results.
    """
    ready, reasons, plain = {}, {}, None
    for name, compile_ in make.items():
        try:
            compiled = compile_()
            results = jax.block_until_ready(compiled(*arrays))
        except Exception as error:  # a peer that cannot run is a row that says so
            reasons[name] = reason_of(error)
            continue
        if name == PLAIN:
            plain = results
        memory = compiled.memory_analysis()
        ready[name] = Ready(
            lambda compiled=compiled: jax.block_until_ready(compiled(*arrays)),
            memory.temp_size_in_bytes if memory else None,
            None if name == PLAIN else difference(results, plain),
        )
    return ready, reasons


def in_turn(
    name: str, ready: Mapping[str, Ready], rounds: int, size: Size, factor: int
) -> list[Time]:
    calls = {key: value.call for key, value in ready.items()}
    seconds = take_turns(calls, rounds=rounds, pause=0.0, shuffled=True).seconds
    found = []
    for key, own in seconds.items():
        against = None
        if PLAIN in seconds:
            measured = ratio(own, seconds[PLAIN])
            against = measured.median, measured.low, measured.high
        found.append(
            Time(
                name,
                key,
                tuple(own),
                against,
                _of_peak(size, factor, statistics.median(own)),
                ready[key].temporary_bytes,
                ready[key].difference,
            )
        )
    return found


def difference(results: Any, plain: Any) -> float | None:
    """The largest of results of the same shape, by their largest value."""
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(plain), strict=False)
    found = [float(_difference(a, b)) for a, b in pairs if a.shape == b.shape]
    return max(found, default=None)


@jax.jit
def _difference(value: jax.Array, wanted: jax.Array) -> jax.Array:
    wide = lambda x: x.astype(jnp.float32)
    gap = jnp.abs(wide(value) - wide(wanted)).max()
    return gap / jnp.maximum(jnp.abs(wide(wanted)).max(), jnp.finfo(jnp.float32).tiny)


def _of_peak(size: Size, factor: int, seconds: float) -> str:
    """The share of the device's peak: of products, or of memory if that bounds more."""
    platform = jax.devices()[0].platform
    device = _devices.tpu() if platform == "tpu" else _devices.gpu()
    if platform == "cpu" or device is None:
        return "-"
    products = factor * size.flops / device.flops
    memory = 2 * factor * size.moved / device.bytes_per_second
    which = "products" if products >= memory else "memory"
    return f"{max(products, memory) / seconds:.0%} of {which}"
