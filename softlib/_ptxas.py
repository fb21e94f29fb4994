"""Refuses CUDA kernels on a machine whose `ptxas` miscompiles them."""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator

import jax

type Version = tuple[int, ...]

# CUDA 12.8.0 up to, not including, 12.9.1: causal attention came out wrong.
FIRST_BAD: Version = (12, 8, 0)
FIRST_GOOD: Version = (12, 9, 86)


def why_not() -> str | None:
    """The reason against CUDA kernels, if this machine's assembler is known bad.

    None without a GPU: such programs are assembled elsewhere.
    """
    if jax.default_backend() != "gpu":
        return None
    return reason_against(installed())


def reason_against(version: Version | None) -> str | None:
    """The reason against an assembler of this version (None: not found), or None."""
    if version is None or not FIRST_BAD <= version < FIRST_GOOD:
        return None
    name = ".".join(map(str, version))
    return f"ptxas {name} miscompiles kernels; install CUDA 12.9.1 or newer"


def version_in(text: str) -> Version | None:
    """The version in what `ptxas --version` prints."""
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", text)
    return None if found is None else tuple(map(int, found.groups()))


@functools.cache
def installed() -> Version | None:
    """The version that JAX will find on this machine; None without one."""
    for path in _candidates():
        try:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        version = version_in(done.stdout)
        if version is not None:
            return version
    return None


def _candidates() -> Iterator[pathlib.Path]:
    """Yields the paths where JAX looks for `ptxas`, in its order."""
    roots = [os.environ.get("CUDA_ROOT")]
    for package in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:
            continue
        if spec is not None:
            roots += list(spec.submodule_search_locations or ())
    for root in filter(None, roots):
        yield pathlib.Path(root) / "bin" / "ptxas"
    on_path = shutil.which("ptxas")
    if on_path:
        yield pathlib.Path(on_path)
    yield pathlib.Path("/usr/local/cuda/bin/ptxas")
