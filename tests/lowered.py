"""Reads programs that are lowered for a platform, before they are compiled."""

import re
from collections.abc import Callable
from typing import Any

import jax


def lowered(platform: str, function: Callable[..., Any], *arguments: Any) -> str:
    """The text of the program for `cpu`, `cuda` or `tpu`, which need not be here."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def products(text: str) -> list[tuple[str, str, str]]:
    """Types, such as 8x128xbf16, of the operands and the result of each product."""
    found = re.findall(
        r"dot_general .* : \(tensor<(.*?)>, tensor<(.*?)>\) -> tensor<(.*?)>", text
    )
    assert len(found) == text.count("dot_general ")
    return found


def dtypes_of_products(text: str) -> set[tuple[str, ...]]:
    """The dtypes, such as bf16, of operands and results."""
    return {tuple(of.rpartition("x")[2] for of in types) for types in products(text)}


def loops(text: str) -> list[int]:
    """The numbers of steps of all loops, sorted."""
    conditions = re.findall(
        r"cond \{\s*(%\S+) = stablehlo.constant dense<(\d+)> : tensor<i32>\s*"
        r"%\S+ = stablehlo.compare LT, %\S+, \1,",
        text,
    )
    assert len(conditions) == text.count("stablehlo.while")
    return sorted(int(steps) for _, steps in conditions)
