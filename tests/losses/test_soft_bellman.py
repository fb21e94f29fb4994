"""Soft-Bellman residuals and OREO's losses."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import soft_bellman as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/oreo_case0.npz"
ROWS, LENGTH, BETA = 6, 9, 0.3
LEVELS = ("token", "step", "response")
every_level = pytest.mark.parametrize("level", LEVELS)


def problem(dtype="float64", seed=0, length=LENGTH) -> tuple[dict, np.ndarray, Any]:
    """Arrays, `where` with holes, an empty and a single token, and steps."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    arrays = {
        "log_prob": 0 - jnp.abs(draw(ROWS, length)),
        "reference_log_prob": 0 - jnp.abs(draw(ROWS, length)),
        "values": draw(ROWS, length),
        "rewards": draw(ROWS, length),
    }
    where = random.uniform(size=(ROWS, length)) < 0.7
    where[0], where[1], where[2] = True, False, np.arange(length) == length // 2
    # Ids may return: two runs of one id are two steps.
    steps = np.cumsum(random.uniform(size=(ROWS, length)) < 0.4, axis=1) % 3
    # What stands between two tokens that count is of no step: it has an id of its own,
    # or that of the token behind it.
    steps[3::2] = np.where(where, steps, 5)[3::2]
    behind = np.roll(steps, -1, axis=1)
    steps[4::2] = np.where(where, steps, behind)[4::2]
    return arrays, where, jnp.asarray(steps)


def policy(level, steps, where, **options):
    ids = steps if level == "step" else None
    return functools.partial(
        losses.oreo_policy_loss, level=level, segment_ids=ids, where=where, **options
    )


def value(level, steps, where, **options):
    ids = steps if level == "step" else None
    return functools.partial(
        losses.oreo_value_loss, level=level, segment_ids=ids, where=where, **options
    )


def per_argument(function, arrays):
    """The loss per row, and the gradients of its sum by argument."""

    @jax.jit
    def run(arrays):
        total = lambda arrays: (function(**arrays).sum(), function(**arrays))
        return jax.grad(total, has_aux=True)(arrays)

    gradients, loss = run(arrays)
    return loss, gradients


# ------------------------------------------------------------------------------ oracles
@pytest.mark.parametrize(
    ("level", "dtype", "terminal"),
    [
        ("step", "float64", False),
        ("step", "float32", True),
        ("token", "bfloat16", False),
        ("token", "float16", True),
        ("response", "float32", False),
    ],
)
def test_matches_oracle(level, dtype, terminal):
    """Values and gradients of both losses; what `where` drops is NaN."""
    with jax.enable_x64(dtype == "float64"):
        arrays, where, steps = problem(dtype)
        if terminal:
            arrays["rewards"] = arrays["rewards"][:, 0]
        exact = {n: np.asarray(a, np.float64) for n, a in arrays.items()}
        for name in ("log_prob", "reference_log_prob", "values"):
            arrays[name] = jnp.where(where, arrays[name], jnp.nan)
        wanted = oracle.losses(
            **exact, beta=BETA, where=where, level=level, segment_ids=np.asarray(steps)
        )
        computed = jnp.promote_types(dtype, jnp.float32)
        for make, argument, gradient in (
            (value, "values", wanted[1]),
            (policy, "log_prob", wanted[2]),
        ):
            function = make(level, steps, jnp.asarray(where), beta=BETA)
            loss, gradients = per_argument(function, arrays)
            assert loss.dtype == computed
            assert_close(loss, wanted[0], dtype=computed, length=LENGTH)
            assert gradients[argument].dtype == arrays[argument].dtype
            assert_close(gradients[argument], gradient, dtype=dtype, length=LENGTH)


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = {name: jnp.asarray(array) for name, array in np.load(DATA).items()}
        arrays = {
            "log_prob": data["in_logp"],
            "reference_log_prob": data["in_ref_logp"],
            "values": data["in_values"],
            "rewards": data["in_rewards"],
        }
        beta, where = data["in_beta"], data["in_where"]
        found = jax.jit(losses.soft_bellman_residual)(**arrays, beta=beta, where=where)
        close = functools.partial(assert_close, dtype="float64", length=8)
        close(found, data["out_residual"])
        loss, gradients = per_argument(value("token", None, where, beta=beta), arrays)
        close(loss, data["out_value_loss"])
        close(gradients["values"], data["out_grad_values"])
        loss, gradients = per_argument(policy("token", None, where, beta=beta), arrays)
        close(loss, data["out_value_loss"])
        close(gradients["log_prob"], data["out_grad_logp_policy"])
        close(
            jax.jit(policy("response", None, where, beta=beta))(**arrays),
            data["out_response_loss"],
        )


