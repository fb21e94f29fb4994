"""A planned operation as a JAX primitive, whose kernels are traced only where they run.

Each lowering platform has a rule. The rule of a platform that has a kernel traces it;
every other one takes the plain implementation, whose trace already gave the types of
the results. So a program made on a machine without accelerators never traces a kernel,
one trace may be lowered for several platforms, and the rule sees what tracing cannot:
over how many devices the compiler will divide the program. A kernel cannot be divided.

An eager call is one compiled program, found again by the static part of the call. What
is static must therefore compare by value: no function that is made anew in each call.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ._sharding import match_varying

PLATFORMS = ("cpu", "tpu", "cuda")

# (options, operands) -> results; both are pytrees, the options are static
type Function = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class OnPlatform:
    """What runs on one platform.

    Attributes:
        kernel: Runs on one device, or on one device's part of a `shard_map`.
        plain: Plain JAX for programs that the compiler divides over devices; None if
            the kernel was asked for by name: then such programs are an error.
    """

    kernel: Function
    plain: Function | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of an operation's call; equal calls share traces and programs.

    Attributes:
        name: Of the operation, for errors.
        plain: Plain JAX: gives the types of the results and every derivative.
        fallback: Runs where no platform of `platforms` is meant; None if only kernels
            were asked for.
        platforms: Pairs of a lowering platform and what runs there.
        options: The first argument of every function here.
        structure: Tree structure of the operands.
        device: The device of the mesh under which the call was traced, if it had one.
            Sizes of tiles depend on it, and a kernel is traced later.
        empty: Places, shapes and dtypes of integer leaves without an element. They are
            made inside: as a residual that leaves a `shard_map`, one ends the compiler
            of jaxlib 0.11.
        mapped: Of each `vmap` around the call, inner ones first: which axis of each
            leaf it maps, its size, and the mesh axis that divides it.
    """

    name: str
    plain: Function
    fallback: Function | None
    platforms: tuple[tuple[str, OnPlatform], ...]
    options: Hashable
    structure: Any
    device: Any = None
    empty: tuple[tuple[int, tuple[int, ...], Any], ...] = ()
    mapped: tuple[tuple[tuple[int | None, ...], int, Any], ...] = ()

    def of(self, function: Function) -> Callable[..., Any]:
        """The function of the operands' leaves."""

        def call(*leaves: Any) -> Any:
            every = list(leaves)
            for place, shape, dtype in self.empty:
                every.insert(place, match_varying(jnp.zeros(shape, dtype), *leaves))
            operands = jax.tree.unflatten(self.structure, every)
            return function(self.options, operands)

        for axes, size, mesh_axis in self.mapped:
            call = jax.vmap(call, axes, axis_size=size, spmd_axis_name=mesh_axis)
        return call


def run(call: Call, operands: Any) -> Any:
    """Binds the primitive; the results have the structure that `call.plain` gives."""
    if jax.config.jax_disable_jit and call.fallback is not None:
        # Operation by operation, with values that a debugger can look at.
        return call.fallback(call.options, operands)
    every = jax.tree.leaves(operands)
    empty = tuple(
        (place, leaf.shape, leaf.dtype)
        for place, leaf in enumerate(every)
        if 0 in jnp.shape(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer)
    )
    call = dataclasses.replace(call, empty=empty)
    places = {place for place, *_ in empty}
    leaves = [leaf for place, leaf in enumerate(every) if place not in places]
    found = _differentiable(call, *leaves)
    return jax.tree.unflatten(_results(call, *leaves), found)


# Memory of traces, with everything that a trace depends on: the mesh in context, x64,
# promotion rules, what `explain` hears. Inlined, it leaves no mark in a program.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _traced(call: Call, function: Function, *leaves: Any) -> Any:
    return call.of(function)(*leaves)


def _trace(call: Call, *leaves: Any) -> Any:
    return _traced.trace(call, call.plain, *map(type_of, leaves))


def _results(call: Call, *leaves: Any) -> Any:
    return jax.tree.structure(_trace(call, *map(jax.typeof, leaves)).out_info)


def type_of(aval: Any) -> jax.ShapeDtypeStruct:
    """An abstract value as the argument of a trace, with the mesh of its type."""
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        sharding=None if aval.sharding.mesh.empty else aval.sharding,
        weak_type=aval.weak_type,
        manual_axis_type=aval.manual_axis_type,
    )


# A kernel has no derivative rule, and neither has the primitive.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(call: Call, *leaves: Any) -> list[Any]:
    return operation_p.bind(*leaves, call=call)


@_differentiable.defjvp
def _(call: Call, primals: Any, tangents: Any) -> Any:
    plain = lambda *leaves: jax.tree.leaves(_traced(call, call.plain, *leaves))
    return jax.jvp(plain, primals, tangents)


operation_p = Primitive("softlib_operation")
operation_p.multiple_results = True


@operation_p.def_abstract_eval
def _(*avals: Any, call: Call) -> Any:
    return _trace(call, *avals).jaxpr.out_avals


@functools.partial(jax.jit, static_argnames="call")
def _compiled(*leaves: Any, call: Call) -> Any:
    return operation_p.bind(*leaves, call=call)


@operation_p.def_impl
def _(*leaves: Any, call: Call) -> Any:
    if jax.config.jax_disable_jit:  # a compiled `bind` would call itself
        return jax.tree.leaves(call.of(call.fallback or call.plain)(*leaves))
    return _compiled(*leaves, call=call)


def _batch(axis: Any, leaves: Any, axes: Any, *, call: Call) -> Any:
    if all(mapped is None for mapped in axes):
        found = operation_p.bind(*leaves, call=call)
        return found, (None,) * len(found)
    own = (tuple(axes), axis.size, axis.spmd_name)
    call = dataclasses.replace(call, mapped=(*call.mapped, own))
    found = operation_p.bind(*leaves, call=call)
    return found, (0,) * len(found)


batching.fancy_primitive_batchers[operation_p] = _batch


def _rule_of(platform: str | None) -> Callable[..., Any]:
    def rule(context: Any, *values: Any, call: Call) -> Any:
        function = _chosen(call, platform, context.module_context)
        lowered = mlir.lower_fun(functools.partial(_traced, call, function))
        with _mesh_for(call.device):
            return lowered(context, *values)

    return rule


def _chosen(call: Call, platform: str | None, module: Any) -> Function:
    own = dict(call.platforms).get(platform or "")
    if own is None:
        function, missing = call.fallback, f"for platform {platform}"
    elif is_divided(module):
        function, missing = own.plain, "for a program divided by the compiler"
    else:
        function, missing = own.kernel, ""
    if function is None:
        kernels = ", ".join(name for name, _ in call.platforms)
        raise NotImplementedError(
            f"{call.name}: no requested implementation {missing}, only kernels for "
            f"{kernels}. Pass implementation=None to let softlib choose."
        )
    return function


def _mesh_for(device: Any) -> contextlib.AbstractContextManager[Any]:
    """The mesh in context, of that device unless it has one of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    if device is None or mesh.abstract_device is not None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))


def is_divided(module: Any) -> bool:
    """Whether the compiler divides the program, or a part of it, over devices."""
    context = module.axis_context
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices > 1
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes | set(context.mesh.manual_axes)
        return bool(manual) and manual != set(context.mesh.axis_names)
    return False


for _platform in (None, *PLATFORMS):
    mlir.register_lowering(operation_p, _rule_of(_platform), platform=_platform)
