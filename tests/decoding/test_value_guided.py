"""Search guided by values, and the chain of remembered samples."""

import jax
import numpy as np
import pytest

from softlib.decoding import (
    IndependenceChain,
    independence_chain_update,
    value_guided_search,
)
from tests.host import jnp

KEY = jax.random.key(0)


def walk(key, states):
    """One step up or down, with the path; a walk ends at 3."""
    place, path, count = states
    step = jax.random.rademacher(key, place.shape, place.dtype)
    at = jnp.arange(path.shape[1])[None] == count[:, None]
    place = place + step
    return (place, jnp.where(at, step[:, None], path), count + 1), place == 3


def start(width, length):
    zeros = jnp.zeros(width, jnp.int32)
    return zeros, jnp.zeros((width, length), jnp.int32), zeros


def height(states):
    return states[0].astype(jnp.float32)


@pytest.mark.parametrize("width", [1, 3])
def test_enough_proposals_climb_straight_to_the_top(width):
    search = jax.jit(
        lambda key: value_guided_search(
            key, walk, height, start(width, 6), num_steps=6, num_proposals=32
        )
    )
    beam = search(KEY)
    place, path, count = beam.states
    np.testing.assert_array_equal(place, 3)
    assert beam.finished.all()
    # What has ended stays as it is: three steps up, then nothing.
    np.testing.assert_array_equal(path, [[1, 1, 1, 0, 0, 0]] * width)
    np.testing.assert_array_equal(count, 3)


def test_values_descend_and_belong_to_their_states():
    beam = value_guided_search(
        KEY, walk, height, start(4, 5), num_steps=5, num_proposals=2
    )
    assert (np.diff(beam.values) <= 0).all()
    np.testing.assert_array_equal(beam.values, height(beam.states))
    np.testing.assert_array_equal(beam.states[0], beam.states[1].sum(1))


def test_more_proposals_are_never_worse_on_average_than_the_policy():
    """One proposal of one candidate is a sample; 2 x 4 of them are better."""
    mean = lambda width, proposals: float(
        jax.vmap(
            lambda key: value_guided_search(
                key,
                walk,
                height,
                start(width, 4),
                num_steps=4,
                num_proposals=proposals,
            ).values[0]
        )(jax.random.split(KEY, 200)).mean()
    )
    assert abs(mean(1, 1)) < 0.5
    assert mean(2, 4) > 2


def test_copies_of_what_has_ended_do_not_crowd_out_the_rest():
    """Even where everything else is worth less than anything."""

    def propose(key, x):
        return x + jnp.arange(6) % 3, x < 0

    value = lambda x: jnp.where(x == -100, 0.0, -jnp.inf)
    beam = value_guided_search(
        KEY, propose, value, jnp.array([50, -100]), num_steps=2, num_proposals=3
    )
    np.testing.assert_array_equal(beam.finished, [True, False])
    np.testing.assert_array_equal(beam.states, [-100, 50])


def test_a_value_of_nan_is_the_worst():
    def propose(key, x):
        return x + jnp.arange(1, 4), jnp.zeros(x.shape, bool)

    value = lambda x: jnp.where(x % 3 == 0, jnp.nan, x.astype(jnp.float32))
    beam = value_guided_search(
        KEY, propose, value, jnp.zeros(1, int), num_steps=1, num_proposals=3
    )
    np.testing.assert_array_equal(beam.states, [2])


GOOD = {
    "propose": lambda key, x: (x, jnp.zeros(x.shape, bool)),
    "value": lambda x: x,
    "states": jnp.zeros(2),
    "num_steps": 1,
    "num_proposals": 2,
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("num_steps", {"num_steps": 0}, ValueError),
        ("num_proposals", {"num_proposals": 1.0}, TypeError),
        ("states", {"states": (jnp.zeros(2), jnp.zeros(3))}, ValueError),
        ("states", {"states": jnp.zeros(())}, ValueError),
        ("states", {"states": jnp.zeros((0, 2))}, ValueError),
        ("states", {"states": ()}, ValueError),
        ("value(states)", {"value": lambda x: x[:1]}, ValueError),
        ("value(states)", {"value": lambda x: x.astype(int)}, TypeError),
        (
            "propose(key, states)[1]",
            {"propose": lambda key, x: (x, jnp.zeros(x.shape))},
            TypeError,
        ),
        (
            "propose(key, states)[1]",
            {"propose": lambda key, x: (x, jnp.zeros(2, bool))},
            ValueError,
        ),
    ],
)
def test_errors(argument, options, error):
    with pytest.raises(error) as raised:
        value_guided_search(KEY, **GOOD | options)
    assert str(raised.value).startswith(f"value_guided_search: `{argument}` must ")


# --------------------------------------------------------------------- chain of samples
def test_a_chain_moves_to_what_is_correct_and_stays_otherwise():
    memory = {"tokens": jnp.array([[1, 1], [2, 2], [3, 3]]), "length": jnp.arange(3)}
    proposal = {"tokens": memory["tokens"] + 10, "length": jnp.arange(3) + 10}
    was, found = jnp.array([True, True, False]), jnp.array([True, False, False])
    chain, correct = independence_chain_update(memory, proposal, was, found)
    np.testing.assert_array_equal(chain["tokens"], [[11, 11], [2, 2], [3, 3]])
    np.testing.assert_array_equal(chain["length"], [10, 1, 2])
    np.testing.assert_array_equal(correct, [True, True, False])


def test_the_chain_is_stationary_at_the_posterior():
    """From the worst start: after some steps the law is that of correct rationales."""
    logits = jnp.array([1.0, 0.0, -1.0, 0.5])
    right = jnp.array([False, True, True, True])
    chains = 20_000

    def step(carry, key):
        memory, correct = carry
        proposal = jax.random.categorical(key, logits, shape=(chains,))
        return independence_chain_update(
            memory, proposal, correct, right[proposal]
        ), None

    begin = IndependenceChain(jnp.zeros(chains, int), jnp.zeros(chains, bool))
    keys = jax.random.split(KEY, 30)
    memory, correct = jax.jit(lambda b: jax.lax.scan(step, b, keys))(begin)[0]
    assert correct.all()
    share = np.bincount(memory, minlength=4) / chains
    wanted = np.exp(logits) * np.asarray(right)
    np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.02)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("memory_correct", {"memory_correct": jnp.zeros(3)}, TypeError),
        ("proposal_correct", {"memory_correct": jnp.zeros(2, bool)}, ValueError),
        ("proposal_correct", {"proposal_correct": jnp.zeros(2, bool)}, ValueError),
        ("proposal", {"proposal": jnp.zeros((3, 1))}, ValueError),
        ("memory", {"memory": jnp.zeros(()), "proposal": jnp.zeros(())}, ValueError),
    ],
)
def test_errors_of_the_chain(argument, options, error):
    arguments = {
        "memory": jnp.zeros((3, 2)),
        "proposal": jnp.zeros((3, 2)),
        "memory_correct": jnp.zeros(3, bool),
        "proposal_correct": jnp.zeros(3, bool),
    }
    with pytest.raises(error) as raised:
        independence_chain_update(**arguments | options)
    assert str(raised.value).startswith(
        f"independence_chain_update: `{argument}` must "
    )
