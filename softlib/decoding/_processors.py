"""Changes of the logits before a token is drawn from them."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype

type LogitsFunction = Callable[[Array], Array]


class Processor(abc.ABC):
    """Base of processors that remember what was drawn.

    `softlib.decoding.generate` and `beam_search` keep the state, one row per sequence,
    and call the methods. A processor that remembers nothing is any function from
    logits (B, V) to logits (B, V), as `softlib.softmax.top_p_logits` with its options
    bound by `functools.partial`, or `lambda logits: logits / temperature`.

    Example:
        >>> automaton = softlib.decoding.TokenAutomaton(jnp.array([[0, -1]]))
        >>> print(isinstance(automaton, softlib.decoding.Processor))
        True
    """

    @abc.abstractmethod
    def init(self, batch: int, vocabulary: int) -> Any:
        """The state before the first token: a pytree of arrays with leading axis B."""

    @abc.abstractmethod
    def process(self, logits: Float[Array, "B V"], state: Any) -> Float[Array, "B V"]:
        """The logits to draw from; -inf excludes a token."""

    @abc.abstractmethod
    def advance(self, state: Any, tokens: Int[Array, " B"]) -> Any:
        """The state after one more token of each sequence."""


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(Processor):
    """Makes tokens that were seen less likely.

    Positive logits of seen tokens are divided by the penalty, negative ones are
    multiplied with it.

    Args:
        penalty: At least 1; 1 changes nothing.
        prompt: Token ids (B, T) that count as seen from the beginning; None for none.
            An id outside of the vocabulary, such as -1 for padding, counts as nothing.

    Raises:
        ValueError: `penalty` is below 1, raised at once; or `prompt` has another number
            of sequences.

    Cost: a boolean per sequence and token of the vocabulary.
    Source: "CTRL: A Conditional Transformer Language Model for Controllable
        Generation".

    Example:
        >>> penalty = softlib.decoding.RepetitionPenalty(2.0, jnp.array([[0, 2]]))
        >>> state = penalty.init(1, 3)
        >>> print(penalty.process(jnp.array([[1.0, 1.0, -1.0]]), state))
        [[ 0.5  1.  -2. ]]
    """

    penalty: float
    prompt: Any = None  # Integer[Array, "B T"]

    def __post_init__(self) -> None:
        name = "RepetitionPenalty"
        checks.require_positive_number(name, "penalty", self.penalty)
        if self.penalty < 1:
            raise ValueError(f"{name}: `penalty` must be >= 1, got {self.penalty}.")

    def init(self, batch, vocabulary):
        seen = jnp.zeros((batch, vocabulary), bool)
        if self.prompt is None:
            return seen
        prompt = jnp.asarray(self.prompt)
        checks.require_integer("RepetitionPenalty", prompt=prompt)
        if prompt.ndim != 2 or prompt.shape[0] != batch:
            raise ValueError(
                f"RepetitionPenalty: `prompt` must be ({batch}, T), one row per "
                f"sequence, got {prompt.shape}."
            )
        return self._marked(seen, prompt)

    def process(self, logits, state):
        less = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(state, less, logits)

    def advance(self, state, tokens):
        return self._marked(state, tokens[:, None])

    @staticmethod
    def _marked(seen: Array, tokens: Array) -> Array:
        rows = jnp.arange(seen.shape[0])[:, None]
        # A negative index would count from the end.
        places = jnp.where(tokens < 0, seen.shape[1], tokens)
        return seen.at[rows, places].set(True, mode="drop")


@dataclasses.dataclass(frozen=True)
class TokenAutomaton(Processor):
    """Allows only what a deterministic automaton over tokens accepts.

    Args:
        transitions: Integers (states, V): the state after a token, or -1 where the
            token is not allowed. The first state is 0. A stop token needs a transition
            in the states in which a sequence may end.

    Raises:
        TypeError: `transitions` are no integers; raised where it is used.
        ValueError: They are not (states, V) with V that of the logits.

    Cost: states x V integers, of which a row is read per sequence and step.

    Example:
        >>> pairs = jnp.array([[1, -1], [-1, 0]])  # token 0, then 1, then 0, ...
        >>> automaton = softlib.decoding.TokenAutomaton(pairs)
        >>> print(automaton.process(jnp.zeros((1, 2)), automaton.init(1, 2)))
        [[  0. -inf]]
    """

    transitions: Any  # Integer[Array, "states V"]

    def init(self, batch, vocabulary):
        table = jnp.asarray(self.transitions)
        checks.require_integer("TokenAutomaton", transitions=table)
        if table.ndim != 2 or table.shape[1] != vocabulary or not table.shape[0]:
            raise ValueError(
                "TokenAutomaton: `transitions` must be (states, V) with V = "
                f"{vocabulary}, got {table.shape}."
            )
        return jnp.zeros(batch, jnp.int32)

    def process(self, logits, state):
        allowed = jnp.asarray(self.transitions)[state] >= 0
        return jnp.where(allowed, logits, -jnp.inf)

    def advance(self, state, tokens):
        return jnp.asarray(self.transitions)[state, tokens].astype(jnp.int32)


for _kind, _field in ((RepetitionPenalty, "prompt"), (TokenAutomaton, "transitions")):
    # Values with arrays: they may be arguments of compiled functions.
    _static = [f.name for f in dataclasses.fields(_kind) if f.name != _field]
    jax.tree_util.register_dataclass(_kind, [_field], _static)


@array_arguments
def typical_logits(
    logits: Float[Array, "*batch V"], *, mass: float
) -> Float[Array, "*batch V"]:
    r"""Keeps the tokens whose information is nearest to the entropy of the row.

    Tokens are taken in the order of $|-\log p_v - H|$ until they hold a probability of
    at least `mass`; the others become -inf.

    Args:
        logits: Any floating dtype.
        mass: Static, in (0, 1]; 1 keeps all.

    Returns:
        The logits, -inf where a token is left out; at least one stays in a row that has
        a finite logit. The smallest distances stay, ties all together.

    Raises:
        TypeError: The logits are not floating.
        ValueError: `mass` is out of range.

    Derivatives: those of selecting entries.
    Cost: a sort of each row.
    Source: "Locally Typical Sampling".

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.2, 0.2, 0.1]))
        >>> print(jnp.isfinite(softlib.decoding.typical_logits(logits, mass=0.3)))
        [False  True  True False]
    """
    function = "typical_logits"
    checks.require_floating(function, logits=logits)
    if not (isinstance(mass, int | float) and 0 < mass <= 1):
        raise ValueError(f"{function}: `mass` must be in (0, 1], got {mass}.")
    if mass == 1:
        return logits
    wide = logits.astype(accumulator_dtype(logits))
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(wide), axis=-1)
    p = jnp.exp(log_p)
    information = jnp.where(p > 0, -log_p, jnp.inf)
    entropy = jnp.where(p > 0, p * information, 0).sum(-1, keepdims=True)
    distance = jnp.abs(information - entropy)
    order = jnp.argsort(distance, axis=-1)
    held = jnp.cumsum(jnp.take_along_axis(p, order, -1), axis=-1)
    # The first place at which enough is held; rounding may leave none.
    last = jnp.minimum((held < mass).sum(-1, keepdims=True), logits.shape[-1] - 1)
    bound = jnp.take_along_axis(jnp.take_along_axis(distance, order, -1), last, -1)
    return jnp.where(distance <= bound, logits, -jnp.inf)


def applied(
    processors: tuple[LogitsFunction | Processor, ...],
    states: tuple[Any, ...],
    logits: Float[Array, "B V"],
) -> Float[Array, "B V"]:
    """The logits after all processors, in their order."""
    for processor, state in zip(processors, states, strict=True):
        if isinstance(processor, Processor):
            logits = processor.process(logits, state)
        else:
            logits = processor(logits)
    return logits


def started(
    function: str,
    processors: tuple[LogitsFunction | Processor, ...],
    batch: int,
    vocabulary: int,
) -> tuple[Any, ...]:
    """The states of all processors before the first token, None for functions."""
    for processor in processors:
        if not (isinstance(processor, Processor) or callable(processor)):
            raise TypeError(
                f"{function}: `processors` must hold functions of logits or "
                f"`Processor`s, got {type(processor).__name__}."
            )
    return tuple(
        processor.init(batch, vocabulary) if isinstance(processor, Processor) else None
        for processor in processors
    )


def advanced(
    processors: tuple[LogitsFunction | Processor, ...],
    states: tuple[Any, ...],
    tokens: Integer[Array, " B"],
) -> tuple[Any, ...]:
    """The states of all processors after one more token."""
    return tuple(
        processor.advance(state, tokens) if isinstance(processor, Processor) else None
        for processor, state in zip(processors, states, strict=True)
    )