@pytest.mark.parametrize("length", [1, 2, 65])
def test_residual_matches_oracle_for_every_length(length):
    arrays, where, _ = problem("float32", length=length)
    exact = {n: np.asarray(a, np.float64) for n, a in arrays.items()}
    wanted = oracle.residual(**exact, beta=BETA, where=where)
    run = jax.jit(functools.partial(losses.soft_bellman_residual, beta=BETA))
    found = run(**arrays, where=jnp.asarray(where))
    assert_close(found, wanted, dtype="float32", length=length)


# ----------------------------------------------------------------------------- promises
@every_level
def test_both_losses_have_the_same_value(level):
    arrays, where, steps = problem("float32")
    make = lambda f: jax.jit(f(level, steps, jnp.asarray(where)))(**arrays)
    assert_close(make(policy), make(value), dtype="float32", length=LENGTH)


@every_level
def test_policy_is_fixed_in_the_value_loss_and_values_in_the_policy_loss(level):
    arrays, where, steps = problem("float32")
    _, of_value = per_argument(value(level, steps, jnp.asarray(where)), arrays)
    _, of_policy = per_argument(policy(level, steps, jnp.asarray(where)), arrays)
    for gradient in (
        of_value["log_prob"],
        of_value["reference_log_prob"],
        of_policy["values"],
        of_policy["reference_log_prob"],
    ):
        np.testing.assert_array_equal(gradient, 0)
    assert (of_value["values"][0] != 0).any()
    assert (of_policy["log_prob"][0] != 0).all()


@every_level
def test_a_trajectory_without_an_action_has_loss_and_gradient_zero(level):
    arrays, _, steps = problem("float32")
    arrays = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), arrays)
    for make in (policy, value):
        function = make(level, steps, jnp.zeros((ROWS, LENGTH), bool))
        for leaf in jax.tree.leaves(per_argument(function, arrays)):
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("make", [policy, value])
def test_no_token_at_all(make):
    arrays = {
        name: jnp.zeros((3, 0)) for name in ("log_prob", "reference_log_prob", "values")
    }
    steps = jnp.zeros((3, 0), int)
    for level in LEVELS:
        found = jax.jit(make(level, steps, None))(**arrays, rewards=jnp.ones(3))
        np.testing.assert_array_equal(found, np.zeros(3))


@every_level
def test_nan_stays_in_its_row(level):
    arrays, _, steps = problem("float32")
    arrays["log_prob"] = arrays["log_prob"].at[2, 3].set(jnp.nan)
    for make in (policy, value):
        loss, gradients = per_argument(make(level, steps, None), arrays)
        others = np.arange(ROWS) != 2
        assert np.isnan(loss[2])
        assert np.isfinite(loss[others]).all()
        for gradient in gradients.values():
            assert np.isfinite(gradient[others]).all()


def test_an_impossible_token_makes_its_trajectory_infinite():
    arrays, _, _ = problem("float32")
    arrays["log_prob"] = arrays["log_prob"].at[2, 3].set(-jnp.inf)
    loss = jax.jit(losses.oreo_policy_loss)(**arrays)
    np.testing.assert_array_equal(np.isinf(loss), np.arange(ROWS) == 2)


def test_large_numbers_do_not_overflow():
    arrays = {n: jnp.full((1, 3), -1e4) for n in ("log_prob", "values")}
    large = jnp.full((1, 3), 1e4)
    loss = jax.jit(losses.oreo_policy_loss)(
        **arrays, reference_log_prob=large, rewards=large
    )
    # V - R + beta l = -1e4 - 3e4 - 0.03 * 6e4 at the first token, and so on.
    residuals = np.array([-41800.0, -31200.0, -20600.0])
    np.testing.assert_allclose(loss[0], (residuals**2).mean(), rtol=1e-6)


def test_a_step_of_one_token_each_is_the_token_level_and_one_step_the_response():
    arrays, where, _ = problem("float32")
    where = jnp.asarray(where)
    for level, ids in (
        ("token", jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))),
        ("response", jnp.zeros((ROWS, LENGTH), int)),
    ):
        found = per_argument(policy("step", ids, where), arrays)
        wanted = per_argument(policy(level, None, where), arrays)
        for one, two in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            assert_close(one, two, dtype="float32", length=LENGTH)


