"""The divergence of two heads as an operation with a derivative rule.

It takes two passes over the vocabulary: the row-statistics engine computes the
logsumexp of each head, then the terms of both are summed over classes. One pass would
not know the logsumexps, and rounding would hide small differences of distributions.

As in `operations`, the rules call the computation inside the decorated function, so
that they can be differentiated themselves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from softlib import _dispatch
from softlib._dispatch import Implementation, Operation, Plan, absent
from softlib._dtypes import common_dtype
from softlib._sharding import match_varying
from softlib.typing import Implementations

from . import (
    operations,
    pair_stream,
    pair_terms,
    tile as _tile,
    tile_gradient,
)
from .accelerator import OnAccelerator
from .head import Head
from .operand import Operand
from .operations import Given
from .pair_stream import KnownPair, Pair, PairBackwardOperands, PairOptions
from .pair_terms import Slopes, Terms
from .tile import Options, RowStatistics
from .vocabulary_parallel import first_class, merged


class GivenPair(NamedTuple):
    """The operands of a divergence of arrays of logits."""

    target: Given
    other: Given
    mixture: Float[Array, ""] | None


def linear(
    names: Implementations, options: PairOptions, pair: Pair
) -> Float[Array, " rows"]:
    """The divergence per row; that of the shard's classes if these are divided."""
    made = _dispatch.plan(PAIR, names, options, pair)
    if made.is_reference:
        lse = tuple(
            map(functools.partial(_lse, names, options), options.both, pair.both)
        )
        return _dispatch.execute(made, options, KnownPair(pair, lse))
    return _linear(made, names, options, pair)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(
    made: Plan, names: Implementations, options: PairOptions, pair: Pair
) -> Float[Array, " rows"]:
    return _sums(made, names, options, pair)[1].value


def _sums(
    made: Plan, names: Implementations, options: PairOptions, pair: Pair
) -> tuple[KnownPair, Terms]:
    lse = tuple(map(functools.partial(_lse, names, options), options.both, pair.both))
    known = KnownPair(pair, lse)
    found = _dispatch.execute(made, options, known)
    return known, found._replace(value=_with_exceptions(options, found.value, lse))


def _linear_forward(
    made: Plan, names: Implementations, options: PairOptions, pair: Pair
):
    known, (value, slopes) = _sums(made, names, options, pair)
    if options.axis_name is not None:
        # Classes of one device have the derivatives of a sum over all classes.
        slopes = lax.psum(slopes, options.axis_name)
        slopes = match_varying(slopes, pair.target.like)
    return value, (known, slopes)


def _linear_backward(
    made: Plan,
    names: Implementations,
    options: PairOptions,
    residuals: tuple[KnownPair, Slopes],
    cotangent: Float[Array, " rows"],
):
    known, sums = residuals
    if options.divergence != "jensen_shannon":  # as in `_with_exceptions`
        cotangent = jnp.where(_massless(known.lse), 0, cotangent)
    gradient = _dispatch.run(
        PAIR_GRADIENT, names, options, PairBackwardOperands(known, sums, cotangent)
    )
    target, other = gradient.target.as_operands(), gradient.other.as_operands()
    return (Pair(target, other, gradient.mixture),)


_linear.defvjp(_linear_forward, _linear_backward)


def _lse(
    names: Implementations, options: PairOptions, own: Options, head: Operand
) -> Float[Array, " rows"]:
    """Logsumexp over all classes, without the derivative rule of the engine."""
    own = own.including("lse")
    is_linear = isinstance(head, Head)
    operation = operations.LINEAR if is_linear else operations.BLOCKWISE
    made = _dispatch.plan(operation, names, own, head)
    found: RowStatistics = _dispatch.execute(made, own, head)
    axis = options.axis_name
    if axis is not None:
        offset = first_class(axis, head.vocabulary(own))
        found = merged(found, axis, offset)
        found = match_varying(found, head.like)
    assert found.lse is not None
    return found.lse


def _with_exceptions(
    options: PairOptions, value: Array, lse: tuple[Array, ...]
) -> Array:
    """The value with 0 for an empty target, and no gradient if either row is empty.

    Jensen-Shannon divergences need no exception: the terms of an empty row are 0.
    """
    if options.divergence == "jensen_shannon":
        return value
    value = jnp.where(lse[0] == -jnp.inf, 0, value)
    return jnp.where(_massless(lse), lax.stop_gradient(value), value)


def _massless(lse: tuple[Array, ...]) -> Array:
    return (lse[0] == -jnp.inf) | (lse[1] == -jnp.inf)


# ------------------------------------------------------------------------- given logits
def given(
    names: Implementations, options: PairOptions, operands: GivenPair
) -> Float[Array, " rows"]:
    """The divergence per row of two arrays of logits; JAX differentiates it."""

    def lse(own: Options, logits: Given) -> Array:
        found = operations.given(names, own.including("lse"), logits).lse
        assert found is not None
        return found

    both = operands[:2]
    known = tuple(map(lse, options.both, both))
    raws = tuple(o.logits.astype(o.dtype) for o in both)
    return _of_raw(options, raws, both, known, operands.mixture)


def _of_raw(
    options: PairOptions,
    raws: tuple[Array, ...],
    operands: tuple[Given, ...] | tuple[Operand, ...],
    lse: tuple[Array, ...],
    mixture: Array | None,
) -> Float[Array, " rows"]:
    def log_p(raw: Array, own: Options, operand: Given | Operand, lse: Array) -> Array:
        modifiers = operand.modifiers
        tile = _tile.logits_of(raw, own, modifiers)
        labels = operand.labels if own.exclude_labels else None
        return tile_gradient.log_probabilities(tile, lse, modifiers, 0, labels)

    s, t = map(log_p, raws, options.both, operands, lse)
    dtype = common_dtype(s.dtype, t.dtype)
    found = pair_terms.values(
        options.divergence, s.astype(dtype), t.astype(dtype), mixture
    )
    return _with_exceptions(options, found.sum(1), lse)


def _reference(options: PairOptions, known: KnownPair) -> Float[Array, " rows"]:
    heads = known.pair.both
    raws = tuple(h.raw(o) for h, o in zip(heads, options.both, strict=True))
    return _of_raw(options, raws, heads, known.lse, known.pair.mixture)


def _note(options: PairOptions, pair: Pair) -> str | None:
    steps = pair_stream.steps_on_accelerators(options, pair)
    return "; ".join(filter(None, (operations.gathers(options, pair), steps))) or None


def _gradient_note(options: PairOptions, operands: PairBackwardOperands) -> str | None:
    return _note(options, operands.known.pair)


_ABSENT = (absent("pallas_tpu", "tpu"), absent("pallas_gpu", "cuda"))

PAIR = Operation(
    "linear_divergence",
    (
        *_ABSENT,
        Implementation(
            "xla",
            pair_stream.forward,
            note=_note,
            accelerated=OnAccelerator(pair_stream.forward),
        ),
        Implementation("reference", _reference),
    ),
)
PAIR_GRADIENT = Operation(
    "linear_divergence_gradient",
    (
        *_ABSENT,
        Implementation(
            "xla",
            pair_stream.backward,
            note=_gradient_note,
            accelerated=OnAccelerator(pair_stream.backward),
        ),
    ),
)
