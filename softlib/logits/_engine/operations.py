"""The operations of the row-statistics engine and their derivative rules.

A `custom_vjp` is needed because the transpose of a loop would store every tile. The
rules call the computation *inside* the decorated functions, never the functions
themselves: forward mode over the rule, hence every Hessian-vector product, would raise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from softlib import _dispatch
from softlib._dispatch import Implementation, Operation, Plan, absent
from softlib._dtypes import accumulator_dtype
from softlib._sharding import automatic_axes
from softlib.typing import Implementations

from . import (
    accelerator as _accelerator,
    kernels_gpu,
    kernels_tpu,
    other_classes,
    reference,
    stream as _stream,
    tile as _tile,
    tile_gradient,
)
from .accelerator import Accelerator, OnAccelerator
from .blocks import Blocks
from .head import Head, HeadGradient
from .kept import Exponentials, Kept, classes_of_exponentials
from .operand import Operand
from .stream import BackwardOperands
from .tile import Modifiers, Options, Ranked, RowStatistics
from .tile_gradient import RowCotangents


class Given(NamedTuple):
    """The operands of a row-statistics operation on an array of logits."""

    logits: Float[Array, "rows V"]
    labels: Int[Array, "rows L"] | None
    modifiers: Modifiers
    ranked: Ranked | None = None

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(self.logits, *self.modifiers.floating)


class Residuals(NamedTuple):
    """Residuals of a head for its backward pass."""

    head: Head
    lse: Float[Array, " rows"] | None
    mean: Float[Array, " rows"] | None
    kept: Kept | None
    # Static, hence in the tree's structure: () if hidden is learned, else None.
    learned: tuple[()] | None


class GivenGradient(NamedTuple):
    logits: Array
    modifiers: Modifiers  # without class_where

    def as_operands(self) -> Given:
        """The gradient in the structure of the operands."""
        return Given(self.logits, None, self.modifiers)


def linear(names: Implementations, options: Options, head: Head) -> RowStatistics:
    made = _dispatch.plan(LINEAR, names, options, head)
    if made.is_reference:
        return _dispatch.execute(made, options, head)  # JAX differentiates it
    return _linear(made, names, options, head)


def chained_linear(
    names: Implementations, options: Options, head: Head
) -> tuple[RowStatistics, Array]:
    """`linear`, and the weight to give to the next operation on the same head.

    Two operations on one weight would each make a gradient of its size, and their sum.
    If the second gets the weight that this one returns, its gradient is computed first
    and this one adds to it in place.
    """
    made = _dispatch.plan(LINEAR, names, options, head)
    if made.is_reference:
        return _dispatch.execute(made, options, head), head.weight
    return _chained(made, names, options, head)


def blockwise(
    names: Implementations, options: Options, operands: Blocks
) -> RowStatistics:
    return _recomputed_statistics(BLOCKWISE, names, options, operands)


def given(names: Implementations, options: Options, operands: Given) -> RowStatistics:
    return _recomputed_statistics(GIVEN, names, options, operands)


# ------------------------------------------------------------------------- linear heads
def _with_rule(
    function: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """A function of (plan, names, options, head) with its derivative rule.

    Symbolic zeros tell the rule whether `hidden` is learned. `shard_map` has none, so
    inside it `hidden` counts as learned.
    """

    def rule(symbolic_zeros: bool) -> Any:
        made = jax.custom_vjp(function, nondiff_argnums=(0, 1, 2))
        made.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)
        return made

    outside, inside = rule(True), rule(False)

    def call(*operands: Any) -> Any:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return (inside if manual else outside)(*operands)

    return call


def _statistics(
    made: Plan, names: Implementations, options: Options, head: Head
) -> RowStatistics:
    return _dispatch.execute(made, options, head)


def _linear_forward(made: Plan, names: Implementations, options: Options, head: Head):
    learned = () if getattr(head.hidden, "perturbed", True) else None
    head = _values(head)
    options_of_both = with_residuals(options)
    if made.fallback is not None and made.fallback.name == _FORWARD.name:
        machine = _keeping_machine(made, options_of_both, head)
        keeping = _keeping(made, machine)
        found, kept = _dispatch.execute(keeping, options_of_both, head)
    else:
        found, kept = _dispatch.execute(made, options_of_both, head), None
    residuals = Residuals(head, found.lse, found.mean_logit, kept, learned)
    return _tile.only(found, options), residuals


def _values(tree: Any) -> Any:
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)
    of = lambda leaf: leaf.value if is_primal(leaf) else leaf
    return jax.tree.map(of, tree, is_leaf=is_primal)


# Fills what is kept on platforms that keep nothing; it is never read.
_PLACEHOLDER = 0.0


def _keeping_machine(made: Plan, options: Options, head: Head) -> Accelerator | None:
    """The machine for which the residuals are: an accelerator, or None for a CPU.

    Residuals have the same structure on all platforms, and are those of the platform
    for which the program is traced, unless a kernel runs there.
    """
    platform = _accelerator.platform_that_keeps()
    if platform is None or platform in dict(made.kernels):
        return None
    count = classes_of_exponentials(options, head)
    return Accelerator() if count else None


@dataclasses.dataclass(frozen=True)
class _Keeping:
    """A forward pass with what the machine keeps, or with a placeholder for it.

    It is compared by value, because it belongs to the key of compiled programs.
    """

    forward: Callable[[Options, Head], RowStatistics]
    machine: Accelerator | None
    is_plain: bool = True

    def __call__(
        self, options: Options, head: Head
    ) -> tuple[RowStatistics, Kept | None]:
        is_same = (options.accelerator is None) == (self.machine is None)
        if self.is_plain and is_same:
            return _stream.forward_keeping(options, head)
        own = options.on(self.machine)
        kept = _stream.kept_buffers(own, head, _PLACEHOLDER)
        return self.forward(options, head), kept


def _keeping(made: Plan, machine: Accelerator | None) -> Plan:
    """The plan of a forward pass that returns what the machine keeps.

    Kernels keep nothing, nor does plain JAX on a machine of the other kind: there the
    backward pass recomputes it.
    """
    of_kernels = [
        (p, dataclasses.replace(kernel, call=_Keeping(kernel.call, machine, False)))
        for p, kernel in made.kernels
    ]
    plain = _Keeping(_stream.forward, machine)
    fallback = dataclasses.replace(
        _FORWARD, call=plain, accelerated=OnAccelerator(plain)
    )
    operation = dataclasses.replace(made.operation, implementations=(fallback,))
    return dataclasses.replace(
        made, operation=operation, kernels=tuple(of_kernels), fallback=fallback
    )


def _reading_kept(forward: Plan, backward: Plan) -> Plan:
    """The backward plan, computing all again where only the forward pass is a kernel.

    In programs that the compiler divides neither pass is one.
    """
    kernels = {platform: _RECOMPUTING for platform, _ in forward.kernels}
    kernels |= dict(backward.kernels)
    return dataclasses.replace(backward, kernels=tuple(kernels.items()))


def _backward(options: Options, operands: BackwardOperands) -> HeadGradient:
    """The gradient in plain JAX, from what this kind of machine has kept."""
    of_accelerator = isinstance(operands.kept, Exponentials)
    if of_accelerator != (options.accelerator is not None):
        operands = operands._replace(kept=None)
    return _stream.backward(options, operands)


def _recomputed_on_accelerator(
    options: Options, operands: BackwardOperands
) -> HeadGradient:
    own = options.on(Accelerator())
    return _stream.backward(own, operands._replace(kept=None))


def _linear_backward(
    made: Plan,
    names: Implementations,
    options: Options,
    residuals: Residuals,
    cotangents: RowStatistics,
):
    return _gradient(made, names, options, residuals, cotangents, None)


def _gradient(
    forward: Plan,
    names: Implementations,
    options: Options,
    residuals: Residuals,
    cotangents: RowStatistics,
    further: Array | None,
):
    head, lse, mean, kept, learned = residuals
    rows = RowCotangents(lse, mean, _instantiated(differentiable(cotangents)))
    options = dataclasses.replace(options, hidden_is_learned=learned is not None)
    operands = BackwardOperands(head, rows, kept, further)
    made = _dispatch.plan(LINEAR_GRADIENT, names, options, operands)
    if isinstance(kept, Exponentials):
        made = _reading_kept(forward, made)
    gradient: HeadGradient = _dispatch.execute(made, options, operands)
    return (gradient.as_operands(),)


def _instantiated(cotangents: RowStatistics) -> RowStatistics:
    is_zero = lambda leaf: isinstance(leaf, SymbolicZero)
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_zero(leaf) else leaf
    return jax.tree.map(zeros, cotangents, is_leaf=is_zero)


_linear = _with_rule(_statistics, _linear_forward, _linear_backward)


def _statistics_and_weight(
    made: Plan, names: Implementations, options: Options, head: Head
) -> tuple[RowStatistics, Array]:
    return _dispatch.execute(made, options, head), head.weight


def _chained_forward(made: Plan, names: Implementations, options: Options, head: Head):
    found, residuals = _linear_forward(made, names, options, head)
    return (found, _values(head.weight)), residuals


def _chained_backward(
    made: Plan,
    names: Implementations,
    options: Options,
    residuals: Residuals,
    cotangents: tuple[RowStatistics, Any],
):
    statistics, further = cotangents
    if isinstance(further, SymbolicZero):
        further = None
    return _gradient(made, names, options, residuals, statistics, further)


_chained = _with_rule(_statistics_and_weight, _chained_forward, _chained_backward)


def _linear_reference(options: Options, head: Operand) -> RowStatistics:
    raw = head.raw(options)
    return reference.statistics(options, raw, head.labels, head.ranked, head.modifiers)


def _linear_gradient_reference(
    options: Options, operands: BackwardOperands
) -> HeadGradient:
    head = operands.head

    def statistics(hidden, weight, modifiers):
        modifiers = modifiers._replace(
            class_where=head.modifiers.class_where, centre=head.modifiers.centre
        )
        same = head._replace(hidden=hidden, weight=weight, modifiers=modifiers)
        return differentiable(_linear_reference(options, same))

    modifiers = head.modifiers._replace(class_where=None, centre=None)
    _, pull = jax.vjp(statistics, head.hidden, head.weight, modifiers)
    gradient = HeadGradient(*pull(operands.rows.cotangents))
    return gradient.added_to(operands.further)


# -------------------------------------------------------------- given logits and blocks
def _recomputed_statistics(
    operation: Operation, names: Implementations, options: Options, operands: Any
) -> RowStatistics:
    """Statistics whose backward pass gets the operands, lse and mean, no products."""
    made = _dispatch.plan(operation, names, options, operands)
    if made.is_reference:
        return _dispatch.execute(made, options, operands)
    return _of_operands(made, names, options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _of_operands(
    made: Plan, names: Implementations, options: Options, operands: Any
) -> RowStatistics:
    return _dispatch.execute(made, options, operands)


def _of_operands_forward(
    made: Plan, names: Implementations, options: Options, operands: Any
):
    found = _dispatch.execute(made, with_residuals(options), operands)
    return _tile.only(found, options), (operands, found.lse, found.mean_logit)


def _of_operands_backward(
    made: Plan,
    names: Implementations,
    options: Options,
    residuals: tuple[Any, Array | None, Array | None],
    cotangents: RowStatistics,
):
    operands, lse, mean = residuals
    rows = RowCotangents(lse, mean, differentiable(cotangents))
    known = BackwardOperands(operands, rows)
    operation = _GRADIENTS[made.operation.name]
    gradient = _dispatch.run(operation, names, options, known)
    return (gradient.as_operands(),)


_of_operands.defvjp(_of_operands_forward, _of_operands_backward)


def _given_forward_xla(options: Options, operands: Given) -> RowStatistics:
    # One tile: XLA fuses the reductions, and partitions them over any sharded axis.
    raw = operands.logits.astype(operands.dtype)
    tile = _tile.logits_of(raw, options, operands.modifiers)
    labels, ranked = operands.labels, operands.ranked
    others = None
    asked, exclude_labels = options, options.exclude_labels
    if exclude_labels and labels is not None and labels.shape[1] == 1:
        pieces = other_classes.pieces_of(raw.shape[1])
        if pieces > 1:
            others = other_classes.sums(
                options, tile, labels, operands.modifiers, pieces
            )
            asked = options.without(*other_classes.SUMS)
            exclude_labels = False
    state = _tile.init(asked, raw.shape[0], labels, ranked, raw.dtype)
    state = _tile.update(
        state,
        tile,
        0,
        labels,
        ranked,
        operands.modifiers,
        exclude_labels=exclude_labels,
    )
    if others is not None:
        state = state._replace(**others._asdict())
    return _tile.finalize(state, options)


def _given_gradient_xla(options: Options, operands: BackwardOperands) -> GivenGradient:
    given, rows = operands.head, operands.rows
    raw = given.logits.astype(given.dtype)
    tile = _tile.logits_of(raw, options, given.modifiers)
    found = tile_gradient.cotangent_of_raw(
        tile, 0, given.labels, rows, options, given.modifiers
    )
    return GivenGradient(
        found.raw.astype(given.logits.dtype),
        tile_gradient.modifiers_like(given.modifiers, *found[1:]),
    )


def _given_reference(options: Options, operands: Given) -> RowStatistics:
    raw = operands.logits.astype(operands.dtype)
    return reference.statistics(
        options, raw, operands.labels, operands.ranked, operands.modifiers
    )


def _given_gradient_reference(
    options: Options, operands: BackwardOperands
) -> GivenGradient:
    given = operands.head

    def statistics(logits, modifiers):
        modifiers = modifiers._replace(
            class_where=given.modifiers.class_where, centre=given.modifiers.centre
        )
        same = given._replace(logits=logits, modifiers=modifiers)
        return differentiable(_given_reference(options, same))

    modifiers = given.modifiers._replace(class_where=None, centre=None)
    _, pull = jax.vjp(statistics, given.logits, modifiers)
    return GivenGradient(*pull(operands.rows.cotangents))


# ------------------------------------------------------------------------------- shared
def with_residuals(options: Options) -> Options:
    """Options that include the statistics which the backward pass needs."""
    if options.gradient_filter_eps is not None:
        return options.including("lse")
    if options.wants("mean_logit"):
        return options.including("lse", "mean_logit")
    return options


def differentiable(statistics: RowStatistics) -> RowStatistics:
    """The statistics without those that have no gradient."""
    return statistics._replace(max_logit=None, argmax=None, label_rank=None)


def _no_filter(options: Options, operands: Any) -> str | None:
    if options.gradient_filter_eps is None:
        return None
    return "it has no gradient filter (gradient_filter_eps)"


def gathers(options: Any, operands: Any) -> str | None:
    axes = automatic_axes(operands)
    if not axes:
        return None
    names = ", ".join(map(repr, axes))
    return (
        f"a weight whose classes are sharded over mesh axis {names} is gathered on "
        "every device; inside jax.shard_map `axis_name` keeps each device to its own"
    )


def stream_note(options: Options, head: Operand) -> str | None:
    notes = gathers(options, head), _stream.steps_on_accelerators(options, head)
    return "; ".join(filter(None, notes)) or None


def gradient_note(options: Options, operands: Any) -> str | None:
    """The notes of a gradient whose operands have a `head`."""
    notes = [stream_note(options, operands.head)]
    if options.gradient_filter_eps is not None:
        notes.append(
            "`gradient_filter_eps` drops blocks of the gradient, saves no time"
        )
    return "; ".join(filter(None, notes)) or None


_ABSENT = (absent("pallas_tpu", "tpu"), absent("pallas_gpu", "cuda"))

_FORWARD = Implementation(
    "xla", _stream.forward, note=stream_note, accelerated=OnAccelerator(_stream.forward)
)
LINEAR = Operation(
    "linear_row_statistics",
    (
        kernels_tpu.FORWARD,
        kernels_gpu.FORWARD,
        _FORWARD,
        Implementation("reference", _linear_reference, _no_filter),
    ),
)
# Backward pass on platforms where only the forward pass is a kernel.
_RECOMPUTING = Implementation("xla", _recomputed_on_accelerator)
LINEAR_GRADIENT = Operation(
    "linear_row_statistics_gradient",
    (
        kernels_tpu.BACKWARD,
        kernels_gpu.BACKWARD,
        Implementation(
            "xla",
            _backward,
            note=gradient_note,
            accelerated=OnAccelerator(_backward),
        ),
        Implementation("reference", _linear_gradient_reference, _no_filter),
    ),
)
BLOCKWISE = Operation(
    "blockwise_row_statistics",
    (
        *_ABSENT,
        _FORWARD,
        Implementation("reference", _linear_reference),
    ),
)
BLOCKWISE_GRADIENT = Operation(
    "blockwise_row_statistics_gradient",
    (
        *_ABSENT,
        Implementation(
            "xla",
            _stream.backward,
            note=gradient_note,
            accelerated=OnAccelerator(_stream.backward),
        ),
    ),
)
GIVEN = Operation(
    "row_statistics",
    (
        *_ABSENT,
        Implementation("xla", _given_forward_xla),
        Implementation("reference", _given_reference),
    ),
)
GIVEN_GRADIENT = Operation(
    "row_statistics_gradient",
    (
        *_ABSENT,
        Implementation("xla", _given_gradient_xla),
        Implementation("reference", _given_gradient_reference),
    ),
)
_GRADIENTS = {BLOCKWISE.name: BLOCKWISE_GRADIENT, GIVEN.name: GIVEN_GRADIENT}
