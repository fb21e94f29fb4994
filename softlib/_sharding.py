"""What the engines must know of meshes: varying axes, and Explicit axes made Auto."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def automatic_axes() -> list[str]:
    """Mesh axes in context over which the compiler may partition a program."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    return [a for a in free if a in mesh.explicit_axes or mesh.shape[a] > 1]


def device_count(array: Any) -> int:
    """Over how many devices the compiler may divide an array.

    The mesh is that of the array's type, known with no mesh in context, too.
    """
    mesh = jax.typeof(array).sharding.mesh
    free = (axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
    return math.prod(mesh.shape[axis] for axis in free)


def match_varying(tree: Any, *others: Array) -> Any:
    """Makes all leaves vary over the union of their and `others'` `shard_map` axes.

    A replicated weight next to sharded rows needs its gradient summed over the mesh.
    The transpose of this cast is that sum, so no backward rule has to know the mesh.
    """
    leaves = [*jax.tree.leaves(tree), *others]
    union = frozenset().union(*(_varying(leaf) for leaf in leaves))

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(union - _varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def in_auto_mode(
    function: Callable[..., Any],
    out_specs: Callable[[PartitionSpec], Any],
    first: Array,
    *rest: Any,
) -> Any:
    """Calls `function(first, *rest)` with Explicit axes of the arrays' mesh made Auto.

    A loop over slices of a sharded axis has no sharding in types; the compiler's
    partitioner handles it. `out_specs` maps the spec of `first` to the result's.
    """
    for leaf in jax.tree.leaves((first, rest)):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            break
    else:
        return function(first, *rest)
    spec = jax.typeof(first).sharding.spec
    specs = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        out_specs(spec),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    return jax.sharding.auto_axes(function, out_sharding=specs)(first, *rest)


def _varying(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
