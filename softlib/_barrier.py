"""An optimization barrier in programs for CPUs only."""

from typing import Any

from jax import lax


def barrier_on_cpu[T](tree: T) -> T:
    """`lax.optimization_barrier(tree)` in a program for a CPU, elsewhere the tree.

    XLA for GPUs hoists the computation of slice indices out of loops, and fails where a
    barrier is in the way.
    """
    keep = lambda tree: tree
    result: Any = lax.platform_dependent(
        tree, cpu=lax.optimization_barrier, default=keep
    )
    return result
