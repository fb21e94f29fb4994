"""One of two processes that hold the arrays of a loss together, 4 devices each.

test_two_processes.py starts `python two_processes.py PORT PROCESS` twice. Each checks
what it holds, its own parts of every number per row and of every gradient, against
float64 on one of its devices, and says so in one line per case.
"""

import itertools
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

# Under plain jit: the axis between the processes, and where rows, classes and features
# are.
PLAIN = (
    ("data", AxisType.Auto, (("data", "classes"),)),
    ("classes", AxisType.Explicit, ("data", "classes")),
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


def main(port, process):
    connect(port, process)
    where = specs("data", "classes")
    for crossing, check_vma in itertools.product(("data", "classes"), (True, False)):
        # Either kind of mesh meets either value of the other two.
        auto = check_vma == (crossing == "data")
        mesh = grid(crossing, AxisType.Auto if auto else AxisType.Explicit)
        function = vocabulary_parallel(mesh, where, check_vma)
        gradients = check(mesh, where, function)
        # Each device has the gradient of its classes, and of no other.
        parts = gradients["weight"].addressable_shards
        assert {part.data.shape for part in parts} == {(CLASSES // 4, FEATURES)}
        print(f"shard_map, {crossing}, check_vma={check_vma}: equal", flush=True)
    for crossing, kind, division in PLAIN:
        check(grid(crossing, kind), specs(*division), metrics)
        print(f"jit, {crossing}, {division}: equal", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
