"""Bandits: what a choice without full information costs.

- `streaming_explore_then_commit`: arms that pass once, with memory for one of them;
  `uniform_exploration_size`, `eps_best_size`, the pulls of each arm.
"""

from ._streaming import (
    StreamResult as StreamResult,
    eps_best_size as eps_best_size,
    streaming_explore_then_commit as streaming_explore_then_commit,
    uniform_exploration_size as uniform_exploration_size,
)

__all__ = [
    "StreamResult",
    "eps_best_size",
    "streaming_explore_then_commit",
    "uniform_exploration_size",
]