def test_beta_may_be_traced_and_differentiated():
    with jax.enable_x64():
        arrays, where, _ = problem()
        call = jax.jit(
            lambda beta: losses.oreo_policy_loss(
                **arrays, beta=beta, where=jnp.asarray(where)
            ).sum()
        )
        slope = jax.grad(call)(jnp.asarray(BETA))
        more, less = call(jnp.asarray(BETA + 1e-6)), call(jnp.asarray(BETA - 1e-6))
        np.testing.assert_allclose(slope, (more - less) / 2e-6, rtol=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), split=st.integers(1, LENGTH - 1))
def test_the_residual_obeys_the_bellman_equation(seed, split):
    """V_t - V_s = delta_t - delta_s + sum of r - beta l in between; shift by reward."""
    arrays, _, _ = problem("float32", seed)
    delta = _residual(arrays)
    gain = arrays["rewards"] - BETA * (
        arrays["log_prob"] - arrays["reference_log_prob"]
    )
    left = arrays["values"][:, 0] - arrays["values"][:, split]
    right = delta[:, 0] - delta[:, split] + gain[:, :split].sum(1)
    assert_close(left, right, dtype="float32", length=LENGTH, c=8)
    richer = arrays | {"rewards": arrays["rewards"].at[:, -1].add(1.5)}
    richer["values"] = arrays["values"] + 1.5
    assert_close(_residual(richer), delta, dtype="float32", length=LENGTH, c=8)


@jax.jit
def _residual(arrays):
    return losses.soft_bellman_residual(**arrays, beta=BETA)


@pytest.mark.slow
def test_residual_under_every_transformation():
    arrays, where, _ = problem("float32")
    check_transformations(
        lambda *a: losses.soft_bellman_residual(*a[:4], beta=a[4], where=a[5]),
        *arrays.values(),
        jnp.asarray(BETA),
        jnp.asarray(where),
        rows=(0, 1, 2, 3, 5),
    )


@pytest.mark.slow
@every_level
def test_policy_loss_under_every_transformation(level):
    arrays, where, steps = problem("float32")
    reason = "what comes after an action is held fixed, by definition"

    def call(log_prob, reference_log_prob, values, rewards, where, steps):
        function = policy(level, steps, where)
        return function(log_prob, reference_log_prob, values, rewards)

    check_transformations(
        call,
        *arrays.values(),
        jnp.asarray(where),
        steps,
        rows=range(6),
        differentiable=[0, 1, 2],
        skip={
            "reverse_mode": reason,
            "forward_mode": reason,
            "gradient_of_gradient": reason,
            "hessian_vector_product": reason,
        },
    )


# ----------------------------------------------------------------------------- headline
class Tree:
    """Every node has three children; a leaf is rewarded or not."""

    def __init__(self, depth=4, children=3, rewarded=0.2, seed=0):
        random = np.random.default_rng(seed)
        self.depth, self.children = depth, children
        self.inner = sum(children**d for d in range(depth))
        count = children**depth
        digits = np.array(list(np.ndindex(*(children,) * depth)))
        first = np.cumsum([0, *(children**d for d in range(depth - 1))])
        offset = np.stack(
            [
                sum(digits[:, k] * children ** (d - 1 - k) for k in range(d))
                + np.zeros(count, int)
                for d in range(depth)
            ],
            axis=1,
        )
        self.actions, self.states = digits, first + offset
        self.rewards = (random.permutation(count) < round(rewarded * count)) * 1.0
        logits = random.normal(size=(self.inner, children))
        self.reference = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def solve(self, beta):
        """Backwards: V = beta log sum exp(log pi_ref + Q / beta); the best policy."""
        value, log_policy = np.zeros(self.inner), np.zeros_like(self.reference)
        below = self.rewards
        for d in range(self.depth - 1, -1, -1):
            q = below.reshape(-1, self.children)
            states = np.unique(self.states[:, d])
            scores = self.reference[states] + q / beta
            top = scores.max(1, keepdims=True)
            lse = top + np.log(np.exp(scores - top).sum(1, keepdims=True))
            below = beta * lse[:, 0]
            value[states], log_policy[states] = below, scores - lse
        return value, log_policy

    def success(self, log_policy):
        return np.exp(log_policy[self.states, self.actions].sum(1)) @ self.rewards


def test_the_optimum_of_a_tree_has_no_residual():
    """On every trajectory, whatever policy drew it."""
    with jax.enable_x64():
        tree = Tree()
        value, log_policy = tree.solve(0.1)
        found = losses.soft_bellman_residual(
            jnp.asarray(log_policy[tree.states, tree.actions]),
            jnp.asarray(tree.reference[tree.states, tree.actions]),
            jnp.asarray(value[tree.states]),
            jnp.asarray(tree.rewards),
            beta=0.1,
        )
        np.testing.assert_allclose(found, 0, atol=1e-14)


