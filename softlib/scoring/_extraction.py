"""Confidence that sampled continuations are memorised; groups of equal ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode
from softlib.softmax import softmax


@array_arguments
def calibrated_confidence(
    sequence_nll: Float[Array, " S"],
    groups: Integer[Array, " S"],
    *,
    num_groups: int | None = None,
    where: Bool[Array, " S"] | None = None,
) -> Float[Array, " S"]:
    r"""Confidence in each of several sampled sequences, given how often it came.

    For sequence $g$ with negative log-likelihood $s_g$, drawn $n_g$ times of $S$,

    $$c_g = \frac{n_g e^{-s_g}}{\sum_h n_h e^{-s_h}} ,$$

    which compares a sequence with the other candidates for the same prefix, while a
    likelihood alone also says how easy the prefix is. Take the candidate of the
    greatest confidence, and rank prefixes by it.

    Args:
        sequence_nll: Sum of the token losses of each sample, in nats; +inf is legal.
        groups: Which samples are the same sequence: ids in $[0, G)$, as those of
            `identical_groups`. A sample with another id that counts makes all NaN.
        num_groups: Static $G$; None for $S$.
        where: True for the samples that count. The others have confidence 0.

    Returns:
        A confidence per sample, the same within a group; over distinct groups they sum
        to 1. In the dtype of `sequence_nll`. 0 for all if no sample is possible.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or `num_groups` is no Python
            int.
        ValueError: Shapes differ, or `num_groups` is below 1.

    Derivatives: any order, with respect to `sequence_nll`.
    Cost: O(S + G). In logarithms: $e^{-s}$ itself is 0 in float32 from 104 nats on, a
        few dozen tokens.
    Source: "Ethicist: Targeted Training Data Extraction Through Loss Smoothed Soft
        Prompting and Calibrated Confidence Estimation". Where losses differ within a
        group, each sample counts with its own.

    Example:
        >>> nll, groups = jnp.full(4, 200.0), jnp.array([0, 1, 1, 1])
        >>> print(softlib.scoring.calibrated_confidence(nll, groups))
        [0.25 0.75 0.75 0.75]
    """
    function = "calibrated_confidence"
    nll, groups = jnp.asarray(sequence_nll), jnp.asarray(groups)
    checks.require_floating(function, sequence_nll=nll)
    checks.require_integer(function, groups=groups)
    if nll.ndim != 1:
        raise ValueError(
            f"{function}: `sequence_nll` must have one axis (S,), got shape "
            f"{nll.shape}."
        )
    why = "one per sample"
    checks.require_shape(function, "groups", groups, nll.shape, why)
    if num_groups is None:
        num_groups = max(1, nll.size)
    checks.require_positive_integer(function, "num_groups", num_groups)
    counts = jnp.ones(nll.shape, bool) if where is None else jnp.asarray(where)
    checks.require_boolean(function, where=counts)
    checks.require_shape(function, "where", counts, nll.shape, why)

    groups = labels_in_range(groups, num_groups)
    inside = groups >= 0
    ids = jnp.where(inside, groups, 0)
    wide = jnp.where(counts, nll, 0).astype(accumulator_dtype(nll))
    # The share of each sample; in a group of n equal ones they add up to n e^-s.
    share = softmax(0 - wide, where=counts)
    share = jnp.where((inside | ~counts).all(), share, jnp.nan)
    of_groups = lambda ids, share: jax.ops.segment_sum(share, ids, num_groups)[ids]
    confidence = in_auto_mode(of_groups, lambda spec: spec, ids, share)
    return jnp.where(counts, confidence, 0).astype(nll.dtype)


@array_arguments(as_given=("sequences",))
def identical_groups(
    sequences: Integer[Array, "S T"], *, where: Bool[Array, "S T"] | None = None
) -> Int[Array, " S"]:
    """Index of the first sample that is the same sequence, for each sample.

    Args:
        sequences: Tokens of each sample.
        where: True for the tokens that count: padding behind an end-of-text token may
            hold anything.

    Returns:
        int32 ids in $[0, S)$, for `calibrated_confidence`.

    Raises:
        TypeError: `sequences` is not integer, or `where` not boolean.
        ValueError: `sequences` has not two axes, or the shapes differ.

    Derivatives: none, the ids are integers.
    Cost: time O(S² T), memory O(S²) where the compiler fuses the comparison.
    Source: the duplicates of "Ethicist: Targeted Training Data Extraction Through Loss
        Smoothed Soft Prompting and Calibrated Confidence Estimation".

    Example:
        >>> samples = jnp.array([[4, 2], [1, 1], [4, 2]])
        >>> print(softlib.scoring.identical_groups(samples))
        [0 1 0]
    """
    function = "identical_groups"
    sequences = jnp.asarray(sequences)
    checks.require_integer(function, sequences=sequences)
    if sequences.ndim != 2:
        raise ValueError(
            f"{function}: `sequences` must have two axes (S, T), got shape "
            f"{sequences.shape}."
        )
    equal = sequences[:, None] == sequences[None]
    if where is not None:
        where = jnp.asarray(where)
        checks.require_boolean(function, where=where)
        why = "that of `sequences`"
        checks.require_shape(function, "where", where, sequences.shape, why)
        one, two = where[:, None], where[None]
        equal = (equal & one & two) | (~one & ~two)
    if not len(sequences):
        return jnp.zeros(0, jnp.int32)
    # The index of the first True of a row; the diagonal is True.
    return jnp.argmax(equal.all(-1), axis=1).astype(jnp.int32)
