"""The operands of attention, cut into tiles, and the scores of one tile.

The query heads that share a key head are rows of one tile: M = G * block_query rows,
G = N // K. Attention over tuples of keys is attention with the products of their
features as keys: all key axes but the last are multiplied into the queries. A tile of
scores is (B, K, J, M, block_key), where J is the number of combinations of keys of the
other axes in the block, 1 without any.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _kernel_limits as limits
from softlib._dtypes import accumulator_dtype
from softlib.typing import Precision

from .plan import BlockPlan
from .scores import Kind

# Row and columns of a block: traced integers, as many as the plan has axes.
type Index = Sequence[Array]

# Why a kernel does not run with the user's blocks.
OWN_BLOCKS = "it chooses its own blocks (block sizes or a BlockPlan are given)"


# For slices whose start is in range: otherwise the program checks for negative indices.
IN_RANGE: Any = {"allow_negative_indices": False}


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options besides the block plan.

    `wide_gradients` leaves gradients in the dtype of the sums, for a caller that adds
    several of them. `drops_normalizer` says that the caller uses the output alone, so
    that the normalizer has no cotangent. `has_given_blocks` says that the user gave
    block sizes or a `BlockPlan`, which excludes kernels: they have blocks of their own.
    `step_scores` is the number of scores of one step on a GPU or TPU, where products
    take operands of 16 bits as they are; None is for steps that suit a CPU.
    """

    kind: Kind
    scale: float
    softcap: float | None
    precision: Precision
    out_dtype: Any
    wide_gradients: bool = False
    drops_normalizer: bool = False
    has_given_blocks: bool = False
    step_scores: int | None = None

    @property
    def is_for_cpu(self) -> bool:
        return self.step_scores is None

    def product_dtype(self, operands: "Operands") -> Any:
        """The dtype in which products take their operands."""
        return operands.dtype if self.is_for_cpu else narrowest_dtype(self, operands)


class Operands(NamedTuple):
    """The arrays of a call."""

    # Any: also made of gradients, some of which are None.
    query: Any  # (B, T, N, H)
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K E"] | None
    plan: Any  # BlockPlan
    dense: Bool[Array, "b n t s"] | None = None
    bias: Float[Array, "b n t s"] | None = None
    sinks: Float[Array, " N"] | None = None
    rows: tuple[Float[Array, "B T N"], ...] = ()
    # Keys and values of the key axes before the last: (B, S_t, K, H), (B, S_t, K, E).
    outer: tuple[tuple[Array, Array], ...] = ()

    @property
    def dtype(self) -> Any:
        outer = [array for pair in self.outer for array in pair]
        return accumulator_dtype(
            self.query, self.key, self.value, self.bias, self.sinks, *self.rows, *outer
        )

    @property
    def groups(self) -> int:
        return self.query.shape[2] // max(self.key.shape[2], 1)


def narrowest_dtype(options: Options, operands: Operands) -> Any:
    """That of query, key and value if they agree on 16 bits, else that of the sums."""
    wide = operands.dtype
    if operands.outer or limits.is_exact(options.precision):
        return wide
    arrays = (operands.query, operands.key, operands.value)
    dtypes = {x.dtype for x in arrays if x is not None}
    # Weights that are not relative to a maximum may leave the range of float16.
    fits = [jnp.bfloat16, jnp.float16] if options.kind.is_log else [jnp.bfloat16]
    return (
        dtypes.pop()
        if len(dtypes) == 1 and dtypes <= set(map(jnp.dtype, fits))
        else wide
    )


