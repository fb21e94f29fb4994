"""A barrier against fusion that only programs for CPUs have."""

from typing import Any

from jax import lax


def barrier_on_cpu[T](tree: T) -> T:
    """`lax.optimization_barrier(tree)` in a program for a CPU, elsewhere the tree.

    XLA for GPUs computes the index of a slice in a loop before the loop where it can,
    and fails at a barrier in between.
    """
    keep = lambda tree: tree
    result: Any = lax.platform_dependent(
        tree, cpu=lax.optimization_barrier, default=keep
    )
    return result
