"""Merges results of attention over disjoint sets of keys."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.numerics import RunningMax


class AttentionResult(NamedTuple):
    r"""Attention of every query, and the sum that its weights were divided by.

    Attributes:
        output: What the call without `return_lse` returns.
        lse: The logarithm of the sum of the weights before division, in nats: for
            softmax $\log \sum_j e^{z_{ij}}$, a sink included. float32, or float64 if an
            argument is; -inf for a query without keys, whose output is 0.
    """

    output: Float[Array, "*rows H"]
    lse: Float[Array, "*rows"]


@array_arguments
def merge_partials(
    outs: Float[Array, "P *rows H"] | Sequence[Float[Array, "*rows H"]],
    lses: Float[Array, "P ..."] | Sequence[Float[Array, "*rows"]],
) -> AttentionResult:
    r"""Attention over all keys, from results over disjoint sets of them.

    $$\ell = \log \sum_p e^{\ell_p}, \qquad o = \sum_p e^{\ell_p - \ell} o_p$$

    The parts may be the splits of a cache, the shards of a ring, or a prefix that many
    sequences share beside what each has of its own. The order is free, and merged
    results may be merged again: for a chain of them keep `outs` in float32, so that
    only the last is rounded.

    Args:
        outs: Results of the parts, one stacked array or a sequence of two or more
            arrays.
        lses: Their logsumexps in nats, in the same order and form. A part with -inf saw
            no keys for that row, and whatever its result holds is ignored.

    Returns:
        `AttentionResult`, in the dtypes of `outs` and of the sums (float32, float64 if
        an argument is). 0 and -inf where every part is empty, and for no parts.

    Raises:
        TypeError: An argument is not floating.
        ValueError: The shapes do not fit, or a sequence is empty.

    Derivatives: forward and reverse mode, any order, in `outs` and `lses`; zero in the
    result of a part that is empty.
    Cost: time and memory of the parts, once in float32.
    Source: softlib's own; the monoid of `softlib.numerics.RunningMax` on results.

    Example:
        >>> outs = jnp.array([[[1.0]], [[3.0]], [[jnp.nan]]])
        >>> lses = jnp.array([[0.0], [0.0], [-jnp.inf]])
        >>> out, lse = softlib.attention.merge_partials(outs, lses)
        >>> print(out[0, 0], jnp.exp(lse).round(4))
        2.0 [2.]
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    checks.require_floating("merge_partials", outs=outs, lses=lses)
    if outs.ndim < 2:
        raise ValueError(
            "merge_partials: `outs` must have the axes (P, *rows, H), got shape "
            f"{outs.shape}."
        )
    checks.require_shape(
        "merge_partials", "lses", lses, outs.shape[:-1], "that of `outs` without H"
    )
    out, lse = merge(outs, lses)
    return AttentionResult(out.astype(outs.dtype), lse)


def merge(
    outs: Float[Array, "P *rows H"], lses: Float[Array, "P ..."]
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """`merge_partials` of stacked results, returned in the dtype of the sums."""
    dtype = accumulator_dtype(outs, lses)
    outs, lses = outs.astype(dtype), lses.astype(dtype)
    outs = jnp.where(lses[..., None] == -jnp.inf, 0, outs)
    accumulator = RunningMax()
    state = accumulator.init(
        lses.shape[1:], dtype, weighted=jnp.zeros(outs.shape[1:], dtype)
    )
    if lses.shape[0]:
        weigh = lambda weights: (weights[..., None] * outs).sum(0)
        state = accumulator.update(state, lses, axis=0, weigh=weigh)
    return accumulator.mean(state), accumulator.finalize(state)


def _stacked(name: str, partials: Array | Sequence[Array]) -> Array:
    if not isinstance(partials, Sequence):
        return jnp.asarray(partials)
    shapes = list(dict.fromkeys(jnp.shape(each) for each in partials))
    if len(shapes) != 1:
        got = " and ".join(map(str, shapes)) or "an empty sequence"
        raise ValueError(
            f"merge_partials: `{name}` must hold arrays of one shape, got {got}."
        )
    return jnp.stack([jnp.asarray(each) for each in partials])
