"""Large steps of logistic regression and the perceptron: trajectories and bounds."""

import pathlib

import jax
import numpy as np
import optax
import pytest

from softlib.estimation import fit_separator, separation_step_bound
from softlib.losses import normalized_logistic_loss, perceptron_loss
from tests.host import jnp

CASE = pathlib.Path(__file__).parent.parent / "data" / "lr_perceptron_case0.npz"
STEP_SIZES = (0.1, 1.0, 10.0, 100.0, np.inf)


def trajectory(x, signs, step_size, normalized, num_steps):
    """The formulas of the paper in float64; coefficients divided by the step size."""
    theta, found = np.zeros(x.shape[1]), [np.zeros(x.shape[1])]
    for step in range(num_steps):
        margins = signs * (x @ theta)
        if step_size == np.inf:
            weights = (margins <= 0) * (0.5 if step == 0 else 1.0)
        else:
            weights = 1 / (1 + np.exp(step_size * margins))
        total = weights.sum() if normalized else len(x)
        theta = theta + (weights / total) @ (signs[:, None] * x)
        found.append(theta)
    return np.array(found)


def worst_case(count):
    """One example that most of the others lead away from, as in the paper's table."""
    x = np.array([[0.5, -1.0]] + [[-0.5, -1.0]] * (count - 1))
    return x, np.array([1.0] + [-1.0] * (count - 1))


fits = jax.jit(fit_separator, static_argnames=("normalized", "max_steps"))


@pytest.mark.parametrize("normalized", [False, True])
def test_trajectory_is_that_of_the_formulas(normalized):
    rng = np.random.default_rng(0)
    x, signs = rng.normal(size=(9, 3)), rng.choice([-1.0, 1.0], size=9)
    options = {"normalized": normalized, "max_steps": 5}
    with jax.enable_x64():
        for step_size in STEP_SIZES:
            wanted = trajectory(x, signs, step_size, normalized, 5)[-1]
            fit = fits(x, signs, step_size=step_size, **options)
            assert not fit.separated
            assert fit.num_steps == 5
            assert fit.step_bound == np.inf
            np.testing.assert_allclose(fit.coefficients, wanted, rtol=1e-12)
            least = (signs * (x @ wanted)).min() / np.linalg.norm(wanted)
            np.testing.assert_allclose(fit.margin, least, rtol=1e-12)


def test_matches_independent_vectors():
    data = np.load(CASE)
    cases = {
        "batch_perceptron": (np.inf, False),
        "normalized_batch_perceptron": (np.inf, True),
        "lr_gd_gamma1": (1.0, False),
        "normalized_lr_gd_gamma1": (1.0, True),
        "lr_gd_gamma1e8_scaled": (1e8, False),
    }
    with jax.enable_x64():
        for name, (step_size, normalized) in cases.items():
            options = {"step_size": step_size, "normalized": normalized}
            fit = fits(data["in_x"], data["in_y"], max_steps=4, **options)
            assert fit.num_steps == 4
            wanted = data[f"out_{name}"][4]
            np.testing.assert_allclose(fit.coefficients, wanted, rtol=1e-12)


def test_steps_of_the_paper_in_its_worst_case():
    """One example among 1,000: steps grow with n unless they are normalized."""
    x, signs = worst_case(1000)
    steps = lambda step_size, normalized: int(
        fits(x, signs, step_size=step_size, normalized=normalized).num_steps
    )
    with jax.enable_x64():
        assert [steps(size, True) for size in (100.0, 10.0, 1.0, 0.1)] == [
            2,
            2,
            16,
            157,
        ]
        assert steps(np.inf, True) == 2
        assert [steps(size, False) for size in (100.0, 10.0)] == [308, 729]
        assert steps(np.inf, False) == 301
        for count, wanted in ((100, 31), (10, 4)):
            fit = fits(*worst_case(count), normalized=False)
            assert fit.num_steps == wanted


