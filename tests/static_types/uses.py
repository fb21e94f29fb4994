"""What type checkers infer of packages that are loaded on first use; `make lint` asks.

Nothing here runs. To a checker that knows such a package by `__getattr__` alone it is
`Any`, which `assert_type` refuses.
"""

from collections.abc import Callable
from typing import assert_type

import jax
import optax

import softlib  # and nothing below it: that would tell the checkers


def layers(mask: softlib.masks.Mask) -> None:
    assert_type(softlib.nn.attention_fn(mask), Callable[..., jax.Array])


def optimizers() -> None:
    assert_type(softlib.optim.perp_grad(), optax.GradientTransformation)


def comparisons(x: jax.Array) -> None:
    assert_type(softlib.testing.assert_close(x, x, dtype=x.dtype, length=1), None)


def studies(x: jax.Array) -> None:
    pair = softlib.scoring.annotate_preferences(x)
    assert_type(pair.margin, jax.Array)
    beam = softlib.decoding.value_guided_search(
        *(x, lambda key, states: (states, x), lambda states: x, x),
        num_steps=1,
        num_proposals=1,
    )
    assert_type(beam.values, jax.Array)
    assert_type(softlib.estimation.ExpertGate().top_k, int | None)
