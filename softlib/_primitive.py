"""A planned operation as a JAX primitive; kernels are traced only where they run.

Each platform has a lowering rule: it traces the platform's kernel, or takes the plain
implementation, whose trace already gave the types of the results. So a program for CPUs
never traces a kernel, one trace can be lowered for several platforms, and the rule
knows over how many devices the compiler will divide the program (a kernel cannot be
divided).

An eager call is one compiled program, cached by the static arguments. These must
compare by value: no function that is defined anew in each call.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ._sharding import match_varying

PLATFORMS = ("cpu", "tpu", "cuda")
ACCELERATORS = ("tpu", "cuda")

# (options, operands) -> results; both are pytrees, the options are static
type Function = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class OnPlatform:
    """The implementations for one platform.

    Attributes:
        kernel: Runs on one device, or on one shard of a `shard_map`.
        divided: Plain JAX for programs that the compiler divides over devices; None
            takes the fallback.
    """

    kernel: Function
    divided: Function | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of an operation's call; equal calls share traces and programs.

    Attributes:
        name: The operation's name, for errors.
        plain: Plain JAX: gives the types of the results and every derivative.
        fallback: Runs on platforms that are not in `platforms`, and in programs that
            the compiler divides; None if only kernels were asked for.
        accelerated: The fallback on TPUs and GPUs, which also takes the number of
            copies that a `vmap` makes; None if it is the same there.
        platforms: Pairs of a lowering platform and what runs there.
        options: The first argument of every function here.
        structure: Tree structure of the operands.
        device: The device of the mesh at the time of the call, if it had one: tile
            sizes depend on it, and a kernel is traced later.
        empty: Indices, shapes and dtypes of integer leaves without an element. They are
            made inside: as a residual of a `shard_map` they crash jaxlib 0.11.
        mapped: For each `vmap` around the call, inner ones first: the mapped axis of
            each leaf, its size, and the mesh axis that divides it.
    """

    name: str
    plain: Function
    fallback: Function | None
    accelerated: Callable[[Any, Any, int], Any] | None
    platforms: tuple[tuple[str, OnPlatform], ...]
    options: Hashable
    structure: Any
    device: Any = None
    empty: tuple[tuple[int, tuple[int, ...], Any], ...] = ()
    mapped: tuple[tuple[tuple[int | None, ...], int, Any], ...] = ()

    def fallback_on(self, platform: str | None) -> Function | None:
        """Plain JAX in the steps that suit the platform."""
        if platform not in ACCELERATORS or self.accelerated is None:
            return self.fallback
        return _Accelerated(self.accelerated, math.prod(n for _, n, _ in self.mapped))

    def of(self, function: Function) -> Callable[..., Any]:
        """`function` with the operands' leaves as its arguments."""

        def call(*leaves: Any) -> Any:
            every = list(leaves)
            for index, shape, dtype in self.empty:
                every.insert(index, match_varying(jnp.zeros(shape, dtype), *leaves))
            operands = jax.tree.unflatten(self.structure, every)
            return function(self.options, operands)

        for axes, size, mesh_axis in self.mapped:
            call = jax.vmap(call, axes, axis_size=size, spmd_axis_name=mesh_axis)
        return call


@dataclasses.dataclass(frozen=True)
class _Accelerated:
    """A `Function` that knows how many copies of it run at once; equal by value."""

    function: Callable[[Any, Any, int], Any]
    copies: int

    def __call__(self, options: Any, operands: Any) -> Any:
        return self.function(options, operands, self.copies)


def run(call: Call, operands: Any) -> Any:
    """Binds the primitive; the results have the structure of those of `call.plain`."""
    if jax.config.jax_disable_jit and call.fallback is not None:
        # Eager, so that a debugger sees values.
        return call.fallback(call.options, operands)
    every = jax.tree.leaves(operands)
    empty = tuple(
        (index, leaf.shape, leaf.dtype)
        for index, leaf in enumerate(every)
        if 0 in jnp.shape(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer)
    )
    call = dataclasses.replace(call, empty=empty)
    made_inside = {index for index, *_ in empty}
    leaves = [leaf for index, leaf in enumerate(every) if index not in made_inside]
    found = _differentiable(call, *leaves)
    return jax.tree.unflatten(_results(call, *leaves), found)


# Caches traces; jit's key has all that a trace depends on (mesh, x64, promotion rules,
# the record of `explain`). Inlined, so that programs do not change.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _traced(call: Call, function: Function, *leaves: Any) -> Any:
    return call.of(function)(*leaves)


def _trace(call: Call, *leaves: Any) -> Any:
    return _traced.trace(call, call.plain, *map(type_of, leaves))


def _results(call: Call, *leaves: Any) -> Any:
    return jax.tree.structure(_trace(call, *map(jax.typeof, leaves)).out_info)


def type_of(aval: Any) -> jax.ShapeDtypeStruct:
    """The argument of a trace for an abstract value, with the mesh of its type."""
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
        module = _with_devices(context.module_context)
        with _mesh_for(call.device):
            return lowered(context.replace(module_context=module), *values)

    return rule


def _chosen(call: Call, platform: str | None, module: Any) -> Function:
    own = dict(call.platforms).get(platform or "")
    fallback = call.fallback_on(platform)
    if own is None:
        function, missing = fallback, f"for platform {platform}"
    elif is_divided(module):
        function = own.divided or fallback
        missing = "for a program divided by the compiler"
    else:
        function, missing = own.kernel, ""
    if function is None:
        kernels = ", ".join(name for name, _ in call.platforms)
        raise NotImplementedError(
            f"{call.name}: no requested implementation {missing}, only kernels for "
            f"{kernels}. Pass implementation=None to let softlib choose."
        )
    return function


def _with_devices(module: Any) -> Any:
    """The context of a program for one device with a device in it.

    Programs for the compiler's own division, which one device does not need, ask how
    many devices there are. JAX tells it where it sees one of them, and it does not look
    into kernels.
    """
    context = module.axis_context
    known = getattr(context, "device_assignment", ())
    if known is not None or context.num_devices != 1:
        return module
    any_device = tuple(jax.devices()[:1])
    context = dataclasses.replace(context, device_assignment=any_device)
    return module.replace(axis_context=context)


def _mesh_for(device: Any) -> contextlib.AbstractContextManager[Any]:
    """A context whose mesh has this device unless the current mesh has its own."""
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
