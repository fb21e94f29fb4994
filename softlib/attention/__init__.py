"""Attention over masks and keys; softmax and other positive weights.

- `dot_product_attention`: attention that visits only the blocks its mask leaves.
- `kronecker_attention`, `two_simplicial_attention`: attention over tuples of keys.
- `kronecker_attention_polynomial`, `exp_polynomial`, `exp_polynomial_error`: the same
  in nearly linear time where scores are bounded, with a certified error.
- `softplus_attention`, `SoftplusStatistics`, `softplus_weights`, `length_log_scale`:
  softplus weights, plain and re-weighted.
- `decode_attention`, `DecodeStatistics`: few queries against a long cache.
- `calibrate_unified_max`, `UnifiedMaxCalibration`: a maximum known beforehand for it.
- `merge_partials`: results over parts of the keys, put together.
- `sequence_parallel_attention`, `sequence_order`: a sequence divided over devices.
- `linear_attention`, `normalized_attention`, `gated_linear_attention`, `quasi_lstm`,
  `selective_scan`, `linear_recurrence`: linear systems with varying parameters;
  `decode_step` and `LinearAttentionState`, `RecurrentResult`: their states;
  `attention_matrix`, `selective_scan_matrix`, `quasi_lstm_matrix`: their kernels;
  `taylor_feature_map`.
- `block_plan`, `BlockPlan`: which blocks a mask leaves.
"""

from ._attention import dot_product_attention as dot_product_attention
from ._decode import (
    DecodeStatistics as DecodeStatistics,
    decode_attention as decode_attention,
)
from ._decode_calibration import (
    UnifiedMaxCalibration as UnifiedMaxCalibration,
    calibrate_unified_max as calibrate_unified_max,
)
from ._exp_polynomial import (
    exp_polynomial as exp_polynomial,
    exp_polynomial_error as exp_polynomial_error,
)
from ._feature_maps import (
    taylor_feature_map as taylor_feature_map,
)
from ._gated_rnn import (
    quasi_lstm as quasi_lstm,
    quasi_lstm_matrix as quasi_lstm_matrix,
)
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
from ._partials import merge_partials as merge_partials
from ._plan import BlockPlan as BlockPlan, block_plan as block_plan
from ._polynomial import (
    kronecker_attention_polynomial as kronecker_attention_polynomial,
)
from ._recurrent_attention import (
    LinearAttentionState as LinearAttentionState,
)
from ._ring import sequence_order as sequence_order
from ._selective_scan import (
    selective_scan as selective_scan,
    selective_scan_matrix as selective_scan_matrix,
)
from ._sequence_parallel import (
    sequence_parallel_attention as sequence_parallel_attention,
)
from ._softplus import (
    SoftplusStatistics as SoftplusStatistics,
    length_log_scale as length_log_scale,
    softplus_attention as softplus_attention,
    softplus_weights as softplus_weights,
)
from ._tensor import (
    kronecker_attention as kronecker_attention,
    two_simplicial_attention as two_simplicial_attention,
)

__all__ = [
    "BlockPlan",
    "DecodeStatistics",
    "LinearAttentionState",
    "RecurrentResult",
    "SoftplusStatistics",
    "UnifiedMaxCalibration",
    "attention_matrix",
    "block_plan",
    "calibrate_unified_max",
    "decode_attention",
    "decode_step",
    "dot_product_attention",
    "exp_polynomial",
    "exp_polynomial_error",
    "gated_linear_attention",
    "kronecker_attention",
    "kronecker_attention_polynomial",
    "length_log_scale",
    "linear_attention",
    "linear_recurrence",
    "merge_partials",
    "normalized_attention",
    "quasi_lstm",
    "quasi_lstm_matrix",
    "selective_scan",
    "selective_scan_matrix",
    "sequence_order",
    "sequence_parallel_attention",
    "softplus_attention",
    "softplus_weights",
    "taylor_feature_map",
    "two_simplicial_attention",
]
