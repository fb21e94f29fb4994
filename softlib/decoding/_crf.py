"""The most likely labels of a linear-chain conditional random field."""

from typing import Literal, NamedTuple

from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._linear_chain import METHODS, best_sequence, checked_chain, labelled


class ViterbiPath(NamedTuple):
    """The best label sequence of each chain.

    Attributes:
        tags: Its labels (*batch, T), int32; 0 in steps that do not count.
        score: Its score (*batch,).
    """

    tags: Int[Array, "*batch T"]
    score: Float[Array, "*batch"]


@array_arguments
def crf_viterbi(
    emissions: Float[Array, "*batch T K"],
    transitions: Float[Array, "K K"],
    *,
    start: Float[Array, " K"] | None = None,
    end: Float[Array, " K"] | None = None,
    where: Bool[Array, "..."] | None = None,
    method: Literal["sequential", "associative"] = "sequential",
) -> ViterbiPath:
    r"""Most likely label sequence of a linear-chain CRF, by Viterbi's algorithm.

    It maximises the score $s(y)$ of `softlib.losses.crf_loss`. Of ties the label of
    the lowest id is taken, from the last step to the first.

    Args:
        emissions: Scores of the K labels in each step.
        transitions: From label $i$ to label $j$; -inf forbids.
        start: Score of the first label; None: 0.
        end: Score of the last label; None: 0.
        where: True for the steps that count, usually the first ones of each sequence;
            broadcasts to the steps of `emissions`. The others are as if they were not
            there.
        method: Static. "sequential" takes a step after the other; "associative" joins
            neighbours in a tree of depth log T, with K times the work. Rounding may
            decide ties differently.

    Returns:
        A `ViterbiPath`, with a score in float32 (float64 if an argument is float64); 0
        for a sequence without a step that counts, -inf if all labels are forbidden.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `method` is unknown.

    Derivatives: the score has those of the score of its tags, which have none.
    Cost: O(T K^2) time and O(T K) integers; "associative": O(T K^3) time.
    Source: "Error Bounds for Convolutional Codes and an Asymptotically Optimum Decoding
        Algorithm"; the tagger of "Did We Miss Something Important? Studying and
        Exploring Variable-Aware Log Abstraction".

    Example:
        >>> emissions = jnp.array([[2.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> stay = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        >>> path = softlib.decoding.crf_viterbi(emissions, stay)
        >>> print(path.tags, path.score)
        [0 0 0] 6.0
    """
    function = "crf_viterbi"
    chain = checked_chain(function, emissions, transitions, start, end, where)
    checks.require_one_of(function, "method", method, METHODS)
    tags = best_sequence(lax.stop_gradient(chain), method)
    return ViterbiPath(tags, labelled(chain, tags).scores.sum(-1))
