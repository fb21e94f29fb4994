"""One program to compile: a kernel, or a function of softlib, at one shape."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
AMPERE = ("a100",)
HOPPER = ("h100",)
BLACKWELL = ("b200",)


@dataclasses.dataclass(frozen=True)
class Division:
    """A division of the arguments of a program over several devices.

    Attributes:
        kind: Of the mesh's axis: Explicit, divided by the types, so that each device
            runs kernels on its part; or Auto, divided by the compiler.
        specs: Of each argument; the axis is named `device`.
        collectives: Exchanges that the mathematics needs; any other is a fault.
        devices: How many.
    """

    kind: str
    specs: tuple[PartitionSpec, ...]
    collectives: frozenset[str] = frozenset()
    devices: int = 4


@dataclasses.dataclass(frozen=True)
class Most:
    """Limits of a program in plain JAX; those of steps and launches hold on GPUs.

    Attributes:
        steps: Of each of its loops.
        launches: Of a step of a loop without a loop inside.
        temporary_mib: In all.
        total: Launches of the whole program; None if only its steps are limited.
    """

    steps: int
    launches: int
    temporary_mib: int
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled, and what is expected of it.

    Attributes:
        family: Of kernels, such as `row statistics`.
        name: Unique in its family.
        function: Of arrays, all else bound.
        arguments: Shapes and dtypes; a pytree for each argument.
        targets: Names of the machines.
        naive_bytes: Of the float32 logits or scores that a plain program would store;
            0 if there are none.
        most_temporaries: As a share of them.
        flops: Multiplications and additions that the definition asks for.
        bytes_moved: That have to be read and written at least.
        spills: Registers that may be spilled: an exception, with its reason.
        ours: Whether it has to hold kernels, without spills. What is not ours is
            compiled only for the tables: peers, and sizes of tiles not chosen.
        plain: Targets on which a program of ours has no kernel, as is right there.
        most: What it may have if it is plain; None if its form is not looked at.
        sizes: Of its tiles, if it is one of a sweep over them.
        division: Over several devices; None on one.
    """

    family: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    targets: tuple[str, ...]
    naive_bytes: int = 0
    most_temporaries: float = 0.02
    flops: float = 0
    bytes_moved: float = 0
    spills: int = 0
    ours: bool = True
    plain: tuple[str, ...] = ()
    most: Most | None = None
    sizes: str = ""
    division: Division | None = None


def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
