"""Judging given text by its given log-probabilities: a number per text."""

__all__: list[str] = []
