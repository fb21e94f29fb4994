"""Ids of classes, tokens or groups, of any integer dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer

# The id that fills a list up.
PADDING = -1


def signed(ids: Any) -> Any:
    """Integers as int32, those of 64 bits as int64; other dtypes as they are.

    The arrays may be NumPy's: masks are evaluated with it too. In an unsigned or narrow
    dtype -1, which stands for no id, would wrap to an id. An id that the signed dtype
    cannot hold becomes its largest number, which is out of every range too.
    """
    dtype = ids.dtype
    if not jnp.issubdtype(dtype, jnp.integer) or dtype in (jnp.int32, jnp.int64):
        return ids
    if not jnp.issubdtype(dtype, jnp.unsignedinteger) or dtype.itemsize < 4:
        return ids.astype(jnp.int32)
    wide = jax.dtypes.canonicalize_dtype(jnp.int64)  # int32 unless x64 is enabled
    most = min(jnp.iinfo(wide).max, jnp.iinfo(dtype).max)
    return jnp.minimum(ids, jnp.asarray(most, dtype)).astype(wide)


def labels_in_range(
    labels: Integer[Array, "*shape"], count: int
) -> Int[Array, "*shape"]:
    """The labels as int32, -1 where they are outside [0, count)."""
    labels = signed(labels)
    valid = (labels >= 0) & (labels < count)
    return jnp.where(valid, labels, -1).astype(jnp.int32)


def equal_ids(one: Any, other: Any) -> Any:
    """True where two ids are the same number; their integer dtypes may differ."""
    kinds = [jnp.issubdtype(each.dtype, jnp.unsignedinteger) for each in (one, other)]
    if kinds[0] == kinds[1]:
        return one == other
    unsigned, ids = (one, other) if kinds[0] else (other, one)
    wide = jnp.promote_types(unsigned.dtype, jnp.dtype(f"u{ids.dtype.name}"))
    return (ids >= 0) & (unsigned.astype(wide) == ids.astype(wide))


def require_ids(
    function: str, positives: Array, batch: tuple[int, ...], *, masks: bool = False
) -> None:
    """Raises unless `positives` are class ids of shape (*batch, K)."""
    if not jnp.issubdtype(positives.dtype, jnp.integer):
        or_mask = ", or a boolean mask over the classes" if masks else ""
        raise TypeError(
            f"{function}: `positives` must be class ids of an integer dtype{or_mask}, "
            f"got {positives.dtype}."
        )
    if positives.ndim != len(batch) + 1 or positives.shape[:-1] != batch:
        axes = ", ".join(map(str, (*batch, "K")))
        raise ValueError(
            f"{function}: `positives` must have shape ({axes}) (several per row), "
            f"got {positives.shape}."
        )
