"""Differential information: oracle, vectors, the optimum of DPO, masks, errors."""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from softlib import information, losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import preference as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
ROWS, SPACE = 3, 7
TWO = {
    "differential": information.differential_information,
    "entropy": information.differential_information_entropy,
    "rejected": functools.partial(information.optimal_rejected_distribution, beta=0.5),
    "sampled": information.sampled_differential_information,
}
THREE = {"optimal": functools.partial(information.dpo_optimal_policy, beta=0.5)}
every = pytest.mark.parametrize("name", [*TWO, *THREE])
exact_ones = pytest.mark.parametrize("name", ["differential", "rejected", "optimal"])


def log_policies(count, dtype="float32", shape=(ROWS, SPACE), seed=0):
    random = np.random.default_rng(seed)
    z = random.normal(size=(count, *shape))
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return tuple(jnp.asarray(row, dtype) for row in z)


def function_of(name):
    return TWO.get(name) or THREE[name]


def arrays_of(name, **options):
    return log_policies(2 if name in TWO else 3, **options)


# ----------------------------------------------------------------------------- oracles
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        one, two, three = log_policies(3, dtype)
        wide = [np.asarray(a).astype(np.float64) for a in (one, two, three)]
        q, entropy = oracle.differential(*wide[:2])

        @jax.jit
        def run(one, two, three):
            return (
                information.differential_information(one, two),
                information.differential_information_entropy(one, two),
                information.dpo_optimal_policy(one, two, three, beta=0.5),
                information.optimal_rejected_distribution(one, two, beta=0.5),
            )

        wanted = (
            np.log(q),
            entropy,
            np.log(oracle.dpo_optimal(*map(np.exp, wide), beta=0.5)),
            np.log(oracle.optimal_rejected(*map(np.exp, wide[:2]), beta=0.5)),
        )
        for actual, expected in zip(run(one, two, three), wanted, strict=True):
            assert actual.dtype == jnp.promote_types(dtype, jnp.float32)
            assert_close(actual, expected, dtype=actual.dtype, length=SPACE)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA / "differential_information_case0.npz") as data:
        names = ("ref", "target", "chosen", "rejected")
        ref, target, chosen, rejected = (
            jnp.asarray(data[f"in_{name}_logp"]) for name in names
        )
        beta = float(data["in_beta"])

        @jax.jit
        def run(ref, target, chosen, rejected):
            of = information
            return {
                "log_did": of.differential_information(target, ref),
                "did_entropy": of.differential_information_entropy(target, ref),
                "optimal_policy": of.dpo_optimal_policy(
                    ref, chosen, rejected, beta=beta
                ),
                "optimal_rejected": of.optimal_rejected_distribution(
                    ref, target, beta=beta
                ),
            }

        for name, actual in run(ref, target, chosen, rejected).items():
            assert_close(actual, data[f"out_{name}"], dtype="float64", length=12)


@pytest.mark.parametrize(
    ("shape", "axis"), [((1,), 0), ((5, 1), -1), ((0, 4), 1), ((2, 3, 5), 0)]
)
def test_any_shape_and_axis(shape, axis):
    one, two = log_policies(2, shape=shape)
    of = information.differential_information
    actual = jax.jit(functools.partial(of, axis=axis))(one, two)
    moved = [np.moveaxis(np.asarray(a), axis, -1) for a in (one, two)]
    log_q = np.log(oracle.differential(moved[0], moved[1])[0])
    assert_close(actual, np.moveaxis(log_q, -1, axis), dtype="float32", length=5)
    entropy_of = information.differential_information_entropy
    entropy = jax.jit(functools.partial(entropy_of, axis=axis))(one, two)
    assert entropy.shape == np.zeros(shape).sum(axis).shape


