"""Kernels for Mosaic GPU: Hopper and Blackwell."""
