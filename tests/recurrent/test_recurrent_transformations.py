"""The recurrent forms of attention through every transformation of JAX."""

from typing import Any

import numpy as np
import pytest

from softlib.recurrent import (
    LinearAttentionState,
    decode_step,
    linear_attention,
    linear_recurrence,
    normalized_attention,
    quasi_lstm,
    selective_scan,
    taylor_feature_map,
)
from softlib.recurrent._linear_recurrence import METHODS
from softlib.testing import TRANSFORMATIONS, check_transformations
from tests.compiled import f32
from tests.host import jnp

ROWS, LENGTH, HEADS, KEY_HEADS, SIZE = 8, 5, 2, 1, 2


def draw(seed, *shape) -> Any:
    random = np.random.default_rng(seed)
    return f32(random.normal(size=shape))


def tokens():
    shape = lambda heads: (ROWS, LENGTH, heads, SIZE)
    return (
        draw(0, *shape(HEADS)),
        draw(1, *shape(KEY_HEADS)),
        draw(2, *shape(KEY_HEADS)),
    )


def sum_normalized():
    """Decays per key head, a mask, a state before and after."""
    log_decay = -np.abs(draw(3, ROWS, LENGTH, KEY_HEADS))
    mask = np.random.default_rng(4).uniform(size=(ROWS, LENGTH)) < 0.8
    memory = draw(5, ROWS, KEY_HEADS, SIZE, SIZE)
    normalizer = np.abs(draw(6, ROWS, KEY_HEADS, SIZE))

    def function(q, k, v, log_decay, mask, memory, normalizer):
        return linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            mask=mask,
            chunk_size=2,
            initial_state=LinearAttentionState(memory, normalizer),
            return_state=True,
        )

    return function, (*tokens(), log_decay, mask, memory, normalizer), range(7)


def normalized():
    """A decay per query head: keys are repeated."""
    log_decay = -np.abs(draw(3, ROWS, LENGTH, HEADS))
    n = draw(4, ROWS, LENGTH, HEADS)

    def function(q, k, v, n, log_decay):
        return normalized_attention(q, k, v, n, log_decay=log_decay, chunk_size=2)

    return function, (*tokens(), n, log_decay), range(5)


def bidirectional():
    eta = np.exp(draw(4, ROWS, LENGTH, HEADS))

    def function(q, k, v, eta):
        return linear_attention(
            q,
            k,
            v,
            feature_map="taylor2",
            normalizer=eta,
            is_causal=False,
            chunk_size=2,
        )

    return function, (*tokens(), eta), range(4)


def decoding():
    q, k, v = (a[:, 0] for a in tokens())

    def function(q, k, v, log_decay):
        first = decode_step(None, q, k, v)
        return decode_step(first.state, q, -k, v, log_decay=log_decay).output

    return function, (q, k, v, -np.abs(draw(3, ROWS, KEY_HEADS))), range(4)


def scan():
    u, delta = draw(0, 2, ROWS, LENGTH, 3)
    B, C = draw(1, 2, ROWS, LENGTH, 2)
    A, D = np.abs(draw(2, 3, 2)), draw(3, 3)

    def function(u, delta, A, B, C, D):
        return selective_scan(u, jnp.abs(delta), A, B, C, D, chunk_size=2)

    return function, (u, delta, A, B, C, D), (0, 1, 3, 4)


def recurrence(method):
    def case():
        decay, inputs = draw(0, ROWS, LENGTH, 1), draw(1, ROWS, LENGTH, 3)

        def function(decay, inputs, start):
            return linear_recurrence(
                decay,
                inputs,
                initial_state=start,
                axis=1,
                reverse=True,
                method=method,
                chunk_size=2 if method == "chunked" else None,
                return_state=True,
            )

        return function, (decay, inputs, draw(2, ROWS, 3)), range(3)

    case.__name__ = method
    return case


def lstm():
    def function(f, i, o, z, alpha):
        return quasi_lstm(f, i, o, z, alpha=alpha)

    gates = draw(0, 4, ROWS, LENGTH, 2)
    return function, (*gates, jnp.array([0.5, 2.0])), range(4)


def taylor():
    return lambda x: taylor_feature_map(x, order=3), (draw(0, ROWS, 3),), (0,)


CASES = [
    sum_normalized,
    normalized,
    bidirectional,
    decoding,
    scan,
    *map(recurrence, METHODS),
    lstm,
    taylor,
]


# Chunks of trees hold trees and steps; the polynomial is in `bidirectional`.
SHORT = [case for case in CASES if case.__name__ not in {*METHODS[::2], "taylor"}]


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.__name__)
def test_gradients_are_the_finite_differences(case):
    function, arrays, rows = case()
    rest = set(TRANSFORMATIONS) - {"reverse_mode"}
    skip = dict.fromkeys(rest, "in the next test, which takes minutes")
    check_transformations(function, *arrays, rows=tuple(rows), skip=skip)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_all_transformations(case):
    function, arrays, rows = case()
    check_transformations(function, *arrays, rows=tuple(rows), length=40)
