"""Numbers about distributions: divergences, mutual information, and what they bound.

What preference optimisation learns, as information:

- `differential_information`, `differential_information_entropy`
- `sampled_differential_information`, `SampledEntropy`: of sequences
- `dpo_optimal_policy`, `optimal_rejected_distribution`
"""

from ._differential import (
    SampledEntropy as SampledEntropy,
    differential_information as differential_information,
    differential_information_entropy as differential_information_entropy,
    dpo_optimal_policy as dpo_optimal_policy,
    optimal_rejected_distribution as optimal_rejected_distribution,
    sampled_differential_information as sampled_differential_information,
)

__all__ = [
    "SampledEntropy",
    "differential_information",
    "differential_information_entropy",
    "dpo_optimal_policy",
    "optimal_rejected_distribution",
    "sampled_differential_information",
]
