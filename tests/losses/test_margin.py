"""Losses of support vector machines: vectors, brute force, edges, derivatives."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib.losses import squared_hinge_loss
from softlib.testing import assert_close, check_transformations
from tests.compiled import losses
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/gru_svm_case0.npz"


def oracle(scores: Any, labels: Any) -> Any:
    targets = np.where(np.arange(scores.shape[-1]) == labels[..., None], 1, -1)
    return (np.maximum(1 - targets * scores, 0) ** 2).sum(-1)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        scores, labels = jnp.asarray(data["out_scores"]), jnp.asarray(data["in_labels"])
        penalty = float(data["in_penalty"])
        check = functools.partial(assert_close, dtype="float64", length=4)
        check(penalty * losses.squared_hinge_loss(scores, labels), data["out_loss"])
        total = lambda s: penalty * squared_hinge_loss(s, labels).sum()
        check(jax.jit(jax.grad(total))(scores), data["out_grad_scores"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_brute_force(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        for shape in ((7, 5), (2, 3, 1), (0, 3), (4,)):
            scores = jnp.asarray(2 * rng.normal(size=shape), dtype)
            labels = jnp.asarray(rng.integers(shape[-1], size=shape[:-1]))
            found = losses.squared_hinge_loss(scores, labels)
            assert found.dtype == jnp.promote_types(dtype, jnp.float32)
            wanted = oracle(np.asarray(scores, np.float64), np.asarray(labels))
            assert_close(found, wanted, dtype=found.dtype, length=5)


def test_a_label_out_of_range_is_nan_and_one_that_does_not_count_is_zero():
    scores = jnp.array([[0.5, -0.5], [0.5, -0.5], [jnp.nan, 1.0], [0.5, -0.5]])
    labels, where = jnp.array([0, 2, -100, -1]), jnp.array([True, True, False, True])
    total = lambda s: squared_hinge_loss(s, labels, where=where)
    np.testing.assert_allclose(total(scores), [0.5, np.nan, 0, np.nan])
    slope = jax.grad(lambda s: total(s).sum())(scores)
    np.testing.assert_array_equal(slope[2], [0, 0])
    np.testing.assert_allclose(slope[0], [-1, 1])


def test_transformations():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(2 * rng.normal(size=(8, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(3, size=8))
    check_transformations(squared_hinge_loss, scores, labels, rows=(0, 1))


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    run: Any = squared_hinge_loss
    with pytest.raises(
        ValueError, match=r"^squared_hinge_loss: `labels` must have shape"
    ):
        run(jnp.ones((2, 3)), jnp.zeros(3, int))
    with pytest.raises(TypeError, match=r"`labels` must have an integer dtype"):
        run(jnp.ones((2, 3)), jnp.zeros(2))
    with pytest.raises(TypeError, match=r"`scores` must have a floating dtype"):
        run(jnp.ones((2, 3), int), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"`where` must broadcast"):
        run(jnp.ones((2, 3)), jnp.zeros(2, int), where=jnp.ones(3, bool))
