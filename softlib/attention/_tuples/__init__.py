"""Kernels of attention over tuples of keys, and what they need to be planned."""
