"""Drawing sequences from models.

Token by token, with logits as values:

- `generate`, `Generated`: sequences drawn, or the likeliest token each time
- `beam_search`, `Beams`: the likeliest sequences
- `Processor`, `RepetitionPenalty`, `TokenAutomaton`, `typical_logits`: what changes
  logits before a token is drawn
- `constrained_log_prob`: of a sequence among those that an automaton accepts

Small models that steer a large one:

- `dynamic_logit_fusion`, `DynamicFusion`: as far as they have moved themselves

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

Mixtures of tokens in the place of drawn ones (soft thinking):

- `concept_tokens`, `ConceptTokens`: the next-token distribution cut to a few tokens
- `gumbel_concept_tokens`, `dirichlet_concept_tokens`: with weights that are drawn
- `concept_embedding`: their mean embedding, the next input
- `cold_stop`, `ColdStop`: whether to stop after certain steps

Candidates that are whole sequences:

- `sequence_utility`: the sum of the logits of a sequence
- `candidate_log_probs`: from scores to probabilities over a few candidates
- `minimum_bayes_risk`: the candidate that agrees best with all

Search and sampling with a judge:

- `value_guided_search`, `ValueGuidedBeam`: beams ranked by a value function
- `independence_chain_update`, `IndependenceChain`: memories of samples that were judged
  correct

Labels of given sequences:

- `crf_viterbi`, `ViterbiPath`: the most likely ones of a linear chain

The filters of a sampler are in `softlib.softmax`: `top_k_logits`, `top_p_logits`,
`min_p_logits`.
"""

from ._beam_search import Beams as Beams, beam_search as beam_search
from ._constrained import constrained_log_prob as constrained_log_prob
from ._crf import ViterbiPath as ViterbiPath, crf_viterbi as crf_viterbi
from ._drafts import (
    Draft as Draft,
    Drafted as Drafted,
    ModelDraft as ModelDraft,
    NGramDraft as NGramDraft,
    PromptLookup as PromptLookup,
)
from ._dynamic_fusion import (
    DynamicFusion as DynamicFusion,
    dynamic_logit_fusion as dynamic_logit_fusion,
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
from ._soft_thinking import (
    ColdStop as ColdStop,
    ConceptTokens as ConceptTokens,
    cold_stop as cold_stop,
    concept_embedding as concept_embedding,
    concept_tokens as concept_tokens,
    dirichlet_concept_tokens as dirichlet_concept_tokens,
    gumbel_concept_tokens as gumbel_concept_tokens,
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
from ._utilities import (
    candidate_log_probs as candidate_log_probs,
    minimum_bayes_risk as minimum_bayes_risk,
    sequence_utility as sequence_utility,
)
from ._value_guided import (
    ValueGuidedBeam as ValueGuidedBeam,
    value_guided_search as value_guided_search,
)

__all__ = [
    "Beams",
    "ColdStop",
    "ConceptTokens",
    "Draft",
    "Drafted",
    "DynamicFusion",
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
    "ViterbiPath",
    "beam_search",
    "candidate_log_probs",
    "cold_stop",
    "concept_embedding",
    "concept_tokens",
    "constrained_log_prob",
    "crf_viterbi",
    "dirichlet_concept_tokens",
    "dynamic_logit_fusion",
    "expected_accepted_tokens",
    "exponential_temperature",
    "generate",
    "gumbel_concept_tokens",
    "gumbel_flow_loss",
    "gumbel_flow_velocity",
    "gumbel_softmax_interpolant",
    "independence_chain_update",
    "minimum_bayes_risk",
    "sample_gumbel_flow",
    "sequence_utility",
    "speculative_acceptance",
    "speculative_generate",
    "speculative_residual",
    "speculative_speedup",
    "speculative_verify",
    "speculative_verify_tree",
    "typical_logits",
    "value_guided_search",
]
