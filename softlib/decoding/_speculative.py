"""Speculative decoding: a draft proposes tokens, the model accepts or corrects them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks, logits as logits_
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.logits import Logits
from softlib.logits._sources import source_of, with_temperature
from softlib.typing import Scalar

from ._generate import formed_logits


class SpeculativeStep(NamedTuple):
    """Drafted tokens that stay, and the one that follows.

    Attributes:
        num_accepted: How many of the drafted tokens stay, from the first on.
        next_token: The token that follows them: the model's own in the place of the one
            that was rejected, or one more after a draft that was accepted whole.
    """

    num_accepted: Int[Array, " B"]
    next_token: Int[Array, " B"]


class SpeculativePath(NamedTuple):
    """The path through a drafted tree that the model accepts.

    Attributes:
        nodes: Indices of the accepted nodes, -1 behind the end of the path.
        num_accepted: How many there are.
        next_token: The token that follows them.
    """

    nodes: Int[Array, "B depth"]
    num_accepted: Int[Array, " B"]
    next_token: Int[Array, " B"]


@array_arguments
def speculative_verify(
    key: Array | None,
    logits: Logits,
    draft_logits: Float[Array, "..."] | None,
    draft_tokens: Integer[Array, "..."],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
    uniforms: tuple[ArrayLike, ArrayLike] | None = None,
) -> SpeculativeStep:
    r"""Accepts a drafted chain of tokens so that the result has the model's own law.

    The draft drew $x_i \sim q_i$; the model's law at the same place is $p_i$. Token $i$
    stays if $u_i\, q_i(x_i) < p_i(x_i)$, $u_i$ uniform in [0, 1). At the first one that
    does not, a token is drawn from $\max(p_i - q_i, 0)$, normalised; after a draft that
    stays whole, from $p_{g + 1}$. The tokens that come out are distributed exactly as
    if the model had drawn them one after the other, whatever the draft is. A filter
    (top-p, a grammar) belongs into both logits before the call.

    Args:
        key: Of `jax.random`; None with `temperature` 0 or with `uniforms`.
        logits: (B, g + 1, V), the model's, at the places of the drafted tokens
            and one behind them; an array, or a value such as `softlib.LinearLogits`, of
            which one row per sequence is formed.
        draft_logits: The draft's, (B, g, V). None for tokens that nothing drew, as of
            prompt lookup: $q_i(x_i) = 1$.
        draft_tokens: (B, g), what was drawn from them.
        temperature: Divides both logits; a number or a scalar array, positive. The
            number 0 compares with the likeliest token of the model, and the draft's
            logits are not read.
        where: True for the tokens that were drafted: a draft ends before the first
            False. None for all.
        uniforms: $u$ of shape (B, g), and (B,) more that draw the last token by the
            inverse of the distribution function in the order of the vocabulary; in the
            place of `key`, for tests and to share randomness.

    Returns:
        `SpeculativeStep`. A row whose logits are NaN, or all -inf, accepts nothing more
        and has -1 for its next token.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, `temperature` is negative, or not exactly one of
            `key` and `uniforms` is given where they are needed.

    Derivatives: none, the results are integers.
    Cost: one stream over the model's logits at each place, one formed row per sequence.
    Source: "Fast Inference from Transformers via Speculative Decoding"; "Scaling Laws
        for Speculative Decoding".

    Example:
        >>> target = jnp.log(jnp.array([[[0.9, 0.1], [0.5, 0.5]]]))
        >>> draft, tokens = jnp.log(jnp.array([[[0.2, 0.8]]])), jnp.array([[1]])
        >>> uniforms = jnp.array([[0.2]]), jnp.array([0.5])
        >>> step = softlib.decoding.speculative_verify(
        ...     None, target, draft, tokens, uniforms=uniforms)
        >>> print(step.num_accepted, step.next_token)
        [0] [0]
    """
    function = "speculative_verify"
    tokens = _checked_tokens(function, logits, draft_logits, draft_tokens)
    is_greedy = isinstance(temperature, int | float) and temperature == 0
    if not is_greedy:
        checks.require_positive_scalars(function, temperature=temperature)
    if where is not None:
        where = checks.checked_where(
            function, where, tokens.shape, "the shape of `draft_tokens`"
        )
    if not is_greedy and (key is None) == (uniforms is None):
        raise ValueError(
            f"{function}: exactly one of `key` and `uniforms` must be given, got "
            f"{'neither' if key is None else 'both'}."
        )
    if uniforms is not None:
        accept, last = (jnp.asarray(x) for x in uniforms)
        shape, why = tokens.shape, "that of `draft_tokens`"
        checks.require_shape(function, "uniforms[0]", accept, shape, why)
        shape, why = tokens.shape[:1], "one per sequence"
        checks.require_shape(function, "uniforms[1]", last, shape, why)
        uniforms = accept, last
    if is_greedy:
        return agreeing(logits, tokens, where).step
    warm = _warm(function, logits, draft_logits, temperature)
    return verified(key, *warm, tokens, where, uniforms).step


class Verified(NamedTuple):
    """A step, and the model's log-probabilities (B, g + 1) of the tokens that stay.

    Those behind the next token mean nothing.
    """

    step: SpeculativeStep
    log_probs: Float[Array, "B places"]


# Compiled as one program, also when it is called outside of any.
@jax.jit
def agreeing(target: Logits, tokens: Array, where: Array | None) -> Verified:
    """The tokens that are the model's likeliest, and the first of these that follows.

    The arguments are those of `speculative_verify`.
    """
    names = "argmax", "max_logit", "lse"
    found = logits_.row_statistics(target, statistics=names)
    assert found.max_logit is not None
    assert found.argmax is not None
    assert found.lse is not None
    # NaN is not above, nor is a row without an allowed token.
    best = jnp.where(found.max_logit > -jnp.inf, found.argmax, -1).astype(jnp.int32)
    count = _leading(best[:, :-1] == tokens, where)
    step = SpeculativeStep(count, best[jnp.arange(tokens.shape[0]), count])
    return Verified(step, found.max_logit - found.lse)


@jax.jit
def verified(
    key: Array | None,
    target: Any,
    draft_logits: Array | None,
    tokens: Array,
    where: Array | None,
    uniforms: tuple[Array, Array] | None,
) -> Verified:
    """The tokens that stay by chance, and the one that follows.

    The arguments are those of `speculative_verify`, at temperature 1.
    """
    batch, drafted = tokens.shape
    log_p = logits_.token_log_probs(target[:, :-1], tokens)
    draft = None if draft_logits is None else _log_softmax(draft_logits)
    if draft is None:
        log_q = jnp.zeros_like(log_p)
    else:
        log_q = jnp.take_along_axis(draft, tokens[:, :, None], -1)[..., 0]
    if uniforms is None:
        assert key is not None
        key_accept, key = jax.random.split(key)
        accept = jax.random.uniform(key_accept, tokens.shape, log_q.dtype)
    else:
        accept = uniforms[0]
    # Not u < p / q: both may underflow. NaN is not accepted.
    dtype = accumulator_dtype(accept, log_p, log_q)
    accept, log_p, log_q = (x.astype(dtype) for x in (accept, log_p, log_q))
    count = _leading(accept * jnp.exp(log_q) < jnp.exp(log_p), where)

    rows = jnp.arange(batch)
    whole_law = _log_softmax(target[rows, count])
    law = whole_law = whole_law.astype(accumulator_dtype(whole_law, log_q))
    if drafted:
        whole = drafted if where is None else _leading(where, None)
        at = rows, jnp.minimum(count, drafted - 1)
        if draft is None:
            left = _log_without(law, tokens[at])
        else:
            left = _log_residual(law, draft[at].astype(law.dtype))
        law = jnp.where((count == whole)[:, None], law, left)
    if uniforms is not None:
        last = _by_distribution_function(law, uniforms[1])
    else:
        assert key is not None
        last = logits_.sample(key, law)
    log_probs = jnp.pad(log_p, ((0, 0), (0, 1))).astype(law.dtype)
    log_probs = log_probs.at[rows, count].set(
        logits_.token_log_probs(whole_law, jnp.maximum(last, 0))
    )
    return Verified(SpeculativeStep(count, last), log_probs)


@array_arguments
def speculative_verify_tree(
    key: Array,
    logits: Logits,
    draft_logits: Float[Array, "..."],
    draft_tokens: Integer[Array, "..."],
    *,
    parents: tuple[int, ...],
    temperature: Scalar = 1.0,
) -> SpeculativePath:
    r"""Accepts a path through a drafted tree, with the model's own law.

    Node $i$ of the tree is the token that the draft drew after `parents[i]`. The
    children of a node are drawn independently from one law $q$; they are tried in their
    order, the first against the model's $p$, and after each rejection $p$ becomes
    $\max(p - q, 0)$, normalised. The walk goes on at the first child that stays, and
    ends with a token from what is left of $p$ when none does. With one child each this
    is `speculative_verify`.

    Args:
        key: Of `jax.random`.
        logits: (B, n + 1, V): the model's law after the prefix, then after the
            path to each node.
        draft_logits: The law from which each node was drawn, equal for siblings.
        draft_tokens: The nodes, parents before their children.
        parents: Static: index of each node's parent, -1 for those after the prefix.
        temperature: Positive, a number or a scalar array; divides both logits.

    Returns:
        `SpeculativePath`, with as many places for nodes as the tree is deep.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, or a parent does not stand before its child.

    Derivatives: none, the results are integers.
    Cost: as many passes over a row of the vocabulary as the tree has nodes.
    Source: "SpecInfer: Accelerating Large Language Model Serving with Tree-based
        Speculative Inference and Verification".

    Example:
        >>> target = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]]))
        >>> draft = jnp.log(jnp.full((1, 2, 2), 0.5))
        >>> path = softlib.decoding.speculative_verify_tree(
        ...     jax.random.key(0), target, draft, jnp.array([[0, 1]]), parents=(-1, -1))
        >>> print(path.nodes, path.num_accepted)
        [[0]] [1]
    """
    function = "speculative_verify_tree"
    tokens = _checked_tokens(function, logits, draft_logits, draft_tokens)
    checks.require_positive_scalars(function, temperature=temperature)
    depths = _depths(function, parents, tokens.shape[1])
    warm = _warm(function, logits, draft_logits, temperature)
    return _walked(key, *warm, tokens, tuple(zip(parents, depths, strict=True)))


@functools.partial(jax.jit, static_argnames="walk")
def _walked(
    key: Array,
    target: Any,
    draft_logits: Array,
    tokens: Array,
    walk: tuple[tuple[int, int], ...],
) -> SpeculativePath:
    """`walk` holds the parent of each node, and the length of the path to it."""
    batch, nodes = tokens.shape
    depth = max((deep for _, deep in walk), default=0)
    key_accept, key_last = jax.random.split(key)
    draft = _log_softmax(draft_logits)
    dtype = accumulator_dtype(target, draft)
    draft = draft.astype(dtype)
    uniforms = jax.random.uniform(key_accept, (nodes, batch), dtype)
    rows = jnp.arange(batch)

    def law_after(at: Array) -> Array:
        """The model's law after the path to a node, -1 the prefix."""
        return _log_softmax(target[rows, at + 1]).astype(dtype)

    def visit(carry: tuple[Array, ...], given: tuple[Array, ...]) -> Any:
        here, law, path = carry
        node, parent, deep, uniform = given
        token, q = tokens[:, node], draft[:, node]
        at_token = lambda x: jnp.take_along_axis(x, token[:, None], 1)[:, 0]
        tried = here == parent
        stays = tried & (uniform * jnp.exp(at_token(q)) < jnp.exp(at_token(law)))
        rest = jnp.where(tried[:, None], _log_residual(law, q), law)
        moved = jnp.where(stays, node, here)
        law = jnp.where(stays[:, None], law_after(moved), rest)
        path = path.at[:, deep - 1].set(jnp.where(stays, node, path[:, deep - 1]))
        return (moved, law, path), None

    start = jnp.full(batch, -1, jnp.int32)
    carry = start, law_after(start), jnp.full((batch, depth), -1, jnp.int32)
    if nodes:
        parents, depths = jnp.asarray(walk, jnp.int32).T
        order = jnp.arange(nodes, dtype=jnp.int32)
        carry, _ = lax.scan(visit, carry, (order, parents, depths, uniforms))
    _, law, path = carry
    count = (path >= 0).sum(1, dtype=jnp.int32)
    return SpeculativePath(path, count, logits_.sample(key_last, law))


