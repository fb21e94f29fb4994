"""Checks and times every kernel on the GPU or TPU of this machine.

`python -m benchmarks.accelerator` is what someone with a device runs, by
`make bench-accelerator`. Every case is a process of its own with a time limit. It reads
the lowered text of its program: a kernel that is not there is not timed. Results are
compared with float64 of NumPy first, and nothing is timed whose result is wrong.
"""
