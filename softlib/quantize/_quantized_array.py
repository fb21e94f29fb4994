"""Weights in few bits as a value: codes, scales, zeros, a codebook."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments, as_array
from softlib._dtypes import accumulator_dtype
from softlib._printed import argument

from ._packing import (
    MOST_BITS,
    pack_codes,
    require_bits,
    require_codes,
    unpacked,
)


class QuantizedParameters(NamedTuple):
    """The continuous part of a `QuantizedArray`: what is learned with fixed codes.

    Attributes:
        scale: Factor of each group, or None.
        zero: Smallest weight of each group, or None.
        codebook: Vectors, or None.

    Derivatives: those of `QuantizedArray.decode`.
    Cost: nothing by itself.

    Example:
        >>> weight = softlib.quantize.quantize_groups(jnp.ones((2, 8)), group_size=4)
        >>> print(weight.parameters.scale.shape, weight.parameters.codebook)
        (2, 2) None
    """

    scale: Float[Array, "*batch groups"] | None
    zero: Float[Array, "*batch groups"] | None
    codebook: Float[Array, "K d"] | None


class QuantizedArray:
    r"""An array of weights in few bits, along its last axis.

    Without a codebook weight $i$ of a group with scale $s$ and zero $m$ is

    $$w_i = s\, q_i + m, \qquad\text{or without a zero}\qquad
    w_i = s\, (q_i - 2^{\mathrm{bits} - 1}),$$

    with the code $q_i$ in $[0, 2^{\mathrm{bits}})$. With a codebook of $K$ vectors of
    $d$ numbers a code stands for $d$ neighbours, $s\, C_q$. `quantize_groups` and
    `quantize_vectors` make such arrays from weights; this constructor takes the codes
    of a checkpoint.

    The value is a pytree: packed codes, scale, zero and codebook are leaves, all else
    is static, so that it passes through `jax.jit` and `jax.lax.scan` over the first
    axis. `softlib.logits.QuantizedLogits` is a head with such a weight, which is never
    decoded whole.

    Args:
        codes: One per weight, or with a codebook one per vector. Outside $[0,
            2^{\mathrm{bits}})$ they raise where their value is known; in a traced array
            the lowest bits are kept.
        bits: Static number of bits of a code, 1 to 16.
        scale: One per group; with a codebook None leaves it out.
        zero: One per group, not with a codebook.
        codebook: One row per code. A code of no row is NaN.
        where: True for the weights that count; the others are exactly 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `bits` or a code is out of range.

    Attributes:
        words: The packed codes, uint32 (`pack_codes`).
        scale, zero, codebook: As given.
        where_words: The packed `where`, or None.
        bits: As given.
        size: Number of weights along the last axis.

    Derivatives: of `decode`, with respect to scale, zero and codebook, of any order.
        The gradient with respect to the decoded array, summed over the weights of each
        code, is that of the codebook.
    Cost: the bits of the codes, and the numbers of each group.
    Source: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression";
        "Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM Inference
        with Transferable Prompt".

    Example:
        >>> codebook = jnp.array([[0.0, 1.0], [2.0, 3.0]])
        >>> codes = jnp.array([[1, 0, 1]])
        >>> weight = softlib.quantize.QuantizedArray(codes, bits=1, codebook=codebook)
        >>> print(weight.shape, weight.decode())
        (1, 6) [[2. 3. 0. 1. 2. 3.]]
    """

    words: Array
    scale: Array | None
    zero: Array | None
    codebook: Array | None
    where_words: Array | None
    bits: int
    size: int

    @array_arguments
    def __init__(
        self,
        codes: Integer[Array, "*batch n"],
        *,
        bits: int,
        scale: Float[Array, "*batch groups"] | None = None,
        zero: Float[Array, "*batch groups"] | None = None,
        codebook: Float[Array, "K d"] | None = None,
        where: Bool[Array, "*batch size"] | None = None,
    ) -> None:
        name = "QuantizedArray"
        require_bits(name, bits, 1, MOST_BITS)
        require_codes(name, "codes", codes, bits)
        checks.require_floating(name, scale=scale, zero=zero, codebook=codebook)
        checks.require_boolean(name, where=where)
        *batch, size = codes.shape
        if codebook is not None:
            if codebook.ndim != 2 or not 1 <= codebook.shape[0] <= 2**bits:
                raise ValueError(
                    f"{name}: `codebook` must have shape (K, d) with 1 to {2**bits} "
                    f"rows for {bits} bits, got {codebook.shape}."
                )
            size *= codebook.shape[1]
        elif scale is None:
            raise ValueError(f"{name}: `scale` must be given without a codebook.")
        if zero is not None and (codebook is not None or scale is None):
            raise ValueError(f"{name}: `zero` must be None with a codebook.")
        if scale is not None:
            rows, groups = scale.shape[:-1], scale.shape[-1:]
            if rows != (*batch,) or not groups or groups[0] < 1 or size % groups[0]:
                raise ValueError(
                    f"{name}: `scale` must have shape {(*batch,)} and one more axis, "
                    f"whose length divides {size}, got {scale.shape}."
                )
            checks.require_shape(name, "zero", zero, scale.shape, "that of `scale`")
        shape = (*batch, size)
        checks.require_shape(name, "where", where, shape, "one per weight")
        kept = None if where is None else pack_codes(where.astype(jnp.int32), bits=1)
        fields = _Fields(pack_codes(codes, bits=bits), scale, zero, codebook, kept)
        vars(self).update(fields._asdict(), bits=bits, size=size)

    # ------------------------------------------------------------------ what it is
    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return (*self.words.shape[:-1], self.size)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.words.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the decoded array, which is that of its floating leaves."""
        known = self.codebook if self.scale is None else self.scale
        assert known is not None
        return known.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def codes(self) -> Int[Array, "*batch n"]:
        """The codes, int32."""
        return unpacked(self.words, self._codes_per_row, self.bits)

    @property
    def _codes_per_row(self) -> int:
        return self.size // (1 if self.codebook is None else self.codebook.shape[1])

    @property
    def where(self) -> Bool[Array, "*batch size"] | None:
        """True for the weights that count; None: all do."""
        if self.where_words is None:
            return None
        return unpacked(self.where_words, self.size, 1) > 0

    @property
    def parameters(self) -> QuantizedParameters:
        """Scale, zero and codebook."""
        return QuantizedParameters(self.scale, self.zero, self.codebook)

    # ------------------------------------------------------------- what is made of it
    def decode(self) -> Float[Array, "*batch size"]:
        """The array of weights, in `dtype`; sums are in float32 or wider."""
        dtype = accumulator_dtype(self.dtype)
        codes = self.codes
        if self.codebook is None:
            if self.zero is None:
                codes = codes - 2 ** (self.bits - 1)
            values = codes.astype(dtype)
        else:
            options: Any = {"mode": "fill", "fill_value": jnp.nan}
            vectors = jnp.asarray(self.codebook, dtype).at[codes].get(**options)
            values = vectors.reshape(self.shape)
        if self.scale is not None:
            groups = values.reshape(*self.scale.shape, -1)
            groups = groups * self.scale.astype(dtype)[..., None]
            if self.zero is not None:
                groups = groups + self.zero.astype(dtype)[..., None]
            values = groups.reshape(self.shape)
        if (where := self.where) is not None:
            values = jnp.where(where, values, 0)
        return values.astype(self.dtype)

    def look_up(self, index: Integer[Array, "..."]) -> Float[Array, "... size"]:
        """The decoded rows at an index along the first axis: embeddings of tokens.

        An index out of range gives NaN, also a negative one.
        """
        index = as_array("look_up", "index", index)
        checks.require_integer("look_up", index=index)
        if self.ndim < 2:
            raise ValueError(
                f"look_up: the array must have at least 2 axes, got {self.shape}."
            )
        inside = (index >= 0) & (index < self.shape[0])
        place = jnp.where(inside, index, 0)
        rows = self.over_leaves(
            lambda name, leaf: leaf if name == "codebook" else leaf[place]
        ).decode()
        inside = inside.reshape(*inside.shape, *(1,) * (rows.ndim - inside.ndim))
        return jnp.where(inside, rows, jnp.nan)

    def astype(self, dtype: DTypeLike) -> "QuantizedArray":
        """The value with floating leaves, and decoded weights, of another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"astype: `dtype` must be floating, got {dtype}.")

        def cast(name: str, leaf: Array) -> Array:
            return leaf if name.endswith("words") else leaf.astype(dtype)

        return self.over_leaves(cast)

    def with_parameters(self, parameters: QuantizedParameters) -> "QuantizedArray":
        """The value with other continuous parameters of the same shapes."""
        for name, new, old in zip(
            QuantizedParameters._fields, parameters, self.parameters, strict=True
        ):
            if (new is None) != (old is None) or (
                new is not None and old is not None and new.shape != old.shape
            ):
                shapes = [None if x is None else x.shape for x in (old, new)]
                raise ValueError(
                    f"with_parameters: `{name}` must have shape {shapes[0]}, "
                    f"got {shapes[1]}."
                )
        return self.replaced(**parameters._asdict())

    def with_codes(self, codes: Integer[Array, "*batch n"]) -> "QuantizedArray":
        """The value with other codes of the same shape."""
        codes = as_array("with_codes", "codes", codes)
        require_codes("with_codes", "codes", codes, self.bits)
        shape = (*self.words.shape[:-1], self._codes_per_row)
        checks.require_shape("with_codes", "codes", codes, shape, "that of the codes")
        return self.replaced(words=pack_codes(codes, bits=self.bits))

    # ----------------------------------------------------------------------- as a tree
    def over_leaves(self, function: Callable[[str, Any], Any]) -> "QuantizedArray":
        """The value with `function(name, leaf)` instead of each leaf that it has."""
        return self.replaced(**{n: function(n, leaf) for n, leaf in self._leaves()})

    def _leaves(self) -> list[tuple[str, Any]]:
        """Names of the leaves that there are, and these."""
        every = [(name, getattr(self, name)) for name in _Fields._fields]
        return [(name, leaf) for name, leaf in every if leaf is not None]

    def replaced(self, **fields: Any) -> "QuantizedArray":
        """The value with other fields, unchecked."""
        new = object.__new__(QuantizedArray)
        vars(new).update(vars(self) | fields)
        return new

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={argument(leaf)}" for name, leaf in self._leaves())
        return f"QuantizedArray({shown}, bits={self.bits}, size={self.size})"


class _Fields(NamedTuple):
    """The leaves."""

    words: Any
    scale: Any
    zero: Any
    codebook: Any
    where_words: Any


def _flatten_with_keys(value: QuantizedArray) -> tuple[Any, Any]:
    leaves = [
        (jax.tree_util.GetAttrKey(name), getattr(value, name))
        for name in _Fields._fields
    ]
    return leaves, (value.bits, value.size)


def _unflatten(static: tuple[int, int], leaves: Any) -> QuantizedArray:
    # Checks nothing: transformations put any object instead of an array.
    bits, size = static
    new = object.__new__(QuantizedArray)
    vars(new).update(_Fields(*leaves)._asdict(), bits=bits, size=size)
    return new


jax.tree_util.register_pytree_with_keys(QuantizedArray, _flatten_with_keys, _unflatten)
