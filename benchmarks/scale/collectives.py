"""Exchanges between devices in a compiled program: their bytes, and who takes part."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from benchmarks.compile_kernels.program import Program, Run

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce"),
    *("all-to-all", "collective-permute"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange of one kind, or all exchanges of a kind among the same devices.

    Attributes:
        kind: As XLA names it.
        members: Devices of a group.
        near: How many of them are on the same host.
        count: How often it runs in a step.
        bytes: Of the whole arrays, per device and step: what a device has after an
            all-gather, before a reduce-scatter, and before and after the others.
    """

    kind: str
    members: int
    near: int
    count: int
    bytes: int

    @property
    def sent(self) -> int:
        """Bytes that a device sends, with the algorithms that send least."""
        if self.kind == "collective-permute":
            return self.bytes
        share = (self.members - 1) / self.members
        return round((2 if self.kind == "all-reduce" else 1) * share * self.bytes)

    @property
    def sent_between_hosts(self) -> int:
        """Bytes per device of these that leave its host, over the links of all devices.

        A ring through a group enters and leaves each host once; so do the bytes, over
        the links of all devices that the group has there.
        """
        if self.near == self.members:
            return 0
        if self.kind == "all-to-all":
            away = (self.members - self.near) / self.members
            return round(away * self.bytes)
        return round(self.sent / self.near)


def of_program(program: Program, devices: int, host: int) -> list[Collective]:
    """Sums of a program for so many devices, by kind and devices that take part."""
    found: dict[tuple[str, int, int], tuple[int, int]] = {}
    for each in _every(program, devices, host):
        key = (each.kind, each.members, each.near)
        count, size = found.get(key, (0, 0))
        found[key] = (count + each.count, size + each.bytes)
    keys = sorted(found, key=lambda key: (KINDS.index(key[0]), *key[1:]))
    return [Collective(*key, *found[key]) for key in keys]


def total(collectives: Iterable[Collective], kind: str) -> int:
    """Bytes of the whole arrays of a kind."""
    return sum(each.bytes for each in collectives if each.kind == kind)


def _every(program: Program, devices: int, host: int) -> Iterator[Collective]:
    for run in program.runs():
        # One that runs beside other work is counted where it starts.
        kind = run.instruction.operation.removesuffix("-start")
        if kind not in KINDS:
            continue
        if kind == "collective-permute":
            # Which links its pairs cross is that of the worst.
            pairs = _pairs(run)
            crosses = any(a // host != b // host for a, b in pairs)
            members, near = (2, 1 if crosses else 2)
        else:
            groups = _groups(run, devices)
            members = groups.shape[1]
            hosts = np.sort(groups // host, axis=1)
            near = members // (1 + int((np.diff(hosts[0]) != 0).sum()))
        if members == 1:
            continue
        size = run.operand_bytes * (members if kind == "all-gather" else 1)
        yield Collective(kind, members, near, run.times, run.times * size)


def _pairs(run: Run) -> list[tuple[int, int]]:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", run.instruction.attributes)
    assert found is not None
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", found[1])]


def _groups(run: Run, devices: int) -> np.ndarray:
    """Ids of the devices of each group, (groups, members), in one of three notations.

    Raises:
        ValueError: The notation is another one.
    """
    text = run.instruction.attributes
    every = np.arange(devices)
    if found := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", text):
        sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", found[1])}
        names = re.findall(r"'(\w+)'", found[2])
        if math.prod(sizes.values()) == devices and set(names) <= {*sizes}:
            axes = [[*sizes].index(name) for name in names]
            grid = np.moveaxis(
                every.reshape(*sizes.values()), axes, range(-len(axes), 0)
            )
            return grid.reshape(-1, math.prod(sizes[name] for name in names))
    elif found := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        grid = every.reshape(_integers(found[3]))
        if found[4]:
            grid = grid.transpose(_integers(found[4]))
        return grid.reshape(int(found[1]), int(found[2]))
    elif found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        groups = re.findall(r"\{([\d,]+)\}", found[1])
        return np.array([_integers(group) for group in groups])
    elif "replica_groups={}" in text:
        return every[None]
    found = re.search(r"replica_groups=.{0,60}", text)
    raise ValueError(f"unknown groups of devices: {found[0] if found else 'none'}")


def _integers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]
