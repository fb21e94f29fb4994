"""The guarantee of comp-sum losses: its formula, its inverse, and that it holds."""

import decimal
import functools
import pathlib

import jax
import numpy as np
import pytest

from softlib.estimation import (
    comp_sum_regret_bound,
    comp_sum_transformation,
)
from tests.host import jnp

CASE = pathlib.Path(__file__).parent.parent / "data" / "comp_sum_losses_case0.npz"
TAUS = (0.0, 0.3, 0.7, 1 - 2.0**-12, 1.0, 1 + 2.0**-20, 1.3, 1.6, 1.95, 2.0, 2.5)
BETAS = (1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0)

compiled = jax.jit(comp_sum_transformation, static_argnames="num_classes")
inverse = jax.jit(comp_sum_regret_bound, static_argnames="num_classes")


def exact(beta, tau, classes):
    """The formula with its powers, to 60 digits."""
    with decimal.localcontext(prec=60):
        b, tau = decimal.Decimal(beta), decimal.Decimal(tau)
        n = decimal.Decimal(classes)
        power = lambda x, y: (y * x.ln()).exp() if x > 0 else decimal.Decimal(0)
        if tau >= 2:
            return b / ((tau - 1) * power(n, tau - 1))
        if tau == 1:
            term = lambda x: x / 2 * x.ln() if x > 0 else decimal.Decimal(0)
            return term(1 + b) + term(1 - b)
        d = 2 - tau
        a = power((power(1 + b, 1 / d) + power(1 - b, 1 / d)) / 2, d)
        if tau < 1:
            return power(decimal.Decimal(2), 1 - tau) / (1 - tau) * (1 - a)
        return (a - 1) / ((tau - 1) * power(n, tau - 1))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_transformation_is_accurate_for_every_tau_and_beta(dtype):
    """1 - a at beta = 1e-3 would be 5e-7 with an error of 6e-8 in float32."""
    with jax.enable_x64(dtype == "float64"):
        beta = jnp.asarray(BETAS, dtype)
        computed = jnp.promote_types(dtype, jnp.float32)
        for tau in TAUS:
            found = compiled(beta, tau=jnp.asarray(tau, computed), num_classes=7)
            assert found.dtype == computed
            rounded = float(jnp.asarray(tau, computed))
            wanted = [float(exact(float(b), rounded, 7)) for b in beta]
            # Near tau = 2 the argument beta / (2 - tau) has an error of 20 eps.
            rtol = 40 * float(jnp.finfo(computed).eps)
            np.testing.assert_allclose(found, wanted, rtol=rtol, err_msg=str(tau))


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(CASE)
        beta = jnp.asarray(data["in_beta"])
        for tau, wanted in zip(data["in_tau"], data["out_transformation"], strict=True):
            found = compiled(beta, tau=tau, num_classes=7)
            # The vectors lose digits in powers.
            np.testing.assert_allclose(found, wanted, rtol=1e-11)


def test_bound_is_the_inverse():
    beta = jnp.asarray([0.0, *BETAS])
    for tau in TAUS:
        regret = compiled(beta, tau=tau, num_classes=7)
        found = inverse(regret, tau=tau, num_classes=7)
        np.testing.assert_allclose(found[1:-2], beta[1:-2], rtol=1e-5)
        # The inverse is flat at 1: T' is infinite there.
        np.testing.assert_allclose(found[-2:], beta[-2:], rtol=1e-3)
        assert found[0] == 0
        above = inverse(regret[-1:] * 1.01, tau=tau, num_classes=7)
        np.testing.assert_array_equal(above, 1)


def test_cross_entropy_does_not_depend_on_the_number_of_classes_but_others_do():
    regret = jnp.array([1e-4])

    @functools.cache
    def bounds(n):
        of = lambda tau: comp_sum_regret_bound(regret, tau=tau, num_classes=n)[0]
        return jax.jit(lambda: jax.lax.map(of, jnp.array([0.0, 1.0, 1.5, 2.0])))()

    bound = lambda tau, n: float(bounds(n)[[0.0, 1.0, 1.5, 2.0].index(tau)])
    assert bound(1.0, 10) == bound(1.0, 1000)
    np.testing.assert_allclose(bound(1.0, 10), np.sqrt(2e-4), rtol=1e-4)
    np.testing.assert_allclose(bound(2.0, 1000), 0.1, rtol=1e-5)
    assert bound(1.5, 10) < bound(1.5, 1000)
    assert bound(0.0, 10) <= np.sqrt(2 * 1e-4) * 1.001


