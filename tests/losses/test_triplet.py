"""Batches of neighbours, whose labels are hard negatives of each other."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.losses.problems import assert_agrees
from tests.oracles import extreme as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"


def problem(rows=7, columns=9, seed=0):
    random = np.random.default_rng(seed)
    similarity = random.uniform(-1, 1, (rows, columns))
    positives = random.uniform(size=(rows, columns)) < 0.3
    positives |= np.eye(rows, columns, dtype=bool)
    positives[0, 1:] = True  # no negatives
    positives[1, 3:] = True  # fewer than k
    return similarity, positives


# ---------------------------------------------------------------------------- the loss
def test_matches_independent_vectors():
    data = np.load(DATA / "ngame_case0.npz")
    with jax.enable_x64():
        call = functools.partial(
            losses.in_batch_triplet_loss,
            jnp.asarray(data["in_similarity"]),
            jnp.asarray(data["in_positives"]),
            margin=float(data["in_margin"]),
            num_negatives=int(data["in_k"]),
        )
        assert_agrees(call(), data["out_loss_mean"], jnp.float64, 0)
        weighted = call(weight_temperature=float(data["in_tau"]))
        assert_agrees(weighted, data["out_loss_weighted"], jnp.float64, 0)


@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_oracle(tau, dtype):
    with jax.enable_x64(dtype == "float64"):
        similarity, positives = problem()
        s = jnp.asarray(similarity, dtype)
        loss = jax.jit(
            lambda s: losses.in_batch_triplet_loss(
                s, jnp.asarray(positives), num_negatives=4, weight_temperature=tau
            )
        )(s)
        wanted = oracle.triplet(np.asarray(s, np.float64), positives, 0.3, 4, tau)
        assert loss.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        assert loss[0] == 0  # no negatives
        # exp of s / tau has ten times the error of s
        assert_close(loss, wanted, dtype=loss.dtype, length=9, c=16)


@pytest.mark.parametrize("tau", [None, 0.1])
def test_dropped_rows_are_zero_and_nan_stays_in_its_row(tau):
    similarity, positives = problem()
    s = jnp.asarray(similarity, jnp.float32)
    s = s.at[2].set(jnp.nan).at[4].set(jnp.nan)
    where = jnp.arange(7) != 4

    @jax.jit
    def run(s):
        call = lambda s: losses.in_batch_triplet_loss(
            s, jnp.asarray(positives), weight_temperature=tau, where=where
        )
        return call(s), jax.grad(lambda s: call(s).sum())(s)

    loss, gradient = run(s)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(7) == 2)
    assert loss[4] == 0
    np.testing.assert_array_equal(gradient[4], 0)
    assert np.isfinite(np.delete(gradient, 2, axis=0)).all()


def test_a_margin_that_is_kept_costs_nothing_and_false_negatives_are_not_pushed():
    s = jnp.asarray([[0.9, 0.5, 0.95], [0.0, 0.2, 0.1], [0.0, 0.0, 1.0]])
    positives = jnp.eye(3, dtype=bool).at[0, 2].set(True)
    call = lambda s: losses.in_batch_triplet_loss(s, positives, margin=0.3)
    loss, gradient = call(s), jax.grad(lambda s: call(s).sum())(s)
    np.testing.assert_allclose(loss, [0, (0.1 + 0.2) / 2, 0], atol=1e-6)
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1], [0.5, -1, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("tau", [None, 0.1])
def test_loss_under_every_transformation(tau):
    similarity, positives = problem()
    check_transformations(
        lambda s: losses.in_batch_triplet_loss(
            s, jnp.asarray(positives), weight_temperature=tau
        ),
        jnp.asarray(similarity, jnp.float32),
        rows=(),
        skip={
            "shard_map": "each row has a column of its own",
            "sharded_jit": "each row has a column of its own",
        },
    )


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"similarity": jnp.ones((3, 2))}, ValueError, "`similarity` must have shape"),
        (
            {"similarity": jnp.ones((2, 2), int)},
            TypeError,
            "`similarity` must have a f",
        ),
        ({"positives": jnp.eye(2)}, TypeError, "`positives` must have dtype bool"),
        ({"num_negatives": 0}, ValueError, "`num_negatives` must be at least 1, got 0"),
        ({"margin": -1.0}, ValueError, "`margin` must be >= 0, got -1.0"),
        ({"weight_temperature": 0.0}, ValueError, "`weight_temperature` must be posi"),
        ({"weight_temperature": jnp.ones(2)}, ValueError, "`weight_temperature` must"),
    ],
)
def test_wrong_arguments_of_the_loss_are_named(changed, error, message):
    arguments = {"similarity": jnp.eye(2), "positives": jnp.eye(2, dtype=bool)}
    with pytest.raises(error, match=f"in_batch_triplet_loss: {message}"):
        losses.in_batch_triplet_loss(**(arguments | changed))