def test_an_early_step_may_raise_the_loss_and_the_next_separates():
    x, signs = np.array([[1.0, -1.0], [-1.0, -4.0]]), np.array([1, -1])
    first = fits(x, signs, normalized=False, max_steps=1)
    np.testing.assert_array_equal(first.coefficients, [0.5, 0.75])
    assert first.margin < 0
    second = fits(x, signs, normalized=False)
    np.testing.assert_array_equal(second.coefficients, [1.0, 0.25])
    assert second.num_steps == 2
    assert second.separated


@pytest.mark.parametrize("normalized", [False, True])
def test_no_instance_takes_more_steps_than_the_bound(normalized):
    """By the margin of the halfspace that made the signs, and by that of the fit."""
    rng = np.random.default_rng(1)
    problems, count = 40, 8
    truth = rng.normal(size=(problems, 2))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    x = rng.normal(size=(problems, count, 2))
    distance = np.einsum("pnd,pd->pn", x, truth)
    signs = np.sign(distance)
    # Some distance to the boundary, so that few steps do.
    x += 0.2 * signs[:, :, None] * truth[:, None, :]
    margin = np.abs(distance).min(1) + 0.2
    radius = np.linalg.norm(x, axis=-1).max(-1)

    @jax.jit
    def fit_all(x, signs, step_size):
        options = {"step_size": step_size, "normalized": normalized}
        fit_one = lambda x, y: fit_separator(x, y, max_steps=20_000, **options)
        bound = separation_step_bound(radius, margin, num_examples=count, **options)
        return jax.vmap(fit_one)(x, signs), bound

    # An upper bound on the largest margin, from many directions.
    largest = np.array([largest_margin(*each) for each in zip(x, signs, strict=True)])
    with jax.enable_x64():
        for step_size in STEP_SIZES:
            fit, bound = jax.tree.map(np.asarray, fit_all(x, signs, step_size))
            assert fit.separated.all()
            assert (fit.num_steps <= bound).all()
            assert (fit.num_steps <= fit.step_bound).all()
            assert (fit.margin > 0).all()
            assert (fit.margin <= largest).all()


def largest_margin(x, signs):
    angles = np.linspace(0, 2 * np.pi, 20_001)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    least = (signs[:, None] * (x @ directions)).min(0).max()
    # Between two of the directions it is larger by the square of their angle.
    return least + np.linalg.norm(x, axis=-1).max() * (angles[1] - angles[0])


def test_bound_in_numbers():
    """R = 3, mu = 1/2, n = 5, step 2: 36 + 2 log 9 / (2 / 4)."""
    bound = lambda **options: float(
        separation_step_bound(
            jnp.asarray(3.0), jnp.asarray(0.5), num_examples=5, **options
        )
    )
    finite = 36 + 4 * np.log(9)
    np.testing.assert_allclose(bound(), 36)
    np.testing.assert_allclose(bound(step_size=2.0), finite, rtol=1e-6)
    np.testing.assert_allclose(bound(normalized=False), 5 * 36)
    found = bound(step_size=2.0, normalized=False)
    np.testing.assert_allclose(found, 10 * finite, rtol=1e-6)
    margins = jnp.asarray([0.0, -1.0, np.nan])
    found = separation_step_bound(jnp.ones(3), margins, num_examples=5)
    np.testing.assert_array_equal(found, [np.inf, np.inf, np.nan])


def test_weights_that_underflow_still_move():
    """After 20 steps of size 1e4 every sigmoid(-m) of float32 but one is 0."""
    x, signs = worst_case(50)
    fit = fits(x.astype(np.float32), signs, step_size=1e4)
    assert fit.separated
    assert fit.coefficients.dtype == jnp.float32


def test_examples_that_do_not_count_may_hold_anything():
    rng = np.random.default_rng(2)
    x, signs = rng.normal(size=(8, 3)), rng.choice([-1.0, 1.0], size=8)
    where = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
    for options in ({}, {"step_size": 2.0, "normalized": False}):
        wanted = fits(x[where], signs[where], max_steps=50, **options)
        poisoned = np.where(where[:, None], x, np.nan), np.where(where, signs, np.nan)
        found = fits(*poisoned, where=where, max_steps=50, **options)
        for own, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4)


