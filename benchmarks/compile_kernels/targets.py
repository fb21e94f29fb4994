"""Machines that are not there, as devices to compile for.

The compilers are the real ones: libtpu's for TPUs, Mosaic GPU with ptxas for NVIDIA's.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from .case import Case, Division

_TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# What XLA wants to know of a GPU: name, compute capability, multiprocessors, GHz, bytes
# of memory, of cache, and per second, and of shared memory of a multiprocessor.
_GPUS = {
    "a100": (
        *("NVIDIA A100-SXM4-80GB", 8, 108, 1.41),
        *(80 << 30, 40 << 20, 2039),
        164,
    ),
    "h100": (
        *("NVIDIA H100 80GB HBM3", 9, 132, 1.98),
        *(80 << 30, 50 << 20, 3352),
        228,
    ),
    "b200": (*("NVIDIA B200", 10, 148, 1.965), *(178 << 30, 126 << 20, 7672), 228),
}
TARGETS = (*_TPUS, *_GPUS)

# Set before jax is imported. Without the first, jax tries the plugins at start.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


def is_tpu(target: str) -> bool:
    return target in _TPUS


def missing(target: str) -> str | None:
    """Why nothing can be compiled for the target here; None if it can."""
    for module in ("libtpu",) if is_tpu(target) else ("jax_plugins.xla_cuda13",):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"the module {module} of the extra kernel-check is not installed"
    return None


def lower(case: Case, target: str) -> jax.stages.Lowered:
    """The case's function of its shapes, traced and lowered for the target."""
    if case.division is not None:
        return _lower_divided(case, case.division, target)
    mesh = jax.sharding.Mesh(np.array(devices(target, 1)), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # The sharding chooses the platform; whoever asks for the device asks the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (
            jax.jit(case.function).trace(*jax.tree.map(placed, case.arguments)).lower()
        )


def _lower_divided(case: Case, division: Division, target: str) -> jax.stages.Lowered:
    """The everyday program of several devices: only its arrays know the mesh."""
    mesh = jax.sharding.Mesh(
        np.array(devices(target, division.devices)),
        ("device",),
        axis_types=(getattr(jax.sharding.AxisType, division.kind),),
    )
    placed = [
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        )
        for x, spec in zip(case.arguments, division.specs, strict=True)
    ]
    return jax.jit(case.function).trace(*placed).lower()


def devices(target: str, count: int, *, host: int | None = None) -> Sequence[Any]:
    """So many devices to compile for, of a TPU up to those of one host.

    `host`: of GPUs, how many are on a host; None for all on one.
    """
    if is_tpu(target):
        found = topologies.get_topology_desc(_TPUS[target], platform="tpu").devices
    else:
        host = count if host is None else host
        found = topologies.get_topology_desc(
            target,
            platform="cuda",
            topology=f"1x{count // host}x{host}",
            target_config=_description(target),
        ).devices
    return found[:count]


def _description(target: str) -> str:
    """XLA's description of a GPU, as the text of a protocol buffer."""
    name, capability, processors, clock, memory, cache, bandwidth, shared = _GPUS[
        target
    ]
    # Instructions of one generation only; the oldest has none.
    features = "feature_extension: ACCELERATED_FEATURES" if capability > 8 else ""
    return f"""
    gpu_device_info {{
      name: "{name}"
      device_vendor: "NVIDIA Corporation"
      cuda_compute_capability {{
        major: {capability} minor: 0 {features}
      }}
      core_count: {processors}
      clock_rate_ghz: {clock}
      device_memory_size: {memory}
      l2_cache_size: {cache}
      memory_bandwidth: {bandwidth}000000000
      device_address_bits: 64
      threads_per_warp: 32
      fpus_per_core: 128
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      shared_memory_per_core: {shared << 10}
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {(shared - 1) << 10}
      thread_dim_limit_x: 1024
      thread_dim_limit_y: 1024
      thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
    platform_name: "CUDA"
    device_description_str: "{name}"
    dnn_version_info {{ major: 9 minor: 10 }}
    """
