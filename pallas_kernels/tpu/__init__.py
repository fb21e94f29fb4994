"""Kernels for Mosaic TPU."""