def why_other_dtypes(
    options: Options, operands: Operands, *, widens: bool = False
) -> str | None:
    """The reason against kernels that take one dtype of 16 bits and sum in float32.

    `widens`: their output may be float32.
    """
    dtype = operands.query.dtype
    assert operands.value is not None
    arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
    reason = limits.why_wrong_dtype(arrays, (jnp.bfloat16, jnp.float16))
    if reason is not None:
        return reason
    for name, array in arrays.items():
        if array.dtype != dtype:
            return f"`{name}` is {array.dtype}, `query` is {dtype}"
    if not options.kind.is_log and dtype == jnp.float16:
        return "weights that are summed as they are may leave the range of float16"
    if operands.dtype != jnp.float32:
        return f"the sums are {operands.dtype}, not float32"
    if options.out_dtype not in (dtype, *[jnp.float32] * widens):
        return f"the output is to be {options.out_dtype}, not {dtype} as the arrays"
    if limits.is_exact(options.precision):
        return f"weights are rounded to the {dtype} of the arrays"
    return None


class Scores(NamedTuple):
    """The scores of one tile.

    Attributes:
        z: The scores, after softcap and bias.
        ok: True where the pair attends; None for everywhere.
        slope: Derivative of the softcap; None without.
    """

    z: Array
    ok: Array | None
    slope: Array | None


class Tiler(NamedTuple):
    """Cuts arrays of the user's layout into tiles, in the dtype of the products."""

    plan: BlockPlan
    groups: int
    dtype: Any

    def query(self, x: Array) -> Array:
        """Cuts (B, T, N, H) into (rows, B, K, M, H)."""
        return self.rows(x.astype(self.dtype))

    def rows(self, x: Array, fill: float = 0) -> Array:
        """Cuts (B, T, N, ...) into (rows, B, K, M, ...), in its own dtype."""
        size, count, groups = self.plan.blocks[0], self.plan.grid[0], self.groups
        batch, _, heads, *features = x.shape
        x = _padded(x, 1, count * size, fill)
        x = x.reshape(batch, count, size, heads // groups, groups, *features)
        x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
        rows = groups * size
        return x.reshape(count, batch, heads // groups, rows, *features)

    def query_back(self, x: Array) -> Array:
        """The inverse of `query`, without padding."""
        size, groups = self.plan.blocks[0], self.groups
        count, batch, heads, _, *features = x.shape
        x = x.reshape(count, batch, heads, groups, size, *features)
        x = jnp.moveaxis(x, (1, 0, 4, 2, 3), (0, 1, 2, 3, 4))
        x = x.reshape(batch, count * size, heads * groups, *features)
        return x[:, : self.plan.lengths[0]]

    def key(self, x: Array, axis: int = -1) -> Array:
        """Cuts (B, S, K, H) of a key axis into (columns, B, K, block_key, H)."""
        size, count = self.plan.blocks[axis], self.plan.grid[axis]
        batch, _, heads, features = x.shape
        x = _padded(x.astype(self.dtype), 1, count * size, 0)
        x = x.reshape(batch, count, size, heads, features)
        return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))

    def key_at(self, x: Array) -> Callable[[Array], Array]:
        """`key(x)[column]`, of the last key axis, as a function of the column.

        With one row of blocks every tile is read once, so it is cut out when it is
        needed, without copying all keys first.
        """
        size, (rows, *_, count) = self.plan.blocks[-1], self.plan.grid
        if rows > 1 or count * size != x.shape[1]:
            tiles = self.key(x)
            return lambda column: tile_at(tiles, column)

        def cut(column: Array) -> Array:
            tile = lax.dynamic_slice_in_dim(x, column * size, size, 1, **IN_RANGE)
            return jnp.moveaxis(tile.astype(self.dtype), 1, 2)

        return cut

    def key_back(self, x: Array, axis: int = -1) -> Array:
        """The inverse of `key`, without padding."""
        count, batch, heads, size, features = x.shape
        x = jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))
        x = x.reshape(batch, count * size, heads, features)
        return x[:, : self.plan.lengths[axis]]

    def pairs(self, x: Array) -> Array:
        """Pads an array over pairs, (b, n, t, s), to whole blocks."""
        for axis, size, count in zip(
            (2, 3), self.plan.blocks, self.plan.grid, strict=True
        ):
            if x.shape[axis] > 1:  # else it is broadcast
                x = _padded(x, axis, size * count, 0)
        return x

    def pairs_back(self, x: Array, like: Array) -> Array:
        return x[:, :, : like.shape[2], : like.shape[3]]


