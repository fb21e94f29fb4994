"""Softmax and its relatives: maps from scores to probabilities, with one signature.

Of exponentials:

- `softmax`, `log_softmax`, `logsumexp`: with a temperature, masks, any axes
- `two_pass_softmax`, `two_pass_log_softmax`, `two_pass_logsumexp`: error-free exponents
- `unified_max_softmax`, `unified_max_log_softmax`, `UnifiedMaxResult`: a maximum known
  beforehand

Of other functions:

- `stablemax`, `log_stablemax`: linear above 0
- `spherical_softmax`, `log_spherical_softmax`, `taylor_softmax`, `log_taylor_softmax`:
  polynomials
- `sdm`, `log_sdm`: a base and a scale that similarity and distance decide

With zeros:

- `sparsemax`, `entmax15`, `entmax`, `tempered_softmax`, `normmax`, `budget_sparsemax`;
  `support_size`
- `top_k_softmax`; `top_k_gating`, `TopKGating`; `noisy_top_k_gating`,
  `NoisyTopKGating`;
  `soft_top_k`, `log_soft_top_k`
- `dense_to_sparse_gate`, `sparsify_gates`, `temperature_schedule`
- `top_k_logits`, `top_p_logits`, `min_p_logits`: filters of a sampler

Draws:

- `gumbel_softmax`, `straight_through_one_hot`, `concrete_log_prob`, `concrete_score`
"""

from ._budget import (
    budget_sparsemax as budget_sparsemax,
    normmax as normmax,
)
from ._dense_to_sparse import (
    dense_to_sparse_gate as dense_to_sparse_gate,
    sparsify_gates as sparsify_gates,
    temperature_schedule as temperature_schedule,
)
from ._entmax import (
    entmax as entmax,
    tempered_softmax as tempered_softmax,
)
from ._filters import (
    min_p_logits as min_p_logits,
    top_k_logits as top_k_logits,
    top_p_logits as top_p_logits,
)
from ._gumbel import (
    concrete_log_prob as concrete_log_prob,
    concrete_score as concrete_score,
    gumbel_softmax as gumbel_softmax,
    straight_through_one_hot as straight_through_one_hot,
)
from ._noisy_top_k import (
    NoisyTopKGating as NoisyTopKGating,
    noisy_top_k_gating as noisy_top_k_gating,
)
from ._sdm import (
    log_sdm as log_sdm,
    sdm as sdm,
)
from ._soft_top_k import (
    log_soft_top_k as log_soft_top_k,
    soft_top_k as soft_top_k,
)
from ._softmax import (
    log_softmax as log_softmax,
    logsumexp as logsumexp,
    softmax as softmax,
)
from ._sparsemax import (
    entmax15 as entmax15,
    sparsemax as sparsemax,
    support_size as support_size,
)
from ._spherical import (
    log_spherical_softmax as log_spherical_softmax,
    spherical_softmax as spherical_softmax,
)
from ._stablemax import (
    log_stablemax as log_stablemax,
    stablemax as stablemax,
)
from ._taylor import (
    log_taylor_softmax as log_taylor_softmax,
    taylor_softmax as taylor_softmax,
)
from ._top_k import (
    TopKGating as TopKGating,
    top_k_gating as top_k_gating,
    top_k_softmax as top_k_softmax,
)
from ._two_pass import (
    two_pass_log_softmax as two_pass_log_softmax,
    two_pass_logsumexp as two_pass_logsumexp,
    two_pass_softmax as two_pass_softmax,
)
from ._unified_max import (
    UnifiedMaxResult as UnifiedMaxResult,
    unified_max_log_softmax as unified_max_log_softmax,
    unified_max_softmax as unified_max_softmax,
)

__all__ = [
    "NoisyTopKGating",
    "TopKGating",
    "UnifiedMaxResult",
    "budget_sparsemax",
    "concrete_log_prob",
    "concrete_score",
    "dense_to_sparse_gate",
    "entmax",
    "entmax15",
    "gumbel_softmax",
    "log_sdm",
    "log_soft_top_k",
    "log_softmax",
    "log_spherical_softmax",
    "log_stablemax",
    "log_taylor_softmax",
    "logsumexp",
    "min_p_logits",
    "noisy_top_k_gating",
    "normmax",
    "sdm",
    "soft_top_k",
    "softmax",
    "sparsemax",
    "sparsify_gates",
    "spherical_softmax",
    "stablemax",
    "straight_through_one_hot",
    "support_size",
    "taylor_softmax",
    "temperature_schedule",
    "tempered_softmax",
    "top_k_gating",
    "top_k_logits",
    "top_k_softmax",
    "top_p_logits",
    "two_pass_log_softmax",
    "two_pass_logsumexp",
    "two_pass_softmax",
    "unified_max_log_softmax",
    "unified_max_softmax",
]
