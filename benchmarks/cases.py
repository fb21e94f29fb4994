"""What a program is given: a shape, a layout, a dtype, and random operands of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, features, vocabulary, and the axis of the weight that is the vocabulary."""

    rows: int
    features: int
    vocabulary: int
    vocab_axis: int = 0
    dtype: str = "float32"

    @property
    def layout(self) -> str:
        return ("(V, D)", "(D, V)")[self.vocab_axis]

    @property
    def shape(self) -> str:
        return f"N = {self.rows}, D = {self.features}, V = {self.vocabulary}"

    @property
    def weight_shape(self) -> tuple[int, int]:
        table = (self.vocabulary, self.features)
        return table if self.vocab_axis == 0 else table[::-1]

    def with_layout(self, vocab_axis: int) -> "Case":
        return dataclasses.replace(self, vocab_axis=vocab_axis)


def operands(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden, weight and labels; logits are about standard normal.

    The numbers do not depend on the layout.
    """
    # One compiled program: made eagerly, a large weight would exist three times.
    return _draw(dataclasses.replace(case, vocab_axis=0), case.vocab_axis)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(case: Case, vocab_axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (case.rows, case.features))
    weight = jax.random.normal(keys[1], case.weight_shape) / case.features**0.5
    labels = jax.random.randint(keys[2], (case.rows,), 0, case.vocabulary)
    weight = weight if vocab_axis == 0 else weight.T
    return hidden.astype(case.dtype), weight.astype(case.dtype), labels


def operand_shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Enough to compile a program that is never run."""
    return (
        jax.ShapeDtypeStruct((case.rows, case.features), jnp.dtype(case.dtype)),
        jax.ShapeDtypeStruct(case.weight_shape, jnp.dtype(case.dtype)),
        jax.ShapeDtypeStruct((case.rows,), jnp.int32),
    )


def as_float(array: Any) -> np.ndarray:
    """Float32 in NumPy, which has no bfloat16; exact."""
    return np.asarray(jnp.asarray(array, jnp.float32))
