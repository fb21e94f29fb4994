"""A check of the block status and row counts of a mask against every pair."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softlib import _checks as checks
from softlib.masks import Block, Mask

# Ranges of queries, and as many of keys; all of them up to 44 positions.
_MOST_RANGES = 1_000
_MOST_POSITIONS = 1_024
# Pairs and blocks that are asked for one by one.
_ALONE = 64


def check_mask(
    mask: Mask, query_length: int = 32, key_length: int | None = None
) -> None:
    """Fails unless a mask is a value, its methods agree, and its proofs hold.

    For masks of one's own, on a size at which every pair can be looked at. Of every
    range of queries against every range of keys:

    - a block that `block_status` calls NONE holds no pair, one that it calls ALL holds
      all of them, for every entry of the batch; so it is, too, where the arrays of the
      mask are not at hand, as in attention, and while a program is traced;
    - `row_count` is the number of keys of each query, of some lengths;
    - calling the mask gives the same for NumPy and JAX positions, pair by pair, in one
      list, traced, under `jax.vmap`, shifted by traced offsets, and with a batch axis
      in front of its arrays;
    - the mask is equal to its copy and hashable, or an argument of `jax.jit` if it
      holds arrays.

    Args:
        mask: The mask; its arrays are concrete. Choose its fields, and the lengths, so
            small that every case of its definition occurs.
        query_length: Static number of queries, at most 1024; up to 44 every block is
            looked at, above some thousand ranges of each axis, of all sizes.
        key_length: Static number of keys; None for as many as queries.

    Raises:
        AssertionError: Something is wrong; the message has the first pair, row or
            block, the smallest first.
        TypeError: `mask` is no mask value.  ValueError: A length is not in range.

    Derivatives: none; the result is None.
    Cost: half a second and some megabytes for 32 queries and keys.
    Source: softlib's own.

    Example:
        >>> class Few(softlib.masks.Causal):
        ...     def row_count(self, query_length, key_length=None):
        ...         return np.arange(query_length)
        >>> try: softlib.testing.check_mask(Few())
        ... except AssertionError as error: print(str(error).split(" keys ")[1])
        it gives 0 for query 0, which attends to 1
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"check_mask: `mask` must be a mask value, got {type(mask).__name__}."
        )
    key_length = query_length if key_length is None else key_length
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        checks.require_positive_integer("check_mask", name, length)
        if length > _MOST_POSITIONS:
            raise ValueError(
                f"check_mask: `{name}` must be at most {_MOST_POSITIONS}, because "
                f"pairs are looked at one by one, got {length}."
            )
    subject = _Subject(mask, query_length, key_length)
    _check_value(mask)
    pairs = _check_pairs(subject)
    _check_blocks(subject, pairs)
    _check_counts(subject, pairs)


@dataclasses.dataclass(frozen=True)
class _Subject:
    mask: Mask
    query_length: int
    key_length: int

    @property
    def query(self) -> np.ndarray:
        return np.arange(self.query_length)[:, None]

    @property
    def key(self) -> np.ndarray:
        return np.arange(self.key_length)[None, :]

    @property
    def name(self) -> str:
        return type(self.mask).__name__

    def asked(self, method: str, way: str, call: Callable[[], Any]) -> Any:
        """The result of a call; what it raises says which call it was."""
        try:
            return call()
        except Exception as error:
            text = f"{self.name}.{method}: {way} it raises {type(error).__name__}"
            raise AssertionError(f"{text}: {error}") from error


# ----------------------------------------------------------------------------- a value
def _check_value(mask: Mask) -> None:
    repr(mask)
    for part in _parts(mask):
        for field in dataclasses.fields(part):
            given = getattr(part, field.name)
            if "axes" in field.metadata:
                continue
            try:
                hash(given)
            except TypeError as error:
                raise AssertionError(
                    f"{type(part).__name__}: the field `{field.name}` is static and "
                    f"must be hashable, got {type(given).__name__}; declare an array "
                    "with masks.array_field, make a list a tuple"
                ) from error
    copy = jax.tree.map(lambda leaf: leaf, mask)
    if not jax.tree.leaves(mask) and (copy != mask or hash(copy) != hash(mask)):
        raise AssertionError(
            f"{type(mask).__name__}: the mask is not equal to its copy"
        )


def _parts(mask: Mask) -> Iterator[Mask]:
    """A mask and the masks that it is made of."""
    yield mask
    for field in dataclasses.fields(mask):
        given = getattr(mask, field.name)
        if isinstance(given, Mask):
            yield from _parts(given)


