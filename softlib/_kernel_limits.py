"""Precisions and `why_not` sentences that the adapters of all kernels share."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

# Values of `precision` for exact float32 products. Unlike XLA's default, None is exact.
PRECISIONS: dict[Any, lax.Precision] = {
    None: lax.Precision.HIGHEST,
    "default": lax.Precision.DEFAULT,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
    lax.Precision.DEFAULT: lax.Precision.DEFAULT,
    lax.Precision.HIGH: lax.Precision.HIGH,
    lax.Precision.HIGHEST: lax.Precision.HIGHEST,
}


def why_too_small(sizes: Iterable[tuple[str, int, int]]) -> str | None:
    """Names a size below its least for kernels; `sizes`: (name, size, least)."""
    for name, size, least in sizes:
        if size < least:
            return f"{size} {name} are too few to gain by it"
    return None


def why_wrong_dtype(
    arrays: dict[str, Array], dtypes: tuple[DTypeLike, ...]
) -> str | None:
    names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
    for name, array in arrays.items():
        if array.dtype not in dtypes:
            return f"`{name}` is {array.dtype}, not {names}"
    return None


def why_no_precision(precision: Any) -> str | None:
    if precision in PRECISIONS:
        return None
    return f"it has no precision {precision!r}"


def is_exact(precision: Any) -> bool:
    """Whether `precision` asks for more than the default."""
    return precision not in (None, "default", lax.Precision.DEFAULT)


def why_not_hopper(generation: str | None) -> str | None:
    if generation == "hopper":
        return None
    found = "another device" if generation is None else f"a {generation.title()}"
    return f"it is written for Hopper GPUs, this is {found}"
