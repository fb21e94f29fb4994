"""TRICE: weights, surrogate, and the variance of its gradient."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.decoding import independence_chain_update
from softlib.testing import assert_close, check_transformations
from tests.compiled import losses
from tests.host import jnp
from tests.oracles import sequences as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/trice_case0.npz"


def test_matches_independent_vectors():
    """From the update of the chains to the gradient of the logits."""
    with jax.enable_x64():
        data = {name: jnp.asarray(array) for name, array in np.load(DATA).items()}
        at = lambda table, z: jnp.take_along_axis(table, z[:, None], 1)[:, 0]
        memory, proposal = data["in_memory"], data["in_proposal"]
        correct = functools.partial(at, data["in_correct"])
        chain, chain_correct = independence_chain_update(
            memory, proposal, correct(memory), correct(proposal)
        )
        np.testing.assert_array_equal(chain, data["out_chain"])
        np.testing.assert_array_equal(chain_correct, data["out_chain_correct"])
        weights = losses.trice_weights(correct(proposal), chain_correct)
        close = functools.partial(assert_close, dtype="float64", length=8)
        close(weights[0], data["out_weight_chain"])
        close(weights[1], data["out_weight_proposal"])

        def surrogate(logits):
            log_p = jax.nn.log_softmax(logits)
            return (
                0
                - losses.trice_loss(
                    at(log_p, chain),
                    at(log_p, proposal),
                    correct(proposal),
                    chain_correct,
                ).sum()
            )

        gradient = jax.jit(jax.grad(surrogate))(data["in_logits"])
        close(gradient, data["out_grad_logits_of_surrogate"])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), count=st.sampled_from([1, 2, 6]))
def test_weights_match_the_definition_and_cancel_as_accuracy_grows(seed, count):
    random = np.random.default_rng(seed)
    chain = random.uniform(size=count) < 0.8
    proposal = random.uniform(size=count) < 0.6
    found = losses.trice_weights(jnp.asarray(proposal), jnp.asarray(chain))
    for one, two in zip(found, oracle.trice_weights(proposal, chain), strict=True):
        assert_close(one, two, dtype="float32", length=1)
    every = jnp.ones(count, bool)
    full = losses.trice_weights(every, every)
    assert_close(
        full[0] + full[1], np.full(count, float(count == 1)), dtype="float32", length=1
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_summands_are_weights_times_log_probabilities(dtype):
    with jax.enable_x64(dtype == "float64"):
        random = np.random.default_rng(0)
        log_prob = [jnp.asarray(-random.gamma(2, size=5), dtype) for _ in range(2)]
        proposal = np.array([True, False, True, False, False])
        chain = np.array([True, True, True, False, True])
        weights = oracle.trice_weights(proposal, chain)
        found = losses.trice_loss(
            log_prob[0], log_prob[1], jnp.asarray(proposal), jnp.asarray(chain)
        )
        assert found.dtype == jnp.promote_types(dtype, jnp.float32)
        exact = [np.asarray(a, np.float64) for a in log_prob]
        wanted = 0 - weights[0] * exact[0] - weights[1] * exact[1]
        assert_close(found, wanted, dtype=found.dtype, length=2)


def test_a_chain_that_is_wrong_has_summand_and_gradient_zero():
    """Whatever its log-probabilities hold."""
    log_prob = jnp.array([jnp.nan, -1.0, -jnp.inf])
    chain = jnp.array([False, True, False])
    call = lambda one, two: losses.trice_loss(one, two, chain, chain)
    summands = call(log_prob, log_prob)
    np.testing.assert_array_equal(summands, [0, 1, 0])  # of one question, beta is 0
    gradient = jax.grad(lambda x: call(x, x).sum())(log_prob)
    np.testing.assert_array_equal(gradient, [0, -1, 0])


def test_an_inconsistent_proposal_does_not_count():
    """The chain would have taken a proposal that is correct."""
    chain = jnp.array([True, True, False])
    one, two = (losses.trice_weights(p, chain) for p in (jnp.ones(3, bool), chain))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_carry_no_gradient_and_no_question_gives_no_summand():
    empty = jnp.zeros(0)
    assert losses.trice_loss(empty, empty, empty > 0, empty > 0).shape == (0,)
    none = jnp.zeros(3, bool)
    found = losses.trice_weights(none, none)
    for weights in found:
        np.testing.assert_array_equal(weights, 0)


@pytest.mark.slow
def test_under_every_transformation():
    random = np.random.default_rng(0)
    log_prob = [jnp.asarray(-random.gamma(2, size=6), jnp.float32) for _ in range(2)]
    flags = [jnp.asarray(random.uniform(size=6) < p) for p in (0.5, 0.9)]
    check_transformations(
        losses.trice_loss,
        *log_prob,
        *flags,
        rows=(0, 1, 2, 3),
        skip={"shard_map": "the weights are those of all questions together"},
    )


# ----------------------------------------------------------------------------- headline
QUESTIONS, RATIONALES, REPEATS = 16, 20, 2000


def gradients(scale, control_variate):
    """Gradients of repeated steps with chains at stationarity, and the exact one."""
    random = np.random.default_rng(0)
    correct = random.uniform(size=(QUESTIONS, RATIONALES)) < 0.4
    correct[:, 0] = True
    logits = jnp.asarray(random.normal(size=correct.shape) + scale * correct)
    correct = jnp.asarray(correct)
    posterior = jnp.where(correct, logits, -jnp.inf)
    at = lambda table, z: jnp.take_along_axis(table, z[:, None], 1)[:, 0]

    def one(key):
        memory, proposal = (
            jax.random.categorical(k, z)
            for k, z in zip(jax.random.split(key), (posterior, logits), strict=True)
        )
        every = jnp.ones(QUESTIONS, bool)
        accepted = at(correct, proposal)
        chain, _ = independence_chain_update(memory, proposal, every, accepted)

        def surrogate(logits):
            log_p = jax.nn.log_softmax(logits)
            if control_variate:
                return losses.trice_loss(
                    at(log_p, chain), at(log_p, proposal), accepted, every
                ).sum()
            return 0 - at(log_p, chain).mean()

        return jax.grad(surrogate)(logits)

    run = jax.jit(jax.vmap(one))
    found = np.asarray(run(jax.random.split(jax.random.key(0), REPEATS)))
    likelihood = lambda z: (
        jax.nn.logsumexp(jnp.where(correct, z, -jnp.inf), 1) - jax.nn.logsumexp(z, 1)
    )
    exact = np.asarray(jax.grad(lambda z: 0 - likelihood(z).mean())(logits))
    return found, exact, float(jnp.exp(likelihood(logits)).mean())


@pytest.mark.parametrize(("scale", "least", "most"), [(0, 0.8, 1.05), (6, 0.0, 0.05)])
def test_the_control_variate_takes_the_variance_of_an_accurate_model(
    scale, least, most
):
    """At p(correct) = 0.99 below 5 % of it is left, and the mean is the gradient."""
    plain, exact, accuracy = gradients(scale, control_variate=False)
    reduced, _, _ = gradients(scale, control_variate=True)
    assert accuracy > 0.99 if scale else accuracy < 0.5
    ratio = reduced.var(0).sum() / plain.var(0).sum()
    assert least < ratio < most
    # Sums over all entries: single ones are rare events, whose error is unknown.
    directions = np.random.default_rng(1).normal(size=(exact.size, 4))
    for found in (plain, reduced):
        sums = (found - exact).reshape(REPEATS, -1) @ directions
        assert (np.abs(sums.mean(0)) < 5 * sums.std(0) / REPEATS**0.5).all()


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("argument", "value", "error", "got"),
    [
        ("chain_log_prob", jnp.zeros(3, int), TypeError, "got int32."),
        ("proposal_log_prob", jnp.zeros(2), ValueError, "got (2,)."),
        ("proposal_correct", jnp.zeros(3), TypeError, "got float32."),
        ("proposal_correct", jnp.zeros((3, 1), bool), ValueError, "got shape (3, 1)."),
        ("chain_correct", jnp.zeros(2, bool), ValueError, "got (2,)."),
    ],
)
def test_error_names_function_argument_and_value(argument, value, error, got):
    arguments = {
        "chain_log_prob": jnp.zeros(3),
        "proposal_log_prob": jnp.zeros(3),
        "proposal_correct": jnp.zeros(3, bool),
        "chain_correct": jnp.zeros(3, bool),
    }
    with pytest.raises(error) as raised:
        losses.trice_loss(**arguments | {argument: value})
    assert str(raised.value).startswith(f"trice_loss: `{argument}` must ")
    assert str(raised.value).endswith(got)
