"""Short codes of next-token distributions, and the width of the model behind them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib.logits import LinearLogits, Logits, gather
from softlib.softmax import log_softmax


@array_arguments
def log_ratio_codes(
    logits: Logits, class_ids: Integer[Array, " L"]
) -> Float[Array, "*batch k"]:
    r"""Log-probabilities of some classes relative to the first of them.

    $$c_i = \log p_{S_i} - \log p_{S_0} = z_{S_i} - z_{S_0}, \qquad i = 1 \dots k$$

    (additive log-ratios). The normaliser drops out, so that $c = (W_S - w_{S_0}) h$ is
    linear in the hidden vector $h$ of a linear head with D features: from $k \geq D$
    codes all V log-probabilities follow, by `log_ratio_decoder`. Take about 100 classes
    more than D + 1: with exactly as many, the reconstruction magnifies rounding by some
    thousands.

    Codes are linear in $h$ at any temperature that is the same for all rows. Logits
    with a softcap are not linear, and probabilities that top-k or top-p sampling sets
    to 0 have lost what they could say.

    Args:
        logits: An array of logits or of log-probabilities, which have the same codes,
            or a value such as `softlib.LinearLogits`. Take float32 or wider.
        class_ids: $S$, at least two ids in $[0, V)$, the same for all rows. The first
            is the base.

    Returns:
        Codes, one fewer than ids, float32 (float64 if an argument is float64). NaN for
        an id outside the range.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `class_ids` have not one axis of at least two ids.

    Derivatives: as `softlib.logits.gather`.
    Cost: as `softlib.logits.gather`; of a linear head only these logits are computed.
    Source: "Better Language Model Inversion by Compactly Representing Next-Token
        Distributions".

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> codes = softlib.scoring.log_ratio_codes(logits, jnp.array([1, 0, 2]))
        >>> print(codes.round(4))
        [[0.6931 0.    ]]
    """
    function = "log_ratio_codes"
    _require_ids(function, class_ids)
    with checks.under_name(function, "gather"):
        z = gather(logits, class_ids)
    return z[..., 1:] - z[..., :1]


class LogRatioDecoder(NamedTuple):
    """A linear head whose inputs are codes of `log_ratio_codes`.

    Its logits of all classes are the log-probabilities up to a number per row:
    `softlib.LinearLogits(codes, decoder.weight, bias=decoder.bias)` can be given to
    every function of logits, `decode_log_ratios` forms the log-probabilities.

    Attributes:
        weight: One row per class.
        bias: One number per class.

    Derivatives: see `log_ratio_decoder` and `fit_log_ratio_decoder`.
    Cost: V (k + 1) numbers.

    Example:
        >>> head = jax.random.normal(jax.random.key(0), (6, 2))
        >>> decoder = softlib.scoring.log_ratio_decoder(head, jnp.array([0, 3, 4, 5]))
        >>> print(decoder.weight.shape, decoder.bias)
        (6, 3) [0. 0. 0. 0. 0. 0.]
    """

    weight: Float[Array, "V k"]
    bias: Float[Array, " V"]


@array_arguments
def log_ratio_decoder(
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    class_ids: Integer[Array, " L"],
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " classes"] | None = None,
) -> LogRatioDecoder:
    r"""Decoder of codes, from the weight of the model's linear head.

    $A = \tilde W \tilde W_S^+$ with $\tilde W = W - w_{S_0}$ and the pseudo-inverse
    $\tilde W_S^+$: $A c = \tilde W h$ if $\tilde W_S$ has rank D.

    Args:
        weight: One row per class; with `vocab_axis=1` one column per class.
        class_ids: $S$ of the codes.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Of the head, one number per class.

    Returns:
        `LogRatioDecoder`, float32 (float64 if an argument is float64); NaN if an id is
        outside $[0, V)$.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or there are fewer than D + 1 ids, from
            which the codes do not determine the hidden vector.

    Derivatives: forward and reverse, where $\tilde W_S$ has rank D.
    Cost: a singular value decomposition, $O(k D^2)$, and products of V k D.
    Source: "Better Language Model Inversion by Compactly Representing Next-Token
        Distributions".

    Example:
        >>> head = jnp.array([[0.0], [1.0], [2.0], [5.0]])
        >>> decoder = softlib.scoring.log_ratio_decoder(head, jnp.array([0, 2]))
        >>> print(decoder.weight.ravel())
        [0.  0.5 1.  2.5]
    """
    function = "log_ratio_decoder"
    checks.require_floating(function, weight=weight, bias=bias)
    checks.require_one_of(function, "vocab_axis", vocab_axis, (0, 1))
    if weight.ndim != 2:
        raise ValueError(
            f"{function}: `weight` must have two axes, got shape {weight.shape}."
        )
    _require_ids(function, class_ids)
    classes, features = weight.shape[vocab_axis], weight.shape[1 - vocab_axis]
    if class_ids.shape[0] <= features:
        raise ValueError(
            f"{function}: `class_ids` must hold at least {features + 1} ids, one more "
            f"than `weight` has features, got {class_ids.shape[0]}."
        )
    checks.require_shape(function, "bias", bias, (classes,), "one per class")
    dtype = accumulator_dtype(*(a for a in (weight, bias) if a is not None))
    head = (weight if vocab_axis == 0 else weight.T).astype(dtype)
    ids = labels_in_range(class_ids, classes)
    inside = jnp.maximum(ids, 0)
    relative = head - head[inside[0]][None]
    of_codes = relative[inside[1:]]
    a = _product(relative, jnp.linalg.pinv(of_codes))
    if bias is None:
        b = jnp.zeros(classes, dtype)
    else:
        b = bias.astype(dtype)
        b = b - b[inside[0]]
        b = b - _product(a, b[inside[1:]][:, None])[:, 0]
    bad = (ids < 0).any()
    return LogRatioDecoder(*(jnp.where(bad, jnp.nan, each) for each in (a, b)))


@array_arguments
def fit_log_ratio_decoder(
    log_probs: Float[Array, "*batch V"],
    class_ids: Integer[Array, " L"],
    *,
    rank: int | None = None,
    has_bias: bool = False,
) -> LogRatioDecoder:
    r"""Decoder of codes, from observed distributions of a model with an unknown head.

    The least-squares solution of $A c_n = \tilde z_n$ over the observed rows n, with
    $\tilde z$ the log-ratios of all classes. It is exact if the codes of the observed
    rows span those of all: N of at least D rows, D + 1 with a bias.

    Args:
        log_probs: Observed rows of log-probabilities, or of logits. Float32 or wider.
        class_ids: $S$ of the codes.
        rank: Static number of directions to keep, the width D of the model
            (`output_rank` finds it): the others hold rounding errors. None keeps those
            above the rounding of the dtype.
        has_bias: Static; whether the head may have a bias, which is then estimated.

    Returns:
        `LogRatioDecoder`, float32 (float64 for float64). NaN if an id is outside
        $[0, V)$ or a log-probability is not finite.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or `rank` is no Python int.
        ValueError: Shapes do not fit together, or `rank` exceeds the number of codes or
            of rows.

    Derivatives: forward and reverse, where no two singular values are equal.
    Cost: a singular value decomposition of the codes, $O(N k^2)$, and products of
        N k V.
    Source: "Better Language Model Inversion by Compactly Representing Next-Token
        Distributions"; the unknown head by least squares.

    Example:
        >>> head = jnp.array([[0.0], [1.0], [2.0], [5.0]])
        >>> observed = jax.nn.log_softmax(jnp.array([[0.5], [-1.0]]) @ head.T)
        >>> fit = softlib.scoring.fit_log_ratio_decoder
        >>> print(fit(observed, jnp.array([0, 2]), rank=1).weight.ravel().round(3))
        [0.  0.5 1.  2.5]
    """
    function = "fit_log_ratio_decoder"
    checks.require_floating(function, log_probs=log_probs)
    checks.require_rank(function, "log_probs", log_probs, 2, "(..., V)")
    _require_ids(function, class_ids)
    codes_count, classes = class_ids.shape[0] - 1, log_probs.shape[-1]
    x = log_probs.reshape(-1, classes).astype(accumulator_dtype(log_probs))
    most = min(codes_count, x.shape[0])
    if rank is not None:
        checks.require_positive_integer(function, "rank", rank)
        if rank > most:
            raise ValueError(
                f"{function}: `rank` must be at most {most}, the smaller of the "
                f"numbers of codes and of rows, got {rank}."
            )
    ids = labels_in_range(class_ids, classes)
    inside = jnp.maximum(ids, 0)
    bad = (ids < 0).any() | ~jnp.isfinite(x).all()
    x = jnp.where(bad, 0, x)
    ratios = x - x[:, inside[0]][:, None]
    codes = ratios[:, inside[1:]]
    mean_code, mean_ratio = jnp.zeros_like(codes[0]), jnp.zeros_like(x[0])
    if has_bias and x.shape[0]:
        mean_code, mean_ratio = codes.mean(0), ratios.mean(0)
    codes, ratios = codes - mean_code[None], ratios - mean_ratio[None]
    u, s, vh = jnp.linalg.svd(codes, full_matrices=False)
    if rank is None:
        tolerance = max(codes.shape) * jnp.finfo(s.dtype).eps
        kept = s > tolerance * s.max(initial=0)
    else:
        kept = (jnp.arange(s.shape[0]) < rank) & (s > 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    a = _product(_product(ratios.T, u) * inverse[None], vh)
    b = mean_ratio - _product(a, mean_code[:, None])[:, 0]
    return LogRatioDecoder(*(jnp.where(bad, jnp.nan, each) for each in (a, b)))


@array_arguments
def decode_log_ratios(
    codes: Float[Array, "*batch k"], decoder: LogRatioDecoder
) -> Float[Array, "*batch V"]:
    """Log-probabilities of all classes from codes.

    Args:
        codes: As `log_ratio_codes` returns them.
        decoder: As `log_ratio_decoder` or `fit_log_ratio_decoder` return it.

    Returns:
        Log-probabilities, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: There are not as many codes as the decoder was made for.

    Derivatives: forward and reverse, any order, with respect to codes and decoder.
    Cost: a product of N V k, and the array of log-probabilities.
        `softlib.LinearLogits` of the codes computes numbers per row without it.
    Source: "Better Language Model Inversion by Compactly Representing Next-Token
        Distributions".

    Example:
        >>> head = jnp.array([[0.0], [1.0], [2.0]])
        >>> decoder = softlib.scoring.log_ratio_decoder(head, jnp.array([0, 2]))
        >>> print(softlib.scoring.decode_log_ratios(jnp.array([0.0]), decoder).round(4))
        [-1.0986 -1.0986 -1.0986]
    """
    function = "decode_log_ratios"
    weight, bias = jnp.asarray(decoder.weight), jnp.asarray(decoder.bias)
    checks.require_floating(function, codes=codes, weight=weight, bias=bias)
    checks.require_rank(function, "codes", codes, 1, "(..., k)")
    if codes.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: `codes` must have {weight.shape[1]} codes on the last axis, "
            f"those of the decoder, got shape {codes.shape}."
        )
    head = LinearLogits(codes, weight, bias=bias, precision=lax.Precision.HIGHEST)
    return log_softmax(head.materialize())


class OutputRank(NamedTuple):
    """The dimension of the space of a model's next-token distributions.

    Attributes:
        rank: int32; -1 if a log-probability is not finite.
        singular_values: Of the centred log-probabilities, in falling order: from the
            rank on they are rounding errors.

    Derivatives: of the singular values.
    Cost: as many numbers as there are rows or classes, whichever are fewer.

    Example:
        >>> hidden = jax.random.normal(jax.random.key(0), (5, 2))
        >>> head = jax.random.normal(jax.random.key(1), (7, 2))
        >>> found = softlib.scoring.output_rank(jax.nn.log_softmax(hidden @ head.T))
        >>> print(found.rank, found.singular_values.shape)
        2 (5,)
    """

    rank: Int[Array, ""]
    singular_values: Float[Array, " least"]


@array_arguments
def output_rank(
    log_probs: Float[Array, "*batch V"], *, epsilon: float | None = None
) -> OutputRank:
    r"""Numerical rank of log-probabilities: the width of the model that made them.

    Log-probabilities of a linear head without a softcap lie in a space of D dimensions,
    its number of features, once the mean of each row is subtracted (one more if the
    head has a bias). So they reveal D, if there are more than D rows. Singular values
    count if they exceed what rounding errors make: of the entries
    $\epsilon \max_{nj} |x_{nj}| (\sqrt N + \sqrt V)$, and of the decomposition the
    spacing of its dtype times $\sqrt{\min(N, V)}$ times the greatest singular value.

    Args:
        log_probs: One row per observed step, of different contexts.
        epsilon: Static relative rounding error of the log-probabilities; None for the
            spacing of the dtype at 1. A model that computes in bfloat16 has errors of
            2⁻⁸, also if its results are float32: look for the cliff in the singular
            values.

    Returns:
        `OutputRank`, singular values in float32 (float64 for float64). The rank is at
        most the number of rows.

    Raises:
        TypeError: `log_probs` are not floating, or `epsilon` is no Python number.
        ValueError: `log_probs` have fewer than two axes, or `epsilon` is not positive.

    Derivatives: of the singular values, where no two are equal.
    Cost: a singular value decomposition, $O(N^2 V)$ for fewer rows than classes.
    Source: "Better Language Model Inversion by Compactly Representing Next-Token
        Distributions". Deviation: the mean of each row is subtracted, not the
        log-probability of one class, whose error would be in all columns. The rank is
        the same.

    Example:
        >>> hidden = jax.random.normal(jax.random.key(0), (9, 3))
        >>> head = jax.random.normal(jax.random.key(1), (20, 3))
        >>> log_probs = jax.nn.log_softmax(hidden @ head.T)
        >>> print(softlib.scoring.output_rank(log_probs).rank)
        3
    """
    function = "output_rank"
    checks.require_floating(function, log_probs=log_probs)
    checks.require_rank(function, "log_probs", log_probs, 2, "(..., V)")
    if epsilon is None:
        epsilon = float(jnp.finfo(log_probs.dtype).eps)
    checks.require_positive_number(function, "epsilon", epsilon)
    classes = log_probs.shape[-1]
    x = log_probs.reshape(-1, classes).astype(accumulator_dtype(log_probs))
    bad = ~jnp.isfinite(x).all()
    x = jnp.where(bad, 0, x)
    # Twice: the rounding of the first mean, in all columns, would count as a direction.
    for _ in range(2):
        x = x - x.mean(-1, keepdims=True)
    values = jnp.linalg.svd(x, full_matrices=False, compute_uv=False)
    rounding = epsilon * (x.shape[0] ** 0.5 + classes**0.5)
    least = jnp.abs(x).max(initial=0) * rounding
    decomposed = float(jnp.finfo(x.dtype).eps) * min(x.shape) ** 0.5
    least = lax.stop_gradient(least + values.max(initial=0) * decomposed)
    rank = (values > least).sum().astype(jnp.int32)
    return OutputRank(jnp.where(bad, -1, rank), jnp.where(bad, jnp.nan, values))


def _require_ids(function: str, class_ids: Array) -> None:
    checks.require_integer(function, class_ids=class_ids)
    if class_ids.ndim != 1 or class_ids.shape[0] < 2:
        raise ValueError(
            f"{function}: `class_ids` must have one axis of at least two ids, got "
            f"shape {class_ids.shape}."
        )


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
