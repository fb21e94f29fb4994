r"""Random linear maps to few rows.

Every sketch $S$ (m, n) has $E\, S^T S = I$ and is a value: a pytree of the arrays that
were drawn, which is called with an array of n leading entries. Its adjoint is
`jax.linear_transpose`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments, as_array
from softlib._dtypes import accumulator_dtype, promoted

RADIX_BITS = 4  # of the factors of a Hadamard matrix that are multiplied as matrices


@array_arguments
def fwht(
    x: Float[Array, "*shape"], *, axis: int = 0, normalized: bool = False
) -> Float[Array, "*shape"]:
    r"""The Walsh-Hadamard transform $H x$ along an axis, in natural (Sylvester) order.

    $H_{ij} = (-1)^{\langle i, j \rangle}$ over the bits of the indices, so that
    $H H = n I$.

    Args:
        x: Its axis has a power of two as length.
        axis: Static.
        normalized: Static; divide by $\sqrt n$, which makes it orthogonal.

    Returns:
        Float32 (float64 for float64 `x`).

    Raises:
        TypeError: `x` is not floating.
        ValueError: `axis` is none of `x`, or its length is no power of two.

    Derivatives: forward and reverse, any order; the map is symmetric.
    Cost: $n \log n$ per vector: $\log_{16} n$ products with matrices of 16 rows.
    Source: "A Nearly-Optimal Bound for Fast Regression with ell_infty Guarantee".

    Example:
        >>> print(softlib.estimation.fwht(jnp.array([1.0, 2.0, 3.0, 4.0])))
        [10. -2. -4.  0.]
    """
    function = "fwht"
    x = jnp.asarray(x)
    checks.require_floating(function, x=x)
    checks.require_axes(function, "axis", axis, x.ndim)
    length = x.shape[axis]
    if length < 1 or length & (length - 1):
        raise ValueError(
            f"{function}: `x` must have a power of two entries along `axis`, "
            f"got {length}."
        )
    return _fwht(x.astype(accumulator_dtype(x)), axis, normalized)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HadamardSketch:
    r"""The subsampled randomized Hadamard transform, $S = P H D / \sqrt m$.

    Random signs $D$, the transform of `fwht`, m of its rows. It mixes every entry into
    every row in $n \log n$ operations. Inputs are padded with zeros to a power of two.
    Fewer than some $d \log d$ rows may lose one of d directions altogether.

    Args:
        signs: $\pm 1$ for every input.
        rows: Which rows of the transform are kept, below the power of two.

    Derivatives: of the result with respect to what is mapped.
    Cost: n log n operations per column.
    Source: "A Nearly-Optimal Bound for Fast Regression with ell_infty Guarantee".

    Example:
        >>> draw = softlib.estimation.HadamardSketch.draw
        >>> sketch = draw(jax.random.key(0), num_inputs=6, num_rows=8)
        >>> x = jnp.arange(6.0)  # all rows: lengths are kept
        >>> print(f"{(sketch(x) ** 2).sum():.3f} {(x**2).sum()}")
        55.000 55.0
    """

    signs: Float[Array, " n"]
    rows: Int[Array, " m"]

    @classmethod
    def draw(
        cls,
        key: Array,
        *,
        num_inputs: int,
        num_rows: int,
        with_replacement: bool = False,
    ) -> "HadamardSketch":
        """Draws signs and rows; without replacement at most the power of two."""
        name = f"{cls.__name__}.draw"
        _check_sizes(name, num_inputs=num_inputs, num_rows=num_rows)
        padded = _power_of_two(num_inputs)
        if not with_replacement and num_rows > padded:
            raise ValueError(
                f"{name}: `num_rows` must be at most {padded} without replacement, "
                f"got {num_rows}."
            )
        of_signs, of_rows = jax.random.split(key)
        rows = jax.random.choice(of_rows, padded, (num_rows,), replace=with_replacement)
        return cls(jax.random.rademacher(of_signs, (num_inputs,), jnp.float32), rows)

    @property
    def num_inputs(self) -> int:
        """The length of what it maps, n."""
        return self.signs.shape[0]

    @property
    def num_rows(self) -> int:
        """The length of what it gives, m."""
        return self.rows.shape[0]

    def __call__(self, x: Float[Array, " n *rest"]) -> Float[Array, " m *rest"]:
        """Applies the map to the leading axis; float32, or float64 for float64 `x`."""
        x = _operand(self, x)
        signs = self.signs.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return _hadamard_rows(signs * x, self.rows, 0) / math.sqrt(self.num_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianSketch:
    r"""A matrix of independent normal numbers of variance $1 / m$.

    Args:
        matrix: The map itself.

    Derivatives: of the result with respect to what is mapped, and to the matrix.
    Cost: m n operations per column.
    Source: "A Nearly-Optimal Bound for Fast Regression with ell_infty Guarantee".

    Example:
        >>> draw = softlib.estimation.GaussianSketch.draw
        >>> sketch = draw(jax.random.key(0), num_inputs=6, num_rows=3)
        >>> print(sketch(jnp.ones((6, 2))).shape)
        (3, 2)
    """

    matrix: Float[Array, "m n"]

    @classmethod
    def draw(cls, key: Array, *, num_inputs: int, num_rows: int) -> "GaussianSketch":
        """Draws the matrix."""
        name = f"{cls.__name__}.draw"
        _check_sizes(name, num_inputs=num_inputs, num_rows=num_rows)
        drawn = jax.random.normal(key, (num_rows, num_inputs))
        return cls(drawn / math.sqrt(num_rows))

    @property
    def num_inputs(self) -> int:
        """The length of what it maps, n."""
        return self.matrix.shape[1]

    @property
    def num_rows(self) -> int:
        """The length of what it gives, m."""
        return self.matrix.shape[0]

    def __call__(self, x: Float[Array, " n *rest"]) -> Float[Array, " m *rest"]:
        """Applies the map to the leading axis; float32, or float64 for float64 `x`."""
        x = _operand(self, x)
        matrix = self.matrix.astype(x.dtype)
        return jnp.tensordot(matrix, x, 1, precision=lax.Precision.HIGHEST)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["signs", "buckets"],
    meta_fields=["num_rows"],
)
@dataclasses.dataclass(frozen=True)
class CountSketch:
    r"""Sums of inputs with random signs, each input in one of m random rows.

    The sparsest sketch: one addition per entry. It keeps lengths, but the guarantee of
    `sketched_lstsq` for every coordinate fails for it: one collision may put the whole
    error into one coordinate, however many rows there are.

    Args:
        signs: $\pm 1$ for every input.
        buckets: The row of every input.
        num_rows: Static m.

    Derivatives: of the result with respect to what is mapped.
    Cost: n operations per column.
    Source: "A Nearly-Optimal Bound for Fast Regression with ell_infty Guarantee", as
        what does not work.

    Example:
        >>> draw = softlib.estimation.CountSketch.draw
        >>> sketch = draw(jax.random.key(0), num_inputs=6, num_rows=3)
        >>> print(sketch(jnp.ones((6, 2))).shape)
        (3, 2)
    """

    signs: Float[Array, " n"]
    buckets: Int[Array, " n"]
    num_rows: int

    @classmethod
    def draw(cls, key: Array, *, num_inputs: int, num_rows: int) -> "CountSketch":
        """Draws signs and rows."""
        name = f"{cls.__name__}.draw"
        _check_sizes(name, num_inputs=num_inputs, num_rows=num_rows)
        of_signs, of_rows = jax.random.split(key)
        buckets = jax.random.randint(of_rows, (num_inputs,), 0, num_rows)
        signs = jax.random.rademacher(of_signs, (num_inputs,), jnp.float32)
        return cls(signs, buckets, num_rows)

    @property
    def num_inputs(self) -> int:
        """The length of what it maps, n."""
        return self.signs.shape[0]

    def __call__(self, x: Float[Array, " n *rest"]) -> Float[Array, " m *rest"]:
        """Applies the map to the leading axis; float32, or float64 for float64 `x`."""
        x = _operand(self, x)
        signs = self.signs.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return jax.ops.segment_sum(signs * x, self.buckets, self.num_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TensorHadamardSketch:
    r"""A sketch of Kronecker products that never forms them.

    $S (u \otimes v) = \sqrt m\, (S_1 u) \odot (S_2 v)$ for two Hadamard sketches of m
    rows, drawn with replacement.

    Args:
        left: The sketch of the first factor.
        right: The sketch of the second factor, with as many rows.

    Derivatives: of the result with respect to what is mapped.
    Cost: $n_1 \log n_1 + n_2 \log n_2$ operations for a product given by its factors.
    Source: "A Nearly-Optimal Bound for Fast Regression with ell_infty Guarantee".

    Example:
        >>> draw = softlib.estimation.TensorHadamardSketch.draw
        >>> sketch = draw(jax.random.key(0), num_inputs=(3, 5), num_rows=4)
        >>> u, v = jnp.arange(3.0), jnp.arange(5.0)
        >>> whole = sketch(jnp.kron(u, v))
        >>> print(jnp.allclose(sketch.of_factors(u, v), whole, atol=1e-4))
        True
    """

    left: HadamardSketch
    right: HadamardSketch

    @classmethod
    def draw(
        cls, key: Array, *, num_inputs: tuple[int, int], num_rows: int
    ) -> "TensorHadamardSketch":
        """Draws both sketches, for factors of these lengths."""
        name = f"{cls.__name__}.draw"
        if not isinstance(num_inputs, tuple) or len(num_inputs) != 2:
            raise ValueError(
                f"{name}: `num_inputs` must be the lengths of two factors, "
                f"got {num_inputs!r}."
            )
        for length in num_inputs:
            _check_sizes(name, num_inputs=length, num_rows=num_rows)
        draw = functools.partial(
            HadamardSketch.draw, num_rows=num_rows, with_replacement=True
        )
        pairs = zip(jax.random.split(key), num_inputs, strict=True)
        return cls(*(draw(own, num_inputs=length) for own, length in pairs))

    @property
    def num_inputs(self) -> int:
        """The length of what it maps, the product of those of the factors."""
        return self.left.num_inputs * self.right.num_inputs

    @property
    def num_rows(self) -> int:
        """The length of what it gives, m."""
        return self.left.num_rows

    def __call__(self, x: Float[Array, " n *rest"]) -> Float[Array, " m *rest"]:
        """Applies the map to the leading axis; float32, or float64 for float64 `x`."""
        x = _operand(self, x)
        columns = x.reshape(self.left.num_inputs, self.right.num_inputs, -1)
        signs = self.left.signs[:, None] * self.right.signs[None]
        columns = signs.astype(x.dtype)[..., None] * columns
        half = _padded_fwht(_padded_fwht(columns, 0), 1)
        kept = half[self.left.rows, self.right.rows] / math.sqrt(self.num_rows)
        return kept.reshape(self.num_rows, *x.shape[1:])

    def of_factors(
        self, u: Float[Array, " n1"], v: Float[Array, " n2"]
    ) -> Float[Array, " m"]:
        """Applies the map to the Kronecker product of two vectors."""
        left, right = promoted(self.left(u), self.right(v))
        return math.sqrt(self.num_rows) * left * right


type Sketch = HadamardSketch | GaussianSketch | CountSketch | TensorHadamardSketch


def _check_sizes(function: str, **sizes: int) -> None:
    for name, size in sizes.items():
        checks.require_positive_integer(function, name, size)


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _operand(sketch: Sketch, x: Array) -> Array:
    name = type(sketch).__name__
    x = as_array(name, "x", x)
    checks.require_floating(name, x=x)
    if not x.ndim or x.shape[0] != sketch.num_inputs:
        raise ValueError(
            f"{name}: `x` must have {sketch.num_inputs} entries on its first axis, "
            f"got shape {x.shape}."
        )
    return x.astype(accumulator_dtype(x))


def _padded_fwht(x: Array, axis: int) -> Array:
    length = x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, _power_of_two(length) - length)
    return _fwht(jnp.pad(x, widths), axis, False)


def _hadamard_rows(x: Array, rows: Array, axis: int) -> Array:
    return jnp.take(_padded_fwht(x, axis), rows, axis=axis)


def _fwht(x: Array, axis: int, normalized: bool) -> Array:
    x = jnp.moveaxis(x, axis, 0)
    shape, length = x.shape, x.shape[0]
    bits = length.bit_length() - 1
    done = 1
    # H of the whole is the Kronecker product of those of groups of bits.
    for start in range(0, bits, RADIX_BITS):
        size = 1 << min(RADIX_BITS, bits - start)
        index = np.arange(size)
        parity = np.bitwise_count(index[:, None] & index[None]) % 2
        factor = jnp.asarray(1.0 - 2.0 * parity, x.dtype)
        parts = x.reshape(done, size, -1)
        mixed = jnp.einsum(
            "ij,ajb->aib", factor, parts, precision=lax.Precision.HIGHEST
        )
        x, done = mixed, done * size
    x = x.reshape(shape)
    if normalized:
        x = x / math.sqrt(length)
    return jnp.moveaxis(x, 0, axis)
