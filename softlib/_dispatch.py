"""Chooses among the implementations of an operation, and says why others cannot run.

A public function calls `plan` with the operation, the user's `implementation` and its
arrays, then `execute` with the plan. Kernels are chosen per *lowering* platform, so a
program traced on a CPU host and lowered for a TPU contains the TPU kernel.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice

from . import _explained_device, _preferred, _primitive, _ptxas
from ._explained_device import Device
from ._explanation import ExplainedOperation, Explanation
from ._sharding import automatic_axes
from ._symbolic import has_symbolic_shape


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: `reference`, `xla`, or `family_target` such as `pallas_tpu`.
        call: `call(options, operands)`, options static and hashable, operands arrays.
        why_not: None if `call` supports the operands, else a sentence fragment. It sees
            shapes, dtypes and options, never values.
        platform: A JAX lowering platform; None runs everywhere.
        note: None, or a sentence fragment: what a user should know about running it
            with these operands.
        divided: Plain JAX with the results of the kernel `call`, for programs that the
            compiler divides over devices; None takes the plan's fallback.
        yields: None, or why the next implementation for the same platform is expected
            to be faster, a sentence fragment: it then comes first, unless the caller
            names one.
        accelerated: Plain JAX with the results of a plain `call`, in steps for TPUs and
            GPUs: `accelerated(options, operands, copies)`, where copies of the call
            that a `vmap` makes share the memory of a step. None takes `call`.
    """

    name: str
    call: Callable[[Any, Any], Any]
    why_not: Callable[[Any, Any], str | None] = lambda options, operands: None
    platform: str | None = None
    note: Callable[[Any, Any], str | None] = lambda options, operands: None
    divided: Callable[[Any, Any], Any] | None = None
    yields: Callable[[Any, Any], str | None] = lambda options, operands: None
    accelerated: Callable[[Any, Any, int], Any] | None = None

    @property
    def family(self) -> str:
        return self.name.partition("_")[0]


def absent(name: str, platform: str) -> Implementation:
    """An implementation that users may name although it has no kernel; it says so."""

    def call(options: Any, operands: Any) -> Any:
        raise AssertionError(f"{name} was planned although it does not exist")

    reason = f"this version has no {platform} kernel for it"
    return Implementation(name, call, lambda options, operands: reason, platform)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Implementations, best first; at least one of them is plain JAX."""

    name: str
    implementations: tuple[Implementation, ...]

    @property
    def plain(self) -> Implementation:
        """The implementation that runs everywhere and that JAX can differentiate."""
        return next(i for i in self.implementations if i.platform is None)

    def candidates(self, names: str | Sequence[str] | None) -> list[Implementation]:
        if names is None:
            return self._preferred(_preferred.names())
        chosen: list[Implementation] = []
        for name in (names,) if isinstance(names, str) else names:
            found = self._named(name)
            if not found:
                families = (i.family for i in self.implementations)
                exact = (i.name for i in self.implementations)
                known = ", ".join(dict.fromkeys((*families, *exact)))
                raise ValueError(
                    f"{self.name}: `implementation` must be None or one (or a "
                    f"sequence) of {known}, got {name!r}."
                )
            chosen += found
        return chosen

    def _preferred(self, names: Sequence[str] | None) -> list[Implementation]:
        """Candidates of a call that names no implementation."""
        if names is None:
            return list(self.implementations)
        return [i for name in names for i in self._named(name)] or [self.plain]

    def _named(self, name: str) -> list[Implementation]:
        return [i for i in self.implementations if name in (i.name, i.family)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernel of each platform that has one, and the fallback of all others."""

    operation: Operation
    kernels: tuple[tuple[str, Implementation], ...]
    fallback: Implementation | None
    reasons: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def is_reference(self) -> bool:
        """Whether the reference runs on all platforms; JAX differentiates it itself."""
        fallback = self.fallback
        return (
            not self.kernels and fallback is not None and fallback.name == "reference"
        )

    @property
    def explained(self) -> ExplainedOperation:
        """The names alone, as users see them."""
        runs = {platform: kernel.name for platform, kernel in self.kernels}
        if self.fallback is not None:
            runs["elsewhere" if runs else "everywhere"] = self.fallback.name
        return ExplainedOperation(
            self.operation.name, runs, dict(self.reasons), dict(self.notes)
        )

    def explained_on(self, device: Device) -> ExplainedOperation:
        """The report for one device: what runs there, and what concerns that."""
        found = dict(self.kernels).get(device.platform, self.fallback)
        if found is None:
            raise NotImplementedError(
                f"{self.operation.name}: no requested implementation for "
                f"{device.name}, only kernels for {', '.join(dict(self.kernels))}."
            )
        possible = {
            i.name
            for i in self.operation.implementations
            if i.platform in (None, device.platform)
        }
        refused = {name: why for name, why in self.reasons if name in possible}
        notes = {name: note for name, note in self.notes if name == found.name}
        return ExplainedOperation(
            self.operation.name, {device.name: found.name}, refused, notes
        )


