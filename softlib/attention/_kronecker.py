"""Attention over tuples of keys: Kronecker (tensor) attention of any order."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.masks import Mask, PerAxis, Window
from softlib.typing import Implementations, Precision, Scalar

from ._arguments import (
    Shapes,
    are_given,
    require_batch,
    require_plan,
    run,
    scaled,
    tuple_shapes,
)
from ._engine.plan import BlockPlan, block_sizes, cheapest_last_axis, per_axis, plan_of
from ._engine.scores import Softmax
from ._engine.tiles import Operands, Options
from ._partials import AttentionResult


class _Options(TypedDict, total=False):
    scale: Scalar | None
    precision: Precision
    implementation: Implementations


class _KroneckerOptions(_Options, total=False):
    mask: Any
    block_query: int | None
    block_keys: tuple[int | None, ...] | None


@overload
# pyrefly: ignore[inconsistent-overload]
def kronecker_attention(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    return_lse: Literal[True],
    **options: Unpack[_KroneckerOptions],
) -> AttentionResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def kronecker_attention(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_KroneckerOptions],
) -> Array: ...
@array_arguments
def kronecker_attention(
    query: Float[Array, "*batch T N H"],
    keys: Sequence[Float[Array, "*batch _S K H"]],
    values: Sequence[Float[Array, "*batch _S K E"]],
    *,
    mask: Mask | PerAxis | BlockPlan | None = None,
    scale: Scalar | None = None,
    return_lse: bool = False,
    block_query: int | None = None,
    block_keys: tuple[int | None, ...] | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch T N E"] | AttentionResult:
    r"""Attention in which every query attends to tuples of keys, in linear memory.

    With two key axes, order 3, $z_{ijk} = a \sum_c q_{ic}\, k^1_{jc}\, k^2_{kc}$,
    $p_{i\cdot\cdot} = \mathrm{softmax}(z_{i\cdot\cdot})$ over all pairs $(j, k)$ at
    once, and $\mathrm{out}_i = \sum_{jk} p_{ijk}\, v^1_j \odot v^2_k$; with more key
    axes more factors. It finds what depends on several tokens together, such as three
    numbers that sum to zero, for which pairwise attention needs a size that grows with
    the sequence. With one key axis it is `dot_product_attention` with another scale.
    Products of three vectors do not survive a rotation of all three: do not rotate
    queries and keys by position.

    Args:
        query: Any leading batch axes, or none.
        keys: One array per key axis; the axes may differ in length. K key heads; query
            head n reads key head `n // (N // K)`, N a multiple of K.
        values: As many, of the lengths of `keys`; their feature size E may differ from
            H.
        mask: A mask value of `softlib.masks`, which then holds on every key axis;
            `masks.PerAxis` for one mask per axis and for masks that relate the keys of
            a tuple to each other; or the `BlockPlan` of one. Blocks of tuples that it
            excludes are not visited.
        scale: Multiplies the products; None for $1/H$. A number is static, a scalar
            array is traced and differentiable.
        return_lse: Static; whether to return the logarithm of $\sum_{jk} e^{z_{ijk}}$
            too.
        block_query: Static queries per block; None chooses by mask and shape. Kernels
            have blocks of their own: where sizes or a `BlockPlan` are given, none runs.
        block_keys: Static keys per block of each axis; None chooses, also in an entry.
            The keys of all axes but the last become rows of a tile: 8 or so, and some
            hundreds of the last. Where no size is given the order of the axes is chosen
            too.
        precision: Of the matrix products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`. `reference` materialises the
            scores of all tuples and supports forward mode.

    Returns:
        The output in the dtype of `query`; with `return_lse` also the log-sum, nats,
        `(*batch, T, N)`, float32, or float64 if an argument is float64. A query that
        may attend to no tuple, because one of the axes leaves it no key, has the output
        0 and the log-sum -inf.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, or the mask has other key axes.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse, with respect to
        `query`, `keys`, `values` and `scale`, through both results; plain forward mode
        with `implementation="reference"`. A query without keys has gradient 0 and gives
        none.
    Cost: with P tuples in the visited blocks $2 P N (H + E)$ flop forward and
        $P N (6 H + 6 E)$ backward, of which none are saved by the order; scratch of the
        arguments once in float32 and of a few tiles. Kept for the backward pass: the
        arguments, the output, and one number per row. Query and keys are multiplied in
        the dtype of the sums, also for bfloat16 arguments.
    Source: "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
        Attention to Kronecker Computation", whose scale is the default.

    Example:
        >>> attend = softlib.attention.kronecker_attention
        >>> query, key = jnp.zeros((2, 1, 4)), jnp.ones((3, 1, 4))
        >>> value = jnp.arange(3.0).reshape(3, 1, 1)
        >>> print(attend(query, (key, key), (value, value + 1))[:, 0, 0])
        [2. 2.]
    """
    return _attention(
        "kronecker_attention",
        query,
        keys,
        values,
        names=("keys", "values"),
        mask=mask,
        scale=scale,
        power=-1.0,
        return_lse=return_lse,
        blocks={"block_query": block_query, "block_keys": block_keys},
        precision=precision,
        implementation=implementation,
    )


@overload
# pyrefly: ignore[inconsistent-overload]
def two_simplicial_attention(
    query: Array,
    key1: Array,
    key2: Array,
    value1: Array,
    value2: Array,
    *,
    window1: int,
    window2: int,
    key2_bias: Scalar = 0.0,
    value2_bias: Scalar = 0.0,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> AttentionResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def two_simplicial_attention(
    query: Array,
    key1: Array,
    key2: Array,
    value1: Array,
    value2: Array,
    *,
    window1: int,
    window2: int,
    key2_bias: Scalar = 0.0,
    value2_bias: Scalar = 0.0,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def two_simplicial_attention(
    query: Float[Array, "*batch T N H"],
    key1: Float[Array, "*batch T K H"],
    key2: Float[Array, "*batch T K H"],
    value1: Float[Array, "*batch T K E"],
    value2: Float[Array, "*batch T K E"],
    *,
    window1: int,
    window2: int,
    key2_bias: Scalar = 0.0,
    value2_bias: Scalar = 0.0,
    scale: Scalar | None = None,
    return_lse: bool = False,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch T N E"] | AttentionResult:
    r"""Causal attention over pairs of keys in two sliding windows.

    `kronecker_attention` of order 3 with the scale $1/\sqrt H$, in which query i
    attends to the pairs with $i - w_1 < j \le i$ and $i - w_2 < k \le i$. Public models
    of this form add constants to the second key and value, $1/H$ and 1: with both zero
    the layer is then ordinary attention, at the scale $H^{-3/2}$.

    Args:
        query: Any leading batch axes, or none.
        key1: Keys of the first window; K key heads, N a multiple of K.
        key2: Keys of the second window.
        value1: Values of the first window.
        value2: Values of the second window.
        window1: Static number of keys, the query's own included, in the first window.
        window2: The same for the second.
        key2_bias: Added to every entry of `key2`; a number or a scalar array.
        value2_bias: Added to every entry of `value2`.
        scale: Multiplies the products; None for $1/\sqrt H$.
        return_lse: Static; returns `AttentionResult`, with the log-sum of the scores.
        precision: Of the matrix products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        As `kronecker_attention`.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, or a window is not positive.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as those of `kronecker_attention`, and of the two biases.
    Cost: as `kronecker_attention`, in blocks of the two windows: linear in T.
    Source: "Fast and Simplex: 2-Simplicial Attention in Triton".

    Example:
        >>> zero, value = jnp.zeros((4, 1, 2)), jnp.arange(8.0).reshape(4, 1, 2)
        >>> options = {"window1": 2, "window2": 1, "value2_bias": 1.0}
        >>> attend = softlib.attention.two_simplicial_attention
        >>> print(attend(zero, zero, zero, value, zero, **options)[:, 0, 0])
        [0. 1. 3. 5.]
    """
    function = "two_simplicial_attention"
    for name, size in (("window1", window1), ("window2", window2)):
        checks.require_positive_integer(function, name, size)
    checks.require_floating(function, key2=key2, value2=value2)
    key2, value2 = (
        _biased(function, name, array, bias)
        for name, array, bias in (
            ("key2_bias", key2, key2_bias),
            ("value2_bias", value2, value2_bias),
        )
    )
    return _attention(
        function,
        query,
        (key1, key2),
        (value1, value2),
        names=("key", "value"),
        mask=PerAxis(Window(window1 - 1, 0), Window(window2 - 1, 0)),
        scale=scale,
        power=-0.5,
        return_lse=return_lse,
        blocks={"block_query": None, "block_keys": None},
        precision=precision,
        implementation=implementation,
    )


def _attention(
    function: str,
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    names: tuple[str, str],
    mask: Any,
    scale: Any,
    power: float,
    return_lse: bool,
    blocks: dict[str, Any],
    precision: Precision,
    implementation: Implementations,
) -> Array | AttentionResult:
    """The common body of both functions; the default scale is H to the `power`."""
    shapes = tuple_shapes(function, query, keys, values, names)
    last = shapes[-1]
    lengths = (last.query_length, *(own.key_length for own in shapes))
    plan, order = _planned(function, last, mask, lengths, blocks)
    out_dtype = query.dtype
    query, *arrays = last.flat(query, *keys, *values)
    pairs = list(zip(arrays[: len(keys)], arrays[len(keys) :], strict=True))
    *outer, (key, value) = (pairs[i] for i in order)
    if scale is None:
        scale = float(max(query.shape[-1], 1)) ** power
    query, scale = scaled(function, query, scale)
    operands = Operands(query, key, value, plan, outer=tuple(outer))
    given = are_given(mask, *blocks.values())
    options = Options(
        Softmax(), scale, None, precision, out_dtype, has_given_blocks=given
    )
    found = run(function, implementation, options, operands)
    out = last.unflat(found.out)
    if not return_lse:
        return out
    return AttentionResult(out, last.unflat(found.normalizer))


def _planned(
    function: str,
    shapes: Shapes,
    mask: Any,
    lengths: tuple[int, ...],
    blocks: dict[str, Any],
) -> tuple[BlockPlan, tuple[int, ...]]:
    """The block plan of tuples, and its order of the key axes.

    Only time depends on the order: the last axis is streamed.
    """
    count = len(lengths) - 1
    order = tuple(range(count))
    sizes = block_sizes(function, blocks, count)
    if isinstance(mask, BlockPlan):
        require_plan(function, shapes, mask, lengths, others=any(sizes))
        return mask, order
    mask = per_axis(function, mask, count)
    require_batch(function, shapes, [mask])
    groups = shapes.heads // shapes.key_heads
    if not any(sizes):
        last = cheapest_last_axis(mask, lengths, groups)
        order = (*(i for i in order if i != last), last)
        mask = mask._permuted(order)
        lengths = (lengths[0], *(lengths[i + 1] for i in order))
    return plan_of(mask, lengths, sizes, groups=groups), order


def _biased(function: str, name: str, array: Array, bias: Any) -> Array:
    """Adds the bias in the dtype of the sums: bfloat16 would round its constants."""
    checks.require_scalar(function, name, bias, -jnp.inf, jnp.inf)
    if isinstance(bias, int | float) and bias == 0:
        return array
    wide = accumulator_dtype(array)
    return array.astype(wide) + jnp.asarray(bias, wide)
