"""Losses of logits: one function each, for arrays and for linear heads.

Unless a function says otherwise, its rows have these edges. A label outside $[0, V)$
makes the loss NaN, and that of an excluded class +inf; neither row has a gradient.
`where` broadcasts to the batch shape. Where it is False, the loss and all gradients are
exactly 0, whatever the other arguments hold (NaN, -100, ...): for labels of -100 write
`where=labels >= 0`. A row without classes has loss 0 and gradient 0; one whose logits
are all -inf costs +inf, with gradient 0.

Losses of an array of logits or of a value such as `softlib.LinearLogits`:

- `softmax_cross_entropy`, `CrossEntropyResult`; `linear_softmax_cross_entropy`: of
  hidden and a weight
- `softmax_cross_entropy_sum`: its sum over rows; of a head, one product less
- `softmax_focal_loss`
- `comp_sum_loss`, and two of its members by name: `generalized_cross_entropy_loss`,
  `mean_absolute_error_loss`
- `poly1_cross_entropy`, `symmetric_cross_entropy`

Of weights: `generalized_gaussian_rate`, their code length.

Losses of log-probabilities, which are plain arrays and therefore have no methods, under
the names of the losses of logits: `focal_from_log_prob`, `comp_sum_from_log_prob`,
`poly1_from_log_prob`, `symmetric_from_log_prob`.

The spherical family, losses of sums and sums of squares:

- `z_loss`, `log_spherical_softmax_loss`, `log_taylor_softmax_loss`,
  `spherical_squared_error`
- `SphericalStatistics`: statistics of a row, with the losses as methods
- `FactoredSphericalState`, `FactoredSphericalStep`: a head in factors; the cost of its
  steps does not depend on the number of classes

Several labels per row, and very many labels:

- `multi_label_cross_entropy`: the mean over them, their sum, or with weights
- `decoupled_softmax_loss`, `one_versus_all_loss`
- `soft_top_k_loss`, `sampled_softmax_loss`
- `in_batch_triplet_loss`: for batches that `softlib.mining` makes

Embedded pairs: `info_nce_loss`, `sigmoid_contrastive_loss`.

Several tokens ahead: `future_tokens`, `FutureTokens`.

Two predictions:

- `softmax_kl_divergence`, in either direction; `softmax_jensen_shannon_divergence`,
  `softmax_soft_target_cross_entropy`
- `kl_to_reference`: the mean over a sequence's tokens
- `knowledge_distillation_loss`, `normalized_distillation_loss`,
  `decoupled_knowledge_distillation_loss`
- `universal_self_distillation_loss`, `USKDTerms`, `zipf_soft_labels`: no teacher
- `mcmi_loss`: of a teacher

Log-probabilities of sequences:

- `preference_margin`, `dpo_loss` (plain, robust, conservative), `ipo_loss`, `kto_loss`;
  without a reference `simpo_loss`, `orpo_loss`, `cpo_loss`
- `ppo_clip_loss` (PPO, GRPO, DAPO, GSPO), `reinforce_leave_one_out_loss`,
  `group_advantages`
- `negative_preference_loss`, `gradient_ascent_loss`: unlearning
- `soft_bellman_residual`, `oreo_policy_loss`, `oreo_value_loss`
- `edit_invariant_sequence_loss`; `ctc_loss`: labels at unknown times
- `smoothed_token_loss`: the worst tokens weigh more
- `trice_loss`, `trice_weights`, `TriceWeights`: latent rationales

Labels of a sequence that depend on each other, of a linear chain:

- `crf_loss`, and what it is made of: `crf_log_normalizer`, `crf_marginals`

A temperature per row:

- `robust_softmax_cross_entropy`
- `robust_contrastive_loss`, `ContrastiveLosses`; `GlobalContrastiveState`,
  `GlobalContrastiveUpdate`: running means over a data set

Losses of logits with another map than softmax:

- `stablemax_cross_entropy`
- `sparsemax_loss`, `entmax_loss`: Fenchel-Young losses; `bi_tempered_logistic_loss`
- `sdm_loss`

Edges of a graph: `edge_reconstruction_loss`.

Margins of two classes: `perceptron_loss`, `normalized_logistic_loss`,
`smoothed_zero_one_loss`; of several:
`squared_hinge_loss`.

Adversarial training: `smooth_adversarial_comp_sum_loss`.

Routers of experts:

- `load_balancing_loss`, `router_z_loss`, `importance_loss`, `cv_squared`
"""