# ---------------------------------------------------------------------------- promises
@every
def test_what_is_outside_the_space_does_not_matter(name):
    """Values and gradients are those of the space without it."""
    function = function_of(name)
    where = jnp.arange(SPACE) != 2
    inside = [a[:, where] for a in arrays_of(name)]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(arrays, where):
        leaves = jax.tree.leaves(function(*arrays, where=where))
        return sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in leaves), leaves

    everywhere = jnp.broadcast_to(where, (ROWS, SPACE))
    expected_gradients, expected = run(inside, everywhere[:, where])
    for filling in (NAN, -INF, INF):
        outside = [a.at[:, 2].set(filling) for a in arrays_of(name)]
        gradients, found = run(outside, everywhere)
        for one, two in zip(found, expected, strict=True):
            if one.ndim == 2:
                np.testing.assert_array_equal(one[:, 2], -np.inf)
                one = one[:, where]
            assert_close(one, two, dtype="float32", length=SPACE)
        for one, two in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_array_equal(one[:, 2], 0)
            assert_close(one[:, where], two, dtype="float32", length=SPACE)


@every
def test_an_empty_space(name):
    arrays = arrays_of(name)
    where = jnp.broadcast_to(jnp.arange(ROWS)[:, None] != 1, (ROWS, SPACE))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(arrays):
        leaves = jax.tree.leaves(function_of(name)(*arrays, where=where))
        return sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in leaves), leaves

    gradients, found = run(arrays)
    if name == "sampled":
        np.testing.assert_array_equal([x[1] for x in found], [0, -np.inf, 0])
    else:
        np.testing.assert_array_equal(found[0][1], 0 if name == "entropy" else -np.inf)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)


def test_what_is_impossible_for_both_is_not_in_the_space():
    one, two, three = (a.at[:, 2].set(-INF) for a in log_policies(3))
    where = jnp.broadcast_to(jnp.arange(SPACE) != 2, one.shape)
    for name, arrays in (
        ("differential", (one, two)),
        ("entropy", (one, two)),
        ("rejected", (one, two)),
        ("optimal", (one, two, three)),
    ):
        function = jax.jit(function_of(name))
        np.testing.assert_array_equal(function(*arrays), function(*arrays, where=where))


@pytest.mark.parametrize(
    ("name", "possible", "degenerate"),
    [
        # Which argument has a hole: a legal one, or one that makes its row NaN.
        ("differential", [0], [1]),
        ("entropy", [0], [1]),
        ("rejected", [0], [1]),
        ("optimal", [0, 1], [2]),
        ("sampled", [], [0, 1]),
    ],
)
def test_what_is_impossible_for_one_of_them(name, possible, degenerate):
    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(arrays):
        leaves = jax.tree.leaves(function_of(name)(*arrays))
        return sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in leaves), leaves

    for position in possible + degenerate:
        arrays = list(arrays_of(name))
        arrays[position] = arrays[position].at[1, 2].set(-INF)
        gradients, found = run(arrays)
        bad = (np.arange(ROWS) == 1) & (position in degenerate)
        for leaf in found:
            isnan = np.isnan(leaf).reshape(ROWS, -1)
            assert (isnan == bad[:, None]).all()
            if leaf.ndim == 2 and position in possible:
                assert leaf[1, 2] == -np.inf
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            if position in degenerate:
                np.testing.assert_array_equal(gradient[1], 0)


def test_the_entropy_of_no_change_is_that_of_all_and_of_one_member_zero():
    (one,) = log_policies(1)
    of = jax.jit(information.differential_information_entropy)
    np.testing.assert_allclose(of(one, one), math.log(SPACE), rtol=1e-6)
    single = of(one, one, where=jnp.arange(SPACE)[None] == 3)
    np.testing.assert_array_equal(single, 0)
    assert not np.signbit(single).any()


# ------------------------------------------------------------------------------ algebra
@given(seed=st.integers(0, 30), constant=st.floats(-50, 50, width=32))
def test_constants_do_not_matter(seed, constant):
    one, two, three = log_policies(3, seed=seed)
    assert_close(
        _all(one + constant, two - constant, three + 2 * constant),
        _all(one, two, three),
        dtype="float32",
        length=SPACE,
        c=200,  # rounding of numbers up to 100
    )


