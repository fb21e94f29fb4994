"""Drawing sequences from models.

Gumbel-softmax flow matching, from noise on the simplex to symbols, with guidance:

- `exponential_temperature`, `gumbel_softmax_interpolant`: what training sees at a time
- `gumbel_flow_loss`: of a denoiser
- `gumbel_flow_velocity`, `sample_gumbel_flow`, `FlowSample`: from it to sequences

Search and sampling with a judge:

- `value_guided_search`, `ValueGuidedBeam`: beams ranked by a value function
- `independence_chain_update`, `IndependenceChain`: memories of samples that were judged
  correct

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
from ._independence_chain import (
    IndependenceChain as IndependenceChain,
    independence_chain_update as independence_chain_update,
)
from ._value_guided import (
    ValueGuidedBeam as ValueGuidedBeam,
    value_guided_search as value_guided_search,
)

__all__ = [
    "FlowSample",
    "IndependenceChain",
    "ValueGuidedBeam",
    "exponential_temperature",
    "gumbel_flow_loss",
    "gumbel_flow_velocity",
    "gumbel_softmax_interpolant",
    "independence_chain_update",
    "sample_gumbel_flow",
    "value_guided_search",
]
