"""Meshes: varying axes, Explicit axes made Auto, and calls on each shard."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def automatic_axes(operands: Any = ()) -> list[str]:
    """Mesh axes over which the compiler may partition a program.

    They are those of the mesh in context and of the meshes in the operands' types,
    which are known without a mesh in context too.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    free: dict[str, None] = {}
    for mesh in meshes:
        for axis in _free_axes(mesh):
            if axis in mesh.explicit_axes or mesh.shape[axis] > 1:
                free[axis] = None
    return list(free)


def device_count(array: Any) -> int:
    """Number of devices over which the compiler may divide an array, by its type."""
    mesh = jax.typeof(array).sharding.mesh
    return math.prod(mesh.shape[axis] for axis in _free_axes(mesh))


def _free_axes(mesh: Any) -> list[str]:
    """Axes of the mesh that no enclosing `shard_map` has taken."""
    return [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]


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


def per_shard(
    function: Callable[..., Any],
    in_specs: Callable[[PartitionSpec], Sequence[Any] | None],
    out_specs: Callable[[PartitionSpec], Any],
    first: Array,
    *rest: Any,
) -> Any:
    """Calls `function(first, *rest)` on every device's shards of an Explicit mesh.

    A kernel cannot be partitioned, but it runs on shards where the mesh divides only
    batch axes of the function, such as rows, batch entries or heads. Arrays that the
    same mesh axes divide elsewhere (the weight of fully sharded training) are gathered.
    All other cases are left to the compiler by `in_auto_mode`.

    Args:
        function: Takes arrays and pytrees, and the sizes of axes from these.
        in_specs: Maps the spec of `first`, with one entry per axis, to specs of the
            arguments, each a pytree with a spec for every array. They name only mesh
            axes of the given spec, and only at batch axes of the function. None leaves
            the call to the compiler.
        out_specs: Maps it likewise to the specs of the results.
        first: The array whose sharding decides.
        *rest: The other arguments.
    """
    arguments = (first, *rest)
    leaves, structure = jax.tree.flatten(arguments)
    types = [jax.typeof(leaf) for leaf in leaves]
    if not any(each.sharding.mesh.axis_names for each in types):
        return function(*arguments)
    mesh = jax.typeof(first).sharding.mesh
    if not mesh.axis_names or set(mesh.explicit_axes) != set(mesh.axis_names):
        return in_auto_mode(function, out_specs, *arguments)
    whole = _whole(jax.typeof(first).sharding.spec, first.ndim)
    specs = in_specs(whole)
    if specs is None:
        return in_auto_mode(function, out_specs, *arguments)
    is_spec = lambda tree: isinstance(tree, PartitionSpec)
    wanted = jax.tree.leaves(specs, is_leaf=is_spec)
    wanted = [_whole(spec, leaf.ndim) for spec, leaf in zip(wanted, types, strict=True)]
    given = [_whole(leaf.sharding.spec, leaf.ndim) for leaf in types]
    dividing = _names(wanted[0])
    others = [spec for spec, want in zip(given, wanted, strict=True) if spec != want]
    uneven = any(map(functools.partial(_is_uneven, mesh), types, wanted))
    foreign = any(_names(spec) - dividing for spec in others)
    if given[0] != wanted[0] or foreign or uneven:
        return in_auto_mode(function, out_specs, *arguments)

    def call(*leaves: Array) -> Any:
        return function(*jax.tree.unflatten(structure, leaves))

    placed = [
        leaf if spec == want else jax.reshard(leaf, NamedSharding(mesh, want))
        for leaf, spec, want in zip(leaves, given, wanted, strict=True)
    ]
    results = out_specs(whole)
    return jax.shard_map(call, mesh=mesh, in_specs=tuple(wanted), out_specs=results)(
        *placed
    )


def _whole(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """The spec with an entry for every axis."""
    return PartitionSpec(*spec, *[None] * (ndim - len(spec)))


def _is_uneven(mesh: Any, array: Any, spec: PartitionSpec) -> bool:
    """Whether some axis does not divide evenly over its devices."""
    shards = [math.prod(map(mesh.shape.get, _names(PartitionSpec(e)))) for e in spec]
    return any(size % count for size, count in zip(array.shape, shards, strict=True))


def _names(spec: PartitionSpec) -> set[str]:
    """The mesh axes in a spec."""
    entries = [entry for entry in spec if entry is not None]
    return {
        name
        for entry in entries
        for name in ((entry,) if isinstance(entry, str) else entry)
    }


def _varying(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