def test_no_example_is_separated_and_a_sign_of_another_value_is_nan():
    x = jnp.ones((2, 3))
    fit = fits(x, jnp.ones(2), where=jnp.zeros(2, bool))
    np.testing.assert_array_equal(fit.coefficients, 0)
    assert fit.separated
    assert fit.num_steps == 0
    fit = fits(x, jnp.asarray([1.0, 0.0]))
    assert np.isnan(fit.coefficients).all()
    assert np.isnan(fit.margin)
    assert not fit.separated
    assert np.isnan(fit.step_bound)
    fit = fits(jnp.zeros((2, 3)), jnp.ones(2), max_steps=3)
    assert not fit.separated
    assert fit.margin == -np.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_are_summed_in_float32(dtype):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(6, 4)), dtype)
    signs = jnp.asarray([1, -1, 1, 1, -1, -1])
    narrow, wide = fits(x, signs), fits(x.astype(jnp.float32), signs)
    for own, other in zip(narrow, wide, strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_array_equal(own, other)


def test_forward_mode_follows_the_steps():
    rng = np.random.default_rng(4)
    x, signs = rng.normal(size=(7, 3)), rng.choice([-1.0, 1.0], size=7)
    along = rng.normal(size=x.shape)
    with jax.enable_x64():
        of = lambda x: fits(x, signs, step_size=1.5, max_steps=4).coefficients
        _, slope = jax.jvp(of, (jnp.asarray(x),), (jnp.asarray(along),))
        wanted = (of(x + 1e-6 * along) - of(x - 1e-6 * along)) / 2e-6
        np.testing.assert_allclose(slope, wanted, rtol=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_sgd_on_the_losses_takes_the_same_steps(normalized):
    rng = np.random.default_rng(5)
    x, signs = rng.normal(size=(10, 3)), rng.choice([-1.0, 1.0], size=10)

    def descend(loss, step_size, num_steps):
        optimizer = optax.sgd(step_size)
        theta = jnp.zeros(3)
        state = optimizer.init(theta)
        slope = jax.jit(jax.grad(lambda theta: loss(signs * (x @ theta)).mean()))
        for _ in range(num_steps):
            updates, state = optimizer.update(slope(theta), state)
            theta = optax.apply_updates(theta, updates)
        return theta

    logistic = normalized_logistic_loss if normalized else optax_logistic
    with jax.enable_x64():
        theta = descend(logistic, 0.7, 4)
        wanted = 0.7 * trajectory(x, signs, 0.7, normalized, 4)[-1]
        np.testing.assert_allclose(theta, wanted, rtol=1e-12)
        if normalized:
            loss = lambda margins: perceptron_loss(margins, normalized=True)
            wanted = trajectory(x, signs, np.inf, True, 4)[-1]
            np.testing.assert_allclose(descend(loss, 1.0, 4), wanted, rtol=1e-12)


def optax_logistic(margins):
    return optax.sigmoid_binary_cross_entropy(margins, jnp.ones_like(margins))


@pytest.mark.usefixtures("untyped")
def test_errors():
    x, signs = jnp.ones((4, 2)), jnp.ones(4)
    with pytest.raises(TypeError, match="fit_separator: `x` must have a floating"):
        fit_separator(jnp.ones((4, 2), int), signs)
    with pytest.raises(ValueError, match=r"fit_separator: `signs` must have shape \(4"):
        fit_separator(x, signs[:3])
    with pytest.raises(ValueError, match="fit_separator: `step_size` must be positive"):
        fit_separator(x, signs, step_size=0.0)
    with pytest.raises(ValueError, match="`max_steps` must be at least 1, got 0"):
        fit_separator(x, signs, max_steps=0)
    with pytest.raises(ValueError, match=r"fit_separator: `where` must have shape \(4"):
        fit_separator(x, signs, where=jnp.ones(3, bool))
    bound = separation_step_bound
    with pytest.raises(ValueError, match="bound: `num_examples` must be at least 1"):
        bound(jnp.ones(()), jnp.ones(()), num_examples=0)
    with pytest.raises(ValueError, match=r"bound: `margin` must have shape \(\)"):
        bound(jnp.ones(()), jnp.ones(2), num_examples=1)