def losses_of(z, tau):
    """Comp-sum losses of each row for each label, in float64."""
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    return -log_p if tau == 1 else np.expm1((tau - 1) * log_p) / (1 - tau)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
def test_no_distribution_violates_the_bound(tau):
    """Pointwise excess loss against T of the excess error, and it is tight."""
    random = np.random.default_rng(0)
    slack, count = np.inf, 3000
    for n in (2, 3):
        p = random.dirichlet(np.ones(n), count)
        # The best scores: softmax proportional to p^(1 / (2 - tau)), or the one class.
        best = np.log(p) / max(2 - tau, 0.05)
        z = best + random.normal(size=p.shape) * random.uniform(0, 3, (count, 1))
        if tau < 2:
            least = (p * losses_of(best, tau)).sum(1)
        else:
            least = (1 - p.max(1)) / (tau - 1)
        regret = (p * losses_of(z, tau)).sum(1) - least
        error = p.max(1) - p[np.arange(count), z.argmax(1)]
        with jax.enable_x64():
            found = np.asarray(compiled(jnp.asarray(error), tau=tau, num_classes=n))
        assert (regret >= found - 1e-12).all()
        slack = min(slack, (regret - found)[error > 0.02].min())
    assert slack < 0.05


def test_derivatives():
    """Of the transformation in beta and tau, of the bound 1 / T'."""
    with jax.enable_x64():
        beta = np.array([0.05, 0.4, 0.8])

        @jax.jit
        def of_beta(beta):
            call = lambda b: comp_sum_transformation(b, tau=1.5, num_classes=5)
            return call(beta), jax.grad(lambda b: call(b).sum())(beta)

        regret, slope = of_beta(jnp.asarray(beta))
        wanted = differences(lambda b: of_beta(b)[0], beta, 1e-6)
        np.testing.assert_allclose(slope, wanted, rtol=1e-7)

        @jax.jit
        def bound(regret):
            call = lambda r: comp_sum_regret_bound(r, tau=1.5, num_classes=5)
            return jax.grad(lambda r: call(r).sum())(regret)

        np.testing.assert_allclose(bound(regret), 1 / slope, rtol=1e-6)
        np.testing.assert_array_equal(bound(jnp.array([0.0, 3.0, 3.0])), 0)

        @jax.jit
        def of_tau(tau):
            call = lambda t: comp_sum_transformation(
                jnp.array([0.4]), tau=t, num_classes=5
            )
            return jax.jvp(call, (tau,), (jnp.ones(()),))

        for tau in (0.4, 0.9999, 1.7, 2.2):
            _, slope = of_tau(tau)
            wanted = differences(lambda t: of_tau(t)[0], tau, 1e-6)
            np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-5)


def differences(function, point, step):
    """The derivative of each element by its own, from both sides."""
    above, below = (np.asarray(function(point + s)) for s in (step, -step))
    return (above - below) / (2 * step)


def test_what_is_no_error_rate_and_no_regret_is_nan():
    found = compiled(jnp.array([-0.1, 1.1, 0.5, jnp.nan]), tau=1.0, num_classes=3)
    np.testing.assert_array_equal(np.isnan(found), [1, 1, 0, 1])
    found = inverse(jnp.array([-1e-9, jnp.nan, jnp.inf]), tau=1.0, num_classes=3)
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("function", [comp_sum_transformation, comp_sum_regret_bound])
def test_errors(function):
    good = jnp.ones(2)
    with pytest.raises(TypeError, match="must have a floating dtype, got int32"):
        function(jnp.ones(2, int), tau=1.0, num_classes=3)
    with pytest.raises(ValueError, match="`tau` must be >= 0, got -1"):
        function(good, tau=-1, num_classes=3)
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        function(good, tau=1.0, num_classes=1)
    with pytest.raises(TypeError, match="`num_classes` must be a Python int"):
        function(good, tau=1.0, num_classes=2.5)