@array_arguments
def speculative_acceptance(
    logits: Float[Array, "*batch V"], draft_logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    r"""The probability that a drafted token stays, $\sum_v \min(p_v, q_v)$.

    It is 1 minus the total variation distance of the two laws.

    Args:
        logits: The model's, $\log p$ up to a constant.
        draft_logits: The draft's, $\log q$ likewise.

    Returns:
        Float32 (float64 if an argument is), in [0, 1].

    Raises:
        TypeError: The logits are not floating.
        ValueError: Their shapes differ.

    Derivatives: forward and reverse; at a tie of the two half of each.
    Cost: a few passes over the arrays.
    Source: "Fast Inference from Transformers via Speculative Decoding".

    Example:
        >>> p, q = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.2, 0.8]))
        >>> print(softlib.decoding.speculative_acceptance(p, q).round(3))
        0.3
    """
    p, q = _pair("speculative_acceptance", logits, draft_logits)
    return jnp.minimum(jnp.minimum(jnp.exp(p), jnp.exp(q)).sum(-1), 1)


@array_arguments
def speculative_residual(
    logits: Float[Array, "*batch V"], draft_logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch V"]:
    r"""The law of the token in the place of a rejected one, as log-probabilities.

    $$\log \frac{\max(p_v - q_v, 0)}{\sum_w \max(p_w - q_w, 0)}$$

    in logarithms throughout, exact where $p$ and $q$ are tiny or nearly equal.

    Args:
        logits: The model's, $\log p$ up to a constant.
        draft_logits: The draft's, $\log q$ likewise.

    Returns:
        Float32 (float64 if an argument is); -inf where $p \leq q$. Equal laws leave
        nothing, which happens by rounding alone: the result is then $\log p$.

    Raises:
        TypeError: The logits are not floating.
        ValueError: Their shapes differ.

    Derivatives: none are meant.
    Cost: a few passes over the arrays.
    Source: "Fast Inference from Transformers via Speculative Decoding".

    Example:
        >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.2, 0.8]))
        >>> print(softlib.decoding.speculative_residual(p, q))
        [  0. -inf]
    """
    return _log_residual(*_pair("speculative_residual", logits, draft_logits))


@array_arguments
def expected_accepted_tokens(
    acceptance: Float[Array, "..."] | float, *, draft_length: Any
) -> Float[Array, "..."]:
    r"""Mean number of tokens that one call of the model yields.

    $$\frac{1 - \alpha^{g + 1}}{1 - \alpha} = 1 + \alpha + \dots + \alpha^g$$

    if every drafted token stays with probability $\alpha$, independently: the accepted
    ones and the one that the model adds.

    Args:
        acceptance: $\alpha$ in [0, 1].
        draft_length: Static $g >= 0$, drafted tokens: an int, or NumPy integers that
            broadcast.

    Returns:
        A number in [1, g + 1]; NaN for $\alpha$ out of range.

    Raises:
        TypeError: `acceptance` is not floating, or `draft_length` is not static.
        ValueError: `draft_length` is negative.

    Derivatives: forward and reverse in `acceptance`, at 1 too.
    Cost: $g$ multiplications per number.
    Source: "Fast Inference from Transformers via Speculative Decoding".

    Example:
        >>> tokens = softlib.decoding.expected_accepted_tokens(
        ...     jnp.array([0.5, 1.0]), draft_length=5)
        >>> print(tokens)
        [1.96875 6.     ]
    """
    function = "expected_accepted_tokens"
    alpha = jnp.asarray(acceptance, None if hasattr(acceptance, "dtype") else float)
    checks.require_floating(function, acceptance=alpha)
    lengths = _draft_lengths(function, draft_length)
    alpha = alpha.astype(accumulator_dtype(alpha))
    alpha, lengths = jnp.broadcast_arrays(alpha, lengths)
    # Horner's rule, since (1 - alpha^n) / (1 - alpha) cancels near 1.
    total = jnp.ones_like(alpha)
    for place in range(int(np.max(_draft_lengths(function, draft_length), initial=0))):
        total = jnp.where(place < lengths, 1 + alpha * total, total)
    return jnp.where((alpha >= 0) & (alpha <= 1), total, jnp.nan)


@array_arguments
def speculative_speedup(
    acceptance: Float[Array, "..."] | float, *, draft_length: Any, cost_ratio: Any
) -> Float[Array, "..."]:
    r"""Speed-up of drafting: how many times faster tokens come than without.

    `expected_accepted_tokens` over the cost of a cycle, $g c + 1$ calls of the model.

    Args:
        acceptance: $\alpha$ in [0, 1].
        draft_length: Static $g$, drafted tokens of a cycle, as there.
        cost_ratio: $c$, time of one drafted token over that of a call of the model,
            which is taken to be the same for $g + 1$ tokens as for one.

    Returns:
        A number; below 1 where drafting does not pay.

    Raises:
        TypeError: As `expected_accepted_tokens`.
        ValueError: As there.

    Derivatives: forward and reverse in `acceptance` and `cost_ratio`.
    Cost: nothing to speak of.
    Source: "Fast Inference from Transformers via Speculative Decoding".

    Example:
        >>> print(softlib.decoding.speculative_speedup(
        ...     jnp.array([0.5, 1.0]), draft_length=5, cost_ratio=0.1))
        [1.3125 4.    ]
    """
    function = "speculative_speedup"
    lengths = _draft_lengths(function, draft_length)
    with checks.under_name(function, "expected_accepted_tokens"):
        tokens = expected_accepted_tokens(acceptance, draft_length=draft_length)
    dtype = tokens.dtype
    return tokens / (jnp.asarray(lengths, dtype) * jnp.asarray(cost_ratio, dtype) + 1)


def _draft_lengths(function: str, given: Any) -> np.ndarray:
    if isinstance(given, jax.core.Tracer):
        raise TypeError(
            f"{function}: `draft_length` must be static, got a traced array."
        )
    lengths = np.asarray(given)
    if not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(
            f"{function}: `draft_length` must hold integers, got {lengths.dtype}."
        )
    if lengths.size and lengths.min() < 0:
        raise ValueError(
            f"{function}: `draft_length` must be >= 0, got {lengths.min()}."
        )
    return lengths


def _checked_tokens(
    function: str, target: Logits, draft: Array | None, tokens: Array
) -> Array:
    checks.require_integer(function, draft_tokens=tokens)
    shape = target.shape if hasattr(target, "shape") else jnp.shape(target)
    if draft is None:
        if len(shape) != 3 or not shape[1]:
            raise ValueError(
                f"{function}: `logits` must be (B, g + 1, V), got {tuple(shape)}."
            )
        wanted = shape[0], shape[1] - 1
        checks.require_shape(
            function, "draft_tokens", tokens, wanted, "one place fewer than `logits`"
        )
        return tokens
    checks.require_floating(function, draft_logits=draft)
    checks.require_rank(function, "draft_logits", draft, 3, "(B, g, V)")
    batch, drafted, vocabulary = draft.shape
    wanted = batch, drafted + 1, vocabulary
    if tuple(shape) != wanted:
        raise ValueError(
            f"{function}: `logits` must be {wanted}, one place more than "
            f"`draft_logits`, got {tuple(shape)}."
        )
    checks.require_shape(
        function, "draft_tokens", tokens, (batch, drafted), "as `draft_logits`"
    )
    return tokens


def _depths(function: str, parents: tuple[int, ...], nodes: int) -> list[int]:
    """The number of nodes on the path to each node, itself included."""
    if len(parents) != nodes:
        raise ValueError(
            f"{function}: `parents` must have {nodes} entries, one per drafted token, "
            f"got {len(parents)}."
        )
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(
                f"{function}: `parents[{node}]` must be in [-1, {node}), got {parent}."
            )
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def _pair(function: str, target: Array, draft: Array) -> tuple[Array, Array]:
    """The log-probabilities of both."""
    checks.require_floating(function, logits=target, draft_logits=draft)
    checks.require_rank(function, "logits", target, 1, "(..., V)")
    checks.require_shape(
        function, "draft_logits", draft, target.shape, "that of `logits`"
    )
    dtype = accumulator_dtype(target, draft)
    return _log_softmax(target.astype(dtype)), _log_softmax(draft.astype(dtype))


def _log_softmax(logits: Logits) -> Array:
    return jax.nn.log_softmax(formed_logits(logits), axis=-1)


def _warm(
    function: str, target: Logits, draft: Array | None, temperature: Scalar
) -> tuple[Any, Any]:
    """The model's logits as a value, and the draft's, at a temperature."""
    source = source_of(function, target)
    if isinstance(temperature, int | float) and temperature == 1:
        return source, draft
    if draft is not None:
        draft = draft.astype(accumulator_dtype(draft))
        draft = draft / jnp.asarray(temperature, draft.dtype)
    return with_temperature(source, temperature), draft


def _leading(agrees: Array, where: Array | None) -> Array:
    """Number of True entries of each row before the first that is not."""
    if where is not None:
        agrees = agrees & where
    return jnp.cumprod(agrees, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)


def _log_residual(p: Array, q: Array) -> Array:
    """Log max(exp p - exp q, 0), normalised; p where nothing is left."""
    above = p > q
    difference = jnp.where(above, q - p, -1.0)
    left = jnp.where(above, p + jnp.log1p(-jnp.exp(difference)), -jnp.inf)
    total = jax.nn.logsumexp(left, axis=-1, keepdims=True)
    return jnp.where(total > -jnp.inf, left - total, p)


def _log_without(law: Array, tokens: Array) -> Array:
    """Log-probabilities without one token of each row; as they were if it has all."""
    others = jnp.arange(law.shape[-1])[None] != tokens[:, None]
    left = jnp.where(others, law, -jnp.inf)
    total = jax.nn.logsumexp(left, axis=-1, keepdims=True)
    return jnp.where(total > -jnp.inf, left - total, law)


def _by_distribution_function(law: Array, uniforms: Array) -> Array:
    """The first token whose cumulated probability exceeds the uniform number."""
    held = jnp.cumsum(jnp.exp(law), axis=-1)
    token = (held <= uniforms[:, None].astype(held.dtype)).sum(-1)
    # Rounding may leave the sum below 1: then the last token that can be drawn.
    last = law.shape[-1] - 1 - jnp.argmax((law > -jnp.inf)[:, ::-1], axis=-1)
    token = jnp.minimum(token, last)
    return jnp.where(jnp.isnan(held[:, -1]), -1, token).astype(jnp.int32)
