"""Drawing sequences from models.

Gumbel-softmax flow matching, from noise on the simplex to symbols, with guidance:

- `exponential_temperature`, `gumbel_softmax_interpolant`: what training sees at a time
- `gumbel_flow_loss`: of a denoiser
- `gumbel_flow_velocity`, `sample_gumbel_flow`, `FlowSample`: from it to sequences

The filters of a sampler are in `softlib.softmax`: `top_k_logits`, `top_p_logits`,
`min_p_logits`.
"""

from ._flow_matching import (
    FlowSample as FlowSample,
    exponential_temperature as exponential_temperature,
    gumbel_flow_loss as gumbel_flow_loss,
    gumbel_flow_velocity as gumbel_flow_velocity,
    gumbel_softmax_interpolant as gumbel_softmax_interpolant,
    sample_gumbel_flow as sample_gumbel_flow,
)

__all__ = [
    "FlowSample",
    "exponential_temperature",
    "gumbel_flow_loss",
    "gumbel_flow_velocity",
    "gumbel_softmax_interpolant",
    "sample_gumbel_flow",
]
