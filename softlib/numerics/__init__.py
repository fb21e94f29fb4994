"""Accumulators that the engines fold with.

- `RunningMax`, `RunningMaxState`: streaming logsumexp with weighted sums.
- `UnifiedMax`, `UnifiedMaxState`: the same against one reference known beforehand.
- `PlainSum`, `PlainSumState`: sums of positive weights, without exponentials.
"""

from ._plain_sum import PlainSum as PlainSum, PlainSumState as PlainSumState
from ._running_max import RunningMax as RunningMax, RunningMaxState as RunningMaxState
from ._unified_max import UnifiedMax as UnifiedMax, UnifiedMaxState as UnifiedMaxState

__all__ = [
    "PlainSum",
    "PlainSumState",
    "RunningMax",
    "RunningMaxState",
    "UnifiedMax",
    "UnifiedMaxState",
]
