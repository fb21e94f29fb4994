"""Batches of neighbours, whose labels are hard negatives of each other."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import losses
from softlib.numerics import balanced_kmeans
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


# ----------------------------------------------------------------------------- batches
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (5, 2), (4, 4), (7, 3)]),
    batch_size=st.sampled_from([1, 3, 8]),
)
def test_batches_hold_each_point_once_in_whole_clusters(seed, shape, batch_size):
    number, size = shape
    random = np.random.default_rng(seed)
    clusters = np.arange(number * size).reshape(shape)
    clusters[random.uniform(size=number) < 0.5, -1] = -1
    batches = _batches(jnp.asarray(clusters), jax.random.key(seed), batch_size)
    flat = np.asarray(batches).reshape(-1)
    points = flat[flat >= 0]
    assert batches.shape[1] == batch_size
    assert sorted(points) == sorted(clusters[clusters >= 0])
    assert (flat[len(points) :] == -1).all()
    place = {point: i for i, point in enumerate(points)}
    for cluster in clusters:
        members = [place[point] for point in cluster if point >= 0]
        assert (
            members == list(range(members[0], members[0] + len(members)))
            if (members)
            else True
        )


_batches = jax.jit(
    lambda clusters, key, size: losses.ngame_batches(
        clusters, batch_size=size, key=key
    ),
    static_argnums=2,
)


def test_batches_depend_on_the_key_alone():
    clusters = jnp.arange(64)[:, None]
    one, same, other = (_batches(clusters, jax.random.key(i), 8) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_drawn_positives_are_uniform_and_none_is_minus_one():
    positives = jnp.array([[4, -1, 9], [-1, -1, -1], [-1, 2, -1]])
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(lambda key: losses.draw_positives(key, positives)))
    drawn = np.asarray(draw(keys))
    np.testing.assert_array_equal(np.unique(drawn[:, 0]), [4, 9])
    assert (drawn[:, 0] == 4).mean() == pytest.approx(0.5, abs=0.06)
    np.testing.assert_array_equal(drawn[:, 1:], [[-1, 2]] * 2000)
    none = losses.draw_positives(keys[0], jnp.zeros((3, 0), int))
    np.testing.assert_array_equal(none, -1)


def test_positives_of_a_batch_are_found_off_the_diagonal_too():
    positives = jnp.array([[0, 2, -1], [1, -1, -1], [2, 0, 1], [3, -1, -1]])
    labels = jnp.array([0, 1, 2, -1])
    found = losses.in_batch_positives(positives, labels)
    wanted = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(found, np.array(wanted, bool))


def test_recall_counts_what_is_in_the_batch():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 3)), random.normal(size=(12, 3))
    positives = random.uniform(size=(12, 12)) < 0.2
    batches = np.append(random.permutation(12)[:11], -1).reshape(3, 4)
    found = losses.hard_negative_recall(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y, jnp.float32),
        jnp.asarray(batches),
        num_negatives=4,
        positives=jnp.asarray(positives),
    )
    for i in range(12):
        others = [j for j in range(12) if j != i and not positives[i, j]]
        hardest = sorted(others, key=lambda j: -x[i] @ y[j])[:4]
        own = next((set(b) for b in batches.tolist() if i in b), set())
        wanted = len(own & set(hardest)) / len(hardest)
        assert found[i] == pytest.approx(wanted, abs=1e-6)


def test_larger_clusters_hold_more_of_the_hardest_negatives():
    """The claim of the paper, on 32 Gaussian blobs in 16 dimensions."""
    random = np.random.default_rng(0)
    means = random.normal(size=(32, 16))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    x = means[np.arange(512) % 32] + 0.6 / 4 * random.normal(size=(512, 16))
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    found = []
    for size in (1, 8, 64):
        clusters = jax.jit(balanced_kmeans, static_argnums=1)(
            x, size, key=jax.random.key(0)
        )
        batches = losses.ngame_batches(clusters, batch_size=64, key=jax.random.key(1))
        share = jax.jit(losses.hard_negative_recall)(x, x, batches).mean()
        found.append(float(share))
    assert found[0] == pytest.approx(64 / 512, abs=0.02)
    assert found == sorted(found)
    assert found[2] > 4 * found[0]


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


@pytest.mark.usefixtures("untyped")
def test_wrong_batches_are_named():
    for call, message in (
        (
            lambda: losses.ngame_batches(
                jnp.arange(4), batch_size=2, key=jax.random.key(0)
            ),
            r"ngame_batches: `clusters` must have shape \(clusters, size\), got \(4,\)",
        ),
        (
            lambda: losses.hard_negative_recall(
                jnp.eye(3), jnp.eye(3), jnp.zeros((1, 3), int), num_negatives=3
            ),
            "hard_negative_recall: `num_negatives` must be below the number of .* 3",
        ),
        (
            lambda: losses.in_batch_positives(jnp.zeros((2, 1), int), jnp.array(0)),
            "in_batch_positives: `labels` must have one axis",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        TypeError, match="in_batch_positives: `labels` must have an int"
    ):
        losses.in_batch_positives(jnp.zeros((2, 1), int), jnp.zeros(3))
