"""A Markov chain over remembered samples, moved by proposals from a model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from softlib import _checks as checks
from softlib._array_arguments import array_arguments


class IndependenceChain(NamedTuple):
    """The memories of a chain, one per question.

    Attributes:
        memory: The remembered rationales: an array, or a pytree of arrays.
        memory_correct: Whether each ends in the right answer.
    """

    memory: Any
    memory_correct: Bool[Array, " M"]


@array_arguments
def independence_chain_update[T](
    memory: T,
    proposal: T,
    memory_correct: Bool[Array, " M"],
    proposal_correct: Bool[Array, " M"],
) -> IndependenceChain:
    r"""Moves the memory of each question to its proposal if that is correct.

    With proposals drawn from $p(z | x)$ this is an independence sampler: the move from
    a correct rationale to another is always accepted, that to a wrong one never, and
    its stationary law is the posterior $p(z | x, y)$ of correct rationales. A memory
    that is still wrong is replaced by the first correct proposal.

    Args:
        memory: The rationale of each question: an array, or a pytree of arrays, with
            the questions on the leading axis. It persists between epochs.
        proposal: The same, drawn from the model in this step.
        memory_correct: Whether the remembered rationale ends in the right answer.
        proposal_correct: Whether the proposal does.

    Returns:
        The new memory, and whether it is correct.

    Raises:
        TypeError: A flag is not boolean.
        ValueError: Shapes differ, or the pytrees do.

    Derivatives: those of a selection.
    Cost: one pass over the memory.
    Source: "Training Chain-of-Thought via Latent-Variable Inference".

    Example:
        >>> memory, proposal = jnp.array([[1, 2], [3, 4]]), jnp.array([[5, 6], [7, 8]])
        >>> was, found = jnp.array([True, True]), jnp.array([True, False])
        >>> chain, correct = independence_chain_update(memory, proposal, was, found)
        >>> print(chain.tolist(), correct)
        [[5, 6], [3, 4]] [ True  True]
    """
    function = "independence_chain_update"
    flags = jnp.asarray(memory_correct), jnp.asarray(proposal_correct)
    checks.require_boolean(function, memory_correct=flags[0], proposal_correct=flags[1])
    was, found = flags
    why = "one per question"
    checks.require_shape(function, "memory_correct", was, (was.size,), why)
    checks.require_shape(function, "proposal_correct", found, was.shape, why)

    def move(old: Array, new: Array) -> Array:
        old, new = jnp.asarray(old), jnp.asarray(new)
        checks.require_rank(function, "memory", old, 1, "(M, ...)")
        checks.require_shape(function, "proposal", new, old.shape, "that of `memory`")
        questions = old.shape[:1]
        checks.require_shape(function, "memory_correct", was, questions, why)
        return jnp.where(found.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return IndependenceChain(jax.tree.map(move, memory, proposal), was | found)
