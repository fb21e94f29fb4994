"""The smooth adversarial comp-sum loss."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib.logits import StoredLogits
from softlib.losses import (
    comp_sum_loss,
    smooth_adversarial_comp_sum_loss,
)
from softlib.testing import assert_close, check_transformations
from tests.heads import of_stored
from tests.host import jnp
from tests.losses.problems import assert_agrees
from tests.oracles.label_losses import smooth_adversarial

CASE = pathlib.Path(__file__).parent.parent / "data" / "comp_sum_losses_case0.npz"
ROWS, CLASSES = 8, 5


def phi(u, tau):
    return math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def arrays(dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    clean = jnp.asarray(random.normal(size=(ROWS, CLASSES)), dtype)
    moved = clean + jnp.asarray(0.3 * random.normal(size=clean.shape), dtype)
    return clean, moved, jnp.arange(ROWS) % CLASSES


run = jax.jit(of_stored.smooth_adversarial_comp_sum_loss)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("excluded", [False, True])
def test_matches_the_definition(dtype, excluded):
    with jax.enable_x64(dtype == "float64"):
        clean, moved, labels = arrays(dtype)
        where = np.ones(CLASSES, bool)
        if excluded:
            where[3], labels = False, jnp.where(labels == 3, 0, labels)
        computed = jnp.promote_types(dtype, jnp.float32)
        for tau in (0.0, 1.0, 1.7):
            found = run(
                clean,
                moved,
                labels,
                tau=jnp.asarray(tau, computed),
                rho=jnp.asarray(0.8, computed),
                nu=jnp.asarray(1.5, computed),
                class_where=jnp.asarray(where),
            )
            exact = [np.asarray(z, np.float64)[:, where] for z in (clean, moved)]
            places = np.searchsorted(np.flatnonzero(where), labels)
            wanted = smooth_adversarial(exact[0], exact[1], places, tau, 0.8, 1.5)
            assert found.dtype == computed
            assert_close(found, wanted, dtype=computed, length=CLASSES)


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(CASE)
        names = ("logits", "logits_adversarial", "labels")
        given = [jnp.asarray(data[f"in_{name}"]) for name in names]
        for tau in (0.0, 1.0):
            found = run(*given, tau=tau, rho=data["in_rho"], nu=data["in_nu"])
            wanted = data[f"out_smooth_adversarial_tau{tau:.0f}"]
            assert_agrees(found, wanted, jnp.float64, 0)


def test_a_shift_of_all_logits_is_no_attack():
    clean, moved, labels = arrays()
    loss = run(clean, moved, labels, rho=0.5, nu=2.0)
    shifted = run(clean - 3, moved + 5, labels, rho=0.5, nu=2.0)
    assert_close(shifted, loss, dtype=jnp.float32, length=CLASSES)
    found = run(clean, clean + 1, labels, rho=0.5, nu=2.0)
    plain = jax.jit(of_stored.comp_sum_loss)(clean, labels, temperature=0.5)
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_without_an_attack_the_norm_has_gradient_zero():
    """The derivative of a norm at 0 is 0 / 0."""
    clean, _, labels = arrays()

    @jax.jit
    def gradients(clean, moved, rho):
        total = lambda clean, moved: run(clean, moved, labels, rho=rho).sum()
        plain = lambda z: comp_sum_loss(z, labels).sum()
        return *jax.grad(total, (0, 1))(clean, moved), jax.grad(plain)(clean)

    of_clean, of_moved, wanted = gradients(clean, clean, 1.0)
    np.testing.assert_array_equal(of_moved, 0)
    assert_close(of_clean, wanted, dtype=jnp.float32, length=CLASSES)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_it_bounds_the_adversarial_margin_loss(tau):
    """Of linear models in the plane, over a grid of the ball, for the paper's nu."""
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    grid = np.concatenate([r * circle for r in (0.25, 0.5, 0.75, 1.0)])
    tightest = np.inf
    for n in (2, 3, 4):
        for _ in range(20):
            weight = random.normal(size=(n, 2))
            x, y, rho = random.normal(size=2), 0, random.uniform(0.3, 2)
            radius = random.uniform(0.05, 1)
            clean, moved = weight @ x, (x + radius * grid) @ weight.T
            margins = moved[:, [y]] - moved[:, 1:]
            cut = np.clip(1 - margins / rho, 0, 1).sum(1)
            worst = max(phi(u, tau) for u in cut)
            change = np.linalg.norm(margins - (clean[y] - clean[1:]), axis=1)
            adversary = moved[change.argmax()]
            found = run(
                *(jnp.asarray(z[None], jnp.float32) for z in (clean, adversary)),
                jnp.array([y]),
                tau=tau,
                rho=rho,
                nu=math.sqrt(n - 1) / rho,
            )
            assert found[0] >= worst - 1e-5
            tightest = min(tightest, float(found[0]) - worst)
    assert tightest < 0.5


