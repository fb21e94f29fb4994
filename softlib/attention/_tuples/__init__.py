"""Kernels of attention over tuples of keys, and their plans."""
