"""A sequence loss of n-grams at any position."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._ids import labels_in_range
from softlib._masked_mean import masked_mean
from softlib.logits import Logits
from softlib.logits._labelled_rows import rows_that_count
from softlib.logits._shared_labels import checked_targets, log_probs_of_shared_labels
from softlib.logits._sources import Source, source_of
from softlib.softmax import gumbel_softmax, logsumexp, softmax
from softlib.typing import Scalar

type Mode = Literal["softmax", "gumbel", "logsumexp"]
type Weights = Sequence[float] | Float[Array, " n"] | None
MODES = ("softmax", "gumbel", "logsumexp")


@array_arguments
def edit_invariant_sequence_loss(
    logits: Logits,
    labels: Integer[Array, "*batch S"],
    *,
    ngrams: Sequence[int] = (1, 2, 3, 4),
    weights: Weights = None,
    mode: Mode = "softmax",
    key: Array | None = None,
    floor: Scalar = -20.0,
    stop_weight_gradient: bool = False,
    where: Bool[Array, "..."] | None = None,
    label_where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Edit-invariant sequence loss: n-grams of the target at any position.

    The output may contain the target at other positions. With $p_i$ the prediction at
    position $i$, every n-gram $j$ of the target is compared with every window:

    $$g_{ij} = \frac{1}{n} \sum_{k < n} \log p_{i + k}(y_{j + k}), \qquad
      w_{ij} = \frac{e^{g_{ij}}}{\sum_{i'} e^{g_{i'j}}}, \qquad
      L_n = -\frac{1}{J} \sum_j \sum_i w_{ij}\, g_{ij},$$

    and the loss is $\sum_n a_n L_n$. An n-gram as long as both sequences gives the mean
    cross-entropy of the tokens. It suits targets with words inserted, dropped, repeated
    or moved; usually a fraction of the cross-entropy is added.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: The target, class ids in $[0, V)$; its length may differ from that of
            the output. An id outside, if `label_where` keeps it, makes its example NaN
            without gradient.
        ngrams: Static; lengths of n-grams, each at least 1. One that is longer than the
            output or the target adds 0.
        weights: $a_n$, one for each length; differentiable as an array. None: equal
            ones of sum 1.
        mode: Static; `"softmax"` is the formula. `"gumbel"` draws $w$ from the
            Gumbel-softmax distribution with temperature 1, as the paper does, which
            also visits windows that are unlikely. `"logsumexp"` has the terms $\log
            \sum_i e^{g_{ij}}$, which do not depend on the position.
        key: PRNG key for `"gumbel"`.
        floor: Lower bound of log-probabilities, which have no gradient below it;
            negative and finite; a number or a scalar array.
        stop_weight_gradient: Static; whether $w$ is held fixed. Otherwise a window with
            $g_{ij}$ more than 1 below $\sum_i w_{ij} g_{ij}$ is pushed further down.
        where: True for the positions of the output that count; broadcasts to the
            batch shape of `logits`. The others may hold anything.
        label_where: True for the tokens of the target that count. An n-gram counts if
            all its tokens do, in a window of positions that all do.

    Returns:
        The loss per example, float32 (float64 if an argument is float64); 0 for an
        example in which no n-gram counts.

    Raises:
        TypeError: An argument has the wrong kind of dtype, a keyword is unknown, or
            `"gumbel"` comes without `key`.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`, and with respect to `weights` and `floor`.
    Cost: the stream of `row_statistics`, a product of $T$ by $S$ by $D$ for each
        example, and for each length a few passes over $T \times S$ numbers, of which
        some three arrays are kept for the backward pass. Nothing but its gradient has
        the size of the weight.
    Source: "Don't Take It Literally: An Edit-Invariant Sequence Loss for Text
        Generation". Padded n-grams do not enter its mean here; a length below 1, in its
        code relative to $T$, is an error.

    Example:
        >>> hidden, weight = 9 * jnp.eye(4)[jnp.array([2, 0, 1, 3])], jnp.eye(4)
        >>> labels = jnp.array([0, 1, 2, 3])  # The output has the 2 at the front.
        >>> loss = softlib.losses.edit_invariant_sequence_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print(loss(logits, labels, ngrams=(1, 2)).round(1))
        1.5
    """
    source = source_of("edit_invariant_sequence_loss", logits)
    choices = (ngrams, weights, mode, key, floor, stop_weight_gradient)
    return _edit_invariant(source, labels, where, label_where, *choices)


