"""Measures of predictions and of training: numbers to report, not to train on.

- Of a ranking of labels: `precision_at_k`, `recall_at_k`, and
  `propensity_scored_precision_at_k`, where rare labels count more by their
  `label_propensities`.
- Of scores of two classes: `auroc`.
- Of training: `softmax_collapse_fraction`, `zero_loss_fraction`,
  `naive_loss_minimization_alignment`.
- Of a distribution over bins: `smoothness_metric`.

Measures that a pass over logits gives, such as `top1_correct`, are in `softlib.logits`.
"""

from ._auroc import auroc as auroc
from ._collapse import (
    naive_loss_minimization_alignment as naive_loss_minimization_alignment,
    softmax_collapse_fraction as softmax_collapse_fraction,
    zero_loss_fraction as zero_loss_fraction,
)
from ._rankings import (
    label_propensities as label_propensities,
    precision_at_k as precision_at_k,
    propensity_scored_precision_at_k as propensity_scored_precision_at_k,
    recall_at_k as recall_at_k,
)
from ._smoothness import smoothness_metric as smoothness_metric

__all__ = [
    "auroc",
    "label_propensities",
    "naive_loss_minimization_alignment",
    "precision_at_k",
    "propensity_scored_precision_at_k",
    "recall_at_k",
    "smoothness_metric",
    "softmax_collapse_fraction",
    "zero_loss_fraction",
]
