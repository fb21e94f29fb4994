"""Pallas kernels for TPUs and GPUs: functions of arrays, and nothing else.

A kernel here computes a forward or a backward pass. It has no derivative rule, no
default taken from the environment and no dtype policy: those belong to `softlib`, which
calls a kernel through its dispatch where the kernel's `why_not` has no objection. So
this package imports only jax and NumPy, and a kernel can be used, tested and measured
without softlib. `pallas_kernels.tpu` is the place of Mosaic TPU kernels,
`pallas_kernels.gpu_mosaic` that of Mosaic GPU kernels.

Sizes, lists of blocks and what is static of a call (`*_tiles`, `*_lists`, `*_plan`) are
in modules that load no Pallas: a call is planned on every machine, but a kernel is
imported by the function that calls it.
"""