from ._adversarial import (
    smooth_adversarial_comp_sum_loss as smooth_adversarial_comp_sum_loss,
)
from ._comp_sum import (
    comp_sum_from_log_prob as comp_sum_from_log_prob,
    comp_sum_loss as comp_sum_loss,
    generalized_cross_entropy_loss as generalized_cross_entropy_loss,
    mean_absolute_error_loss as mean_absolute_error_loss,
)
from ._contrastive_pairs import (
    info_nce_loss as info_nce_loss,
    sigmoid_contrastive_loss as sigmoid_contrastive_loss,
)
from ._contrastive_temperature import (
    ContrastiveLosses as ContrastiveLosses,
    GlobalContrastiveState as GlobalContrastiveState,
    GlobalContrastiveUpdate as GlobalContrastiveUpdate,
    robust_contrastive_loss as robust_contrastive_loss,
)
from ._crf import (
    crf_log_normalizer as crf_log_normalizer,
    crf_loss as crf_loss,
    crf_marginals as crf_marginals,
)
from ._cross_entropy import (
    CrossEntropyResult as CrossEntropyResult,
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
    softmax_cross_entropy as softmax_cross_entropy,
)
from ._cross_entropy_sum import softmax_cross_entropy_sum as softmax_cross_entropy_sum
from ._ctc import ctc_loss as ctc_loss
from ._distillation import (
    decoupled_knowledge_distillation_loss as decoupled_knowledge_distillation_loss,
    knowledge_distillation_loss as knowledge_distillation_loss,
    normalized_distillation_loss as normalized_distillation_loss,
)
from ._divergences import (
    softmax_jensen_shannon_divergence as softmax_jensen_shannon_divergence,
    softmax_kl_divergence as softmax_kl_divergence,
    softmax_soft_target_cross_entropy as softmax_soft_target_cross_entropy,
)
from ._edges import edge_reconstruction_loss as edge_reconstruction_loss
from ._edit_invariant import (
    edit_invariant_sequence_loss as edit_invariant_sequence_loss,
)
from ._extreme import (
    decoupled_softmax_loss as decoupled_softmax_loss,
    soft_top_k_loss as soft_top_k_loss,
)
from ._factored_spherical import (
    FactoredSphericalState as FactoredSphericalState,
    FactoredSphericalStep as FactoredSphericalStep,
)
from ._fenchel_young import (
    bi_tempered_logistic_loss as bi_tempered_logistic_loss,
    entmax_loss as entmax_loss,
    sparsemax_loss as sparsemax_loss,
)
from ._focal import (
    focal_from_log_prob as focal_from_log_prob,
    softmax_focal_loss as softmax_focal_loss,
)
from ._future_tokens import (
    FutureTokens as FutureTokens,
    future_tokens as future_tokens,
)
from ._generalized_gaussian_rate import (
    generalized_gaussian_rate as generalized_gaussian_rate,
)
from ._kl_to_reference import kl_to_reference as kl_to_reference
from ._latent_rationale import (
    TriceWeights as TriceWeights,
    trice_loss as trice_loss,
    trice_weights as trice_weights,
)
from ._margin import squared_hinge_loss as squared_hinge_loss
from ._mcmi import mcmi_loss as mcmi_loss
from ._mixtures import (
    poly1_cross_entropy as poly1_cross_entropy,
    poly1_from_log_prob as poly1_from_log_prob,
    symmetric_cross_entropy as symmetric_cross_entropy,
    symmetric_from_log_prob as symmetric_from_log_prob,
)
from ._multi_label import multi_label_cross_entropy as multi_label_cross_entropy
from ._one_versus_all import one_versus_all_loss as one_versus_all_loss
from ._perceptron import (
    normalized_logistic_loss as normalized_logistic_loss,
    perceptron_loss as perceptron_loss,
)
from ._policy_gradient import (
    group_advantages as group_advantages,
    ppo_clip_loss as ppo_clip_loss,
    reinforce_leave_one_out_loss as reinforce_leave_one_out_loss,
)
from ._preference import (
    dpo_loss as dpo_loss,
    ipo_loss as ipo_loss,
    preference_margin as preference_margin,
    simpo_loss as simpo_loss,
)
from ._reference_free_preference import (
    cpo_loss as cpo_loss,
    orpo_loss as orpo_loss,
)
from ._robust_temperature import (
    robust_softmax_cross_entropy as robust_softmax_cross_entropy,
)
from ._router import (
    cv_squared as cv_squared,
    importance_loss as importance_loss,
    load_balancing_loss as load_balancing_loss,
    router_z_loss as router_z_loss,
)
from ._sampled_softmax import sampled_softmax_loss as sampled_softmax_loss
from ._sdm import sdm_loss as sdm_loss
from ._self_distillation import (
    USKDTerms as USKDTerms,
    universal_self_distillation_loss as universal_self_distillation_loss,
    zipf_soft_labels as zipf_soft_labels,
)
from ._smoothed import smoothed_token_loss as smoothed_token_loss
from ._soft_bellman import (
    oreo_policy_loss as oreo_policy_loss,
    oreo_value_loss as oreo_value_loss,
    soft_bellman_residual as soft_bellman_residual,
)
from ._spherical import (
    log_spherical_softmax_loss as log_spherical_softmax_loss,
    log_taylor_softmax_loss as log_taylor_softmax_loss,
    spherical_squared_error as spherical_squared_error,
)
from ._spherical_family import SphericalStatistics as SphericalStatistics
from ._stablemax import stablemax_cross_entropy as stablemax_cross_entropy
from ._triplet import in_batch_triplet_loss as in_batch_triplet_loss
from ._unlearning import (
    gradient_ascent_loss as gradient_ascent_loss,
    negative_preference_loss as negative_preference_loss,
)
from ._unpaired_preference import kto_loss as kto_loss
from ._z_loss import z_loss as z_loss
from ._zero_one import smoothed_zero_one_loss as smoothed_zero_one_loss

