"""The devices that kernels are written for, and their limits.

Tile sizes depend on shapes, dtypes and the device: that of the mesh under which a
program is traced, so that a program can be made for another machine, or else the
default device.
"""

import dataclasses

import jax

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One core of a TPU.

    Attributes:
        name: The compiler's name.
        vmem_bytes: Vector memory that one kernel can use.
        matrix_unit: Rows and columns of the systolic array.
        flops: Operations per second of bfloat16 products with sums in float32.
        bytes_per_second: Bandwidth of its share of high-bandwidth memory.
        cores: Cores of a chip, which one program sees as one device.
    """

    name: str
    vmem_bytes: int
    matrix_unit: int
    flops: float
    bytes_per_second: float
    cores: int = 1


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: The compiler's name.
        generation: `hopper` or `blackwell`: their matrix instructions differ.
        multiprocessors: Number of multiprocessors.
        smem_bytes: Shared memory that one block of threads can use.
        registers: 32-bit registers per multiprocessor.
        flops: Operations per second of bfloat16 products with sums in float32.
        bytes_per_second: Bandwidth of its memory.
    """

    name: str
    generation: str
    multiprocessors: int
    smem_bytes: int
    registers: int
    flops: float
    bytes_per_second: float


V4 = Tpu("v4", 16 * MIB, 128, 138e12, 614e9, cores=2)
V5E = Tpu("v5e", 128 * MIB, 128, 197e12, 819e9)
V5P = Tpu("v5p", 64 * MIB, 128, 230e12, 1383e9, cores=2)
V6E = Tpu("v6e", 128 * MIB, 256, 918e12, 1640e9)
V7X = Tpu("tpu7x", 64 * MIB, 256, 1154e12, 3690e9)
# For an unknown TPU: the smallest limits of all.
ANY_TPU = dataclasses.replace(V4, name="any TPU", cores=1)
H100 = Gpu("h100", "hopper", 132, 232_448, 65_536, 989e12, 3352e9)
B200 = Gpu("b200", "blackwell", 148, 232_448, 65_536, 2250e12, 7672e9)

# Prefixes and substrings of `device_kind`.
_TPU_KINDS = (
    ("TPU v4", V4),
    ("TPU v5 lite", V5E),
    ("TPU v5e", V5E),
    ("TPU v5", V5P),
    ("TPU v6", V6E),
    ("TPU7", V7X),
    ("TPU v7", V7X),
)
_GPU_KINDS = {H100: ("H100", "H200", "H800", "H20"), B200: ("B200", "B100", "B300")}


def tpu() -> Tpu:
    """The TPU for which a program is being traced; `ANY_TPU` if it is not known."""
    kind = _device_kind("tpu")
    return next((d for start, d in _TPU_KINDS if kind.startswith(start)), ANY_TPU)


def gpu() -> Gpu | None:
    """The GPU for which a program is being traced, if it is one with kernels."""
    kind = _device_kind("gpu")
    found = (d for d, names in _GPU_KINDS.items() if any(n in kind for n in names))
    return next(found, None)


def gpu_generation() -> str | None:
    """`hopper`, `blackwell`, or None for unknown and other GPUs."""
    device = gpu()
    return None if device is None else device.generation


def _device_kind(platform: str) -> str:
    """The device kind; empty for a device of another platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform in _names(platform) else ""
    default = jax.devices()[0]
    return default.device_kind if default.platform in _names(platform) else ""


def _names(platform: str) -> tuple[str, ...]:
    return ("gpu", "cuda") if platform == "gpu" else (platform,)
