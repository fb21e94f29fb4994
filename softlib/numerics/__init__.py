"""Accumulators of streaming sums, and numerical helpers.

- `RunningMax`, `RunningMaxState`: streaming logsumexp with weighted sums.
- `UnifiedMax`, `UnifiedMaxState`: the same against one reference known beforehand.
- `TwoPass`, `TwoPassState`: the same in extended floats, rescaled without rounding.
- `PlainSum`, `PlainSumState`: sums of positive weights, without exponentials.

Exponentials that neither overflow nor underflow: `ExtendedFloat`, `extended_exp`,
`extended_add`, `extended_multiply`, `extended_sum`, `extended_log`,
`extended_to_float`.

Numbers about neighbours: `similarity_depth`, `SimilarityDepth`, `distance_quantile`,
`dkw_radius`.
Clusters of one size: `balanced_kmeans`.
Edges that a graph does not have: `sample_negative_edges`, `NegativeEdges`.
Generalized Gaussians: `generalized_gaussian_log_prob`, `generalized_gaussian_quantile`,
`generalized_gaussian_fit`, `GeneralizedGaussianFit`, `reshape_distribution`.

A weighted sum from fewer terms: `systematic_resample`, `ResampledTerms`; the worst
cases: `top_k_mean`.
"""

from ._balanced_kmeans import balanced_kmeans as balanced_kmeans
from ._extended import (
    ExtendedFloat as ExtendedFloat,
    extended_add as extended_add,
    extended_exp as extended_exp,
    extended_log as extended_log,
    extended_multiply as extended_multiply,
    extended_sum as extended_sum,
    extended_to_float as extended_to_float,
)
from ._generalized_gaussian import (
    GeneralizedGaussianFit as GeneralizedGaussianFit,
    generalized_gaussian_fit as generalized_gaussian_fit,
    generalized_gaussian_log_prob as generalized_gaussian_log_prob,
    generalized_gaussian_quantile as generalized_gaussian_quantile,
    reshape_distribution as reshape_distribution,
)
from ._negative_edges import (
    NegativeEdges as NegativeEdges,
    sample_negative_edges as sample_negative_edges,
)
from ._plain_sum import (
    PlainSum as PlainSum,
    PlainSumState as PlainSumState,
)
from ._resampling import (
    ResampledTerms as ResampledTerms,
    systematic_resample as systematic_resample,
)
from ._running_max import (
    RunningMax as RunningMax,
    RunningMaxState as RunningMaxState,
)
from ._similarity import (
    SimilarityDepth as SimilarityDepth,
    distance_quantile as distance_quantile,
    dkw_radius as dkw_radius,
    similarity_depth as similarity_depth,
)
from ._top_k_mean import top_k_mean as top_k_mean
from ._two_pass import (
    TwoPass as TwoPass,
    TwoPassState as TwoPassState,
)
from ._unified_max import (
    UnifiedMax as UnifiedMax,
    UnifiedMaxState as UnifiedMaxState,
)

__all__ = [
    "ExtendedFloat",
    "GeneralizedGaussianFit",
    "NegativeEdges",
    "PlainSum",
    "PlainSumState",
    "ResampledTerms",
    "RunningMax",
    "RunningMaxState",
    "SimilarityDepth",
    "TwoPass",
    "TwoPassState",
    "UnifiedMax",
    "UnifiedMaxState",
    "balanced_kmeans",
    "distance_quantile",
    "dkw_radius",
    "extended_add",
    "extended_exp",
    "extended_log",
    "extended_multiply",
    "extended_sum",
    "extended_to_float",
    "generalized_gaussian_fit",
    "generalized_gaussian_log_prob",
    "generalized_gaussian_quantile",
    "reshape_distribution",
    "sample_negative_edges",
    "similarity_depth",
    "systematic_resample",
    "top_k_mean",
]
