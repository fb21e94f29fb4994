"""Attention over masks and keys; softmax and other positive weights.

- `dot_product_attention`: attention that visits only the blocks its mask leaves.
- `kronecker_attention`, `two_simplicial_attention`: attention over tuples of keys.
- `kronecker_attention_polynomial`, `PolynomialAttentionResult`, `exp_polynomial`,
  `exp_polynomial_error`: the same in nearly linear time where scores are bounded, with
  a certified error.
- `softplus_attention`, `SoftplusResult`, `softplus_weights`, `length_log_scale`:
  softplus weights, plain and re-weighted.
- `weighted_pool`: few learned queries that read many weighted tokens.
- `decode_attention`, `DecodeResult`: few queries against a long cache.
- `calibrate_unified_max`, `UnifiedMaxCalibration`: a maximum known beforehand for it.
- `AttentionResult`, `merge_partials`: results over parts of the keys, put together.
- `sequence_parallel_attention`, `sequence_order`: a sequence divided over devices.
- `block_plan`, `BlockPlan`: which blocks a mask leaves.
"""

from ._decode.calibration import (
    UnifiedMaxCalibration as UnifiedMaxCalibration,
    calibrate_unified_max as calibrate_unified_max,
)
from ._decode_attention import (
    DecodeResult as DecodeResult,
    decode_attention as decode_attention,
)
from ._devices.ring import sequence_order as sequence_order
from ._devices.sequence_parallel import (
    sequence_parallel_attention as sequence_parallel_attention,
)
from ._dot_product import dot_product_attention as dot_product_attention
from ._engine.plan import (
    BlockPlan as BlockPlan,
    block_plan as block_plan,
)
from ._kronecker import (
    kronecker_attention as kronecker_attention,
    two_simplicial_attention as two_simplicial_attention,
)
from ._kronecker_polynomial import (
    PolynomialAttentionResult as PolynomialAttentionResult,
    kronecker_attention_polynomial as kronecker_attention_polynomial,
)
from ._partials import (
    AttentionResult as AttentionResult,
    merge_partials as merge_partials,
)
from ._polynomial.exp_polynomial import (
    exp_polynomial as exp_polynomial,
    exp_polynomial_error as exp_polynomial_error,
)
from ._softplus import (
    SoftplusResult as SoftplusResult,
    length_log_scale as length_log_scale,
    softplus_attention as softplus_attention,
    softplus_weights as softplus_weights,
)
from ._weighted_pool import weighted_pool as weighted_pool

__all__ = [
    "AttentionResult",
    "BlockPlan",
    "DecodeResult",
    "PolynomialAttentionResult",
    "SoftplusResult",
    "UnifiedMaxCalibration",
    "block_plan",
    "calibrate_unified_max",
    "decode_attention",
    "dot_product_attention",
    "exp_polynomial",
    "exp_polynomial_error",
    "kronecker_attention",
    "kronecker_attention_polynomial",
    "length_log_scale",
    "merge_partials",
    "sequence_order",
    "sequence_parallel_attention",
    "softplus_attention",
    "softplus_weights",
    "two_simplicial_attention",
    "weighted_pool",
]
