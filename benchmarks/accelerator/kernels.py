"""Whether kernels are really in a program: read from its lowered text."""

import re

import softlib

_CALLS = re.compile(r"custom_call @(?:tpu_custom_call|mosaic_gpu\w*)\(")


class NoKernel(Exception):
    """A program that would be timed in a kernel's name holds too few of them."""


def count(text: str) -> int:
    """Kernels of Mosaic in the text of a lowered program."""
    return len(_CALLS.findall(text))


def require(texts: list[str], explained: softlib.Explanation) -> list[int]:
    """The number of kernels in each program; each has more than the one before it.

    Args:
        texts: Of the forward pass, and of it with gradients if they have kernels.
        explained: What softlib says of the last one, for the error.

    Raises:
        NoKernel: A pass has no kernel of its own.
    """
    counts = list(map(count, texts))
    for before, found in zip([0, *counts], counts, strict=False):
        if found <= before:
            numbers = ", then ".join(map(str, counts))
            reasons = "; ".join(
                f"{name}: {why}"
                for operation in explained.operations
                for name, why in operation.refused.items()
            )
            raise NoKernel(f"{numbers} kernels in the program ({reasons or 'planned'})")
    return counts


def tiles_of(explained: softlib.Explanation, platform: str) -> list[str]:
    """The notes on the kernels of `tpu` or `cuda`, which name their tiles."""
    name = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]
    return [
        f"{operation.operation}: {operation.notes[name]}"
        for operation in explained.operations
        if name in operation.notes
    ]
