"""Losses over large vocabularies, from a linear head or from logits.

Row statistics, the engine everything else is composed of:

- `linear_row_statistics`, `row_statistics`, `RowStatistics`
- `linear_logits`: the logits themselves, where they are few

Losses and numbers per token; each `linear_` function streams over the vocabulary, its
`softmax_` twin takes logits:

- `linear_softmax_cross_entropy`, `softmax_cross_entropy`
- `linear_softmax_cross_entropy_sum`: its sum over rows, three products for four
- `linear_multi_label_cross_entropy`, `multi_label_cross_entropy`: several labels a row
- `linear_softmax_focal_loss`, `softmax_focal_loss`
- `linear_comp_sum_loss`, `comp_sum_loss`, and two of its members by name:
  `linear_generalized_cross_entropy_loss`, `generalized_cross_entropy_loss`,
  `linear_mean_absolute_error_loss`, `mean_absolute_error_loss`
- `linear_poly1_cross_entropy`, `poly1_cross_entropy`
- `linear_symmetric_cross_entropy`, `symmetric_cross_entropy`
- `linear_token_log_probs`, `softmax_token_log_probs`
- `linear_entropy`, `softmax_entropy`
- `linear_top1_correct`, `softmax_top1_correct`
- `linear_label_rank`, `label_rank`
- `linear_token_metrics`, `softmax_token_metrics`, `TokenMetrics`: several at once

The spherical family, which sees a logit and the sums of all and of their squares:

- `linear_z_loss`, `z_loss` (not `logsumexp_penalty`)
- `linear_log_spherical_softmax_loss`, `log_spherical_softmax_loss`,
  `linear_log_taylor_softmax_loss`, `log_taylor_softmax_loss`,
  `linear_spherical_squared_error`, `spherical_squared_error`
- `factored_spherical_init`, `factored_spherical_sgd_step` and others named like them:
  a head whose step does not grow with the classes; `FactoredSphericalState`,
  `FactoredSphericalStep`, `SphericalStatistics`
- of its statistics: `z_loss_from_statistics`, `log_spherical_softmax_from_statistics`,
  `log_taylor_softmax_from_statistics`, `spherical_squared_error_from_statistics`

Of logits, with other maps in the place of softmax:

- `stablemax_cross_entropy`
- `sparsemax_loss`, `entmax_loss`: Fenchel-Young losses; `bi_tempered_logistic_loss`
- `sdm_loss`

Numbers about training:

- `softmax_collapse_fraction`, `zero_loss_fraction`, `naive_loss_minimization_alignment`
- `load_balancing_loss`, `router_z_loss`, `importance_loss`, `cv_squared`: of routers

The same losses of log-probabilities: `focal_from_log_prob`, `comp_sum_from_log_prob`,
`poly1_from_log_prob`, `symmetric_from_log_prob`.
"""

