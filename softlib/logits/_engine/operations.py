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
from softlib._sharding import automatic_axes, match_varying
from softlib.typing import Implementations

from . import (
    kernels_gpu,
    kernels_tpu,
    other_classes,
    stream as _stream,
    tile as _tile,
    tile_gradient,
)
from .accelerator import OnAccelerator
from .blocks import Blocks
from .head import Head, HeadGradient
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
    kept: Array | None  # raw products of the first classes
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
        found, kept = _dispatch.execute(_keeping(made), options_of_both, head)
    else:
        found, kept = _dispatch.execute(made, options_of_both, head), None
    residuals = Residuals(head, found.lse, found.mean_logit, kept, learned)
    return _tile.only(found, options), residuals


def _values(tree: Any) -> Any:
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)
    of = lambda leaf: leaf.value if is_primal(leaf) else leaf
    return jax.tree.map(of, tree, is_leaf=is_primal)


# Fills the array of kept products on platforms that keep none; it is never read.
_PLACEHOLDER = 0.0


@dataclasses.dataclass(frozen=True)
class _WithPlaceholder:
    """A forward pass that keeps no products and returns a placeholder for them.

    It is compared by value, because it belongs to the key of compiled programs.
    """

    forward: Callable[[Options, Head], RowStatistics]

    def __call__(
        self, options: Options, head: Head
    ) -> tuple[RowStatistics, Array | None]:
        # The types of the results are those of the passes that keep products.
        shape = _stream.kept_shape(options.on(None), head)
        kept = None
        if shape is not None:
            kept = jnp.full(shape, _PLACEHOLDER, head.dtype)
        return self.forward(options, head), match_varying(kept, head.hidden)


def _keeping(made: Plan) -> Plan:
    """The plan of a forward pass that keeps products where it is plain JAX on a CPU.

    Residuals have the same structure on all platforms. Kernels keep no products, and
    neither do the large steps of accelerators: their backward passes recompute them.
    """
    of_kernels = [
        (platform, dataclasses.replace(kernel, call=_WithPlaceholder(kernel.call)))
        for platform, kernel in made.kernels
    ]
    fallback = dataclasses.replace(
        _FORWARD,
        call=_stream.forward_keeping,
        accelerated=OnAccelerator(_WithPlaceholder(_stream.forward)),
    )
    operation = dataclasses.replace(made.operation, implementations=(fallback,))
    return dataclasses.replace(
        made, operation=operation, kernels=tuple(of_kernels), fallback=fallback
    )


def _recomputed(options: Options, operands: BackwardOperands) -> HeadGradient:
    return _stream.backward(options, operands._replace(kept=None))


def _linear_backward(
    made: Plan,
    names: Implementations,
    options: Options,
    residuals: Residuals,
    cotangents: RowStatistics,
):
    return _gradient(names, options, residuals, cotangents, None)


def _gradient(
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
    gradient: HeadGradient = _dispatch.run(LINEAR_GRADIENT, names, options, operands)
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
    return _gradient(names, options, residuals, statistics, further)


_chained = _with_rule(_statistics_and_weight, _chained_forward, _chained_backward)


def _linear_reference(options: Options, head: Operand) -> RowStatistics:
    raw = head.raw(options)
    return _reference(options, raw, head.labels, head.ranked, head.modifiers)


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
    return _reference(
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
def _reference(
    options: Options,
    raw: Array,
    labels: Array | None,
    ranked: Ranked | None,
    modifiers: Modifiers,
) -> RowStatistics:
    """The statistics by their definitions, of whole rows."""
    z = _tile.logits_of(raw, options, modifiers).z
    where = modifiers.class_where
    present = _tile.select(z, where, -jnp.inf)
    counted = _tile.select(z, where, 0)
    asked = present
    if options.exclude_labels:
        assert labels is not None
        classes = jnp.arange(z.shape[1])[None, None, :]
        own = (classes == labels[..., None]).any(1)
        asked = jnp.where(own, -jnp.inf, present)
    weighed = asked
    if modifiers.class_log_weights is not None:
        weighed = weighed + modifiers.class_log_weights.astype(z.dtype)[None]
    top = jax.lax.stop_gradient(weighed).max(1)
    empty = top == -jnp.inf
    shift = jnp.where(empty, 0, top)
    exponentials = jnp.exp(weighed - shift[:, None])
    # Selected before the logarithm too: 0 * inf in a derivative is NaN.
    total = jnp.where(empty, 1, exponentials.sum(1))
    lse = jnp.where(empty, -jnp.inf, shift + jnp.log(total))
    p = exponentials / total[:, None]
    finite = jnp.where(weighed == -jnp.inf, 0, present)
    found = RowStatistics(
        lse=lse,
        mean_logit=(p * finite).sum(1),
        sum_logits=counted.sum(1),
        sum_squared_logits=(counted * counted).sum(1),
        max_logit=jax.lax.stop_gradient(present).max(1),
        argmax=jnp.argmax(present, axis=1).astype(jnp.int32),
        sum_softplus=jax.nn.softplus(asked).sum(1),
    )
    if labels is not None:
        inside = labels >= 0
        at = jnp.take_along_axis(z, jnp.where(inside, labels, 0), axis=1)
        found = found._replace(label_logits=jnp.where(inside, at, 0))
    if ranked is not None:
        others = z[:, None, :]
        own, ids = ranked.logits[..., None], ranked.labels[..., None]
        classes = jnp.arange(z.shape[1])[None, None, :]
        before = (others > own) | ((others == own) & (classes < ids))
        before = before & (classes != ids)
        if where is not None:
            before = before & where.reshape(-1, 1, z.shape[1])
        found = found._replace(label_rank=before.sum(-1, dtype=jnp.int32))
    return _tile.only(found, options)


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
LINEAR_GRADIENT = Operation(
    "linear_row_statistics_gradient",
    (
        kernels_tpu.BACKWARD,
        kernels_gpu.BACKWARD,
        Implementation(
            "xla",
            _stream.backward,
            note=gradient_note,
            accelerated=OnAccelerator(_recomputed),
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