@jax.jit
def _all(one, two, three):
    return jnp.concatenate(
        [
            information.differential_information(one, two),
            information.dpo_optimal_policy(one, two, three, beta=0.5),
            information.optimal_rejected_distribution(one, two, beta=0.5),
            information.differential_information_entropy(one, two)[:, None],
        ],
        axis=1,
    )


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_bayes_and_the_round_trip(beta):
    """Pi is ref q; what rejected samples teach is the target, to 1e-12."""

    @jax.jit
    def run(ref, target, beta):
        rejected = information.optimal_rejected_distribution(ref, target, beta=beta)
        found = information.dpo_optimal_policy(ref, ref, rejected, beta=beta)
        of = information.differential_information
        return found, of(target, ref), of(ref, rejected)

    with jax.enable_x64():
        ref, target = log_policies(2, "float64", shape=(20, SPACE))
        found, q, of_pairs = run(ref, target, beta)
        np.testing.assert_allclose(jax.nn.log_softmax(ref + q), target, atol=1e-12)
        np.testing.assert_allclose(found, target, atol=1e-12)
        # The information of the optimum is a power of that of the pairs.
        np.testing.assert_allclose(jax.nn.log_softmax(of_pairs / beta), q, atol=1e-11)


# ----------------------------------------------------------------- headline experiments
def test_the_population_loss_of_dpo_is_least_at_the_optimal_policy():
    """BFGS from the reference, V = 8: the same probabilities to 1e-5."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    beta, size = 0.5, 8
    with jax.enable_x64():
        ref, chosen, rejected = log_policies(3, "float64", shape=(size,))
        pairs = jnp.outer(jnp.exp(chosen), jnp.exp(rejected))

        @jax.jit
        @jax.value_and_grad
        def population(logits):
            log_probs = jax.nn.log_softmax(logits)
            grid = lambda a, axis: jnp.broadcast_to(
                jnp.expand_dims(a, axis), (size, size)
            )
            loss = losses.dpo_loss(
                grid(log_probs, 1),
                grid(log_probs, 0),
                grid(ref, 1),
                grid(ref, 0),
                beta=beta,
            )
            return (pairs * loss).sum()

        call = lambda z: tuple(map(np.asarray, population(jnp.asarray(z))))
        found = scipy_optimize.minimize(
            call, np.asarray(ref), jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        wanted = information.dpo_optimal_policy(ref, chosen, rejected, beta=beta)
        policy = jax.nn.softmax(jnp.asarray(found.x))
        assert np.abs(policy - jnp.exp(wanted)).max() < 1e-5
        assert np.abs(policy - jnp.exp(ref)).max() > 0.1
        slope = population(wanted)[1]
        np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_both_log_probabilities_of_a_pair_fall_towards_a_target_of_high_entropy():
    """Displacement: 0 is preferred to 1 by both targets, and learned by both.

    The first sharpens the reference, the second spreads it over what is rare.
    """
    ref = jax.nn.log_softmax(-1.5 * jnp.log(jnp.arange(1.0, 51.0)))
    disliked = jnp.where(jnp.arange(50) == 1, jnp.log(0.3), 0.0)
    found = []

    @jax.jit
    def learn(target):
        rejected = information.optimal_rejected_distribution(ref, target, beta=1.0)
        learned = information.dpo_optimal_policy(ref, ref, rejected, beta=1.0)
        return learned, information.differential_information_entropy(learned, ref)

    for power in (1.5, 0.5):
        learned, entropy = learn(jax.nn.log_softmax(power * ref + disliked))
        gain = np.asarray(learned - ref)
        assert gain[0] > gain[1]
        assert gain[1] < 0
        # On average what is drawn from the reference becomes less likely, always.
        assert (jnp.exp(ref) * gain).sum() < 0
        found.append((entropy, gain[0]))
    (low, rises), (high, falls) = found
    assert low < high - 0.15
    assert rises > 0.2
    assert falls < -0.2


def test_the_estimate_from_samples_tends_to_the_entropy():
    """And its effective sample size says when it does not."""
    size = 50
    ref, policy = log_policies(2, shape=(size,), seed=3)
    ratio = np.exp(np.asarray(policy - ref).astype(float))
    normalizer = np.log(ratio.sum())
    wanted = oracle.differential(policy, ref)[1]
    draws = jax.random.categorical(jax.random.key(0), policy, shape=(16, 4000))
    estimate = jax.jit(
        lambda draws: information.sampled_differential_information(
            policy[draws], ref[draws]
        )
    )
    found = estimate(draws)
    assert abs(found.entropy.mean() - wanted) < 0.02
    assert abs(found.log_normalizer.mean() - normalizer) < 0.02
    np.testing.assert_allclose(found.entropy, wanted, atol=0.15)
    assert (found.effective_sample_size > 100).all()
    few = estimate(draws[:, :5])
    assert (few.effective_sample_size <= 5 * (1 + 1e-6)).all()
    assert few.effective_sample_size.min() < 2
    error = lambda found: np.abs(np.asarray(found.entropy) - wanted).mean()
    assert error(few) > 5 * error(found)


def test_the_estimate_is_finite_for_weights_beyond_float32():
    """Weights of sequences are e to the hundreds."""
    log_prob = jnp.array([-300.0, -310.0, -305.0])
    estimate = jax.jit(information.sampled_differential_information)
    found = estimate(log_prob, log_prob - 5)
    w = np.exp(-np.asarray(log_prob).astype(float) - 300)
    normalizer = np.log(w.mean()) + 305
    assert_close(found.log_normalizer, normalizer, dtype="float32", length=3)
    size = w.sum() ** 2 / (w**2).sum()
    np.testing.assert_allclose(found.effective_sample_size, size, rtol=1e-4)
    assert_close(found.entropy, normalizer - 5, dtype="float32", length=3)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow
@every
def test_every_transformation(name):
    check_transformations(
        function_of(name),
        *arrays_of(name, shape=(8, 3)),
        rows=tuple(range(len(arrays_of(name)))),
    )


def test_beta_may_be_swept_and_differentiated():
    one, two, three = log_policies(3)
    for of in (
        lambda beta: information.dpo_optimal_policy(one, two, three, beta=beta),
        lambda beta: information.optimal_rejected_distribution(one, two, beta=beta),
    ):
        betas = jnp.array([0.5, 1.0])
        swept = jax.jit(jax.vmap(of))(betas)
        static = jax.jit(lambda of=of: (of(0.5), of(1.0)))()
        for found, wanted in zip(swept, static, strict=True):
            assert_close(found, wanted, dtype="float32", length=SPACE)
        slope = jax.jit(jax.jacfwd(of))(jnp.float32(0.75))
        ends = jax.jit(jax.vmap(of))(jnp.array([0.74, 0.76]))
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 0.02, atol=4e-3)


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@every
def test_bad_arguments_name_the_function(name):
    arrays = arrays_of(name)
    function = function_of(name)
    address = getattr(function, "func", function).__name__
    for call, error, message in (
        (
            lambda: function(arrays[0], *[a[:2] for a in arrays[1:]]),
            ValueError,
            "shape",
        ),
        (lambda: function(*[a.astype(int) for a in arrays]), TypeError, "floating"),
        (lambda: function(*arrays, axis=2), ValueError, "`axis` must"),
        (lambda: function(*arrays, where=arrays[0]), TypeError, "`where` must"),
        (
            lambda: function(*arrays, where=jnp.ones(2, bool)),
            ValueError,
            "`where` must",
        ),
    ):
        with pytest.raises(error, match=f"^{address}: .*{message}"):
            call()
    if name in ("rejected", "optimal"):
        for beta in (0.0, -1, math.inf, jnp.ones(2)):
            with pytest.raises(ValueError, match=f"^{address}: `beta` must"):
                function(*arrays, beta=beta)
