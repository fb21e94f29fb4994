"""A layer of tensor attention: queries that attend to tuples of keys."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from softlib import _checks as checks, attention, masks
from softlib._array_arguments import array_arguments
from softlib.masks import Block, Mask, PerAxis
from softlib.typing import Implementations, Precision

from ._attention import static_names
from ._head_sizes import head_sizes


class TensorAttention(nnx.Module):
    r"""Multi-head attention to pairs of keys, or to triples and longer tuples.

    Order 3, with $q = x W_q$ and, for each of the two key axes, $k_t = x W_{k,t}$ and
    $v_t = x W_{v,t}$: token $i$ gets $\sum_{jk} P_{ijk} \, v_{1,j} \odot v_{2,k} \, W$,
    where $P_i$ is the softmax over all pairs $(j, k)$ of
    $\text{scale} \sum_c q_{ic} k_{1,jc} k_{2,kc}$. Each axis has projections of its
    own. Order 2 is ordinary attention, with another scale unless it is given; order m
    has m - 1 axes.

    Args:
        features: Size D of the last axis of inputs and outputs.
        num_heads: Number of query heads.
        order: Static, at least 2: one query and `order - 1` keys.
        num_key_heads: Number of key heads, a divisor of `num_heads`, the same on every
            axis; None is as many.
        head_features: Size H of a query and of a key; None is `features` / `num_heads`.
        value_features: Size of a value; None is `features` / `num_heads`.
        kv_features: Size of the last axis of `inputs_kv`, or one size per key axis;
            None is `features`.
        blank_key: Static; whether every axis gets one more key and value, learned and
            the same for all sequences, that no mask hides. A query that finds no tuple
            can attend to the blanks. They start at 1, so that a pair of a blank and a
            token is attended to as in ordinary attention, and no row is ever empty.
        method: Static; `exact`, or `polynomial` for the approximation of
            `softlib.attention.kronecker_attention_polynomial`, linear in the number of
            tokens and only for heads of a few features.
        logit_bound: Static; of `polynomial`, as the three that follow; see there. A
            query whose logits might exceed it gives NaN.
        rtol: Static; relative error of the weights, from which the degree follows;
            None is 0.01 if there is no `degree`.
        degree: Static; of the polynomial. One of `degree` and `logit_bound` is needed.
        basis: Static; `chebyshev` or `taylor`.
        scale: Factor of the logits; None is $1/H$. $H^{-1/2}$ is that of 2-simplicial
            attention, and of ordinary attention with order 2.
        use_bias: Whether the projections have a bias.
        dtype: Dtype of the computation; None follows inputs and parameters.
        param_dtype: Dtype of the parameters.
        kernel_init: Initialiser of the projections.
        precision: Of the matrix products.
        implementation: Of `exact`; see `softlib.explain`.
        rngs: Key source.

    Raises:
        TypeError: A size is no Python int.
        ValueError: Sizes do not divide, or an option is out of range or belongs to the
            other method.

    Attributes:
        query: Projection to the query heads.
        keys: Projections to the keys, one per axis.
        values: Projections to the values, one per axis.
        blank_keys: (axes, key heads, H), or None.
        blank_values: The same for the values.
        out: Projection from the heads.

    Derivatives: as `softlib.attention.kronecker_attention`, in the parameters and the
        inputs.
    Cost: that of `softlib.attention.kronecker_attention`, cubic in the number of tokens
        with order 3 and linear memory, or of
        `softlib.attention.kronecker_attention_polynomial`; `2 * order` projections.
    Source: "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
        Attention to Kronecker Computation"; learned blanks are softlib's own.

    Example:
        >>> layer = softlib.nn.TensorAttention(8, 2, blank_key=True, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 5, 8))
        >>> weights = layer.attention_weights(x, mask=softlib.masks.Causal())
        >>> print(layer(x).shape, weights.shape)
        (1, 5, 8) (1, 2, 5, 6, 6)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        order: int = 3,
        num_key_heads: int | None = None,
        head_features: int | None = None,
        value_features: int | None = None,
        kv_features: int | tuple[int, ...] | None = None,
        blank_key: bool = False,
        method: Literal["exact", "polynomial"] = "exact",
        logit_bound: float | None = None,
        rtol: float | None = None,
        degree: int | None = None,
        basis: Literal["chebyshev", "taylor"] = "chebyshev",
        scale: float | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = initializers.lecun_normal(),
        precision: Precision = None,
        implementation: Implementations = None,
        rngs: nnx.Rngs,
    ):
        name = "TensorAttention"
        checks.require_positive_integer(name, "order", order)
        if order < 2:
            raise ValueError(f"{name}: `order` must be at least 2, got {order}.")
        key_heads = num_heads if num_key_heads is None else num_key_heads
        for option, number in (
            ("features", features),
            ("num_heads", num_heads),
            ("num_key_heads", key_heads),
            ("head_features", head_features),
            ("value_features", value_features),
        ):
            if number is not None:
                checks.require_positive_integer(name, option, number)
        size, width = head_sizes(
            name, features, num_heads, key_heads, head_features, value_features
        )
        if method == "polynomial":
            _require_polynomial(name, logit_bound, rtol, degree, implementation)
        else:
            checks.require_one_of(name, "method", method, ("exact", "polynomial"))
            _require_exact(name, logit_bound=logit_bound, rtol=rtol, degree=degree)
        self.order, self.scale, self.method = order, scale, method
        self.logit_bound, self.rtol = logit_bound, rtol
        self.degree, self.basis = degree, basis
        self.precision, self.implementation = precision, static_names(implementation)

        own: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": kernel_init,
            "precision": precision,
            "rngs": rngs,
        }
        linear = functools.partial(nnx.LinearGeneral, **own)
        sources = _kv_sizes(name, features, kv_features, order - 1)
        self.query = linear(features, (num_heads, size))
        self.keys = nnx.List([linear(n, (key_heads, size)) for n in sources])
        self.values = nnx.List([linear(n, (key_heads, width)) for n in sources])
        self.out = linear((num_heads, width), features, axis=(-2, -1))

        def blank(size: int) -> nnx.Param | None:
            shape = (order - 1, key_heads, size)
            return nnx.Param(jnp.ones(shape, param_dtype)) if blank_key else None

        self.blank_keys, self.blank_values = blank(size), blank(width)

    @array_arguments
    def __call__(
        self,
        inputs: Float[Array, "*batch T D"],
        inputs_kv: Array | tuple[Array, ...] | None = None,
        *,
        mask: Mask | PerAxis | None = None,
    ) -> Float[Array, "*batch T D"]:
        """Returns the outputs.

        Args:
            inputs: A sequence.
            inputs_kv: What is attended to, of any length, or one sequence per key axis;
                None is `inputs`.
            mask: A mask value, the same for every key axis, or `masks.PerAxis`; on the
                positions of the tokens, whether there are blanks or not. With the
                method `polynomial` only None and `masks.Causal()`. A query that may
                attend to nothing has the attended value 0.

        Raises:
            TypeError: `mask` is no mask value.
            ValueError: `inputs_kv` has another number of sequences than there are key
                axes, or the method cannot use the mask.
        """
        query, keys, values = self._heads(inputs, inputs_kv)
        return self.out(self._attend(query, keys, values, mask))

    @array_arguments
    def attention_weights(
        self,
        inputs: Float[Array, "*batch T D"],
        inputs_kv: Array | tuple[Array, ...] | None = None,
        *,
        mask: Mask | PerAxis | None = None,
    ) -> Array:
        """Returns P, for pictures and short sequences; every tuple is stored.

        Args:
            inputs, inputs_kv, mask: As in a call.

        Returns:
            Weights `(*batch, num_heads, T, S_1, S_2, ...)` that sum to 1 over the key
            axes; with blanks, entry 0 of a key axis is the blank.
        """
        query, keys, _ = self._heads(inputs, inputs_kv)
        lengths = tuple(key.shape[-3] for key in keys)
        # The product of one-hot values names the tuple: what is attended to is P.
        tuples = int(np.prod(lengths))
        place = np.unravel_index(np.arange(tuples), lengths)
        values = tuple(
            jnp.broadcast_to(
                jnp.asarray(np.arange(n)[:, None] == axis, key.dtype)[:, None, :],
                (*key.shape[:-1], tuples),
            )
            for key, n, axis in zip(keys, lengths, place, strict=True)
        )
        found = jnp.moveaxis(self._attend(query, keys, values, mask), -2, -3)
        return found.reshape(*found.shape[:-1], *lengths)

    def _heads(
        self, inputs: Array, inputs_kv: Any
    ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        sources = _sources(inputs, inputs_kv, self.order - 1)

        def projected(linears: Any, blanks: nnx.Param | None) -> tuple[Array, ...]:
            heads = [linear(x) for linear, x in zip(linears, sources, strict=True)]
            if blanks is None:
                return tuple(heads)
            return tuple(map(_with_blank, heads, blanks[...]))

        keys = projected(self.keys, self.blank_keys)
        return self.query(inputs), keys, projected(self.values, self.blank_values)

    def _attend(
        self,
        query: Array,
        keys: tuple[Array, ...],
        values: tuple[Array, ...],
        mask: Mask | PerAxis | None,
    ) -> Array:
        has_blanks = self.blank_keys is not None
        shared: Any = {"scale": self.scale, "precision": self.precision}
        if self.method == "exact":
            if has_blanks:
                mask = _beside_blanks(mask)
            return attention.kronecker_attention(
                query,
                keys,
                values,
                mask=mask,
                implementation=self.implementation,
                **shared,
            )
        is_causal = _is_causal(mask)
        # Beside a blank query i stands at place i + 1. One more query takes place 0.
        extra = has_blanks and is_causal
        if extra:
            query = jnp.concatenate([query[..., :1, :, :], query], axis=-3)
        found = attention.kronecker_attention_polynomial(
            query,
            keys,
            values,
            logit_bound=self.logit_bound,
            rtol=self.rtol,
            degree=self.degree,
            basis=self.basis,
            is_causal=is_causal,
            **shared,
        )
        return found[..., 1:, :, :] if extra else found


def _with_blank(heads: Array, blank: Array) -> Array:
    """The blank in front of (*batch, S, K, size)."""
    first = jnp.broadcast_to(
        blank.astype(heads.dtype), (*heads.shape[:-3], 1, *blank.shape)
    )
    return jnp.concatenate([first, heads], axis=-3)


def _beside_blanks(mask: Any) -> Any:
    """The mask of tokens, on positions among which 0 is the blank of an axis."""
    if mask is None:
        return None
    if isinstance(mask, Mask):
        return masks.Prefix(1) | mask.shift(0, -1)
    if not isinstance(mask, PerAxis):
        raise TypeError(
            "TensorAttention: `mask` must be a mask value, masks.PerAxis or None, got "
            f"{type(mask).__name__}."
        )
    joint = tuple(_joint_beside_blanks(part, len(mask.axes)) for part in mask.joint)
    return PerAxis(*map(_beside_blanks, mask.axes), joint=joint)


def _joint_beside_blanks(part: Any, axes: int) -> Any:
    """The joint mask of tokens behind a blank, without a restriction of blanks."""
    if not isinstance(part, masks.Between):
        free = (None,) * axes
        return _JointOfTokens(PerAxis(*free, joint=part).shift(0, *(-1 for _ in free)))
    if part.first == 0:
        blank, offsets = masks.Prefix(1), (0, -1)
    elif part.second == 0:
        blank, offsets = FIRST_ROW, (-1, 0)
    else:
        blank, offsets = masks.GlobalTokens(0, 1), (-1, -1)
    mask = blank | part.mask.shift(*offsets)
    return masks.Between(part.first, part.second, mask)


# Prefix(1) with query and key exchanged.
FIRST_ROW = (masks.GlobalTokens(0, 1) & ~masks.Prefix(1)) | (
    masks.Window(0, 0) & masks.Prefix(1)
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _JointOfTokens:
    """A joint mask that applies to tuples without a blank; all others attend."""

    mask: PerAxis

    def __call__(self, query: Any, *keys: Any) -> Any:
        return functools.reduce(
            lambda attends, key: attends | (key == 0), keys, self.mask(query, *keys)
        )

    def block_status(self, *edges: Any) -> np.ndarray:
        status = self.mask.block_status(*edges)
        for start, stop in zip(edges[2::2], edges[3::2], strict=True):
            blank = np.where(stop == 1, Block.ALL, Block.SOME)
            status = np.maximum(status, np.where(start == 0, blank, Block.NONE))
        return np.asarray(status)


def _is_causal(mask: Mask | PerAxis | None) -> bool:
    parts = mask.axes if isinstance(mask, PerAxis) else (mask,)
    if not (isinstance(mask, PerAxis) and mask.joint):
        if all(part == masks.Causal() for part in parts):
            return True
        if all(part is None or part == masks.All() for part in parts):
            return False
    raise ValueError(
        "TensorAttention: `mask` must be None or masks.Causal() for the method "
        f"'polynomial', got {type(mask).__name__}; the method 'exact' takes any."
    )


def _sources(inputs: Array, inputs_kv: Any, axes: int) -> tuple[Array, ...]:
    if not isinstance(inputs_kv, tuple | list):
        return (inputs if inputs_kv is None else inputs_kv,) * axes
    if len(inputs_kv) != axes:
        raise ValueError(
            f"TensorAttention: `inputs_kv` must be one sequence, or {axes} (one per "
            f"key axis), got {len(inputs_kv)}."
        )
    return tuple(inputs_kv)


def _kv_sizes(name: str, features: int, given: Any, axes: int) -> tuple[int, ...]:
    sizes = (features if given is None else given,) * axes
    if isinstance(given, tuple | list):
        sizes = tuple(given)
    if len(sizes) != axes:
        raise ValueError(
            f"{name}: `kv_features` must be one size, or {axes} (one per key axis), "
            f"got {len(sizes)}."
        )
    for size in sizes:
        checks.require_positive_integer(name, "kv_features", size)
    return sizes


def _require_polynomial(
    name: str, logit_bound: Any, rtol: Any, degree: Any, implementation: Any
) -> None:
    if logit_bound is None and degree is None:
        raise ValueError(
            f"{name}: `logit_bound` or `degree` must be given for the method "
            "'polynomial', got None for both."
        )
    if rtol is not None and degree is not None:
        raise ValueError(
            f"{name}: `rtol` must be None if `degree` is given, got {rtol}."
        )
    if implementation is not None:
        raise ValueError(
            f"{name}: `implementation` must be None for the method 'polynomial', which "
            f"has one, got {implementation!r}."
        )


def _require_exact(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}: `{option}` must be None for the method 'exact', got {value}."
            )
