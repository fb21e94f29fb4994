"""Halfspaces from noisy signs: the descent, and what the tester accepts."""

import itertools
import math
import pathlib

import jax
import numpy as np
import pytest
from scipy import special, stats

from softlib.estimation import fit_halfspace, halfspace_tester, strip_statistics
from softlib.losses import smoothed_zero_one_loss
from softlib.testing import check_transformations
from tests.compiled import estimation
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
CASE = DATA / "halfspace_tester_learner_case0.npz"
fits = jax.jit(fit_halfspace, static_argnames=("widths", "steps_per_width"))


def noisy(seed, count=4000, features=6, noise=0.1):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=features)
    x = rng.normal(size=(count, features)).astype("f4")
    signs = np.where((x @ truth > 0) ^ (rng.random(count) < noise), 1, -1)
    return x, signs, truth / np.linalg.norm(truth)


def surrogate(w, x, signs, width):
    """The mean smoothed error of a direction of any length."""
    margins = signs * (x @ (w / np.linalg.norm(w)))
    return special.expit(-margins / width).mean()


def test_matches_independent_vectors():
    data = np.load(CASE)
    w, x, signs = data["in_w"], data["in_x"], data["in_y"]
    width = float(data["in_width"])

    def loss(w):
        margins = signs * jnp.matmul(x, w / jnp.linalg.norm(w))
        return smoothed_zero_one_loss(margins, width=width).mean()

    with jax.enable_x64():
        value, slope = jax.value_and_grad(loss)(jnp.asarray(w))
        np.testing.assert_allclose(value, data["out_surrogate"], rtol=1e-12)
        np.testing.assert_allclose(slope, data["out_grad"], rtol=1e-9, atol=1e-13)
        strip = estimation.strip_statistics(x, w, width=0.5)
        np.testing.assert_allclose(strip[:3], data["out_strip"], rtol=1e-11)
        moments = estimation.gaussian_moment_deviations(x, degree=4)
        np.testing.assert_allclose(moments, data["out_moments"], rtol=1e-11)


def test_the_loss_is_a_smooth_step():
    margins = jnp.asarray([-np.inf, -9.0, -0.1, 0.0, 0.3, np.inf])
    with jax.enable_x64():
        wide = margins.astype("float64")
        found = smoothed_zero_one_loss(wide, width=0.1)
        wanted = special.expit(-np.asarray(wide) / 0.1)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    slopes = jax.grad(
        lambda m, s: smoothed_zero_one_loss(m, width=s).sum(), argnums=(0, 1)
    )(margins, jnp.float32(0.1))
    assert all(np.isfinite(each).all() for each in slopes)
    where = jnp.asarray([True, False])
    found = smoothed_zero_one_loss(jnp.asarray([0.0, np.nan]), width=0.1, where=where)
    np.testing.assert_array_equal(found, [0.5, 0])
    # The width goes to 0: the error itself.
    found = smoothed_zero_one_loss(jnp.asarray([-1e-3, 1e-3]), width=1e-6)
    np.testing.assert_array_equal(found, [1, 0])


def test_the_loss_under_transformations():
    margins = np.random.default_rng(0).normal(size=8).astype("f4")
    check_transformations(
        lambda m, s: smoothed_zero_one_loss(m, width=s), margins, jnp.float32(0.7)
    )


def test_descent_ends_at_a_stationary_point_near_the_truth():
    """Random halfspaces in random noise: nearer than the mean it began with."""
    for seed, noise in enumerate((0.0, 0.1, 0.2)):
        x, signs, truth = noisy(seed, noise=noise)
        fit = fits(x, signs)
        both = np.stack([fit.direction, fit.initial]) @ truth
        found, before = np.arccos(np.clip(both, -1, 1)) / math.pi
        assert found < 0.02
        assert found < before
        assert fit.gradient_norm < 0.01
        np.testing.assert_allclose(np.linalg.norm(fit.direction), 1, rtol=1e-6)
        np.testing.assert_allclose(
            fit.loss, surrogate(np.asarray(fit.direction), x, signs, 0.05), rtol=1e-4
        )
        wrong = np.sign(x @ np.asarray(fit.direction)) != signs
        np.testing.assert_allclose(fit.error, wrong.mean(), atol=1e-6)


def test_a_step_is_the_gradient_on_the_sphere():
    x, signs, _ = noisy(3, 50, 3)
    with jax.enable_x64():
        x, start = x.astype(float), np.array([1.0, 1.0, 0.0])
        options = {"widths": (0.4,), "steps_per_width": 1}
        fit = fits(x, signs, initial=start, step_size=0.5, **options)
        u = start / np.sqrt(2)
        slope = np.array(
            [
                (surrogate(u + h, x, signs, 0.4) - surrogate(u - h, x, signs, 0.4))
                / 2e-6
                for h in 1e-6 * np.eye(3)
            ]
        )
        moved = u - 0.5 * 0.4 * np.array(slope)
        np.testing.assert_allclose(
            fit.direction, moved / np.linalg.norm(moved), atol=1e-8
        )