def test_exceptions_in_their_order():
    """A masked row with NaN, a bad label, an excluded label; gradients stay finite."""
    clean, moved, _ = arrays()
    clean = clean.at[0].set(jnp.nan)
    labels = jnp.array([-1, -1, 3, CLASSES, 0, 1, 2, 4])
    where, class_where = jnp.arange(ROWS) != 0, jnp.arange(CLASSES) != 3

    @jax.jit
    def run(clean, moved, nu):
        loss, pull = jax.vjp(
            lambda *a: smooth_adversarial_comp_sum_loss(
                StoredLogits(a[0], class_where=class_where),
                StoredLogits(a[1], class_where=class_where),
                labels,
                nu=a[2],
                where=where,
            ),
            clean,
            moved,
            nu,
        )
        return loss, pull(jnp.ones(ROWS))

    loss, gradients = run(clean, moved, jnp.float32(0.5))
    np.testing.assert_array_equal(np.isnan(loss), [0, 1, 0, 1, 0, 0, 0, 0])
    assert loss[0] == 0
    assert loss[2] == jnp.inf
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients[0][:4], 0)
    np.testing.assert_array_equal(gradients[1][:4], 0)


@pytest.mark.slow
def test_loss_under_every_transformation():
    clean, moved, labels = arrays()

    def function(clean, moved, tau, rho, nu):
        return smooth_adversarial_comp_sum_loss(
            clean, moved, labels[: clean.shape[0]], tau=tau, rho=rho, nu=nu
        )

    skip = dict.fromkeys(("shard_map", "sharded_jit"), "labels are closed over")
    skip["forward_mode"] = "the statistics have a custom_vjp"
    skip["vmap"] = "labels are closed over"
    scalars = (jnp.float32(0.3), jnp.float32(0.8), jnp.float32(1.5))
    check_transformations(function, clean, moved, *scalars, rows=(0, 1), skip=skip)


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rho": 0.0}, ValueError, "`rho` must be positive and finite, got 0"),
        ({"nu": -1}, ValueError, "`nu` must be >= 0, got -1"),
        ({"tau": -1}, ValueError, "`tau` must be >= 0, got -1"),
        (
            {"logits": StoredLogits(jnp.ones((ROWS, CLASSES)), temperature=2.0)},
            ValueError,
            "`temperature` of the logits must be None",
        ),
        (
            {"adversarial_logits": jnp.ones((ROWS, 2))},
            ValueError,
            r"`adversarial_logits` must have shape \(8, 5\)",
        ),
        ({"labels": jnp.ones(ROWS)}, TypeError, "`labels` must have an integer"),
    ],
)
def test_errors_of_the_loss(change, error, message):
    names = ("logits", "adversarial_logits", "labels")
    given: dict[str, Any] = dict(zip(names, arrays(), strict=True))
    with pytest.raises(error, match=f"^smooth_adversarial_comp_sum_loss: {message}"):
        smooth_adversarial_comp_sum_loss(**{**given, **change})
