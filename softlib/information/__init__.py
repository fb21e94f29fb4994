"""Numbers about distributions: divergences, mutual information, and what they bound.

From samples, by Gaussian kernels; scalars of a whole set:

- `cauchy_schwarz_divergence`, `cauchy_schwarz_mutual_information`,
  `conditional_cauchy_schwarz_divergence`, `median_bandwidth`
- `cs_information_bottleneck_loss`: of regression
"""

from ._cauchy_schwarz import (
    cauchy_schwarz_divergence as cauchy_schwarz_divergence,
    cauchy_schwarz_mutual_information as cauchy_schwarz_mutual_information,
    conditional_cauchy_schwarz_divergence as conditional_cauchy_schwarz_divergence,
    cs_information_bottleneck_loss as cs_information_bottleneck_loss,
    median_bandwidth as median_bandwidth,
)

__all__ = [
    "cauchy_schwarz_divergence",
    "cauchy_schwarz_mutual_information",
    "conditional_cauchy_schwarz_divergence",
    "cs_information_bottleneck_loss",
    "median_bandwidth",
]
