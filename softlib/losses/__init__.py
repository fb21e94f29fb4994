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

Of whole sequences:

- `linear_edit_invariant_sequence_loss`, `edit_invariant_sequence_loss`: of n-grams

and of token log-probabilities, such as those of `linear_token_log_probs`:

- `soft_bellman_residual`, `oreo_value_loss`, `oreo_policy_loss`: offline rewards
- `trice_loss`, `trice_weights`: chains of thought as latent variables
- `smoothed_token_loss`, `top_k_mean`: the worst tokens weigh more

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
from ._edit_invariant import (
    edit_invariant_sequence_loss as edit_invariant_sequence_loss,
    linear_edit_invariant_sequence_loss as linear_edit_invariant_sequence_loss,
)
from ._entropy import (
    linear_entropy as linear_entropy,
    softmax_entropy as softmax_entropy,
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
from ._latent_rationale import (
    trice_loss as trice_loss,
    trice_weights as trice_weights,
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
from ._smoothed import (
    smoothed_token_loss as smoothed_token_loss,
    top_k_mean as top_k_mean,
)
from ._soft_bellman import (
    oreo_policy_loss as oreo_policy_loss,
    oreo_value_loss as oreo_value_loss,
    soft_bellman_residual as soft_bellman_residual,
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

__all__ = [
    "RowStatistics",
    "TokenMetrics",
    "bi_tempered_logistic_loss",
    "comp_sum_from_log_prob",
    "comp_sum_loss",
    "cv_squared",
    "edit_invariant_sequence_loss",
    "entmax_loss",
    "focal_from_log_prob",
    "generalized_cross_entropy_loss",
    "importance_loss",
    "label_rank",
    "linear_comp_sum_loss",
    "linear_edit_invariant_sequence_loss",
    "linear_entropy",
    "linear_generalized_cross_entropy_loss",
    "linear_label_rank",
    "linear_logits",
    "linear_mean_absolute_error_loss",
    "linear_multi_label_cross_entropy",
    "linear_poly1_cross_entropy",
    "linear_row_statistics",
    "linear_softmax_cross_entropy",
    "linear_softmax_cross_entropy_sum",
    "linear_softmax_focal_loss",
    "linear_symmetric_cross_entropy",
    "linear_token_log_probs",
    "linear_token_metrics",
    "linear_top1_correct",
    "load_balancing_loss",
    "mean_absolute_error_loss",
    "multi_label_cross_entropy",
    "naive_loss_minimization_alignment",
    "oreo_policy_loss",
    "oreo_value_loss",
    "poly1_cross_entropy",
    "poly1_from_log_prob",
    "router_z_loss",
    "row_statistics",
    "sdm_loss",
    "smoothed_token_loss",
    "soft_bellman_residual",
    "softmax_collapse_fraction",
    "softmax_cross_entropy",
    "softmax_entropy",
    "softmax_focal_loss",
    "softmax_token_log_probs",
    "softmax_token_metrics",
    "softmax_top1_correct",
    "sparsemax_loss",
    "stablemax_cross_entropy",
    "symmetric_cross_entropy",
    "symmetric_from_log_prob",
    "top_k_mean",
    "trice_loss",
    "trice_weights",
    "zero_loss_fraction",
]
