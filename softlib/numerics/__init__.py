"""Accumulators that the engines fold with.

- `RunningMax`, `RunningMaxState`: streaming logsumexp with weighted sums.
"""

from ._accumulators import (
    RunningMax as RunningMax,
    RunningMaxState as RunningMaxState,
)

__all__ = ["RunningMax", "RunningMaxState"]
