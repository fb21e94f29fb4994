"""What programs must do and move, what they do and move, and the time of both.

Times are quotients of counts and of what makers of devices promise, not measured.
"""

import itertools
from collections.abc import Iterator, Sequence

from pallas_kernels._devices import B200, H100, V4, V5E, V5P, V6E, V7X, Gpu, Tpu

from .case import Case
from .compiled import Compiled

# It has no kernels of ours, only plain JAX.
_A100 = Gpu("a100", "ampere", 108, 166_912, 65_536, 312e12, 2039e9)
DEVICES: dict[str, Tpu | Gpu] = {
    device.name: device for device in (V4, V5E, V5P, V6E, V7X, _A100, H100, B200)
}
_HEAD = """\
| program | device | must do | must move | bound | least time | does | moves | time | \
of peak |
| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"""


def markdown(cases: Sequence[Case], everything: Sequence[Compiled]) -> Iterator[str]:
    """A table for each family."""
    of = {found.key: found for found in everything if found.error is None}
    known = (case for case in cases if case.ours and (case.flops or case.bytes_moved))
    for family, of_family in itertools.groupby(known, lambda case: case.family):
        lines = [
            _line(case, of[key], DEVICES[target])
            for case in of_family
            for target in case.targets
            if (key := (family, case.name, target)) in of
        ]
        yield "\n".join([f"### {family.capitalize()}", "", _HEAD, *lines])


def seconds(flops: float, moved: float, device: Tpu | Gpu) -> float:
    return max(flops / device.flops, moved / device.bytes_per_second)


def _line(case: Case, compiled: Compiled, device: Tpu | Gpu) -> str:
    least = seconds(case.flops, case.bytes_moved, device)
    products = case.flops / device.flops
    bound = "products" if products >= least else "memory"
    cells = [
        case.name,
        device.name,
        _count(case.flops, "FLOP"),
        _count(case.bytes_moved, "B"),
        bound,
        _time(least),
    ]
    does, moves = compiled.counted_flops, compiled.accessed_bytes
    if does and moves:
        time = seconds(does, moves, device)
        share = min(least / time, 1)
        cells += [_count(does, "FLOP"), _count(moves, "B"), _time(time), f"{share:.0%}"]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def _count(number: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"


def _time(duration: float) -> str:
    return (
        f"{duration * 1e3:.3g} ms" if duration >= 1e-4 else f"{duration * 1e6:.3g} µs"
    )