def test_examples_that_do_not_count_and_bad_values():
    x, signs, _ = noisy(4, 60)
    where = np.arange(60) % 4 > 0
    wanted = fits(x[where], signs[where], steps_per_width=20)
    poisoned = np.where(where[:, None], x, np.nan), np.where(where, signs, 0)
    found = fits(*poisoned, where=where, steps_per_width=20)
    np.testing.assert_allclose(found.direction, wanted.direction, atol=1e-5)
    assert np.isnan(fits(*poisoned, steps_per_width=20).direction).all()
    none = fits(*poisoned, where=np.zeros(60, bool), steps_per_width=20)
    np.testing.assert_array_equal(none.direction, 0)
    np.testing.assert_array_equal(none.error, 0)
    u, v = np.eye(6, dtype="f4")[:2]
    strip = estimation.strip_statistics(poisoned[0], u, width=0.5, where=where)
    alone = estimation.strip_statistics(x[where], u, width=0.5)
    np.testing.assert_allclose(strip, alone, rtol=1e-5)
    far = estimation.strip_statistics(x + 100, u, width=0.5)
    np.testing.assert_array_equal(far, 0)
    for sample, keep in ((x, np.zeros(60, bool)), (poisoned[0], np.ones(60, bool))):
        assert not estimation.halfspace_tester(sample, u, v, where=keep).accepted
    assert np.isnan(estimation.strip_statistics(x, 0 * u, width=0.5).mass_ratio)


def test_strips_and_disagreement_do_not_depend_on_rotations():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 4))
    with jax.enable_x64():
        for _ in range(4):
            turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
            u, v = rng.normal(size=(2, 4))
            plain = estimation.strip_statistics(x, u, width=0.7)
            turned = estimation.strip_statistics(x @ turn, 3 * u @ turn, width=0.7)
            np.testing.assert_allclose(plain, turned, rtol=1e-10)
            # By its definition.
            unit = u / np.linalg.norm(u)
            near = x[abs(x @ unit) <= 0.7]
            rest = near - np.outer(near @ unit, unit)
            values = np.linalg.eigvalsh(rest.T @ rest / len(near))
            np.testing.assert_allclose(plain[1:3], values[[1, 3]], rtol=1e-10)
            share, angle = estimation.halfspace_disagreement(x, u, v)
            np.testing.assert_allclose(share, (np.sign(x @ u) != np.sign(x @ v)).mean())
            cosine = unit @ v / np.linalg.norm(v)
            np.testing.assert_allclose(angle, np.arccos(cosine) / math.pi, rtol=1e-9)
        share, angle = estimation.halfspace_disagreement(x, u, u * (1 + 1e-12))
        np.testing.assert_allclose([share, angle], 0, atol=1e-12)


def test_mixed_moments_oracle():
    """All monomials one by one."""
    x = np.random.default_rng(6).normal(size=(50, 3))
    factorial = lambda k: 0 if k % 2 else math.prod(range(k - 1, 0, -2))
    wanted = []
    for k in range(1, 6):
        off = []
        for chosen in itertools.combinations_with_replacement(range(3), k):
            powers = np.bincount(chosen, minlength=3)
            normal = math.prod(factorial(p) for p in powers)
            off.append(abs((x**powers).prod(1).mean() - normal))
        wanted.append(max(off))
    with jax.enable_x64():
        found = estimation.gaussian_moment_deviations(x, degree=5, mixed=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-11)


LAWS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "Laplace": lambda rng, size: rng.laplace(scale=0.5**0.5, size=size),
    "cube": lambda rng, size: rng.uniform(-(3**0.5), 3**0.5, size=size),
}


@pytest.mark.parametrize("law", LAWS)
def test_the_tester_accepts_the_normal_law_alone(law):
    """Of 40 samples of 2,000, with the directions that the learner found on others."""
    rng = np.random.default_rng(7)
    tester = jax.jit(jax.vmap(lambda x, u, v: halfspace_tester(x, u, v)))
    u = rng.normal(size=(40, 5))
    v = u + 0.3 * rng.normal(size=(40, 5))
    x = LAWS[law](rng, (40, 2000, 5)).astype("f4")
    found = tester(x, u.astype("f4"), v.astype("f4"))
    rate = np.mean(found.accepted)
    if law == "normal":
        assert stats.binomtest(int(rate * 40), 40, 0.95).pvalue > 0.01 or rate > 0.95
    else:
        assert rate == 0


@pytest.mark.usefixtures("untyped")
def test_errors():
    x, signs, u = jnp.ones((4, 3)), jnp.ones(4), jnp.ones(3)
    with pytest.raises(TypeError, match="fit_halfspace: `x` must have a floating"):
        fit_halfspace(x.astype(int), signs)
    with pytest.raises(ValueError, match=r"`signs` must have shape \(4,\)"):
        fit_halfspace(x, signs[:2])
    with pytest.raises(ValueError, match="`widths` must be positive and finite, got 0"):
        fit_halfspace(x, signs, widths=(0.1, 0.0))
    with pytest.raises(ValueError, match="`widths` must hold at least one number"):
        fit_halfspace(x, signs, widths=())
    with pytest.raises(ValueError, match=r"`direction` must have shape \(3,\)"):
        strip_statistics(x, u[:2], width=0.1)
    with pytest.raises(ValueError, match="`width` must be positive"):
        strip_statistics(x, u, width=-1.0)
    with pytest.raises(ValueError, match="`x` must have at least 2 columns, got 1"):
        strip_statistics(x[:, :1], u[:1], width=0.1)
    with pytest.raises(ValueError, match="`failure_probability` must be finite and be"):
        halfspace_tester(x, u, u, failure_probability=1.0)
    with pytest.raises(ValueError, match="`degree` must be at least 1, got 0"):
        halfspace_tester(x, u, u, degree=0)
