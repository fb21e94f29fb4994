"""Recurrences: linear systems with varying parameters, run as scans or as attention.

- `linear_attention`, `normalized_attention`, `gated_linear_attention`, `quasi_lstm`,
  `selective_scan`, `linear_recurrence`: a sequence in linear time.
- `gru`: the gated recurrent unit, whose steps follow each other.
- `decode_step`, `LinearAttentionState`, `RecurrentResult`: their states, step by step.
- `attention_matrix`, `selective_scan_matrix`, `quasi_lstm_matrix`: their kernels, the
  weights that attention would have.
- `taylor_feature_map`: features of queries and keys.
"""

from ._feature_maps import taylor_feature_map as taylor_feature_map
from ._gated_rnn import (
    quasi_lstm as quasi_lstm,
    quasi_lstm_matrix as quasi_lstm_matrix,
)
from ._gru import gru as gru
from ._linear_attention import (
    attention_matrix as attention_matrix,
    decode_step as decode_step,
    gated_linear_attention as gated_linear_attention,
    linear_attention as linear_attention,
    normalized_attention as normalized_attention,
)
from ._linear_recurrence import (
    RecurrentResult as RecurrentResult,
    linear_recurrence as linear_recurrence,
)
from ._selective_scan import (
    selective_scan as selective_scan,
    selective_scan_matrix as selective_scan_matrix,
)
from ._states import LinearAttentionState as LinearAttentionState

__all__ = [
    "LinearAttentionState",
    "RecurrentResult",
    "attention_matrix",
    "decode_step",
    "gated_linear_attention",
    "gru",
    "linear_attention",
    "linear_recurrence",
    "normalized_attention",
    "quasi_lstm",
    "quasi_lstm_matrix",
    "selective_scan",
    "selective_scan_matrix",
    "taylor_feature_map",
]
