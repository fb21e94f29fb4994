"""Gradient transformations, to be chained with those of Optax, and an ascent.

- `perp_grad`: removes the component of a gradient that only scales its weight.
- `projected_gradient_ascent`: the worst point of a ball around each example.
- `sgld`: steps of Langevin dynamics, which draw weights from their posterior.
"""

from ._perp_grad import perp_grad as perp_grad
from ._projected_gradient_ascent import (
    projected_gradient_ascent as projected_gradient_ascent,
)
from ._sgld import sgld as sgld

__all__ = [
    "perp_grad",
    "projected_gradient_ascent",
    "sgld",
]