class _Record:
    """The plans made while `explain` traces a function.

    Its identity is part of the key of every jit cache, so that a function that is
    already compiled is traced again.

    Attributes:
        device: What `explain` is asked about; None for all platforms.
        plans: In the order in which they were made.
    """

    def __init__(self, device: Device | None):
        self.device = device
        self.plans: list[Plan] = []

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return (
            contextlib.nullcontext() if self.device is None else self.device.context()
        )


_RECORD = jax.make_user_context(None)


def asks_about_a_device() -> bool:
    """Whether plans are made for `explain` to say what a device runs.

    It need not be here, and what this machine has installed does not matter.
    """
    return _RECORD.value is not None and _RECORD.value.device is not None


def plan(
    operation: Operation, names: str | Sequence[str] | None, options: Any, operands: Any
) -> Plan:
    """Chooses, per platform, the first implementation that supports the operands.

    Raises:
        ValueError: a name is unknown.
        NotImplementedError: none of the requested implementations can run.
    """
    record = _RECORD.value
    if record is None:
        return _plan(operation, names, options, operands)
    with record.context():
        made = _plan(operation, names, options, operands)
    record.plans.append(made)
    return made


def _plan(
    operation: Operation, names: str | Sequence[str] | None, options: Any, operands: Any
) -> Plan:
    kernels: dict[str, Implementation] = {}
    reasons: dict[str, str] = {}
    yielding: list[tuple[Implementation, str]] = []
    fallback: Implementation | None = None
    for candidate in operation.candidates(names):
        if candidate.platform in kernels:
            continue  # nor can a later one for the same platform
        reason = _why_not(candidate, options, operands)
        if reason is not None:
            reasons[candidate.name] = reason
        elif candidate.platform is None:
            fallback = candidate
            break  # it runs everywhere: nothing after it can be reached
        elif names is None and (reason := candidate.yields(options, operands)):
            yielding.append((candidate, reason))
        else:
            kernels.setdefault(candidate.platform, candidate)
    for candidate, reason in yielding:
        assert candidate.platform is not None
        if kernels.setdefault(candidate.platform, candidate) is not candidate:
            reasons[candidate.name] = reason

    chosen = [*kernels.values()] if fallback is None else [*kernels.values(), fallback]
    if _RECORD.value is None:  # nobody reads notes, and finding them takes time
        chosen = []
    notes = [(i.name, note) for i in chosen if (note := i.note(options, operands))]
    made = Plan(
        operation,
        tuple(kernels.items()),
        fallback,
        tuple(reasons.items()),
        tuple(notes),
    )
    if not kernels and fallback is None:
        raise NotImplementedError(
            f"no requested implementation can run: {made.explained}\n"
            "Pass implementation=None to let softlib choose."
        )
    return made


