"""Drawing sequences from models.

Token by token, with logits as values:

- `generate`, `Generated`: sequences drawn, or the likeliest token each time
- `beam_search`, `Beams`: the likeliest sequences
- `Processor`, `RepetitionPenalty`, `TokenAutomaton`, `typical_logits`: what changes
  logits before a token is drawn

A draft that proposes, a model that verifies:

- `speculative_generate`, `SpeculativeSequences`: sequences in fewer calls of a model
- `Draft`, `Drafted`, `PromptLookup`, `NGramDraft`, `ModelDraft`: what proposes tokens
- `speculative_verify`, `SpeculativeStep`, `speculative_verify_tree`, `SpeculativePath`:
  exact verification
- `speculative_acceptance`, `speculative_residual`: its parts
- `expected_accepted_tokens`, `speculative_speedup`: what a draft is worth

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

from ._beam_search import Beams as Beams, beam_search as beam_search
from ._drafts import (
    Draft as Draft,
    Drafted as Drafted,
    ModelDraft as ModelDraft,
    NGramDraft as NGramDraft,
    PromptLookup as PromptLookup,
)
from ._flow_matching import (
    FlowSample as FlowSample,
    exponential_temperature as exponential_temperature,
    gumbel_flow_loss as gumbel_flow_loss,
    gumbel_flow_velocity as gumbel_flow_velocity,
    gumbel_softmax_interpolant as gumbel_softmax_interpolant,
    sample_gumbel_flow as sample_gumbel_flow,
)
from ._generate import Generated as Generated, generate as generate
from ._independence_chain import (
    IndependenceChain as IndependenceChain,
    independence_chain_update as independence_chain_update,
)
from ._processors import (
    Processor as Processor,
    RepetitionPenalty as RepetitionPenalty,
    TokenAutomaton as TokenAutomaton,
    typical_logits as typical_logits,
)
from ._speculative import (
    SpeculativePath as SpeculativePath,
    SpeculativeStep as SpeculativeStep,
    expected_accepted_tokens as expected_accepted_tokens,
    speculative_acceptance as speculative_acceptance,
    speculative_residual as speculative_residual,
    speculative_speedup as speculative_speedup,
    speculative_verify as speculative_verify,
    speculative_verify_tree as speculative_verify_tree,
)
from ._speculative_generate import (
    SpeculativeSequences as SpeculativeSequences,
    speculative_generate as speculative_generate,
)
from ._value_guided import (
    ValueGuidedBeam as ValueGuidedBeam,
    value_guided_search as value_guided_search,
)

__all__ = [
    "Beams",
    "Draft",
    "Drafted",
    "FlowSample",
    "Generated",
    "IndependenceChain",
    "ModelDraft",
    "NGramDraft",
    "Processor",
    "PromptLookup",
    "RepetitionPenalty",
    "SpeculativePath",
    "SpeculativeSequences",
    "SpeculativeStep",
    "TokenAutomaton",
    "ValueGuidedBeam",
    "beam_search",
    "expected_accepted_tokens",
    "exponential_temperature",
    "generate",
    "gumbel_flow_loss",
    "gumbel_flow_velocity",
    "gumbel_softmax_interpolant",
    "independence_chain_update",
    "sample_gumbel_flow",
    "speculative_acceptance",
    "speculative_generate",
    "speculative_residual",
    "speculative_speedup",
    "speculative_verify",
    "speculative_verify_tree",
    "typical_logits",
    "value_guided_search",
]
