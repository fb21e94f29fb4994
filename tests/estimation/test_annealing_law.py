"""Scaling law with annealing: the areas, the recovery of a law, what is refused."""

import pathlib

import jax
import numpy as np
import pytest
from scipy import optimize

from softlib.estimation import (
    AnnealingAreas,
    AnnealingLaw,
    annealing_areas,
    fit_annealing_law,
)
from tests.host import jnp

CASE = pathlib.Path(__file__).parent.parent / "data" / "lr_annealing_law_case0.npz"
TRUTH = (2.6, 0.45, 1.2, 0.5)

areas_of = jax.jit(annealing_areas, static_argnames="axis")
fit = jax.jit(fit_annealing_law, static_argnames=("huber_delta", "max_steps"))


def areas_step_by_step(rates, decay):
    """The definition, in float64."""
    forward, annealing, momentum, before = 0.0, 0.0, 0.0, rates[0]
    found = []
    for rate in rates:
        momentum = decay * momentum + before - rate
        forward, annealing, before = forward + rate, annealing + momentum, rate
        found.append((forward, annealing))
    return np.array(found).T


def schedules(steps=400, peak=1e-2):
    """Constant, cosine, and warmup-stable-decay."""
    time = np.arange(steps) / steps
    cosine = peak * (0.1 + 0.45 * (1 + np.cos(np.pi * time)))
    decay = peak * np.where(time < 0.7, 1.0, 10.0 ** (-(time - 0.7) / 0.3))
    return np.stack([np.full(steps, peak), cosine, decay])


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_areas_are_those_of_the_definition(decay):
    rates = schedules()
    wanted = np.stack([areas_step_by_step(each, decay) for each in rates], axis=1)
    with jax.enable_x64():
        found = areas_of(rates, decay=decay)
        np.testing.assert_allclose(found.forward, wanted[0], rtol=1e-12)
        np.testing.assert_allclose(found.annealing, wanted[1], rtol=1e-9, atol=1e-15)
    # By the sum over what each step loses: a second derivation.
    falls = np.append(0, -np.diff(rates[1]))
    left = np.arange(400)[:, None] - np.arange(400)[None] + 1
    weights = np.where(left > 0, left, 0.0)
    if decay < 1:
        weights = np.where(
            left > 0, (1 - decay ** np.maximum(left, 0)) / (1 - decay), 0
        )
    np.testing.assert_allclose(wanted[1, 1], weights @ falls, rtol=1e-9, atol=1e-15)


def test_float32_areas_of_a_long_schedule():
    """Term by term the sum of 100,000 rates would be off by 1e-4."""
    rates = np.linspace(1e-3, 1e-5, 100_000).astype(np.float32)
    found = areas_of(rates)
    # Rounded to float32, 0.999 is another decay: 1 / (1 - decay) is off by 1.3e-5.
    wanted = areas_step_by_step(rates.astype(np.float64), float(np.float32(0.999)))
    np.testing.assert_allclose(found.forward, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found.annealing[100:], wanted[1][100:], rtol=1.2e-5)


def test_matches_independent_vectors():
    data = np.load(CASE)
    rates, steps = data["in_lr"], data["in_steps"]
    with jax.enable_x64():
        areas = jax.tree.map(lambda each: each[:, steps], areas_of(rates))
        np.testing.assert_allclose(areas.forward, data["out_S1"], rtol=1e-12)
        np.testing.assert_allclose(areas.annealing, data["out_S2"], atol=1e-13)
        law = AnnealingLaw(*data["in_params_L0_A_C_alpha"])
        losses = law.loss(areas)
        np.testing.assert_allclose(losses, data["out_loss"], rtol=1e-12)
        found = fit(*areas, losses)
        np.testing.assert_allclose(found.law, law, rtol=1e-6)
        assert found.converged
        assert found.mean_absolute_error < 1e-8
        # The objective by its definition, at another law.
        other = law._replace(floor=1.01 * law.floor)
        residual = np.abs(np.log(other.loss(areas)) - np.log(losses))
        huber = np.where(residual < 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4))
        np.testing.assert_allclose(
            huber.sum(), data["out_objective_perturbed"], rtol=1e-9
        )


def curves(seed, noise):
    areas = areas_step_by_step(schedules()[2], 0.97)[:, 20::10]
    forward, annealing = areas
    floor, scale, gain, exponent = TRUTH
    losses = (
        floor + scale * forward**-exponent - 0.02 * gain / annealing.max() * (annealing)
    )
    rng = np.random.default_rng(seed)
    return forward, annealing, losses * np.exp(noise * rng.normal(size=losses.shape))


