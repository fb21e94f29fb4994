"""What compilers say of one program, and whether it is as it must be."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .case import Case
from .launches import Loop

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all"),
    *("collective-permute", "reduce-scatter"),
)
# The oldest of the TPUs, for which no sizes were sought that spill nothing.
SPILLS_ON_V4 = 256


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        name: As it was given to Pallas.
        memory_bytes: Of vector memory (TPU) or shared memory (GPU).
        spills: Vector registers stored to memory (TPU), or bytes of them (GPU).
        matrix_instructions: To the matrix units; over all branches, each loop once.
        instructions: Bundles (TPU) or instructions (GPU), counted alike.
        registers: Of a thread; GPU only.
        notes: Remarks of the assembler.
    """

    name: str
    memory_bytes: int
    spills: int
    matrix_instructions: int
    instructions: int
    registers: int = 0
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One case on one target; `error` says why there is nothing else.

    `counted_flops` and `accessed_bytes` are those of XLA's analysis: for a kernel, what
    its tiles do, read and write, as the kernel says. 0 where the kernel does not say.
    `collectives` counts the exchanges between devices by their names, `launches` those
    of a GPU program in plain JAX, `loops` are its loops. `moved_bytes` are those of
    `traffic`, of a program in plain JAX.
    """

    family: str
    name: str
    target: str
    error: str | None = None
    argument_bytes: int = 0
    output_bytes: int = 0
    temp_bytes: int = 0
    counted_flops: float = 0.0
    accessed_bytes: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    launches: int = 0
    loops: tuple[Loop, ...] = ()
    moved_bytes: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """Unique in a table."""
        return self.family, self.name, self.target

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Compiled":
        """The inverse of `dataclasses.asdict`, also after JSON."""
        kernels = (
            Kernel(**(kernel | {"notes": tuple(kernel["notes"])}))
            for kernel in values["kernels"]
        )
        loops = (Loop(**loop) for loop in values.get("loops", ()))
        return cls(**(values | {"kernels": tuple(kernels), "loops": tuple(loops)}))


def faults(case: Case, compiled: Compiled) -> Iterator[str]:
    """What a program of softlib may not have."""
    if compiled.error is not None:
        yield compiled.error
        return
    if not case.ours:
        return
    if bool(compiled.kernels) == (compiled.target in case.plain):
        yield f"{len(compiled.kernels)} kernels are in the program"
    needed = case.division.collectives if case.division else frozenset()
    for name in sorted({*compiled.collectives} - needed):
        yield f"{compiled.collectives[name]} {name} between devices"
    allowed = max(case.spills, SPILLS_ON_V4 if compiled.target == "v4" else 0)
    for kernel in compiled.kernels:
        if kernel.spills > allowed:
            yield f"{kernel.name} spills {kernel.spills}"
        yield from (f"{kernel.name}: {n}" for n in kernel.notes if "serial" in n)
    yield from _faults_of_plain(case, compiled)
    most = case.most_temporaries * case.naive_bytes
    if case.naive_bytes and compiled.temp_bytes > most:
        yield f"{compiled.temp_bytes} temporary bytes are more than {most:.0f}"


def _faults_of_plain(case: Case, compiled: Compiled) -> Iterator[str]:
    most = case.most
    if most is None:
        return
    for loop in compiled.loops:
        if loop.steps is None or loop.steps > most.steps:
            yield f"{loop.steps} steps of a loop are more than {most.steps}"
        if loop.is_innermost and loop.launches > most.launches:
            yield f"{loop.launches} launches of a step are more than {most.launches}"
    if most.total is not None and compiled.launches > most.total:
        yield f"{compiled.launches} launches are more than {most.total}"
    if compiled.temp_bytes > most.temporary_mib << 20:
        yield (
            f"{compiled.temp_bytes >> 20} MiB of temporaries are more than "
            f"{most.temporary_mib}"
        )


def collectives(program: str) -> dict[str, int]:
    """Counts of each exchange between devices in the compiled text, by name.

    One that runs beside other work has two lines there, and is counted at its start.
    """
    names = "|".join(COLLECTIVES)
    return dict(Counter(re.findall(rf" ({names})(?:-start)?\(", program)))


def tpu_kernels(program: str, table_of: Callable[[str], str]) -> tuple[Kernel, ...]:
    """From the compiled text, and the compiler's table of each kernel's bundles."""
    found = {}
    pattern = r'^\s*(?:ROOT )?%?([\w.\-]+) = .*custom_call_target="tpu_custom_call".*'
    for match in re.finditer(pattern, program, re.MULTILINE):
        name = match[1]
        used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', match[0])
        sizes = re.findall(
            r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1] if used else ""
        )
        counts, bundles = _columns(table_of(name))
        found[name] = Kernel(
            name,
            sum(map(int, sizes)),
            counts["VSTORE:SPILL"],
            counts["MXU"],
            bundles,
        )
    return tuple(found.values())


def _columns(table: str) -> tuple[Counter[str], int]:
    """Sums of the columns of a table of bundles, and its rows."""
    head, _, body = table.partition("== UTILIZATION:")
    names = re.search(r"^MXU.*$", head, re.MULTILINE)
    counts: Counter[str] = Counter()
    if names is None:
        return counts, 0
    rows = [line.split() for line in body.strip().splitlines()]
    for row in rows:
        for name, count in zip(names[0].split(","), row, strict=True):
            counts[name.strip()] += int(count)
    return counts, len(rows)


# Of tensor cores: Hopper's, Blackwell's, and those of a single warp.
_MATRIX = ("HGMMA", "UTCHMMA", "HMMA")


def gpu_kernels(
    program: str, printed: str, known: dict[str, Kernel]
) -> tuple[Kernel, ...]:
    """From the compiled text, and what Mosaic GPU and ptxas print meanwhile.

    A kernel that the process has compiled before is not compiled again: `known` keeps
    what was found of each, by its hash.
    """
    pattern = (
        r'^\s*(?:ROOT )?%?[\w\-]+\.?(\d*) = .*custom_call_target="mosaic_gpu_v2"'
        r'.*op_name="(.*?)".*kernel_hash = "((?:[^"\\]|\\.)*)"'
    )
    # In the order in which they were lowered, which is that of their numbers.
    calls = sorted(
        (int(match[1] or 0), match[2], match[3])
        for match in re.finditer(pattern, program, re.MULTILINE)
    )
    sizes = re.findall(r"^Resources\(smem_scratch_bytes=(\d+)", printed, re.MULTILINE)
    assembled = list(_assembled(printed))
    found = []
    for place, (_, path, key) in enumerate(calls):
        if key not in known:
            mine = next((k for k in assembled if f"{k.name}/" in f"{path}/"), None)
            if mine is None:
                raise ValueError(f"the compiler printed nothing of {path}")
            assembled.remove(mine)
            # Without a size for each, the largest.
            same = len(sizes) == len(calls)
            size = sizes[place] if same else max(sizes, key=int, default="0")
            known[key] = dataclasses.replace(mine, memory_bytes=int(size))
        found.append(known[key])
    return tuple(dict.fromkeys(found))


def _assembled(printed: str) -> Iterator[Kernel]:
    """What the assembler says of each kernel; not its shared memory."""
    for part in re.split(r"(?=^.*Compiling entry function)", printed, flags=re.M)[1:]:
        (name,) = re.findall(r"Compiling entry function '(.*?)'", part)

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        assembly = r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
        words = Counter(re.findall(assembly, part, re.MULTILINE))
        remarks = re.findall(r"\(C\d+\).*", part)
        yield Kernel(
            name.removesuffix("_mosaic_gpu_kernel"),
            0,
            number(r"(\d+) bytes spill stores"),
            sum(words[word] for word in _MATRIX),
            sum(words.values()),
            number(r"Used (\d+) registers"),
            tuple(sorted({remark.split(" in function")[0] for remark in remarks})),
        )