def test_training_on_a_tree_finds_the_optimal_value_and_policy():
    """81 trajectories of the reference, all at once: success 0.08 becomes 0.999."""
    with jax.enable_x64():
        tree, beta = Tree(), 0.1
        value, log_policy = tree.solve(beta)
        states, actions = jnp.asarray(tree.states), jnp.asarray(tree.actions)
        ref = jnp.asarray(tree.reference)[states, actions]
        rewards = jnp.asarray(tree.rewards)

        def loss(parameters):
            log_pi = jax.nn.log_softmax(parameters["logits"])[states, actions]
            values = parameters["values"][states]
            return (
                losses.oreo_value_loss(values, log_pi, ref, rewards, beta=beta)
                + losses.oreo_policy_loss(log_pi, ref, values, rewards, beta=beta)
            ).mean()

        # At a constant rate Adam jumps away again from an optimum that it has reached.
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 2000))

        def step(carry, _):
            parameters, state = carry
            updates, state = optimizer.update(jax.grad(loss)(parameters), state)
            new: Any = optax.apply_updates(parameters, updates)
            policy = jnp.exp(jax.nn.log_softmax(new["logits"]))
            distance = jnp.abs(policy - np.exp(log_policy)).sum(1).max() / 2
            off = jnp.abs(new["values"] - value).max()
            return (new, state), (off, distance)

        start = {"values": jnp.zeros(tree.inner), "logits": jnp.asarray(tree.reference)}
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2000))
        (parameters, _), (off, distance) = run((start, optimizer.init(start)))
        assert max(off[500], distance[500]) < 1e-2
        assert max(off[-1], distance[-1]) < 1e-6
        best = tree.success(log_policy)
        assert tree.success(tree.reference) < 0.1
        assert best > 0.999
        found = np.asarray(jax.nn.log_softmax(parameters["logits"]))
        np.testing.assert_allclose(tree.success(found), best, atol=1e-6)


# ------------------------------------------------------------------------------- errors
BAD = [
    ("log_prob", jnp.zeros((2, 3), int), TypeError, "int32."),
    ("reference_log_prob", jnp.zeros((2, 4)), ValueError, "(2, 4)."),
    ("values", jnp.zeros((3,)), ValueError, "(3,)."),
    ("rewards", jnp.zeros((3,)), ValueError, "(3,)."),
    ("rewards", jnp.zeros((2,), int), TypeError, "int32."),
    ("where", jnp.zeros((2, 3)), TypeError, "float32."),
    ("where", jnp.zeros((2, 4), bool), ValueError, "(2, 4)."),
    ("beta", -0.1, ValueError, "-0.1."),
    ("beta", jnp.zeros(2), ValueError, "(2,)."),
]
OF_LEVELS = [
    ("level", {"level": "word"}, ValueError, "'word'."),
    ("segment_ids", {"level": "step"}, ValueError, "without them."),
    ("segment_ids", {"segment_ids": jnp.zeros((2, 3), int)}, ValueError, "with them."),
    (
        "segment_ids",
        {"level": "step", "segment_ids": jnp.zeros((2, 3))},
        TypeError,
        "float32.",
    ),
    (
        "segment_ids",
        {"level": "step", "segment_ids": jnp.zeros(3, int)},
        ValueError,
        "(3,).",
    ),
]
FUNCTIONS = ["soft_bellman_residual", "oreo_value_loss", "oreo_policy_loss"]


def good() -> dict[str, Any]:
    names = ("log_prob", "reference_log_prob", "values", "rewards")
    return {**{name: jnp.zeros((2, 3)) for name in names}, "beta": 0.1}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("argument", "wrong", "error", "got"), BAD)
def test_error_names_function_argument_and_value(name, argument, wrong, error, got):
    with pytest.raises(error) as raised:
        getattr(losses, name)(**good() | {argument: wrong})
    assert str(raised.value).startswith(f"{name}: `{argument}` must ")
    assert str(raised.value).endswith(f"got {got}") or got in str(raised.value)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize(("argument", "options", "error", "got"), OF_LEVELS)
def test_errors_of_levels(name, argument, options, error, got):
    with pytest.raises(error) as raised:
        getattr(losses, name)(**good() | options)
    assert str(raised.value).startswith(f"{name}: `{argument}` must ")
    assert str(raised.value).endswith(got)