# --------------------------------------------------------------------------- the pairs
def _check_pairs(subject: _Subject) -> np.ndarray:
    """The pairs that attend, by batch entry; checks that all ways to ask agree."""
    mask, query, key = subject.mask, subject.query, subject.key
    pairs = subject.asked("attends", "on NumPy positions", lambda: mask(query, key))
    shape = (subject.query_length, subject.key_length)
    pairs = np.asarray(pairs).reshape(-1, *shape)
    listed = subject.asked("attends", "on a list of pairs", lambda: _in_a_list(subject))
    traced = subject.asked("attends", "traced", lambda: _traced(subject))
    for way, found in {"on a list of pairs": listed, **traced}.items():
        found = np.asarray(found)
        found = np.broadcast_to(found.reshape(-1, *shape), np.shape(pairs))
        wrong = np.argwhere(found != pairs)
        if len(wrong):
            entry, row, column = wrong[0]
            raise AssertionError(
                f"{subject.name}.attends: {way} query {row} and key {column} give "
                f"{found[entry, row, column]}, on NumPy positions "
                f"{pairs[entry, row, column]}"
            )
    rows, columns = (
        np.unique(np.linspace(0, length - 1, 5).astype(int)) for length in shape
    )
    for row in rows:
        for column in columns:
            found = np.asarray(mask(row, column)).reshape(-1)
            if (found != pairs[:, row, column]).any():
                raise AssertionError(
                    f"{subject.name}.attends: asked alone, query {row} and key "
                    f"{column} give {found}, among others {pairs[:, row, column]}"
                )
    return pairs


def _in_a_list(subject: _Subject) -> Any:
    query, key = np.broadcast_arrays(subject.query, subject.key)
    return subject.mask(query.ravel(), key.ravel())


def _traced(subject: _Subject) -> dict[str, Any]:
    """The pairs as compiled programs ask for them, all in one."""
    batched = _with_batch_axis(subject.mask)
    on_host = subject.query, subject.key

    def ask(mask, batched, query, key, offset):
        by_query = jax.vmap(lambda one: mask(one, key[0]))(query[:, 0])
        shifted = mask.shift(offset, offset + 1)
        found = {
            "traced": mask(query, key),
            "in a program, on NumPy positions": jnp.asarray(mask(*on_host)),
            "under vmap": jnp.moveaxis(by_query, 0, -2),
            "shifted by traced offsets": shifted(query - offset, key - offset - 1),
        }
        if batched is not None:
            found["with a batch axis"] = batched(query, key)
        return found

    return jax.device_get(jax.jit(ask)(subject.mask, batched, *on_host, 2))


def _with_batch_axis(mask: Mask) -> Mask | None:
    """The mask of a batch of one, if it holds arrays without a batch axis."""
    leaves, structure = jax.tree.flatten(mask)
    ranks = mask._leaf_ranks()
    if not leaves or any(map(int.__ne__, map(np.ndim, leaves), ranks)):
        return None
    return jax.tree.unflatten(structure, [jnp.asarray(leaf)[None] for leaf in leaves])


# -------------------------------------------------------------------------- the blocks
def _check_blocks(subject: _Subject, pairs: np.ndarray) -> None:
    mask = subject.mask
    leaves, structure = jax.tree.flatten(mask)
    bare = jax.tree.unflatten(structure, [object() for _ in leaves])
    queries, keys = _ranges(subject.query_length), _ranges(subject.key_length)
    edges = (queries[0][:, None], queries[1][:, None], *keys)

    def traced():
        found = []
        jax.eval_shape(lambda: found.append(bare.block_status(*edges)))
        return found[0]

    ask = lambda way, call: subject.asked("block_status", way, call)
    without = "with objects in the place of its arrays"
    found = ask(without, lambda: bare.block_status(*edges))
    _require_sound(subject, found, pairs, queries, keys)
    for way, call in (
        ("with its arrays", lambda: mask.block_status(*edges)),
        ("while a program is traced", traced),
        ("of a list of blocks", lambda: _listed(bare, edges)),
        *(("asked alone", call) for call in _blocks_alone(bare, edges, found)),
    ):
        if not np.array_equal(ask(way, call), found):
            raise AssertionError(
                f"{subject.name}.block_status: {way} it gives another status, though "
                "it may depend on its arguments and static fields only"
            )


