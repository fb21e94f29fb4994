"""Conditional mutual information and its centroids: vectors, identities, promises."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from softlib.testing import assert_close, check_transformations
from tests.compiled import information
from tests.host import jnp
from tests.losses.problems import assert_agrees, precision

cmi = information.conditional_mutual_information


def problem(rows=20, classes=4, seed=0, dtype="float32"):
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(rows, classes))
    return jnp.asarray(logits, dtype), jnp.asarray(random.integers(0, classes, rows))


def brute_force(logits, labels):
    """Divergence of every row from the mean of its class: float64, loops."""
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    found = np.zeros(len(z))
    for i, label in enumerate(np.asarray(labels)):
        q = p[np.asarray(labels) == label].mean(0)
        found[i] = sum(a * np.log(a / b) for a, b in zip(p[i], q, strict=True) if a)
    return found


def test_matches_independent_vectors(request):
    data = np.load(request.path.parent.parent / "data/mcmi_case0.npz")
    with jax.enable_x64():
        logits, labels = (jnp.asarray(data[n]) for n in ("in_logits", "in_labels"))
        centroids = information.class_centroids(
            jax.nn.softmax(logits), labels, num_classes=4
        )
        assert_agrees(centroids, data["out_centroids"], jnp.float64, 12)
        for given in (None, centroids):
            found = cmi(logits, labels, centroids=given)
            assert_agrees(found, data["out_cmi_per_example"], jnp.float64, 12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_brute_force(dtype):
    with precision(dtype):
        logits, labels = problem(dtype=dtype)
        found = cmi(logits, labels)
        computed = jnp.promote_types(dtype, jnp.float32)
        assert found.dtype == computed
        assert_agrees(found, brute_force(logits, labels), computed, 20)


def test_mean_is_the_entropy_of_centroids_less_that_of_predictions():
    with jax.enable_x64():
        logits, labels = problem(dtype="float64")
        probs = jax.nn.softmax(logits)
        sums = information.class_centroid_sums(probs, labels, num_classes=4)
        entropy = lambda p: -(p * jnp.log(p)).sum(-1)
        of_classes = (sums.counts * entropy(sums.centroids())).sum() / 20
        wanted = of_classes - entropy(probs).mean()
        np.testing.assert_allclose(cmi(logits, labels).mean(), wanted, rtol=1e-13)


def test_zero_for_equal_predictions_of_a_class_and_invariant_to_shifts():
    logits, labels = problem()
    same = logits[:4][labels]
    np.testing.assert_allclose(cmi(same, labels), 0, atol=1e-6)
    shifted = cmi(logits + jnp.arange(20.0)[:, None], labels)
    np.testing.assert_allclose(shifted, cmi(logits, labels), atol=1e-5)
    order = jnp.array([2, 0, 3, 1])
    moved = cmi(logits[:, order], labels)
    np.testing.assert_allclose(moved, cmi(logits, labels), atol=1e-5)


def test_gradient_of_the_sum_is_whole_although_centroids_are_constants():
    """A centroid minimises the sum, so its own derivative vanishes."""
    with jax.enable_x64():
        logits, labels = problem(dtype="float64")

        def whole(logits):
            p = jax.nn.softmax(logits)
            q = information.class_centroids(p, labels, num_classes=4)
            return (p * (jnp.log(p) - jnp.log(q)[labels])).sum()

        constant = jax.grad(lambda z: cmi(z, labels).sum())(logits)
        np.testing.assert_allclose(constant, jax.grad(whole)(logits), atol=1e-13)


def test_a_row_without_outcomes_is_0_and_leaves_its_centroid_alone():
    logits, labels = problem()
    empty = logits.at[3].set(-jnp.inf)
    for centroids in (None, jax.nn.softmax(jnp.eye(4))):
        found, gradient = jax.value_and_grad(
            lambda z, own=centroids: cmi(z, labels, centroids=own).sum()
        )(empty)
        wanted = cmi(
            jnp.delete(logits, 3, 0), jnp.delete(labels, 3), centroids=centroids
        )
        np.testing.assert_allclose(found, wanted.sum(), rtol=1e-5)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[3], 0)


def test_rows_that_do_not_count_and_labels_without_a_class():
    logits, labels = problem()
    where = jnp.arange(20) != 3
    bad = logits.at[3].set(jnp.nan)
    total = lambda z: cmi(z, labels.at[5].set(9), where=where)
    found = total(bad)
    np.testing.assert_array_equal(np.isnan(found), np.arange(20) == 5)
    assert found[3] == 0
    gradient = jax.grad(lambda z: jnp.nansum(total(z)))(bad)
    np.testing.assert_array_equal(gradient[jnp.array([3, 5])], 0)
    assert np.isfinite(gradient).all()
    kept = np.delete(np.arange(20), [3, 5])
    alone = brute_force(logits[kept], labels[kept])
    np.testing.assert_allclose(found[kept], alone, atol=1e-6)
    # An outcome of probability 0 in both adds nothing.
    logits = logits.at[:, 1].set(-jnp.inf)
    value, gradient = jax.value_and_grad(lambda z: cmi(z, labels).sum())(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_an_absent_class_has_the_uniform_centroid_and_keeps_it_in_an_update():
    probs = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    labels = jnp.array([0, 0, -1])
    found = information.class_centroids(probs, labels, num_classes=2)
    np.testing.assert_allclose(found, [[0.75, 0.25], [0.5, 0.5]])
    old = jnp.array([[0.5, 0.5], [0.1, 0.9]])
    moved = information.centroid_update(old, probs, labels, decay=0.6)
    np.testing.assert_allclose(moved, [[0.6, 0.4], [0.1, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(moved.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sums_add_up_over_devices(check_vma):
    logits, labels = problem(rows=16)
    probs = jax.nn.softmax(logits)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def divided(probs, labels):
        own = information.class_centroid_sums(probs, labels, num_classes=4)
        return jax.lax.psum(own, "data")

    sums = jax.shard_map(
        divided,
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )(probs, labels)
    wanted = information.class_centroids(probs, labels, num_classes=4)
    assert_close(sums.centroids(), wanted, dtype=jnp.float32, length=16)


@pytest.mark.slow
def test_under_every_transformation():
    logits, labels = problem(rows=8, classes=3)
    centroids = jax.nn.softmax(problem(rows=3, classes=3, seed=1)[0])
    check_transformations(
        lambda z, y, q: cmi(z, y, centroids=q),
        logits,
        labels,
        centroids,
        rows=(0, 1),
        differentiable=(0,),
        skip=dict.fromkeys(
            ("shard_map", "sharded_jit"), "row by row, in plain JAX, without a loop"
        ),
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, y: cmi(p[0], y), ValueError, r"`logits` must have shape \(N, C\)"),
        (lambda p, y: cmi(p, y * 1.0), TypeError, "`labels` must have an integer"),
        (lambda p, y: cmi(p, y[:1]), ValueError, r"`labels` must have shape \(3,\)"),
        (lambda p, y: cmi(p, y, centroids=p[0]), ValueError, "`centroids` must"),
        (
            lambda p, y: information.class_centroids(p, y, num_classes=0),
            ValueError,
            "`num_classes` must be at least 1",
        ),
        (
            lambda p, y: information.centroid_update(p, p, y, decay=1.5),
            ValueError,
            "`decay` must be in",
        ),
        (
            lambda p, y: information.class_centroid_sums(
                p, y, num_classes=2, where=y[:2] == 0
            ),
            ValueError,
            r"`where` must have shape \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(jnp.ones((3, 2)) / 2, jnp.zeros(3, int))
