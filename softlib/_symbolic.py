"""Sizes that are known only when an exported program is called.

`jax.export` traces with dimensions that are no Python integers. They can be added and
multiplied, but not compared with a limit, so a plan that depends on a size takes a rule
that is right for all of them.
"""

from typing import Any

import jax


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of them is a dimension of `jax.export`, without a value."""
    return not all(isinstance(size, int) for size in sizes)


def has_symbolic_shape(tree: Any) -> bool:
    """Whether an array in it has a dimension without a value."""
    shapes = (getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(tree))
    return any(is_symbolic(*shape) for shape in shapes)
