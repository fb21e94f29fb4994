"""Few queries against many keys in plain JAX: a fold over splits of the keys.

The queries that share a key head are the rows of one product (`rows`, R = G T of them).
The scores and values of one split exist at a time, in the dtype of the sums; keys and
values are sliced, never padded or copied whole. Splits behind the longest sequence are
not visited, so time follows the lengths and not the size of the cache.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic
from softlib.numerics import RunningMax, RunningMaxState, UnifiedMax, UnifiedMaxState
from softlib.typing import Precision

# Elements of key and value in a split if `num_splits` is None: 1 MiB in float32, so
# that a split stays in the cache of a core between its products.
SPLIT_SIZE = 2**18
LEAST_KEYS = 128

type State = RunningMaxState | UnifiedMaxState


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of the operation."""

    softcap: float | None = None
    num_splits: int | None = None
    precision: Precision = None


class Operands(NamedTuple):
    """The arrays of the operation; all the queries of one key head are one axis."""

    query: Float[Array, "B K R H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    scale: Float[Array, ""]
    # A row sees this number of first keys (None: all); may be negative or above S.
    visible: Int[Array, "B R"] | None
    unified: UnifiedMax | None  # None: the running maximum

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(self.query, self.key, self.value)


def forward(options: Options, operands: Operands) -> State:
    """The sums over all keys, split by split."""
    count = operands.key.shape[1]
    size = _keys_per_split(options, operands)
    if size == count:
        return whole(options, operands)
    splits = -(-count // size)
    if operands.visible is not None:
        seen = jnp.clip(operands.visible.max(initial=0), 0, count)
        splits = (seen + size - 1) // size

    def visit(split: Int[Array, ""] | int, state: State) -> State:
        # The last split starts early enough to be full; repeated keys are masked.
        begin = split * size
        start = jnp.minimum(begin, count - size)
        take = lambda array: lax.dynamic_slice_in_dim(array, start, size, 1)
        mine = operands._replace(key=take(operands.key), value=take(operands.value))
        fresh = None
        if count % size:
            fresh = start + jnp.arange(size) >= begin
        return _updated(options, mine, state, start, fresh)

    return lax.fori_loop(0, splits, visit, _start(operands))


def whole(options: Options, operands: Operands) -> State:
    """The sums over all keys at once; JAX differentiates this."""
    start = _start(operands)
    if operands.key.shape[1] == 0:
        return start
    return _updated(options, operands, start, 0, None)


def scores(
    options: Options,
    query: Float[Array, "B K R H"],
    key: Float[Array, "B S K H"],
    scale: Float[Array, ""],
) -> Float[Array, "B K R S"]:
    dtype = common_dtype(query, key)
    z = jnp.einsum(
        "bkrh,bskh->bkrs",
        query.astype(dtype),
        key.astype(dtype),
        precision=options.precision,
        preferred_element_type=scale.dtype,
    )
    z = z * scale
    cap = options.softcap
    return z if cap is None else cap * jnp.tanh(z / cap)


def weighted_values(
    options: Options,
    weights: Float[Array, "B K R S"],
    value: Float[Array, "B S K Hv"],
) -> Float[Array, "B K R Hv"]:
    # Weights stay in the dtype of the sums: float16 overflows at exp(11).
    return jnp.einsum(
        "bkrs,bskv->bkrv",
        weights,
        value.astype(weights.dtype),
        precision=options.precision,
        preferred_element_type=weights.dtype,
    )


def seen_by_rows(
    visible: Int[Array, "B R"], indices: Int[Array, " S"]
) -> Bool[Array, "B 1 R S"]:
    return indices[None, None, None, :] < visible[:, None, :, None]


def seen_by_any(
    visible: Int[Array, "B R"], indices: Int[Array, " S"]
) -> Bool[Array, "B S 1 1"]:
    longest = visible.max(1, initial=0)
    return indices[None, :, None, None] < longest[:, None, None, None]


def _start(operands: Operands) -> State:
    batch, heads, rows, _ = operands.query.shape
    dtype, shape = operands.dtype, (batch, heads, rows)
    weighted = jnp.zeros((*shape, operands.value.shape[-1]), dtype)
    accumulator = operands.unified or RunningMax()
    state = accumulator.init(shape, dtype, weighted=weighted)
    return match_varying(state, operands.query)


def _updated(
    options: Options,
    split: Operands,
    state: Any,
    start: Int[Array, ""] | int,
    fresh: Bool[Array, " S"] | None,
) -> State:
    """Adds a split of the keys, whose first has the index `start`, to the state."""
    z, value = scores(options, split.query, split.key, split.scale), split.value
    indices = start + jnp.arange(z.shape[-1])
    if fresh is not None:
        z = jnp.where(fresh[None, None, None, :], z, -jnp.inf)
    if split.visible is not None:
        z = jnp.where(seen_by_rows(split.visible, indices), z, -jnp.inf)
        # Unused entries of a cache may hold NaN, which a weight of 0 keeps.
        value = jnp.where(seen_by_any(split.visible, indices), value, 0)
    accumulator = split.unified or RunningMax()
    weigh = lambda weights: weighted_values(options, weights, value)
    return accumulator.update(state, z, weigh=weigh)


def _keys_per_split(options: Options, operands: Operands) -> int:
    batch, count, heads, size = operands.key.shape
    if options.num_splits is not None:
        return -(-count // options.num_splits)
    if is_symbolic(batch):
        return min(count, LEAST_KEYS)  # the size for a large batch
    per_key = max(1, batch * heads * (size + operands.value.shape[-1]))
    return min(count, max(LEAST_KEYS, SPLIT_SIZE // per_key))
