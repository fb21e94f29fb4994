"""Devices that lower and compile programs: the one here, or another that is imitated.

The imitation runs kernels in the interpreters of Pallas on a CPU. The text that is read
is that of the same program lowered for the device that is imitated.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu, tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.measure import machine
from pallas_kernels import _devices
from softlib import _ptxas
from tests.operations import kernels_of

from .kernels import NoKernel, count
from .problem import Program

IMITATED = {"tpu": ("TPU v5 lite", 1, "tpu"), "cuda": ("NVIDIA H100", 132, "gpu")}
# The interpreter of Mosaic GPU has to be told to every kernel: some of their scratch
# memory exists only in it.
_GPU_KERNELS = (
    ("row_statistics", "forward"),
    ("row_statistics", "gradient"),
    ("attention", "attention"),
    ("attention_backward", "query_gradient"),
    ("attention_key_gradients", "key_gradients"),
    ("decode", "decode"),
    ("softmax", "softmax"),
    ("softmax", "logsumexp"),
    ("trilinear", "forward"),
    ("trilinear_gradient", "query_gradient"),
    ("trilinear_key_gradient", "key_gradients"),
)
# Of Pallas on TPUs and of Mosaic GPU.
_PRIMITIVES = re.compile(r"\b(?:pallas_call|mpmd_map)\[")
_PACKAGES = (
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cuda-nvcc"),
    "nvidia-cuda-nvcc-cu12",
)
# Fields of nvidia-smi, and their names in the report.
_ASKED = {
    "driver_version": "driver",
    "memory.total": "memory",
    "power.limit": "power limit",
    "clocks.max.sm": "highest clock",
}


class Here:
    """The default device of this process."""

    @property
    def platform(self) -> str:
        """`cpu`, `tpu` or `cuda`."""
        platform = jax.devices()[0].platform
        return "cuda" if platform == "gpu" else platform

    @property
    def target(self) -> str:
        """The name kernels have for it: `tpu`, `hopper`, `blackwell`, or another."""
        if self.platform != "cuda":
            return self.platform
        return _devices.gpu_generation() or "another GPU"

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """In which programs are traced, explained and given arrays."""
        return contextlib.nullcontext()

    def compiled(self, program: Program, *arrays: Any) -> tuple[str, Any]:
        """The lowered text, and the very same program compiled."""
        lowered = jax.jit(program).lower(*arrays)
        return lowered.as_text(), lowered.compile()

    def text(self, program: Program, *arrays: Any) -> str:
        return jax.jit(program).lower(*arrays).as_text()


class Imitated(Here):
    """Another platform, `tpu` or `cuda`, on a CPU."""

    def __init__(self, platform: str):
        self._platform = platform
        kind, cores, name = IMITATED[platform]
        device = AbstractDevice(device_kind=kind, num_cores=cores, platform=name)
        self._mesh = AbstractMesh((), (), abstract_device=device)

    @property
    def platform(self) -> str:
        return self._platform

    @property
    def target(self) -> str:
        return {"tpu": "tpu", "cuda": "hopper"}[self._platform]

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return jax.sharding.use_abstract_mesh(self._mesh)

    def compiled(self, program: Program, *arrays: Any) -> tuple[str, Any]:
        text = self.text(program, *arrays)
        with _interpreted(self._platform):
            # A function of its own: what was traced for the text is not found again.
            own: Callable[..., Any] = lambda *given: program(*given)
            traced = jax.jit(own).trace(*arrays)
            interpreted = len(_PRIMITIVES.findall(str(traced.jaxpr)))
            if interpreted < count(text):
                raise NoKernel(f"{interpreted} of {count(text)} kernels interpreted")
            return text, traced.lower().compile()

    def text(self, program: Program, *arrays: Any) -> str:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        with self.context():
            traced = jax.jit(program).trace(*shapes)
            return traced.lower(lowering_platforms=(self._platform,)).as_text()


def named(imitated: str | None) -> Here:
    return Here() if imitated is None else Imitated(imitated)


@contextlib.contextmanager
def _interpreted(platform: str) -> Iterator[None]:
    """While a program is traced and compiled: its kernels run in an interpreter."""
    with contextlib.ExitStack() as stack:
        if platform == "tpu":
            fast: Any = True
            stack.enter_context(pltpu.force_tpu_interpret_mode(fast))
        else:
            hopper = lambda: _devices.H100
            stack.enter_context(mock.patch.object(_devices, "gpu", hopper))
            for module_name, name in _GPU_KERNELS:
                module = importlib.import_module(
                    f"pallas_kernels.gpu_mosaic.{module_name}"
                )
                kernel = functools.partial(
                    getattr(module, name), interpret=plgpu.InterpretGPUParams()
                )
                stack.enter_context(mock.patch.object(module, name, kernel))
        stack.enter_context(kernels_of(platform))
        yield


# ------------------------------------------------------------------------------ machine
def describe() -> dict[str, Any]:
    """The device, and all versions that a reader of its times has to know."""
    here = Here()
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if here.platform == "cuda":
        ptxas = _ptxas.installed()
        versions["ptxas"] = "not found" if ptxas is None else ".".join(map(str, ptxas))
        versions |= _asked_of_the_driver()
    return {
        "platform": here.platform,
        "target": here.target,
        "kind": jax.devices()[0].device_kind,
        "name": _name(),
        "devices": jax.device_count(),
        "machine": machine() | versions | _commit(),
    }


def _name() -> str:
    """That of the compiler, by which cost models know the device."""
    known = _devices.tpu() if Here().platform == "tpu" else _devices.gpu()
    return "unknown" if known is None else known.name


def _asked_of_the_driver() -> dict[str, str]:
    text = _printed(
        "nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"
    )
    values = text.splitlines()[0].split(", ") if text else []
    return dict(zip(_ASKED.values(), values, strict=False))


def _commit() -> dict[str, str]:
    text = _printed("git", "describe", "--always", "--dirty")
    return {"commit": text} if text else {}


def _printed(*command: str) -> str:
    """The output of a program; empty if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""