def objective(logs, forward, annealing, losses):
    floor, scale, gain, exponent = np.exp(logs)
    predicted = floor + scale * forward**-exponent - gain * annealing
    if (predicted <= 0).any():
        return np.inf
    size = np.abs(np.log(predicted / losses))
    return np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_no_minimum_that_scipy_finds_is_lower(seed):
    data = curves(seed, 2e-3)
    with jax.enable_x64():
        found = jax.tree.map(np.asarray, fit(*data))
    assert found.converged
    own = np.log(np.array(found.law))
    np.testing.assert_allclose(objective(own, *data), found.objective, rtol=1e-9)
    for exponent in (0.2, 0.8):
        start = np.log([2.5, 0.5, 0.5, exponent])
        other = optimize.minimize(objective, start, data, "Nelder-Mead")
        assert found.objective <= other.fun * (1 + 1e-9)


def test_float32_fits_as_well():
    data = [each.astype(np.float32) for each in curves(0, 2e-3)]
    with jax.enable_x64():
        wide = fit(*(each.astype(np.float64) for each in data))
    found = fit(*data)
    assert found.law.floor.dtype == jnp.float32
    np.testing.assert_allclose(found.objective, wide.objective, rtol=1e-3)
    narrow = fit(*(jnp.asarray(each, jnp.bfloat16) for each in data))
    assert narrow.objective.dtype == jnp.float32
    assert np.isfinite(narrow.objective)


def test_points_that_do_not_count_change_nothing():
    forward, annealing, losses = curves(1, 2e-3)
    where = np.arange(len(losses)) % 3 > 0
    spoiled = [
        np.where(where, each, bad)
        for each, bad in ((forward, 0.1), (annealing, np.nan), (losses, -1.0))
    ]
    with jax.enable_x64():
        found = fit(*spoiled, where=where)
        # A point before the first step is left out by itself.
        spoiled[0] = np.where(where, forward, 0)
        by_itself = fit(*spoiled)
        wanted = fit(forward[where], annealing[where], losses[where])
    np.testing.assert_allclose(found.objective, wanted.objective, rtol=1e-8)
    np.testing.assert_allclose(by_itself.law, found.law)


def test_a_constant_rate_leaves_the_gain_open():
    forward = np.arange(1, 30) * 0.1
    losses = 2 + 0.5 * forward**-0.6
    with jax.enable_x64():
        found = fit(forward, np.zeros(29), losses)
    assert found.converged
    np.testing.assert_allclose(found.law[0], 2, rtol=1e-4)
    assert np.isfinite(found.law.gain)


def test_vmap_fits_one_curve_each():
    many = [
        np.stack(each) for each in zip(*(curves(s, 2e-3) for s in (0, 1)), strict=True)
    ]
    with jax.enable_x64():
        found = jax.jit(jax.vmap(fit_annealing_law))(*many)
        for k in range(2):
            alone = fit(*(each[k] for each in many))
            np.testing.assert_allclose(found.objective[k], alone.objective, rtol=1e-7)


def test_bad_values_give_nan():
    forward, annealing, losses = curves(0, 0.0)
    for bad in (np.nan, -1.0):
        spoiled = np.append(losses[:-1], bad)
        assert np.isnan(fit(forward, annealing, spoiled).law).all()
    nothing = fit(forward, annealing, losses, where=np.zeros(len(losses), bool))
    assert np.isnan(nothing.law).all()
    law = AnnealingLaw(*map(jnp.asarray, TRUTH))
    early = law.loss(AnnealingAreas(jnp.zeros(1), jnp.zeros(1)))
    np.testing.assert_array_equal(early, np.inf)


def test_derivative_of_the_areas():
    rates = schedules(20)[1]
    with jax.enable_x64():
        total = lambda rates: (areas_of(rates, decay=0.9).annealing ** 2).sum()
        slope = jax.grad(total)(jnp.asarray(rates))
        step = np.eye(20)[7] * 1e-7
        wanted = (total(rates + step) - total(rates - step)) / 2e-7
        np.testing.assert_allclose(slope[7], wanted, rtol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_errors():
    ones = jnp.ones(5)
    with pytest.raises(TypeError, match="annealing_areas: `learning_rates` must have"):
        annealing_areas(jnp.ones(5, int))
    with pytest.raises(ValueError, match=r"annealing_areas: `decay` must be in \[0, 1"):
        annealing_areas(ones, decay=1.5)
    with pytest.raises(ValueError, match="annealing_areas: `axis` must hold axes"):
        annealing_areas(ones, axis=1)
    with pytest.raises(ValueError, match="fit_annealing_law: `losses` must have"):
        fit_annealing_law(ones, ones, jnp.ones(4))
    with pytest.raises(ValueError, match="`huber_delta` must be positive"):
        fit_annealing_law(ones, ones, ones, huber_delta=0.0)