def _require_sound(
    subject: _Subject, found: np.ndarray, pairs: np.ndarray, queries: Any, keys: Any
) -> None:
    if not np.isin(found, list(Block)).all():
        strange = found[~np.isin(found, list(Block))][0]
        raise AssertionError(
            f"{subject.name}.block_status: {strange} is no masks.Block"
        )
    lengths = [stop - start for start, stop in (queries, keys)]
    size = lengths[0][:, None] * lengths[1]
    count = [_sums(entry, queries, keys) for entry in pairs]
    none = (found == Block.NONE) & (np.max(count, 0) > 0)
    whole = (found == Block.ALL) & (np.min(count, 0) < size)
    wrong = np.flatnonzero(none | whole)
    if not len(wrong):
        return
    row, column = np.unravel_index(wrong[size.flat[wrong].argmin()], found.shape)
    (first, stop), (first_key, stop_key) = (
        (int(starts[at]), int(stops[at]))
        for (starts, stops), at in ((queries, row), (keys, column))
    )
    held = pairs[:, first:stop, first_key:stop_key]
    claim = Block(int(found[row, column]))
    entry, query, key = np.argwhere(held == (claim == Block.NONE))[0]
    verb = "attends" if claim == Block.NONE else "does not attend"
    of_entry = f" in batch entry {entry}" if len(pairs) > 1 else ""
    raise AssertionError(
        f"{subject.name}.block_status: {claim.name} of queries "
        f"[{first}, {stop}) and keys [{first_key}, {stop_key}), but query "
        f"{first + query} {verb} to key {first_key + key}{of_entry}"
    )


def _sums(pairs: np.ndarray, queries: Any, keys: Any) -> np.ndarray:
    """Pairs that attend in each block of two lists of ranges."""
    before = np.zeros((pairs.shape[0] + 1, pairs.shape[1] + 1), np.int64)
    before[1:, 1:] = pairs.cumsum(0).cumsum(1)
    rows = before[queries[1]] - before[queries[0]]
    return rows[:, keys[1]] - rows[:, keys[0]]


def _ranges(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops: every range, or as many as may be of each of some sizes."""
    start, stop = np.triu_indices(length + 1, 1)
    if len(start) <= _MOST_RANGES:
        return start, stop
    powers = 2 ** np.arange(length.bit_length())
    sizes = np.unique([powers, powers + 1, powers * 3 // 2])
    sizes = np.append(sizes[sizes < length], length)
    each = _MOST_RANGES // len(sizes)
    starts = [np.unique(np.linspace(0, length - n, each).astype(int)) for n in sizes]
    stops = [some + n for some, n in zip(starts, sizes, strict=True)]
    return np.concatenate(starts), np.concatenate(stops)


def _listed(mask: Mask, edges: tuple[np.ndarray, ...]) -> np.ndarray:
    every = np.broadcast_arrays(*edges)
    return mask.block_status(*(x.ravel() for x in every)).reshape(every[0].shape)


def _blocks_alone(
    mask: Mask, edges: tuple[np.ndarray, ...], found: np.ndarray
) -> Iterator[Callable[[], Any]]:
    """Some blocks by Python integers; each call gives the whole map with its block."""
    every = [x.ravel() for x in np.broadcast_arrays(*edges)]
    for at in np.linspace(0, found.size - 1, _ALONE).astype(int):

        def call(at=at):
            one = found.copy()
            one.flat[at] = mask.block_status(*(int(x[at]) for x in every))
            return one

        yield call


# -------------------------------------------------------------------------- the counts
def _check_counts(subject: _Subject, pairs: np.ndarray) -> None:
    _, rows, columns = pairs.shape
    half, half_columns = -(-rows // 2), -(-columns // 2)
    sizes = ((rows, columns), (half, columns), (rows, half_columns), (1, 1))
    count = lambda mask: [mask.row_count(*size) for size in sizes]
    ways = {" in a program": lambda: jax.jit(count)(subject.mask)}
    if not jax.tree.leaves(subject.mask):
        ways = {"": lambda: count(subject.mask), **ways}
    for way, call in ways.items():
        counts = subject.asked("row_count", way.strip() or "on the host", call)
        for size, found in zip(sizes, counts, strict=True):
            expected = pairs[:, : size[0], : size[1]].sum(-1)
            of = f"{subject.name}.row_count: of {size[0]} queries and {size[1]} keys"
            _require_equal(of + way, np.asarray(found), expected)


def _require_equal(of: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.issubdtype(found.dtype, np.integer) or found.size != expected.size:
        raise AssertionError(
            f"{of} it gives {found.dtype} of shape {found.shape}, not an integer per "
            "query (and batch entry)"
        )
    found = found.reshape(expected.shape)
    wrong = np.argwhere(found != expected)
    if len(wrong):
        entry, row = wrong[0]
        raise AssertionError(
            f"{of} it gives {found[entry, row]} for query {row}, which attends to "
            f"{expected[entry, row]}"
        )
