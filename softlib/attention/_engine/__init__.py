"""Attention over the blocks that a mask leaves: streams, plans, kernels."""
