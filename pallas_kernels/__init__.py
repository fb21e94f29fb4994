"""Pallas kernels for TPUs and GPUs: functions of arrays, and nothing else.

A kernel computes a forward or a backward pass. It has no derivative rule, no defaults
from the environment and no dtype policy: those belong to `softlib`, which calls a
kernel if its `why_not` gives no reason. So this package imports only jax and NumPy, and
a kernel can be used, tested and measured without softlib. `pallas_kernels.tpu`
holds kernels for Mosaic TPU, `pallas_kernels.gpu_mosaic` those for Mosaic GPU.

Sizes, lists of blocks and static options (`*_tiles`, `*_lists`, `*_plan`) are in
modules that do not load Pallas: a call is planned on every machine, but a kernel is
imported by the function that calls it.
"""
