"""Sizes that are known only when an exported program is called.

`jax.export` traces with symbolic dimensions. They cannot be compared with a limit, so a
plan that depends on a size takes a rule that is right for all sizes.
"""

from typing import Any

import jax


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of the sizes is a symbolic dimension of `jax.export`."""
    return not all(isinstance(size, int) for size in sizes)


def has_symbolic_shape(tree: Any) -> bool:
    """Whether an array in the tree has a symbolic dimension."""
    shapes = (getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(tree))
    return any(is_symbolic(*shape) for shape in shapes)
