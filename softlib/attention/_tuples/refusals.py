"""Reasons against kernels for pairs of keys on any device."""

import jax

from softlib import _kernel_limits as limits
from softlib.attention._engine.scores import Softmax
from softlib.attention._engine.tiles import OWN_BLOCKS, Operands, Options
from softlib.masks import Between

# Smaller problems do not fill a tile, and plain JAX compiles faster.
LEAST_LENGTH, LEAST_FEATURES = 128, 32


def why_no_options(options: Options, operands: Operands) -> str | None:
    """The reason against kernels by options, missing operands or sizes, or None."""
    if len(operands.outer) != 1:
        return f"it takes two key axes, not {len(operands.outer) + 1}"
    if operands.value is None:
        return "it computes no statistics without values"
    if options.kind != Softmax():
        return f"it has no weights of kind {type(options.kind).__name__}"
    if options.softcap is not None:
        return "it has no softcap"
    if operands.bias is not None or operands.dense is not None:
        return "it takes no array over tuples"
    if operands.sinks is not None or operands.rows:
        return "it takes no array over rows"
    if options.has_given_blocks:
        return OWN_BLOCKS
    query, *lengths = operands.plan.lengths
    batch, _, heads, features = operands.query.shape
    if not (batch and heads):
        return "an axis is empty"
    sizes = (
        ("queries", query, LEAST_LENGTH),
        ("keys", min(lengths), LEAST_LENGTH),
        ("features of a query", features, LEAST_FEATURES),
        ("features of a value", operands.value.shape[-1], LEAST_FEATURES),
    )
    return limits.why_too_small(sizes)


def why_no_mask(operands: Operands) -> str | None:
    """The reason why a mask cannot be listed beforehand or evaluated in a kernel."""
    plan = operands.plan
    if plan.counts is not None:
        return "its lists of blocks are static, those of the plan are data"
    if jax.tree.leaves(plan.mask):
        return "it looks into no array of a mask"
    if not plan.mask._is_arithmetic():
        return "the mask is no arithmetic on positions"
    if not all(isinstance(each, Between) for each in plan.mask.joint):
        return "it evaluates no function as a joint mask, only masks.Between"
    return None
