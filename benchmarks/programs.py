"""What is compared: the mean cross-entropy of a linear head, in every form we can find.

A program is made from a case; making, compiling or running it may fail, say because its
package is not installed, and the tables then give the reason. The packages of peers are
imported where they are used: none of them is needed to measure the others.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import softlib

from .cases import Case
from .products import products

type Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

NAIVE = "optax on logits"
SOFTLIB = "softlib, per row"
SOFTLIB_SUM = "softlib, sum"
NAIVE_ALONE = f"{NAIVE}, loss alone"
SOFTLIB_ALONE = f"{SOFTLIB}, loss alone"
PRODUCTS_4 = "bare products, 4 passes"
PRODUCTS_3 = "bare products, 3 passes"
# Programs of this library, and loops that compute no loss: the others are peers.
OURS = (SOFTLIB, SOFTLIB_SUM, SOFTLIB_ALONE)
BOUNDS = (PRODUCTS_4, PRODUCTS_3)


@dataclasses.dataclass(frozen=True)
class Program:
    """One row of the tables.

    Attributes:
        name: Its name.
        make: Makes what is compiled, a function of (hidden, weight, labels).
        layouts: The values of `vocab_axis` that it takes without a transpose.
        loss: Makes the mean loss alone; None if there is none.
        yardstick: The program by whose time its own is divided.
    """

    name: str
    make: Callable[[Case], Callable[..., Any]]
    layouts: tuple[int, ...] = (0, 1)
    loss: Callable[[Case], Loss] | None = None
    yardstick: str = NAIVE


# --------------------------------------------------------------------------------- ours
def per_row(case: Case) -> Loss:
    def mean(hidden, weight, labels):
        logits = softlib.LinearLogits(hidden, weight, vocab_axis=case.vocab_axis)
        return softlib.losses.softmax_cross_entropy(logits, labels).mean()

    return mean


def summed(case: Case) -> Loss:
    def mean(hidden, weight, labels):
        logits = softlib.LinearLogits(hidden, weight, vocab_axis=case.vocab_axis)
        return softlib.losses.softmax_cross_entropy_sum(logits, labels) / case.rows

    return mean


# -------------------------------------------------------------------------------- peers
def naive(case: Case) -> Loss:
    def mean(hidden, weight, labels):
        logits = jnp.dot(hidden, weight.T if case.vocab_axis == 0 else weight)
        per_row = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return per_row.mean()

    return mean


def checkpointed(case: Case) -> Loss:
    return jax.checkpoint(naive(case))


def tokamax(implementation: str) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        package: Any = importlib.import_module("tokamax")

        def mean(hidden, weight, labels):
            return package.linear_softmax_cross_entropy_loss(
                hidden,
                labels,
                weight,
                reduction="mean",
                implementation=implementation,
            )

        return mean

    return make


def jax_cce(case: Case) -> Loss:
    package: Any = importlib.import_module("jax_cce")
    return package.linear_cross_entropy


# ---------------------------------------------------------------------------- the table
def _with_gradients(
    name: str, loss: Callable[[Case], Loss], layouts: tuple[int, ...] = (0, 1)
) -> Program:
    make = lambda case: jax.value_and_grad(loss(case), argnums=(0, 1))
    return Program(name, make, layouts, loss)


PROGRAMS = (
    _with_gradients(NAIVE, naive),
    _with_gradients("jax.checkpoint of it", checkpointed),
    _with_gradients("tokamax xla", tokamax("xla"), (1,)),
    _with_gradients("tokamax chunked_xla", tokamax("chunked_xla"), (1,)),
    _with_gradients("jax-cce", jax_cce, (0,)),
    _with_gradients(SOFTLIB, per_row),
    _with_gradients(SOFTLIB_SUM, summed),
    Program(PRODUCTS_4, lambda case: products(case, 4)),
    Program(PRODUCTS_3, lambda case: products(case, 3)),
    Program(NAIVE_ALONE, naive, yardstick=NAIVE_ALONE),
    Program(SOFTLIB_ALONE, per_row, yardstick=NAIVE_ALONE),
)
