"""The operands of attention, cut into tiles, and the scores of one tile.

The query heads that share a key head are rows of one tile: M = G * block_query rows,
G = N // K. A tile of scores is (B, K, M, block_key), or its transpose: which axis holds
the keys is `key_axis`, -1 or -2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib._dtypes import accumulator_dtype
from softlib.typing import Precision

from ._plan import BlockPlan
from ._scores import Kind


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static besides the block plan.

    `wide_gradients` leaves gradients in the dtype of the sums, for a caller that adds
    several of them up.
    """

    kind: Kind
    scale: float
    logit_softcap: float | None
    precision: Precision
    out_dtype: Any
    wide_gradients: bool = False


class Operands(NamedTuple):
    """The arrays of one call."""

    # Any: also made of gradients, some of which are None.
    query: Any  # (B, T, N, H)
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K E"] | None
    plan: Any  # BlockPlan
    dense: Bool[Array, "b n t s"] | None = None
    bias: Float[Array, "b n t s"] | None = None
    sinks: Float[Array, " N"] | None = None
    rows: tuple[Float[Array, "B T N"], ...] = ()

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(
            self.query, self.key, self.value, self.bias, self.sinks, *self.rows
        )

    @property
    def groups(self) -> int:
        return self.query.shape[2] // max(self.key.shape[2], 1)


class Scores(NamedTuple):
    """Of one tile.

    Attributes:
        z: The scores, after softcap and bias.
        ok: Where the pair attends; None for everywhere.
        slope: Derivative of the softcap; None without.
    """

    z: Array
    ok: Array | None
    slope: Array | None


