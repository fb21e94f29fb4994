"""Attention in plain JAX: the steps and launches of its blocks, and its memory."""

from typing import Any

import jax
import jax.numpy as jnp

from softlib import attention, masks

from .case import AMPERE, HOPPER, Case, Most, array
from .cases_plain import FAMILY, MACHINES

_GPUS = (*AMPERE, *HOPPER)
_BATCH, _HEADS, _FEATURES = 2, 16, 128


def cases() -> list[Case]:
    # Of 8k tokens 10 blocks for each half of the heads, of the window 31 for all heads.
    return [
        *_cases(
            "causal attention of 8k",
            *(_causal, 8192),
            Most(10, 11, 600, 250),
            Most(10, 19, 1280, 680),
        ),
        *_cases(
            "packed causal attention of 8k",
            *(_packed, 8192),
            Most(10, 15, 600, 330),
            Most(10, 22, 1280, 820),
        ),
        *_cases(
            "window of 1k in 16k",
            *(_window, 16_384),
            Most(31, 12, 768, 390),
            Most(31, 19, 1440, 1020),
        ),
    ]


def _causal(documents: Any) -> masks.Mask:
    return masks.Causal()


def _packed(documents: Any) -> masks.Mask:
    return masks.Causal() & masks.Segments(documents)


def _window(documents: Any) -> masks.Mask:
    return masks.Causal() & masks.Window(1023, 0)


def _cases(
    name: str, mask: Any, length: int, forward_most: Most, both_most: Most
) -> list[Case]:
    """The forward pass, and both passes."""

    def forward(query: Any, key: Any, value: Any, documents: Any) -> Any:
        return attention.dot_product_attention(
            *(query, key, value), mask=mask(documents), implementation="xla"
        )

    def both(query: Any, key: Any, value: Any, documents: Any, cotangent: Any) -> Any:
        call = lambda q, k, v: forward(q, k, v, documents)
        out, pull = jax.vjp(call, query, key, value)
        return out, pull(cotangent)

    heads = array(jnp.bfloat16, _BATCH, length, _HEADS, _FEATURES)
    documents = array(jnp.int32, _BATCH, length)
    arguments = (heads, heads, heads, documents)
    programs = [
        (name, forward, arguments, forward_most, _GPUS),
        (f"{name}, gradients", both, (*arguments, heads), both_most, MACHINES),
    ]
    return [
        Case(FAMILY, name, function, given, targets, plain=targets, most=most)
        for name, function, given, most, targets in programs
    ]