__all__ = [
    "ContrastiveLosses",
    "CrossEntropyResult",
    "FactoredSphericalState",
    "FactoredSphericalStep",
    "FutureTokens",
    "GlobalContrastiveState",
    "GlobalContrastiveUpdate",
    "SphericalStatistics",
    "TriceWeights",
    "USKDTerms",
    "bi_tempered_logistic_loss",
    "comp_sum_from_log_prob",
    "comp_sum_loss",
    "cpo_loss",
    "crf_log_normalizer",
    "crf_loss",
    "crf_marginals",
    "ctc_loss",
    "cv_squared",
    "decoupled_knowledge_distillation_loss",
    "decoupled_softmax_loss",
    "dpo_loss",
    "edge_reconstruction_loss",
    "edit_invariant_sequence_loss",
    "entmax_loss",
    "focal_from_log_prob",
    "future_tokens",
    "generalized_cross_entropy_loss",
    "generalized_gaussian_rate",
    "gradient_ascent_loss",
    "group_advantages",
    "importance_loss",
    "in_batch_triplet_loss",
    "info_nce_loss",
    "ipo_loss",
    "kl_to_reference",
    "knowledge_distillation_loss",
    "kto_loss",
    "linear_softmax_cross_entropy",
    "load_balancing_loss",
    "log_spherical_softmax_loss",
    "log_taylor_softmax_loss",
    "mcmi_loss",
    "mean_absolute_error_loss",
    "multi_label_cross_entropy",
    "negative_preference_loss",
    "normalized_distillation_loss",
    "normalized_logistic_loss",
    "one_versus_all_loss",
    "oreo_policy_loss",
    "oreo_value_loss",
    "orpo_loss",
    "perceptron_loss",
    "poly1_cross_entropy",
    "poly1_from_log_prob",
    "ppo_clip_loss",
    "preference_margin",
    "reinforce_leave_one_out_loss",
    "robust_contrastive_loss",
    "robust_softmax_cross_entropy",
    "router_z_loss",
    "sampled_softmax_loss",
    "sdm_loss",
    "sigmoid_contrastive_loss",
    "simpo_loss",
    "smooth_adversarial_comp_sum_loss",
    "smoothed_token_loss",
    "smoothed_zero_one_loss",
    "soft_bellman_residual",
    "soft_top_k_loss",
    "softmax_cross_entropy",
    "softmax_cross_entropy_sum",
    "softmax_focal_loss",
    "softmax_jensen_shannon_divergence",
    "softmax_kl_divergence",
    "softmax_soft_target_cross_entropy",
    "sparsemax_loss",
    "spherical_squared_error",
    "squared_hinge_loss",
    "stablemax_cross_entropy",
    "symmetric_cross_entropy",
    "symmetric_from_log_prob",
    "trice_loss",
    "trice_weights",
    "universal_self_distillation_loss",
    "z_loss",
    "zipf_soft_labels",
]
