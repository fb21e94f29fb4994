"""Facts about this machine that decide the steps of the plain JAX stream."""

import os

import jax

# Measured on 2 cores; with many, small steps would leave most of them idle.
_FEW = 4


def has_few_cores() -> bool:
    """Whether one small tile at a time keeps the machine busy: a CPU of a few cores.

    A matter of speed alone. A program that is made here for another platform takes the
    steps that are good here where it has no kernel.
    """
    return jax.default_backend() == "cpu" and (os.cpu_count() or _FEW) <= _FEW
