"""Drafts: what proposes tokens for a model to verify."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks

from ._generate import Step, formed_logits
from ._processors import LogitsFunction


class Drafted(NamedTuple):
    """Tokens that a `Draft` proposes for each sequence of a batch.

    Attributes:
        tokens: The next g tokens.
        logits: From which they were drawn, one row for each; None for tokens that
            nothing drew.
        counts: How many of the tokens are meant, from the first on, 0 to g; None for
            all. The model is asked for one token only where no sequence has a draft.
        state: The next state of the draft.
    """

    tokens: Int[Array, "B g"]
    logits: Float[Array, "B g V"] | None
    counts: Int[Array, " B"] | None
    state: Any


class Draft(abc.ABC):
    """Base of what proposes tokens in `softlib.decoding.speculative_generate`.

    A draft is given all tokens so far; one that is itself a model also keeps a state.
    Whatever it proposes, the result has the law of the model that verifies.

    Example:
        >>> draft = softlib.decoding.PromptLookup(draft_length=4)
        >>> print(isinstance(draft, softlib.decoding.Draft))
        True
    """

    @abc.abstractmethod
    def propose(
        self,
        key: Array | None,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"],
        state: Any,
    ) -> Drafted:
        """Proposes what follows the first `lengths` of the tokens.

        Behind these the tokens are -1. Without a key the likeliest token is wanted.
        """

    def init(self) -> Any:
        """The state after the prompt: a pytree."""
        return ()

    def rewind(self, state: Any, counts: Int[Array, " B"]) -> Any:
        """The state without the last `counts` of the tokens of the last proposal.

        These are the last token before it and its g own, g + 1 together, of which the
        model keeps those but the last `counts`.
        """
        return state


@dataclasses.dataclass(frozen=True)
class PromptLookup(Draft):
    """Copies what followed the last tokens where they stood before.

    The longest end of the sequence that occurs earlier in it is looked up, the latest
    occurrence if there are several, and the tokens behind it are proposed. They go on
    periodically where the occurrence reaches into the end itself. It pays where text is
    copied: edits, summaries, answers from a document, code.

    Args:
        draft_length: Tokens of a proposal, g.
        longest: Longest end that is compared; a longer one counts as this long.
        shortest: A sequence without an occurrence of this length has no draft.

    Raises:
        TypeError: An argument is no Python int.
        ValueError: One is below 1, or `shortest` is above `longest`.

    Cost: `longest` comparisons per token so far; no state.
    Source: "Prompt Lookup Decoding", and LZ77 for the periodic end.

    Example:
        >>> draft = softlib.decoding.PromptLookup(draft_length=3)
        >>> tokens = jnp.array([[7, 5, 6, 1, 2, 5, 6]])
        >>> print(draft.propose(None, tokens, jnp.array([7]), ()).tokens)
        [[1 2 5]]
    """

    draft_length: int = 8
    longest: int = 8
    shortest: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            checks.require_positive_integer("PromptLookup", field.name, value)
        if self.shortest > self.longest:
            raise ValueError(
                "PromptLookup: `shortest` must be at most `longest` = "
                f"{self.longest}, got {self.shortest}."
            )

    def propose(
        self,
        key: Array | None,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"],
        state: Any,
    ) -> Drafted:
        size = tokens.shape[1]
        place = jnp.arange(size)[None]
        end = lengths[:, None] - 1
        matched = jnp.zeros(tokens.shape, jnp.int32)
        agrees = place < end
        for back in range(self.longest):
            last = _at(tokens, end - back)
            agrees &= (jnp.roll(tokens, back, 1) == last) & (place >= back)
            matched += agrees.astype(jnp.int32)
        # The latest of the best: argmax takes the first.
        found = size - 1 - jnp.argmax(matched[:, ::-1], axis=1)[:, None]
        length = jnp.take_along_axis(matched, found, 1)[:, 0]
        period = jnp.maximum(end - found, 1)
        ahead = jnp.arange(self.draft_length)[None] % period
        counts = jnp.where(length >= self.shortest, self.draft_length, 0)
        return Drafted(_at(tokens, found + 1 + ahead), None, counts, state)


@dataclasses.dataclass(frozen=True)
class NGramDraft(Draft):
    """Proposes the token that followed the longest known context most often.

    The contexts are those of a text that was counted once, by `NGramDraft.fit`, as a
    tree: below the root the last token, below it the one before. A proposal walks down
    as far as the tree knows the context, g times.

    Args:
        token: Of each node but the root, whose entry is not read; the children of a
            node stand together, in the order of their tokens.
        first_child: Index of each node's first child, and one more entry: those of
            node n are `first_child[n]` to `first_child[n + 1]`.
        likeliest: The token that followed each context most often.
        order: Static: tokens of a context and the one that follows.
        draft_length: Static: tokens of a proposal, g.
        shortest: Static: a proposal ends before a token whose context is known to
            fewer tokens; 0 for never.

    Raises:
        TypeError: A static argument is no Python int.
        ValueError: One is out of range.

    Cost: g x order binary searches per sequence; the tree has at most order x tokens
        nodes of 12 bytes. No state.
    Source: "Scaling Laws for Speculative Decoding" has the use; the backing off to
        shorter contexts is the textbook's.

    Example:
        >>> text = jnp.array([1, 2, 3, 1, 2, 4, 1, 2, 3])
        >>> draft = softlib.decoding.NGramDraft.fit(text, order=3, draft_length=2)
        >>> print(draft.propose(None, text[None, :2], jnp.array([2]), ()).tokens)
        [[3 1]]
    """

    # Any: transformations rebuild it from whatever stands for its arrays.
    token: Any
    first_child: Any
    likeliest: Any
    order: int
    draft_length: int = 8
    shortest: int = 1

    @classmethod
    def fit(
        cls,
        tokens: ArrayLike,
        *,
        order: int = 4,
        draft_length: int = 8,
        shortest: int = 1,
    ) -> "NGramDraft":
        """Counts a text.

        Args:
            tokens: Integers (N,), on the host; a negative one parts two texts.
            order: At least 1, tokens of a context and the one that follows.
            draft_length: As in the class.
            shortest: As in the class.

        Raises:
            TypeError: The tokens are no integers, or an option no Python int.
            ValueError: There is no token, or an option is out of range.
        """
        name = "NGramDraft.fit"
        checks.require_positive_integer(name, "order", order)
        text = np.asarray(tokens)
        if not np.issubdtype(text.dtype, np.integer):
            raise TypeError(f"{name}: `tokens` must hold integers, got {text.dtype}.")
        if text.ndim != 1 or not (text >= 0).any():
            raise ValueError(
                f"{name}: `tokens` must be (N,) with a token that is not negative, got "
                f"shape {text.shape}."
            )
        text = text.astype(np.int64)
        places = np.flatnonzero(text >= 0)  # of tokens that follow a context
        nodes = np.zeros(len(places), np.int64)  # of the contexts; 0 is the root
        parents: list[np.ndarray] = []
        token, likeliest = [np.zeros(1, np.int64)], [_mode(text[places])]
        total, size = 1, int(text.max()) + 1
        for back in range(1, order):
            before = places - back
            known = (before >= 0) & (text[np.maximum(before, 0)] >= 0)
            places, nodes = places[known], nodes[known]
            # One number for a node and its child, so that a sort orders both.
            pairs, which = np.unique(
                nodes * size + text[places - back], return_inverse=True
            )
            parents.append(pairs // size)
            token.append(pairs % size)
            likeliest.append(_likeliest(which, text[places], len(pairs)))
            nodes = total + which
            total += len(pairs)
        # Children stand in the order of their parents, so their number ends each run.
        children = np.bincount(
            np.concatenate([*parents, []]).astype(int), minlength=total
        )
        first = 1 + np.concatenate([[0], np.cumsum(children)])
        arrays = np.concatenate(token), first, np.concatenate(likeliest)
        return cls(
            *(jnp.asarray(array, jnp.int32) for array in arrays),
            order=order,
            draft_length=draft_length,
            shortest=shortest,
        )

    def __post_init__(self) -> None:
        name = "NGramDraft"
        checks.require_positive_integer(name, "order", self.order)
        checks.require_positive_integer(name, "draft_length", self.draft_length)
        if isinstance(self.shortest, bool) or not isinstance(self.shortest, int):
            raise TypeError(
                f"{name}: `shortest` must be a Python int, got {self.shortest!r}."
            )
        if not 0 <= self.shortest <= self.order - 1:
            raise ValueError(
                f"{name}: `shortest` must be in [0, {self.order - 1}], below `order`, "
                f"got {self.shortest}."
            )

    def propose(
        self,
        key: Array | None,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"],
        state: Any,
    ) -> Drafted:
        # The context, its last token first; -1 where there is none.
        back = lengths[:, None] - 1 - jnp.arange(max(self.order - 1, 1))[None]
        context = jnp.where(back >= 0, _at(tokens, back), -1)

        def visit(context: Array, _: None) -> Any:
            node, depth = self._found(context)
            token = self.likeliest[node]
            context = jnp.concatenate([token[:, None], context[:, :-1]], axis=1)
            return context, (token, depth >= self.shortest)

        _, (found, known) = lax.scan(visit, context, None, length=self.draft_length)
        counts = jnp.cumprod(known, axis=0, dtype=jnp.int32).sum(0, dtype=jnp.int32)
        return Drafted(found.T, None, counts, state)

    def _found(self, context: Int[Array, "B order"]) -> tuple[Array, Array]:
        """The deepest node of each context, and its depth."""
        node = jnp.zeros(context.shape[0], jnp.int32)
        depth, goes_on = node, node == 0
        for back in range(self.order - 1):
            child = self._child(node, context[:, back])
            goes_on &= child > 0
            node = jnp.where(goes_on, child, node)
            depth += goes_on.astype(jnp.int32)
        return node, depth

    def _child(self, node: Int[Array, " B"], wanted: Int[Array, " B"]) -> Array:
        """The child of each node with the wanted token, 0 if there is none."""
        low, stop = self.first_child[node], self.first_child[node + 1]
        last = self.token.shape[0] - 1

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) // 2
            below = self.token[jnp.minimum(middle, last)] < wanted
            is_open = low < high
            return (
                jnp.where(is_open & below, middle + 1, low),
                jnp.where(is_open & ~below, middle, high),
            )

        # A loop: XLA fuses the steps of an unrolled one, each of which looks up what
        # the last one found, and compiles for minutes with a large tree.
        low, _ = lax.fori_loop(0, last.bit_length(), halve, (low, stop))
        is_it = (low < stop) & (self.token[jnp.minimum(low, last)] == wanted)
        return jnp.where(is_it, low, 0)


@dataclasses.dataclass(frozen=True)
class ModelDraft(Draft):
    """Draws from a smaller model: another one, or the first layers of the same.

    Args:
        step: Maps tokens (B,) and the state to logits (B, V) and the next state, as in
            `softlib.decoding.generate`.
        state: After the prompt.
        forget: Maps the state and numbers (B,) to the state without so many of its last
            tokens.
        draft_length: Tokens of a proposal, g.
        processors: Functions from logits (B, V) to logits, such as a temperature: the
            more this law is like the model's, the more tokens stay.

    Raises:
        TypeError: `draft_length` is no Python int, or an argument no function.
        ValueError: `draft_length` is below 1.

    Cost: g + 1 calls of `step`; the last one reads a token that may stay.
    Source: "Fast Inference from Transformers via Speculative Decoding".

    Example:
        >>> counting = lambda tokens, state: (
        ...     10.0 * jax.nn.one_hot((tokens + 1) % 5, 5), state)
        >>> draft = softlib.decoding.ModelDraft(
        ...     counting, (), lambda state, counts: state, draft_length=3)
        >>> print(draft.propose(None, jnp.array([[1]]), jnp.array([1]), ()).tokens)
        [[2 3 4]]
    """

    step: Step
    state: Any
    forget: Callable[[Any, Array], Any]
    draft_length: int = 4
    processors: Sequence[LogitsFunction] = ()

    def __post_init__(self) -> None:
        name = "ModelDraft"
        checks.require_positive_integer(name, "draft_length", self.draft_length)
        functions = {"step": self.step, "forget": self.forget}
        functions |= {f"processors[{i}]": f for i, f in enumerate(self.processors)}
        for argument, function in functions.items():
            if not callable(function):
                raise TypeError(
                    f"{name}: `{argument}` must be a function, got "
                    f"{type(function).__name__}."
                )

    def init(self):
        return self.state

    def propose(
        self,
        key: Array | None,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"],
        state: Any,
    ) -> Drafted:
        def visit(carry: Any, key: Array | None) -> Any:
            token, state = carry
            logits, state = self.step(token, state)
            logits = formed_logits(logits)
            for processor in self.processors:
                logits = processor(logits)
            if key is None:
                token = jnp.argmax(logits, axis=-1)
            else:
                token = jax.random.categorical(key, logits)
            return (token.astype(jnp.int32), state), (token, logits)

        count = self.draft_length + 1
        keys = None if key is None else jax.random.split(key, count)
        start = _at(tokens, lengths[:, None] - 1)[:, 0], state
        (_, state), (found, logits) = lax.scan(visit, start, keys, length=count)
        found = found[:-1].T.astype(jnp.int32)
        law = None if key is None else jnp.moveaxis(logits[:-1], 0, 1)
        return Drafted(found, law, None, state)

    def rewind(self, state, counts):
        return self.forget(state, counts)


_ARRAYS: dict[type, tuple[str, ...]] = {
    PromptLookup: (),
    NGramDraft: ("token", "first_child", "likeliest"),
    ModelDraft: ("state",),
}
for _kind, _fields in _ARRAYS.items():
    # They may be arguments of compiled functions.
    _static = [f.name for f in dataclasses.fields(_kind) if f.name not in _fields]
    jax.tree_util.register_dataclass(_kind, _fields, _static)


def _at(tokens: Integer[Array, "B S"], places: Integer[Array, "B n"]) -> Array:
    """The tokens at places; those out of range are the nearest."""
    places = jnp.clip(places, 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, places, 1)


def _mode(tokens: np.ndarray) -> np.ndarray:
    """The most frequent token, (1,); the smallest of equals."""
    return np.bincount(tokens).argmax(keepdims=True)


def _likeliest(nodes: np.ndarray, tokens: np.ndarray, count: int) -> np.ndarray:
    """The token that most often stands beside each node."""
    size = int(tokens.max(initial=0)) + 1
    pairs, times = np.unique(nodes * size + tokens, return_counts=True)
    # The last that is written to an entry stays: the most frequent, then the smallest.
    order = np.lexsort((-pairs, times))
    found = np.zeros(count, np.int64)
    found[pairs[order] // size] = pairs[order] % size
    return found
