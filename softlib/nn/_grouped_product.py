"""Rows that are sorted by group, each times the matrix of its group.

`jax.lax.ragged_dot` computes it well on accelerators. XLA has no such product for CPUs
and multiplies every row by every matrix there, forward and backward; so on a CPU a loop
takes blocks of the rows of one group. Its number of steps depends on the sizes of the
groups, which JAX cannot transpose: the two products of this file are primitives that
are each other's transposes, and so have derivatives of every order and in both modes.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from softlib._primitive import is_divided, type_of
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic
from softlib.typing import Precision

# Rows of a block: as many as a group has on average, within these.
_LEAST, _MOST = 8, 128


def grouped_product(
    rows: Float[Array, "R D"],
    weight: Float[Array, "G D F"],
    sizes: Int[Array, " G"],
    *,
    precision: Precision,
    dtype: Any,
) -> Float[Array, "R F"]:
    """Every row times the matrix of its group, in `dtype`, in which it is summed too.

    `sizes`: rows of each group; those of group 0 come first. Rows after the last group
    are undefined, in the results and in the gradient of `rows`.
    """
    rows, weight, sizes = (
        match_varying(x, rows, weight, sizes) for x in (rows, weight, sizes)
    )
    return _rows_p.bind(
        rows, weight, sizes, transposed=False, precision=precision, dtype=dtype
    )


# -------------------------------------------------- what is computed, by ragged_dot
def _ragged_rows(
    rows: Array,
    weight: Array,
    sizes: Array,
    *,
    transposed: bool,
    precision: Precision,
    dtype: Any,
) -> Array:
    """Every row times the matrix of its group, or times its transpose."""
    contracted = (((1,), (2 if transposed else 1,)), ((), ()))
    dimensions = lax.RaggedDotDimensionNumbers(contracted, [0], [0])
    return _ragged(rows, weight, sizes, dimensions, precision, dtype)


def _ragged_outer(
    rows: Array, others: Array, sizes: Array, *, precision: Precision, dtype: Any
) -> Array:
    """Sum of the outer products of its rows in both, for every group: (G, D, F)."""
    dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return _ragged(rows, others, sizes, dimensions, precision, dtype)


def _ragged(
    left: Array,
    right: Array,
    sizes: Array,
    dimensions: lax.RaggedDotDimensionNumbers,
    precision: Precision,
    dtype: Any,
) -> Array:
    return lax.ragged_dot_general(
        *(left, right, sizes, dimensions),
        precision=precision,
        preferred_element_type=dtype,
    )


# -------------------------------------------------------- the same, block by block
def _blocked_rows(
    rows: Array,
    weight: Array,
    sizes: Array,
    *,
    transposed: bool,
    precision: Precision,
    dtype: Any,
) -> Array:
    length, block = rows.shape[0], _block_size(rows, sizes)
    features = weight.shape[1 if transposed else 2]
    rows = _followed(rows, block)
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def group(found: Array, given: Any) -> tuple[Array, None]:
        matrix, first, size = given

        def step(i: Array, found: Array) -> Array:
            start = first + i * block
            part = lax.dynamic_slice_in_dim(rows, start, block)
            part = lax.dot_general(
                part,
                matrix,
                contracted,
                precision=precision,
                preferred_element_type=dtype,
            )
            # The last block reaches into the next groups, which are written later.
            return lax.dynamic_update_slice_in_dim(found, part, start, 0)

        return lax.fori_loop(0, _blocks(size, block), step, found), None

    found = match_varying(jnp.zeros((length + block, features), dtype), rows)
    found, _ = lax.scan(group, found, (weight, _firsts(sizes), sizes))
    return found[:length]


def _blocked_outer(
    rows: Array, others: Array, sizes: Array, *, precision: Precision, dtype: Any
) -> Array:
    block = _block_size(rows, sizes)
    shape = rows.shape[1], others.shape[1]
    wide = jnp.promote_types(jnp.float32, dtype)
    rows, others = _followed(rows, block), _followed(others, block)
    zeros = match_varying(jnp.zeros(shape, wide), rows)

    def group(_: None, given: Any) -> tuple[None, Array]:
        first, size = given

        def step(i: Array, total: Array) -> Array:
            # What the other groups hold may be infinite: both sides are cut.
            own = (i * block + jnp.arange(block) < size)[:, None]
            left, right = (
                jnp.where(own, lax.dynamic_slice_in_dim(x, first + i * block, block), 0)
                for x in (rows, others)
            )
            return total + lax.dot_general(
                left,
                right,
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=wide,
            )

        total = lax.fori_loop(0, _blocks(size, block), step, zeros)
        return None, total.astype(dtype)

    return lax.scan(group, None, (_firsts(sizes), sizes))[1]


def _block_size(rows: Array, sizes: Array) -> int:
    length, groups = rows.shape[0], sizes.shape[0]
    if is_symbolic(length):
        return _MOST
    mean = max(length // groups, 1)
    return min(max(1 << (mean.bit_length() - 1), _LEAST), _MOST)


def _blocks(size: Array, block: int) -> Array:
    return (size + (block - 1)) // block


def _firsts(sizes: Array) -> Array:
    return jnp.cumsum(sizes) - sizes


def _followed(x: Array, block: int) -> Array:
    """Rows followed by `block` zero rows: the last block may reach past the end."""
    return jnp.pad(x, ((0, block), (0, 0)))


# ----------------------------------------------------------------------- as primitives
def _primitive(
    name: str, everywhere: Callable[..., Array], on_cpu: Callable[..., Array]
) -> Primitive:
    """A product that is linear in each of its first two operands.

    The transpose rule, which names both products, is added below.
    """
    primitive = Primitive(name)
    # Remembers the types that it has found.
    static = [*inspect.signature(everywhere).parameters][3:]
    traced = jax.jit(everywhere, static_argnames=static)

    def result(*avals: Any, **options: Any) -> Any:
        (found,) = traced.trace(*map(type_of, avals), **options).jaxpr.out_avals
        return found

    def derivative(primals: Any, tangents: Any, **options: Any) -> Any:
        left, right, sizes = primals
        found = primitive.bind(left, right, sizes, **options)
        # The rule is not called without a tangent.
        slopes = [
            primitive.bind(*pair, sizes, **options)
            for tangent, pair in zip(
                tangents, ((tangents[0], right), (left, tangents[1])), strict=False
            )
            if not isinstance(tangent, ad.Zero)
        ]
        return found, functools.reduce(jnp.add, slopes)

    def mapped(operands: Any, axes: Any, **options: Any) -> Any:
        moved = [
            None if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(operands, axes, strict=True)
        ]

        def one(parts: Any) -> Array:
            own = [
                x if axis is None else part
                for x, axis, part in zip(operands, axes, parts, strict=True)
            ]
            return primitive.bind(*own, **options)

        return lax.map(one, moved), 0

    @functools.partial(jax.jit, static_argnames="options")
    def compiled(*operands: Array, options: Any) -> Array:
        return primitive.bind(*operands, **dict(options))

    def eager(*operands: Array, **options: Any) -> Array:
        if jax.config.jax_disable_jit:  # a compiled `bind` would call itself
            return everywhere(*operands, **options)
        return compiled(*operands, options=tuple(options.items()))

    def lowered_for_cpu(context: Any, *values: Any, **options: Any) -> Any:
        # The compiler divides a product over devices better than a loop of slices.
        divided = is_divided(context.module_context)
        function = functools.partial(everywhere if divided else on_cpu, **options)
        return mlir.lower_fun(function, multiple_results=False)(context, *values)

    primitive.def_abstract_eval(result)
    primitive.def_impl(eager)
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = mapped
    lowered = mlir.lower_fun(everywhere, multiple_results=False)
    mlir.register_lowering(primitive, lowered)
    mlir.register_lowering(primitive, lowered_for_cpu, platform="cpu")
    return primitive


_rows_p = _primitive("softlib_grouped_rows", _ragged_rows, _blocked_rows)
_outer_p = _primitive("softlib_grouped_outer", _ragged_outer, _blocked_outer)


def _transposed_rows(
    cotangent: Any, rows: Any, weight: Any, sizes: Any, *, transposed: bool, **options
) -> Any:
    precision = options["precision"]
    if ad.is_undefined_primal(rows):
        own = {"precision": precision, "dtype": rows.aval.dtype}
        weight = weight.astype(cotangent.dtype)
        found = _rows_p.bind(cotangent, weight, sizes, transposed=not transposed, **own)
        return found, None, None
    own = {"precision": precision, "dtype": weight.aval.dtype}
    rows = rows.astype(cotangent.dtype)
    pair = (cotangent, rows) if transposed else (rows, cotangent)
    return None, _outer_p.bind(*pair, sizes, **own), None


def _transposed_outer(cotangent: Any, rows: Any, others: Any, sizes: Any, **options):
    precision, of_rows = options["precision"], ad.is_undefined_primal(rows)
    missing, given = (rows, others) if of_rows else (others, rows)
    found = _rows_p.bind(
        given.astype(cotangent.dtype),
        cotangent,
        sizes,
        transposed=of_rows,
        precision=precision,
        dtype=missing.aval.dtype,
    )
    return (found, None, None) if of_rows else (None, found, None)


ad.primitive_transposes[_rows_p] = _transposed_rows
ad.primitive_transposes[_outer_p] = _transposed_outer