from ._collapse import (
    naive_loss_minimization_alignment as naive_loss_minimization_alignment,
    softmax_collapse_fraction as softmax_collapse_fraction,
    zero_loss_fraction as zero_loss_fraction,
)
from ._comp_sum import (
    comp_sum_from_log_prob as comp_sum_from_log_prob,
    comp_sum_loss as comp_sum_loss,
    generalized_cross_entropy_loss as generalized_cross_entropy_loss,
    linear_comp_sum_loss as linear_comp_sum_loss,
    linear_generalized_cross_entropy_loss as linear_generalized_cross_entropy_loss,
    linear_mean_absolute_error_loss as linear_mean_absolute_error_loss,
    mean_absolute_error_loss as mean_absolute_error_loss,
)
from ._compose import TokenMetrics as TokenMetrics
from ._cross_entropy import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
    softmax_cross_entropy as softmax_cross_entropy,
)
from ._cross_entropy_sum import (
    linear_softmax_cross_entropy_sum as linear_softmax_cross_entropy_sum,
)
from ._entropy import (
    linear_entropy as linear_entropy,
    softmax_entropy as softmax_entropy,
)
from ._factored_spherical import (
    FactoredSphericalState as FactoredSphericalState,
    factored_spherical_init as factored_spherical_init,
    factored_spherical_rebase as factored_spherical_rebase,
    factored_spherical_statistics as factored_spherical_statistics,
    factored_spherical_weight as factored_spherical_weight,
)
from ._factored_spherical_step import (
    FactoredSphericalStep as FactoredSphericalStep,
    factored_spherical_sgd_step as factored_spherical_sgd_step,
    factored_spherical_sgd_update as factored_spherical_sgd_update,
)
from ._fenchel_young import (
    bi_tempered_logistic_loss as bi_tempered_logistic_loss,
    entmax_loss as entmax_loss,
    sparsemax_loss as sparsemax_loss,
)
from ._focal import (
    focal_from_log_prob as focal_from_log_prob,
    linear_softmax_focal_loss as linear_softmax_focal_loss,
    softmax_focal_loss as softmax_focal_loss,
)
from ._label_rank import (
    label_rank as label_rank,
    linear_label_rank as linear_label_rank,
)
from ._logits import linear_logits as linear_logits
from ._mixtures import (
    linear_poly1_cross_entropy as linear_poly1_cross_entropy,
    linear_symmetric_cross_entropy as linear_symmetric_cross_entropy,
    poly1_cross_entropy as poly1_cross_entropy,
    poly1_from_log_prob as poly1_from_log_prob,
    symmetric_cross_entropy as symmetric_cross_entropy,
    symmetric_from_log_prob as symmetric_from_log_prob,
)
from ._multi_label import (
    linear_multi_label_cross_entropy as linear_multi_label_cross_entropy,
    multi_label_cross_entropy as multi_label_cross_entropy,
)
from ._router import (
    cv_squared as cv_squared,
    importance_loss as importance_loss,
    load_balancing_loss as load_balancing_loss,
    router_z_loss as router_z_loss,
)
from ._row_statistics import (
    linear_row_statistics as linear_row_statistics,
    row_statistics as row_statistics,
)
from ._sdm import (
    sdm_loss as sdm_loss,
)
from ._spherical import (
    linear_log_spherical_softmax_loss as linear_log_spherical_softmax_loss,
    linear_log_taylor_softmax_loss as linear_log_taylor_softmax_loss,
    linear_spherical_squared_error as linear_spherical_squared_error,
    log_spherical_softmax_loss as log_spherical_softmax_loss,
    log_taylor_softmax_loss as log_taylor_softmax_loss,
    spherical_squared_error as spherical_squared_error,
)
from ._spherical_family import (
    SphericalStatistics as SphericalStatistics,
    log_spherical_softmax_from_statistics as log_spherical_softmax_from_statistics,
    log_taylor_softmax_from_statistics as log_taylor_softmax_from_statistics,
    spherical_squared_error_from_statistics as spherical_squared_error_from_statistics,
    z_loss_from_statistics as z_loss_from_statistics,
)
from ._stablemax import (
    stablemax_cross_entropy as stablemax_cross_entropy,
)
from ._tile import RowStatistics as RowStatistics
from ._token_metrics import (
    linear_token_log_probs as linear_token_log_probs,
    linear_token_metrics as linear_token_metrics,
    linear_top1_correct as linear_top1_correct,
    softmax_token_log_probs as softmax_token_log_probs,
    softmax_token_metrics as softmax_token_metrics,
    softmax_top1_correct as softmax_top1_correct,
)
from ._z_loss import (
    linear_z_loss as linear_z_loss,
    z_loss as z_loss,
)

__all__ = [
    "FactoredSphericalState",
    "FactoredSphericalStep",
    "RowStatistics",
    "SphericalStatistics",
    "TokenMetrics",
    "bi_tempered_logistic_loss",
    "comp_sum_from_log_prob",
    "comp_sum_loss",
    "cv_squared",
    "entmax_loss",
    "factored_spherical_init",
    "factored_spherical_rebase",
    "factored_spherical_sgd_step",
    "factored_spherical_sgd_update",
    "factored_spherical_statistics",
    "factored_spherical_weight",
    "focal_from_log_prob",
    "generalized_cross_entropy_loss",
    "importance_loss",
    "label_rank",
    "linear_comp_sum_loss",
    "linear_entropy",
    "linear_generalized_cross_entropy_loss",
    "linear_label_rank",
    "linear_log_spherical_softmax_loss",
    "linear_log_taylor_softmax_loss",
    "linear_logits",
    "linear_mean_absolute_error_loss",
    "linear_multi_label_cross_entropy",
    "linear_poly1_cross_entropy",
    "linear_row_statistics",
    "linear_softmax_cross_entropy",
    "linear_softmax_cross_entropy_sum",
    "linear_softmax_focal_loss",
    "linear_spherical_squared_error",
    "linear_symmetric_cross_entropy",
    "linear_token_log_probs",
    "linear_token_metrics",
    "linear_top1_correct",
    "linear_z_loss",
    "load_balancing_loss",
    "log_spherical_softmax_from_statistics",
    "log_spherical_softmax_loss",
    "log_taylor_softmax_from_statistics",
    "log_taylor_softmax_loss",
    "mean_absolute_error_loss",
    "multi_label_cross_entropy",
    "naive_loss_minimization_alignment",
    "poly1_cross_entropy",
    "poly1_from_log_prob",
    "router_z_loss",
    "row_statistics",
    "sdm_loss",
    "softmax_collapse_fraction",
    "softmax_cross_entropy",
    "softmax_entropy",
    "softmax_focal_loss",
    "softmax_token_log_probs",
    "softmax_token_metrics",
    "softmax_top1_correct",
    "sparsemax_loss",
    "spherical_squared_error",
    "spherical_squared_error_from_statistics",
    "stablemax_cross_entropy",
    "symmetric_cross_entropy",
    "symmetric_from_log_prob",
    "z_loss",
    "z_loss_from_statistics",
    "zero_loss_fraction",
]
