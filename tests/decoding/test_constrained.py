"""Log-probabilities of tokens among those that an automaton allows."""

import jax
import numpy as np
import pytest

from softlib import decoding
from softlib.testing import assert_close, check_transformations
from tests.host import jnp

ROWS, STEPS, TOKENS, STATES = 6, 5, 4, 3
log_prob = jax.jit(decoding.constrained_log_prob)


def problem(dtype="float32", seed=0):
    """Logits, tokens that are allowed, `where` with holes, and an automaton."""
    random = np.random.default_rng(seed)
    table = random.integers(0, STATES, (STATES, TOKENS))
    table[random.uniform(size=table.shape) < 0.4] = -1
    table[:, 0] = [1, 2, 0]
    logits = jnp.asarray(2 * random.normal(size=(ROWS, STEPS, TOKENS)), dtype)
    where = random.uniform(size=(ROWS, STEPS)) < 0.8
    where[0], where[1] = True, False
    tokens = np.full((ROWS, STEPS), -100)
    for b in range(ROWS):
        state = 0
        for t in np.flatnonzero(where[b]):
            tokens[b, t] = random.choice(np.flatnonzero(table[state] >= 0))
            state = table[state, tokens[b, t]]
    return logits, jnp.asarray(tokens), jnp.asarray(where), jnp.asarray(table)


def oracle(logits, tokens, where, table):
    """Unconstrained log-probabilities less the log-mass of what is allowed."""
    logits, total = np.asarray(logits, np.float64), np.zeros(len(logits))
    for b in range(len(logits)):
        state = 0
        for t in np.flatnonzero(where[b]):
            p = np.exp(logits[b, t] - logits[b, t].max())
            p /= p.sum()
            allowed = table[state] >= 0
            total[b] += np.log(p[tokens[b, t]]) - np.log(p[allowed].sum())
            state = table[state, tokens[b, t]]
    return total


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        logits, tokens, where, table = problem(dtype)
        wanted = oracle(logits, *map(np.asarray, (tokens, where, table)))
        logits = jnp.where(where[..., None], logits, jnp.nan)
        automaton = decoding.TokenAutomaton(table)
        found = log_prob(logits, tokens, automaton, where=where)
        computed = jnp.promote_types(dtype, jnp.float32)
        assert found.dtype == computed
        assert_close(found, wanted, dtype=computed, length=STEPS)


def test_what_is_not_allowed_is_impossible_without_gradient():
    logits = jnp.zeros((4, 2, 3))
    tokens = jnp.array([[0, 1], [2, 1], [0, 5], [0, 0]])
    table = jnp.array([[1, -1, 2], [-1, 1, -1], [-1, -1, -1]])  # nothing follows 2

    def total(logits):
        found = decoding.constrained_log_prob(
            logits, tokens, decoding.TokenAutomaton(table)
        )
        return found.sum(), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(logits)
    np.testing.assert_allclose(found, [-np.log(2), *[-np.inf] * 3], rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1:], 0)
    assert (gradient[0] != 0).any()


def test_transformations():
    logits, tokens, where, table = problem()
    rows = slice(0, 4)
    check_transformations(
        lambda logits, tokens, where: decoding.constrained_log_prob(
            logits, tokens, decoding.TokenAutomaton(table), where=where
        ),
        *(logits[rows], tokens[rows], where[rows]),
        rows=(0, 1, 2),
    )


@pytest.mark.usefixtures("untyped")
def test_errors():
    automaton = decoding.TokenAutomaton(jnp.zeros((2, 4), int))
    logits, tokens = jnp.zeros((2, 3)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"^constrained_log_prob: `transitions` must"):
        decoding.constrained_log_prob(logits, tokens, automaton)
    with pytest.raises(ValueError, match=r"^constrained_log_prob: `tokens` must have"):
        decoding.constrained_log_prob(logits, tokens[:1], automaton)