class Pairs(NamedTuple):
    """The mask, boolean array and bias over pairs, padded to whole blocks."""

    plan: BlockPlan
    groups: int
    dense: Array | None
    bias: Array | None
    is_for_cpu: bool = True

    def mask(self, at: Index) -> Array:
        """True where the tuples of a block attend: (b, k, J, M, s)."""
        plan, axes = self.plan, len(at)
        # Axes in the order of a tile: the keys of all axes but the last, then queries.
        order = [axes - 2, *range(axes - 2), axes - 1]
        indices = [
            (block * size + jnp.arange(size)).reshape(
                [-1 if axis == own else 1 for axis in range(axes)]
            )
            for block, size, own in zip(at, plan.blocks, order, strict=True)
        ]
        ok = plan.mask._within(*plan.lengths)(*indices)
        *outer, size_k = plan.blocks[1:]
        shape = (*outer, plan.blocks[0], size_k)
        ok = jnp.broadcast_to(ok, (*ok.shape[:-axes], *shape))
        ranges = zip(indices, plan.lengths, plan.blocks, strict=True)
        for index, length, size in list(ranges)[1:]:
            if length % size:  # the last keys are padding
                real = (index < length).reshape((1,) * (ok.ndim - axes) + index.shape)
                ok = ok & real
        ok = ok.reshape(-1, 1, math.prod(outer), 1, plan.blocks[0], size_k)
        if self.dense is not None:
            ok = ok & self._grouped(self._tile(self.dense, at))
        ok = self._as_scores(ok)
        # Without the barrier XLA evaluates the mask in each sum and maximum that reads
        # it, and on a CPU its integers keep these loops from being vectorised.
        return lax.optimization_barrier(ok) if self.is_for_cpu else ok

    def bias_of(self, at: Index) -> Array:
        assert self.bias is not None
        return self._as_scores(self._grouped(self._tile(self.bias, at)))

    def sum_bias(self, total: Array, dz: Array, at: Index) -> Array:
        """Adds the cotangent of a tile of scores, reduced, to that of the bias."""
        assert self.bias is not None
        batch, heads = dz.shape[:2]
        dz = dz.reshape(batch, heads * self.groups, *self.plan.blocks)
        narrow = [axis for axis in range(4) if self.bias.shape[axis] == 1]
        dz = dz.sum(narrow, keepdims=True)
        start = self._start(total, at)
        dz = lax.dynamic_slice(total, start, dz.shape, **IN_RANGE) + dz
        return lax.dynamic_update_slice(total, dz, start, **IN_RANGE)

    def _tile(self, x: Array, at: Index) -> Array:
        sizes = [
            1 if whole == 1 else size
            for whole, size in zip(x.shape[2:], self.plan.blocks, strict=True)
        ]
        start, sizes = self._start(x, at), (*x.shape[:2], *sizes)
        return lax.dynamic_slice(x, start, sizes, **IN_RANGE)

    def _start(self, x: Array, at: Index) -> list[Any]:
        zero = jnp.zeros_like(at[0])
        starts = [
            block * size if whole > 1 else zero
            for whole, block, size in zip(
                x.shape[2:], at, self.plan.blocks, strict=True
            )
        ]
        return [zero, zero, *starts]

    def _grouped(self, tile: Array) -> Array:
        """Reshapes (b, n, t, s) to (b, 1 or K, 1, 1 or G, t, s)."""
        batch, heads, *pair = tile.shape
        groups = 1 if heads == 1 else self.groups
        return tile.reshape(batch, heads // groups, 1, groups, *pair)

    def _as_scores(self, tile: Array) -> Array:
        """Broadcasts and reshapes (b, k, J, g, t, s) to (b, k, J, M, s)."""
        size_q, size_k = self.plan.blocks[0], self.plan.blocks[-1]
        front = tile.shape[:3]
        tile = jnp.broadcast_to(tile, (*front, self.groups, size_q, size_k))
        return tile.reshape(*front, self.groups * size_q, size_k)


def spread(rows: Array, factors: Sequence[Array]) -> Array:
    """Rows times every combination of factors: (B, K, M, H) -> (B, K, J * M, H)."""
    for factor in reversed(factors):
        batch, heads, size, features = rows.shape
        rows = factor[:, :, :, None, :] * rows[:, :, None]
        rows = rows.reshape(batch, heads, factor.shape[2] * size, features)
    return rows


def spread_first(rows: Array, factors: Sequence[Array]) -> Array:
    """`spread` with features first: (B, K, H, M) -> (B, K, H, J * M)."""
    for factor in reversed(factors):
        *front, size = rows.shape
        rows = factor[..., :, None] * rows[..., None, :]
        rows = rows.reshape(*front, factor.shape[-1] * size)
    return rows


def gather(rows: Array, factors: Sequence[Array]) -> Array:
    """The transpose of `spread`: (B, K, J * M, H) -> (B, K, M, H)."""
    for factor in factors:
        batch, heads, size, features = factor.shape
        rest = rows.shape[2] // size
        rows = rows.reshape(batch, heads, size, rest, features)
        rows = (rows * factor[:, :, :, None, :]).sum(2)
    return rows


def factor_cotangents(
    rows: Array, factors: list[Array], cotangent: Array
) -> list[Array]:
    """Cotangents of the factors of `spread`."""
    _, pull = jax.vjp(lambda factors: spread(rows, factors), factors)
    return pull(cotangent)[0]


def scores(
    options: Options,
    pairs: Pairs,
    query: Array,
    key: Array,
    at: Index,
    *,
    partial: bool,
) -> Scores:
    """The scores of a tile; queries are spread, `partial` adds the mask."""
    outer = math.prod(pairs.plan.blocks[1:-1])
    z = product(query, key.swapaxes(-1, -2), options)
    if not options.is_for_cpu:  # there queries are scaled
        z = z * options.scale
    batch, heads, rows, block_key = z.shape
    z = z.reshape(batch, heads, outer, rows // outer, block_key)
    slope = None
    if options.softcap is not None:
        bent = jnp.tanh(z / options.softcap)
        z, slope = options.softcap * bent, 1 - bent * bent
    if pairs.bias is not None:
        z = z + pairs.bias_of(at).astype(z.dtype)
    ok = pairs.mask(at) if partial else None
    return Scores(z, ok, slope)


def product(left: Array, right: Array, options: Options) -> Array:
    """Matrix products over the leading axes, with sums of at least float32."""
    return jnp.matmul(
        left,
        right,
        precision=options.precision,
        preferred_element_type=accumulator_dtype(left),
    )


def tile_at(tiles: Array, index: Array) -> Array:
    """`tiles[index]` for an index in range.

    `jnp` indexing would handle negative and out-of-range indices: further computations
    for XLA to compile, in every loop.
    """
    return lax.squeeze(slice_at(tiles, index), (0,))


def add_at(tiles: Array, index: Array, tile: Array) -> Array:
    """`tiles` with `tile` added at the index."""
    added = slice_at(tiles, index) + lax.expand_dims(tile, (0,))
    return set_slice(tiles, index, added)


def slice_at(tiles: Array, index: Array) -> Array:
    """`tile_at`, keeping the axis of tiles with length 1."""
    sizes = (1, *tiles.shape[1:])
    return lax.dynamic_slice(tiles, _start(tiles, index), sizes, **IN_RANGE)


def set_slice(tiles: Array, index: Array, new: Array) -> Array:
    """`tiles` with the slice that `slice_at` gives replaced.

    XLA fuses the two if only arithmetic lies between them.
    """
    return lax.dynamic_update_slice(tiles, new, _start(tiles, index), **IN_RANGE)


def _start(tiles: Array, index: Array) -> list[Any]:
    return [index] + [index.dtype.type(0)] * (tiles.ndim - 1)


def _padded(x: Array, axis: int, length: int, fill: float) -> Array:
    if x.shape[axis] == length:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, width, constant_values=fill)