class Tiler(NamedTuple):
    """Cuts arrays of the user's layout into tiles, in the dtype of the sums."""

    plan: BlockPlan
    groups: int
    dtype: Any

    def query(self, x: Array, fill: float = 0) -> Array:
        """(B, T, N, H) or (B, T, N) -> (rows, B, K, M, H) or (rows, B, K, M)."""
        size, count, groups = self.plan.blocks[0], self.plan.grid[0], self.groups
        batch, _, heads, *features = x.shape
        x = _padded(x.astype(self.dtype), 1, count * size, fill)
        x = x.reshape(batch, count, size, heads // groups, groups, *features)
        x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
        rows = groups * size
        return x.reshape(count, batch, heads // groups, rows, *features)

    def query_back(self, x: Array) -> Array:
        """The inverse of `query`, without what was padded."""
        size, groups = self.plan.blocks[0], self.groups
        count, batch, heads, _, *features = x.shape
        x = x.reshape(count, batch, heads, groups, size, *features)
        x = jnp.moveaxis(x, (1, 0, 4, 2, 3), (0, 1, 2, 3, 4))
        x = x.reshape(batch, count * size, heads * groups, *features)
        return x[:, : self.plan.lengths[0]]

    def key(self, x: Array) -> Array:
        """(B, S, K, H) -> (columns, B, K, block_key, H)."""
        size, count = self.plan.blocks[1], self.plan.grid[1]
        batch, _, heads, features = x.shape
        x = _padded(x.astype(self.dtype), 1, count * size, 0)
        x = x.reshape(batch, count, size, heads, features)
        return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))

    def key_back(self, x: Array) -> Array:
        count, batch, heads, size, features = x.shape
        x = jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))
        x = x.reshape(batch, count * size, heads, features)
        return x[:, : self.plan.lengths[1]]

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
    """What is defined on pairs: the mask, boolean arrays, the bias; padded."""

    plan: BlockPlan
    groups: int
    dense: Array | None
    bias: Array | None

    def mask(self, row: Array, column: Array, key_axis: int) -> Array:
        """Where the pairs of a block attend, wide or narrow, as the scores."""
        (size_q, size_k), (_, length) = self.plan.blocks, self.plan.lengths
        query = (row * size_q + jnp.arange(size_q))[:, None]
        key = (column * size_k + jnp.arange(size_k))[None, :]
        ok = self.plan.mask._within(*self.plan.lengths)(query, key)
        ok = jnp.broadcast_to(ok, (*ok.shape[:-2], size_q, size_k))
        ok = ok.reshape(-1, 1, 1, size_q, size_k)
        if length % size_k:
            ok = ok & (key < length)[None, None, None]
        if self.dense is not None:
            ok = ok & self._grouped(self._tile(self.dense, row, column))
        return self._as_scores(ok, key_axis)

    def bias_of(self, row: Array, column: Array, key_axis: int) -> Array:
        assert self.bias is not None
        tile = self._grouped(self._tile(self.bias, row, column))
        return self._as_scores(tile, key_axis)

    def sum_bias(
        self, total: Array, dz: Array, row: Array, column: Array, key_axis: int
    ) -> Array:
        """Adds the cotangent of a tile of scores to that of the bias, reduced."""
        assert self.bias is not None
        batch, heads = dz.shape[:2]
        size_q, size_k = self.plan.blocks
        if key_axis == -2:
            dz = dz.swapaxes(-1, -2)
        dz = dz.reshape(batch, heads * self.groups, size_q, size_k)
        narrow = [axis for axis in range(4) if self.bias.shape[axis] == 1]
        dz = dz.sum(narrow, keepdims=True)
        start = self._start(total, row, column)
        before = lax.dynamic_slice(total, start, dz.shape)
        return lax.dynamic_update_slice(total, before + dz, start)

    def _tile(self, x: Array, row: Array, column: Array) -> Array:
        sizes = [
            1 if whole == 1 else size
            for whole, size in zip(x.shape[2:], self.plan.blocks, strict=True)
        ]
        start = self._start(x, row, column)
        return lax.dynamic_slice(x, start, (*x.shape[:2], *sizes))

    def _start(self, x: Array, row: Array, column: Array) -> list[Any]:
        zero = jnp.zeros_like(row)
        wide = [whole > 1 for whole in x.shape[2:]]
        size_q, size_k = self.plan.blocks
        at_q = row * size_q if wide[0] else zero
        at_k = column * size_k if wide[1] else zero
        return [zero, zero, at_q, at_k]

    def _grouped(self, tile: Array) -> Array:
        """(b, n, t, s) -> (b, 1 or K, 1 or G, t, s)."""
        batch, heads, *pair = tile.shape
        groups = 1 if heads == 1 else self.groups
        return tile.reshape(batch, heads // groups, groups, *pair)

    def _as_scores(self, tile: Array, key_axis: int) -> Array:
        """(b, k, g, t, s), wide or narrow, -> (b, k, M, s) or its transpose."""
        size_q, size_k = self.plan.blocks
        tile = jnp.broadcast_to(tile, (*tile.shape[:2], self.groups, size_q, size_k))
        tile = tile.reshape(*tile.shape[:2], self.groups * size_q, size_k)
        return tile if key_axis == -1 else tile.swapaxes(-1, -2)


def scores(
    options: Options,
    pairs: Pairs,
    query: Array,
    key: Array,
    row: Array,
    column: Array,
    *,
    partial: bool,
    key_axis: int,
) -> Scores:
    """The scores of one tile of queries that are scaled already.

    `partial` where the mask has to be evaluated.
    """
    left, right = (query, key) if key_axis == -1 else (key, query)
    z = product(left, right.swapaxes(-1, -2), options)
    slope = None
    if options.logit_softcap is not None:
        bent = jnp.tanh(z / options.logit_softcap)
        z, slope = options.logit_softcap * bent, 1 - bent * bent
    if pairs.bias is not None:
        z = z + pairs.bias_of(row, column, key_axis).astype(z.dtype)
    ok = pairs.mask(row, column, key_axis) if partial else None
    return Scores(z, ok, slope)


def product(left: Array, right: Array, options: Options) -> Array:
    """Matrix products over the leading axes, with sums in the dtype of the operands."""
    return jnp.matmul(
        left,
        right,
        precision=options.precision,
        preferred_element_type=left.dtype,
    )


def _padded(x: Array, axis: int, length: int, fill: float) -> Array:
    if x.shape[axis] == length:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, width, constant_values=fill)
