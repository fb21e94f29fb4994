"""Numbers about distributions: divergences, mutual information, and what they bound."""

__all__: list[str] = []
