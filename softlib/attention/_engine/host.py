"""Facts about this machine that decide the step sizes of the plain JAX stream."""

import os

import jax

# Measured on 2 cores; with many, small steps would leave most of them idle.
_FEW = 4


def has_few_cores() -> bool:
    """Whether one small tile at a time keeps the machine busy: a CPU of few cores.

    It affects speed alone. Programs for GPUs and TPUs have steps of their own; in
    attention over tuples of keys their blocks have the sizes that are good here.
    """
    return jax.default_backend() == "cpu" and (os.cpu_count() or _FEW) <= _FEW
