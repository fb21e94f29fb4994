"""Type aliases that appear in public signatures."""

from collections.abc import Sequence
from typing import Literal

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = [
    "AxisName",
    "GradientFilter",
    "Implementations",
    "PerRow",
    "Precision",
    "Scalar",
]

type Implementations = str | Sequence[str] | None
"""What may run: None chooses, a name pins, of a sequence the first that can runs."""

type AxisName = str | tuple[str, ...]
"""One or several axes of a mesh."""

type GradientFilter = float | int | Literal["auto"] | None
"""Threshold below which blocks of a gradient are dropped; None drops none."""

type Precision = jax.lax.PrecisionLike
"""Precision of the matrix products, as in `jax.lax.dot_general`."""

type Scalar = float | int | Float[Array, ""]
"""A Python number (static) or a scalar array (traced, differentiable)."""

type PerRow = ArrayLike
"""A number, a scalar array, or one value per row (the batch shape)."""
