"""Exact and polynomial attention against the number of tokens: time and error."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from softlib.attention import (
    exp_polynomial,
    kronecker_attention,
    kronecker_attention_polynomial,
)

from .options import Options

# Features of the head, and the bound of all entries. With scale 1 / FEATURES no logit
# exceeds the cube of the bound.
FEATURES, BOUND = 4, 1.0
LOGIT_BOUND = BOUND**3
# In as many sequences as make so many tokens: short ones alone measure only the call.
TOKENS = 4096
TOLERANCES = (1e-1, 1e-2, 1e-3)
# Both take as many operations where n is 1.2 sqrt(rank).
CROSSOVER = 1.2


class Cost(NamedTuple):
    """One attention at one length.

    Attributes:
        rtol: Relative error of the weights that is certified; None for exact.
        tokens: n, of each sequence.
        seconds: The fastest run, divided by all tokens.
        error: Largest difference from exact of all outputs; None for exact.
    """

    rtol: float | None
    tokens: int
    seconds: float
    error: float | None


def rank(rtol: float) -> int:
    """Monomials of the polynomial in the features of a head."""
    degree = len(exp_polynomial(LOGIT_BOUND, rtol)) - 1
    return math.comb(degree + FEATURES, FEATURES)


def crossover(rtol: float) -> float:
    return CROSSOVER * math.sqrt(rank(rtol))


def certified(rtol: float) -> float:
    """Bound of the error of an output, for values whose entries are at most 1."""
    return 2 * rtol / (1 - rtol)


def costs(options: Options) -> list[Cost]:
    cases = [(n, rtol) for n in options.cost_lengths for rtol in (None, *TOLERANCES)]
    bar = tqdm.tqdm(cases, desc="      cost", disable=None, dynamic_ncols=True)
    found, exact = [], np.zeros(())
    for n, rtol in bar:
        arguments = _draw(n, options.seeds[0])
        attend = jax.jit(_attention(rtol))
        out = np.asarray(attend(*arguments))
        if rtol is None:
            exact = out
        total = arguments[0].shape[0] * n
        fastest = min(_timed(attend, *arguments) for _ in range(options.repeats))
        error = None if rtol is None else float(np.abs(out - exact).max())
        found.append(Cost(rtol, n, fastest / total, error))
    return found


def _attention(rtol: float | None) -> Callable[..., jax.Array]:
    if rtol is None:
        return kronecker_attention
    return functools.partial(
        kronecker_attention_polynomial, logit_bound=LOGIT_BOUND, rtol=rtol
    )


def _draw(n: int, seed: int) -> tuple:
    random = np.random.default_rng([seed, n])
    shape = (max(1, TOKENS // n), n, 1, FEATURES)
    one = lambda: jax.numpy.asarray(random.uniform(-BOUND, BOUND, shape), "float32")
    return one(), (one(), one()), (one(), one())


def _timed(attend: Callable[..., jax.Array], *arguments) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(attend(*arguments))
    return time.perf_counter() - begin