def execute(plan: Plan, options: Any, operands: Any) -> Any:
    """Runs a plan; a kernel's derivative is that of the plain implementation."""
    if plan.is_reference:
        assert plan.fallback is not None
        return plan.fallback.call(options, operands)
    call = _primitive.Call(
        plan.operation.name,
        plan.operation.plain.call,
        None if plan.fallback is None else plan.fallback.call,
        None if plan.fallback is None else plan.fallback.accelerated,
        tuple(
            (platform, _primitive.OnPlatform(kernel.call, kernel.divided))
            for platform, kernel in plan.kernels
        ),
        options,
        jax.tree.structure(operands),
        jax.sharding.get_abstract_mesh().abstract_device,
    )
    return _primitive.run(call, operands)


def run(
    operation: Operation, names: str | Sequence[str] | None, options: Any, operands: Any
) -> Any:
    return execute(plan(operation, names, options, operands), options, operands)


def explain(
    function: Callable[..., Any],
    /,
    *args: Any,
    device: str | AbstractDevice | None = None,
    **kwargs: Any,
) -> Explanation:
    """Finds the implementation that each operation in a call would use.

    The call is traced, nothing is computed: `function` may be a whole training step,
    compiled or not, and arrays may be `jax.ShapeDtypeStruct`s. Arguments that are not
    arrays (numbers, strings, None) are passed on as they are.

    Args:
        function: Any function that calls softlib somewhere.
        *args: Its positional arguments (pytrees are fine).
        device: Static: the one device to answer for, which need not be here: `"cpu"`,
            `"a100"`, `"h100"`, `"b200"`, `"v4"`, `"v5e"`, `"v5p"`, `"v6e"`, `"tpu7x"`,
            or any other as a `jax.sharding.AbstractDevice`. Its machine is supposed
            to have cuDNN and an assembler without known faults, if it has a GPU. None
            answers for every platform, with this machine's device and what is installed
            here. It is not passed on: a keyword `device` of the function itself has to
            be bound by `functools.partial`.
        **kwargs: Its keyword arguments.

    Returns:
        An `Explanation`, which prints as text: per operation its name, what runs on
        which platform (or on the device), why the implementations before it in the
        order of preference do not, and what is worth knowing about the one that does
        (an option that saves no time there, an array that may be gathered).
        `operations` holds the same as fields.

    Raises:
        ValueError: the name of the device is unknown.
        NotImplementedError: an implementation that the call pins cannot run, or not on
            the device.

    Derivatives: none, the result is text. Derivatives *inside* `function` are shown:
    explain `jax.grad(loss)` to see the backward pass.
    Cost: one trace of `function`; no compilation, no memory for arrays.

    Example:
        >>> hidden, weight = jnp.ones((4, 8)), jnp.ones((100, 8))
        >>> labels = jnp.arange(4)
        >>> loss = softlib.losses.linear_softmax_cross_entropy
        >>> print(softlib.explain(loss, hidden, weight, labels, device="h100"))
        linear_row_statistics
          h100: xla
          not pallas_gpu: 4 rows are too few to gain by it
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [leaf if _is_array(leaf) else None for leaf in leaves]

    def call(arrays):
        merged = [
            leaf if array is None else array
            for leaf, array in zip(leaves, arrays, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, merged)
        return _arrays_of(function(*args, **kwargs))

    record = _Record(None if device is None else _explained_device.named(device))
    with _RECORD(record):
        jax.eval_shape(call, arrays)
    explained = [
        made.explained if record.device is None else made.explained_on(record.device)
        for made in record.plans
    ]
    distinct = {str(operation): operation for operation in explained}
    return Explanation(tuple(distinct.values()))


def _arrays_of(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _why_not(implementation: Implementation, options: Any, operands: Any) -> str | None:
    if implementation.platform is not None:
        axes = automatic_axes(operands)
        if axes:
            return f"mesh axis {axes[0]!r} is not manual; call it inside jax.shard_map"
        if has_symbolic_shape(operands):
            return "its tiles need sizes, and a dimension is symbolic (jax.export)"
    is_assembled = (implementation.family, implementation.platform) == (
        "pallas",
        "cuda",
    )
    if is_assembled and not asks_about_a_device():
        reason = _ptxas.why_not()
        if reason is not None:
            return reason
    return implementation.why_not(options, operands)
