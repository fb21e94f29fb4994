"""Losses over large vocabularies, from a linear head or from logits.

Row statistics, the engine everything else is composed of:

- `linear_row_statistics`, `row_statistics`, `RowStatistics`
- `linear_logits`: the logits themselves, where they are few

Losses and numbers per token; each `linear_` function streams over the vocabulary, its
`softmax_` twin takes logits:

- `linear_softmax_cross_entropy`, `softmax_cross_entropy`
- `linear_token_log_probs`, `softmax_token_log_probs`
- `linear_entropy`, `softmax_entropy`
- `linear_top1_correct`, `softmax_top1_correct`
- `linear_token_metrics`, `softmax_token_metrics`, `TokenMetrics`: several at once
"""

from ._compose import TokenMetrics as TokenMetrics
from ._cross_entropy import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
    softmax_cross_entropy as softmax_cross_entropy,
)
from ._entropy import (
    linear_entropy as linear_entropy,
    softmax_entropy as softmax_entropy,
)
from ._logits import linear_logits as linear_logits
from ._row_statistics import (
    linear_row_statistics as linear_row_statistics,
    row_statistics as row_statistics,
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
    "linear_entropy",
    "linear_logits",
    "linear_row_statistics",
    "linear_softmax_cross_entropy",
    "linear_token_log_probs",
    "linear_token_metrics",
    "linear_top1_correct",
    "row_statistics",
    "softmax_cross_entropy",
    "softmax_entropy",
    "softmax_token_log_probs",
    "softmax_token_metrics",
    "softmax_top1_correct",
]
