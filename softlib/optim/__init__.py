"""Gradient transformations, to be chained with those of Optax.

- `perp_grad`: removes the component of a gradient that only scales its weight.
"""

from ._perp_grad import (
    perp_grad as perp_grad,
)

__all__ = [
    "perp_grad",
]
