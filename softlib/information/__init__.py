"""Numbers about distributions: divergences, mutual information, and what they bound.

Of predictions, given the class:

- `conditional_mutual_information`, and the centroids it needs: `class_centroids`,
  `class_centroid_sums`, `CentroidSums`, `centroid_update`

What preference optimisation learns, as information:

- `differential_information`, `differential_information_entropy`
- `sampled_differential_information`, `SampledEntropy`: of sequences
- `dpo_optimal_policy`, `optimal_rejected_distribution`

Mixtures of hypotheses under the logarithmic loss, and what they guarantee:

- `sequential_mixture`, `SequentialMixture`; `redundancy_bound`, `RedundancyBound`

Lengths of sequences, programs and codes:

- `integer_frequencies`, `range_encode`, `RangeCode`, `range_decode`: a coder
- `context_log_likelihoods`: predictions by what followed before
- `compression_rate`: of programs that print data

From samples, by Gaussian kernels; scalars of a whole set:

- `cauchy_schwarz_divergence`, `cauchy_schwarz_mutual_information`,
  `conditional_cauchy_schwarz_divergence`, `median_bandwidth`
- `cs_information_bottleneck_loss`: of regression
"""

from ._bayes_mixture import (
    RedundancyBound as RedundancyBound,
    SequentialMixture as SequentialMixture,
    redundancy_bound as redundancy_bound,
    sequential_mixture as sequential_mixture,
)
from ._cauchy_schwarz import (
    cauchy_schwarz_divergence as cauchy_schwarz_divergence,
    cauchy_schwarz_mutual_information as cauchy_schwarz_mutual_information,
    conditional_cauchy_schwarz_divergence as conditional_cauchy_schwarz_divergence,
    cs_information_bottleneck_loss as cs_information_bottleneck_loss,
    median_bandwidth as median_bandwidth,
)
from ._conditional import (
    CentroidSums as CentroidSums,
    centroid_update as centroid_update,
    class_centroid_sums as class_centroid_sums,
    class_centroids as class_centroids,
    conditional_mutual_information as conditional_mutual_information,
)
from ._differential import (
    SampledEntropy as SampledEntropy,
    differential_information as differential_information,
    differential_information_entropy as differential_information_entropy,
    dpo_optimal_policy as dpo_optimal_policy,
    optimal_rejected_distribution as optimal_rejected_distribution,
    sampled_differential_information as sampled_differential_information,
)
from ._program_length import (
    RangeCode as RangeCode,
    compression_rate as compression_rate,
    context_log_likelihoods as context_log_likelihoods,
    integer_frequencies as integer_frequencies,
    range_decode as range_decode,
    range_encode as range_encode,
)

__all__ = [
    "CentroidSums",
    "RangeCode",
    "RedundancyBound",
    "SampledEntropy",
    "SequentialMixture",
    "cauchy_schwarz_divergence",
    "cauchy_schwarz_mutual_information",
    "centroid_update",
    "class_centroid_sums",
    "class_centroids",
    "compression_rate",
    "conditional_cauchy_schwarz_divergence",
    "conditional_mutual_information",
    "context_log_likelihoods",
    "cs_information_bottleneck_loss",
    "differential_information",
    "differential_information_entropy",
    "dpo_optimal_policy",
    "integer_frequencies",
    "median_bandwidth",
    "optimal_rejected_distribution",
    "range_decode",
    "range_encode",
    "redundancy_bound",
    "sampled_differential_information",
    "sequential_mixture",
]
