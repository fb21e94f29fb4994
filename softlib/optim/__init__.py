"""Gradient transformations, to be chained with those of Optax, and an ascent.

- `perp_grad`: removes the component of a gradient that only scales its weight.
- `projected_gradient_ascent`: the worst point of a ball around each example.
- `pv_tuning`, `PVTuning`, `PVState`: codes and codebooks of quantized weights;
  `pv_code_update`: its step of the codes.
- `sgld`: steps of Langevin dynamics, which draw weights from their posterior.
"""

from ._perp_grad import perp_grad as perp_grad
from ._projected_gradient_ascent import (
    projected_gradient_ascent as projected_gradient_ascent,
)
from ._pv_tuning import (
    PVState as PVState,
    PVTuning as PVTuning,
    pv_code_update as pv_code_update,
    pv_tuning as pv_tuning,
)
from ._sgld import sgld as sgld

__all__ = [
    "PVState",
    "PVTuning",
    "perp_grad",
    "projected_gradient_ascent",
    "pv_code_update",
    "pv_tuning",
    "sgld",
]
