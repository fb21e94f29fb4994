"""One of two processes that hold the arrays of a loss together, 4 devices each.

test_two_processes.py starts `python two_processes.py PORT PROCESS CASE...` twice. Each
checks what it holds, its own parts of every number per row and of every gradient,
against float64 on one of its devices, and says so in one line per case.
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tests.losses.divided import (
    CLASSES,
    FEATURES,
    check,
    metrics,
    specs,
    vocabulary_parallel,
)

# The axis between the processes and the kind of the mesh; then `check_vma` of
# `shard_map`, or under plain jit where rows, classes and features are.
CASES = (
    ("data", AxisType.Explicit, False),
    ("classes", AxisType.Explicit, True),
    ("data", AxisType.Auto, (("data", "classes"),)),
    ("classes", AxisType.Explicit, ("data", "classes")),
    ("data", AxisType.Auto, True),
    ("classes", AxisType.Auto, False),
    ("classes", AxisType.Auto, ("data", None, "classes")),
    ("data", AxisType.Explicit, ("classes", None, "data")),
)


def grid(crossing, kind):
    """2 x 4 devices, where the axis `crossing` leads from one process to the other."""
    devices = np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id)))
    if crossing == "data":
        devices = devices.reshape(2, 4)
    else:
        devices = devices.reshape(2, 2, 2).swapaxes(0, 1).reshape(2, 4)
    return Mesh(devices, ("data", "classes"), axis_types=(kind,) * 2)


def connect(port, process):
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        num_processes=2,
        process_id=process,
        coordinator_bind_address=address,
        initialization_timeout=60,
    )
    assert (jax.process_count(), jax.device_count()) == (2, 8)


def main(port, process, *cases):
    connect(port, process)
    where = specs("data", "classes")
    for crossing, kind, how in (CASES[case] for case in cases):
        mesh = grid(crossing, kind)
        if isinstance(how, bool):
            function = vocabulary_parallel(mesh, where, check_vma=how)
            gradients = check(mesh, where, function)
            # Each device has the gradient of its classes, and of no other.
            parts = gradients["weight"].addressable_shards
            assert {part.data.shape for part in parts} == {(CLASSES // 4, FEATURES)}
        else:
            check(mesh, specs(*how), metrics)
        print(f"{crossing}, {kind}, {how}: equal", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
