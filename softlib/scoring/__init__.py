"""Judging text and models by the probabilities that models give.

Rewards and preferences from two language models:

- `density_ratio_reward`, `annotate_preferences`, `PreferenceAnnotation`

Uncertainty of generated text:

- `sequence_nll`, `greedy_nll`: of given tokens, and of greedy decoding
- `sequence_entropy`, `predictive_entropy`: of the next tokens, and of sampled answers
- `semantic_entropy` over groups of equal meaning, which `similar_groups` finds

Detection of text that a model wrote:

- `entropy_test`, `EntropyTest`: log-perplexity against entropy
- `two_model_test`, `TwoModelTest`: the likelihood ratio of two models

Extraction of memorised text:

- `calibrated_confidence`: in each of several sampled continuations
- `identical_groups`: which of them are the same

Benchmark items in the training data:

- `option_permutations`: the orders in which a question's options are scored
- `benchmark_leakage`, `Leak`: whether one order is much likelier than the others
- `isolation_decision`: of an isolation forest in one dimension, exactly

Inversion of language models from their log-probabilities:

- `log_ratio_codes`: log-probabilities of a few classes, from which all follow by
  `decode_log_ratios` with a `LogRatioDecoder`
- `log_ratio_decoder`, `fit_log_ratio_decoder`: from a known head or from observations
- `output_rank`, `OutputRank`: the width of the model

Activation sparsity of feed-forward layers:

- `tail_truncation_error` of a threshold, `truncation_threshold` of an error
- `truncate_activations`, `activation_ratio`: with a threshold
- `perplexity_sparsity`, `PerplexitySparsity`: the error at a given perplexity

Cascades of a small and a large model:

- `ensemble_uncertainty`, `EnsembleUncertainty`: of several passes
- `route_by_uncertainty`: what to send on, by a budget or a threshold
- `similar_cases`, `SimilarCases`: past mistakes that resemble an example
- `cascade_curve`: accuracy against the number sent on
"""

from ._cascade import (
    EnsembleUncertainty as EnsembleUncertainty,
    SimilarCases as SimilarCases,
    cascade_curve as cascade_curve,
    ensemble_uncertainty as ensemble_uncertainty,
    route_by_uncertainty as route_by_uncertainty,
    similar_cases as similar_cases,
)
from ._density_ratio import (
    PreferenceAnnotation as PreferenceAnnotation,
    annotate_preferences as annotate_preferences,
    density_ratio_reward as density_ratio_reward,
)
from ._detection import (
    EntropyTest as EntropyTest,
    TwoModelTest as TwoModelTest,
    entropy_test as entropy_test,
    two_model_test as two_model_test,
)
from ._extraction import (
    calibrated_confidence as calibrated_confidence,
    identical_groups as identical_groups,
)
from ._inversion import (
    LogRatioDecoder as LogRatioDecoder,
    OutputRank as OutputRank,
    decode_log_ratios as decode_log_ratios,
    fit_log_ratio_decoder as fit_log_ratio_decoder,
    log_ratio_codes as log_ratio_codes,
    log_ratio_decoder as log_ratio_decoder,
    output_rank as output_rank,
)
from ._leakage import (
    Leak as Leak,
    benchmark_leakage as benchmark_leakage,
    isolation_decision as isolation_decision,
    option_permutations as option_permutations,
)
from ._sparsity import (
    PerplexitySparsity as PerplexitySparsity,
    activation_ratio as activation_ratio,
    perplexity_sparsity as perplexity_sparsity,
    tail_truncation_error as tail_truncation_error,
    truncate_activations as truncate_activations,
    truncation_threshold as truncation_threshold,
)
from ._uncertainty import (
    greedy_nll as greedy_nll,
    predictive_entropy as predictive_entropy,
    semantic_entropy as semantic_entropy,
    sequence_entropy as sequence_entropy,
    sequence_nll as sequence_nll,
    similar_groups as similar_groups,
)

__all__ = [
    "EnsembleUncertainty",
    "EntropyTest",
    "Leak",
    "LogRatioDecoder",
    "OutputRank",
    "PerplexitySparsity",
    "PreferenceAnnotation",
    "SimilarCases",
    "TwoModelTest",
    "activation_ratio",
    "annotate_preferences",
    "benchmark_leakage",
    "calibrated_confidence",
    "cascade_curve",
    "decode_log_ratios",
    "density_ratio_reward",
    "ensemble_uncertainty",
    "entropy_test",
    "fit_log_ratio_decoder",
    "greedy_nll",
    "identical_groups",
    "isolation_decision",
    "log_ratio_codes",
    "log_ratio_decoder",
    "option_permutations",
    "output_rank",
    "perplexity_sparsity",
    "predictive_entropy",
    "route_by_uncertainty",
    "semantic_entropy",
    "sequence_entropy",
    "sequence_nll",
    "similar_cases",
    "similar_groups",
    "tail_truncation_error",
    "truncate_activations",
    "truncation_threshold",
    "two_model_test",
]
