"""How much memory a loss needs while it runs, read from the compiled program.

Only temporaries count: neither the hidden states and the table that go in nor the
gradients that come out. Nothing is executed and no array of these sizes is made.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softlib import LinearLogits

from .objective import LOSSES, mean_loss


class Measurement(NamedTuple):
    """Temporary bytes of loss and both gradients; None where XLA does not tell."""

    rows: int
    width: int
    vocabulary: int
    temporary_bytes: dict[str, int | None]


def measure(*, rows: int, width: int, vocabulary: int) -> Measurement:
    """Compiles value and gradients of the head's loss, once for each of `LOSSES`."""
    hidden = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    logits = jax.eval_shape(LinearLogits, hidden, table)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    sizes: dict[str, int | None] = {}
    for loss in LOSSES:
        # The gradient of logits is that of hidden states and table.
        both = jax.jit(jax.value_and_grad(functools.partial(mean_loss, loss=loss)))
        analysis = both.lower(logits, labels).compile().memory_analysis()
        sizes[loss] = analysis and int(analysis.temp_size_in_bytes)
    return Measurement(rows, width, vocabulary, sizes)


def survey(*, rows: int, width: int, vocabulary: int) -> list[Measurement]:
    """The run's own shapes first, then other vocabularies, then other row counts."""
    shapes = [(rows, vocabulary)]
    shapes += [(rows, v) for v in (32_000, 64_000, 256_000)]
    shapes += [(r, vocabulary) for r in (1_024, 8_192)]
    return [
        measure(rows=r, width=width, vocabulary=v) for r, v in dict.fromkeys(shapes)
    ]