def _edit_invariant(
    source: Source,
    labels: Array,
    where: Array | None,
    label_where: Array | None,
    ngrams: Sequence[int],
    weights: Weights,
    mode: str,
    key: Array | None,
    floor: Scalar,
    stop_weight_gradient: bool,
) -> Float[Array, "*batch"]:
    labels, label_where = checked_targets(source, labels, label_where)
    weights = _checked_options(source, ngrams, weights, mode, key, floor)
    where = rows_that_count(source, where)
    source = source.masked(where)

    labels = jnp.where(label_where, labels_in_range(labels, source.num_classes), -1)
    outside = label_where & (labels < 0)
    token_counts = label_where & ~outside
    log_probs, some = log_probs_of_shared_labels(source, labels)
    position_counts = some if where is None else some & where
    pairs = position_counts[..., :, None] & token_counts[..., None, :]
    floor = jnp.asarray(floor, source.dtype)
    log_probs = jnp.where(log_probs < floor, floor, log_probs)
    log_probs = jnp.where(pairs, log_probs, 0)

    total = jnp.zeros(outside.shape[:-1], source.dtype)
    lengths = (source.batch_shape[-1], labels.shape[-1])
    for i, n in enumerate(ngrams):
        if n > min(lengths):
            continue
        own_key = None if key is None else jax.random.fold_in(key, i)
        own = _of_length(
            n,
            log_probs,
            position_counts,
            token_counts,
            mode,
            own_key,
            stop_weight_gradient,
        )
        total = total + weights[i] * own
    return jnp.where(outside.any(-1), jnp.nan, total)


def _checked_options(
    source: Source,
    ngrams: Sequence[int],
    weights: Weights,
    mode: str,
    key: Array | None,
    floor: Scalar,
) -> Float[Array, " n"]:
    """The weights of the lengths."""
    function = source.function
    for n in ngrams:
        checks.require_positive_integer(function, "ngrams", n)
    if not ngrams:
        raise ValueError(f"{function}: `ngrams` must hold a length at least, got none.")
    checks.require_one_of(function, "mode", mode, MODES)
    if mode == "gumbel" and key is None:
        raise TypeError(f"{function}: `key` must be given for mode='gumbel', got None.")
    checks.require_scalar(function, "floor", floor, -math.inf, 0)
    if isinstance(floor, int | float) and not math.isfinite(floor):
        raise ValueError(f"{function}: `floor` must be finite, got {floor}.")
    if weights is None:
        return jnp.full(len(ngrams), 1 / len(ngrams), source.dtype)
    weights = jnp.asarray(weights, None if hasattr(weights, "dtype") else source.dtype)
    checks.require_floating(function, weights=weights)
    why = "one per length in `ngrams`"
    checks.require_shape(function, "weights", weights, (len(ngrams),), why)
    return weights.astype(source.dtype)


def _of_length(
    n: int,
    log_probs: Float[Array, "*batch T S"],
    position_counts: Bool[Array, "*batch T"],
    token_counts: Bool[Array, "*batch S"],
    mode: str,
    key: Array | None,
    stop_weight_gradient: bool,
) -> Float[Array, "*batch"]:
    g = _over_windows(log_probs, n, 2, jnp.add) / n
    window = _over_windows(position_counts, n, 1, jnp.logical_and)
    n_gram = _over_windows(token_counts, n, 1, jnp.logical_and)
    counts = window[..., :, None] & n_gram[..., None, :]
    found = _found(g, counts, mode, key, stop_weight_gradient)
    n_gram = n_gram & window.any(-1, keepdims=True)
    return 0 - masked_mean(found, n_gram, axis=-1)


def _found(
    g: Float[Array, "*batch I J"],
    counts: Bool[Array, "*batch I J"],
    mode: str,
    key: Array | None,
    stop_weight_gradient: bool,
) -> Float[Array, "*batch J"]:
    """Log-probability per token of each n-gram, combined over all windows."""
    if mode == "logsumexp":
        return logsumexp(g, -2, where=counts)
    if mode == "gumbel":
        assert key is not None
        w = gumbel_softmax(key, g, -2, where=counts)
    else:
        w = softmax(g, -2, where=counts)
    if stop_weight_gradient:
        w = lax.stop_gradient(w)
    return (w * jnp.where(counts, g, 0)).sum(-2)


def _over_windows(
    array: Array, n: int, axes: int, combine: Callable[[Array, Array], Array]
) -> Array:
    """Combines windows of n entries, along the diagonal of the last `axes` axes.

    Windows of 1, 2, 4, ... entries are doubled and joined: about 2 log n passes, and no
    subtraction.
    """
    found, length, power, size = None, 0, array, 1
    while True:
        if n & size:
            own = power
            if found is not None:
                own = _joined(found, power, length, axes, combine)
            found, length = own, length + size
        if length == n:
            assert found is not None
            return found
        power = _joined(power, power, size, axes, combine)
        size *= 2


def _joined(
    first: Array,
    second: Array,
    shift: int,
    axes: int,
    combine: Callable[[Array, Array], Array],
) -> Array:
    """Combines windows of `first` with those of `second` that start `shift` later."""
    moved = second[(..., *(slice(shift, None),) * axes)]
    sizes = [
        min(one, two)
        for one, two in zip(first.shape[-axes:], moved.shape[-axes:], strict=True)
    ]
    cut = (..., *(slice(size) for size in sizes))
    return combine(first[cut], moved[cut])
