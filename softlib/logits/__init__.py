"""Logits and what one asks of them: numbers per row, whether or not they are formed.

- `RowStatistics`: what a stream over the vocabulary gives.
- `TokenMetrics`: several numbers per token from one pass.
- `TopK`: the best classes of each row.
"""

from ._compose import TokenMetrics as TokenMetrics
from ._engine.tile import RowStatistics as RowStatistics
from ._top_k import TopK as TopK

__all__ = ["RowStatistics", "TokenMetrics", "TopK"]
