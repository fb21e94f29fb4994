"""What is logged about rounding: thresholds, dtypes, rows, and alignment."""

import jax
import numpy as np
import pytest

from tests.compiled import metrics, of_stored
from tests.host import jnp


# ------------------------------------------------------------------------ the softmax
@pytest.mark.parametrize(
    ("dtype", "threshold"),
    [("float32", 24), ("float16", 11), ("bfloat16", 8), ("float64", 53)],
)
def test_a_term_is_lost_beyond_the_precision_of_the_dtype(dtype, threshold):
    with jax.enable_x64():
        just = threshold * np.log(2)
        logits = jnp.array([[0.0, -just - 0.1], [0.0, -just + 0.2]])
        for given in (logits, logits.astype("float32")):
            lost = [
                float(metrics.softmax_collapse_fraction(row, dtype=dtype))
                for row in given
            ]
            assert lost == [1, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_by_default_the_dtype_is_that_of_the_losses(dtype):
    logits = jnp.array([[0.0, -10.0], [0.0, -16.0], [0.0, -17.0]], dtype)
    found = jax.jit(metrics.softmax_collapse_fraction)(logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 / 3)


def test_it_is_when_a_plain_loss_has_no_gradient():
    margin = jnp.linspace(10, 25, 31)
    logits = jnp.stack([margin, 0 * margin, 0 * margin - 5], axis=1)
    labels = jnp.zeros(31, int)
    plain = -jax.nn.log_softmax(logits)[:, 0]  # the logarithm of that sum
    collapsed = jax.jit(jax.vmap(metrics.softmax_collapse_fraction))(logits)
    np.testing.assert_array_equal(collapsed, plain == 0)
    assert 0 < metrics.softmax_collapse_fraction(logits) < 1
    exact = of_stored.softmax_cross_entropy(logits, labels)
    assert metrics.zero_loss_fraction(exact) == 0


def test_many_small_terms_are_not_lost():
    logits = jnp.zeros(10_001).at[1:].set(-17.5)  # each of them would be
    assert metrics.softmax_collapse_fraction(logits) == 0


def test_rows_that_are_not_collapsed():
    inf = jnp.inf
    rows = [[jnp.nan, 0.0], [-inf, -inf], [inf, 0.0], [50.0, 50.0], [-inf, 0.0]]
    found = [float(metrics.softmax_collapse_fraction(jnp.array(row))) for row in rows]
    assert found == [0, 0, 0, 0, 1]
    assert metrics.softmax_collapse_fraction(jnp.array([[3.0], [4.0]])) == 1


def test_only_rows_that_count_are_counted():
    logits = jnp.array([[[30.0, 0], [0, 0]], [[jnp.nan, 0], [50, 0]]])
    where = jnp.array([[True, False], [True, False]])
    assert metrics.softmax_collapse_fraction(logits, where=where) == 0.5
    assert metrics.softmax_collapse_fraction(logits, where=~where[:, :1]) == 0
    assert metrics.softmax_collapse_fraction(jnp.zeros((0, 3))) == 0


def test_fractions_have_no_gradient():
    logits = jnp.array([[30.0, 0.0], [0.0, 1.0]])
    for function in (metrics.softmax_collapse_fraction, metrics.zero_loss_fraction):
        np.testing.assert_array_equal(jax.grad(function)(logits), jnp.zeros((2, 2)))


def test_zero_losses_that_count():
    values = jnp.array([0.0, 1e-37, 0.0, jnp.nan], "bfloat16")
    assert metrics.zero_loss_fraction(values) == 0.5
    where = jnp.array([False, True, True, True])
    np.testing.assert_allclose(metrics.zero_loss_fraction(values, where=where), 1 / 3)
    assert metrics.zero_loss_fraction(jnp.zeros((0,))) == 0
    assert metrics.zero_loss_fraction(values).dtype == jnp.float32


# ------------------------------------------------------------------------- alignment
def test_alignment_is_the_cosine_of_every_tensor():
    random = np.random.default_rng(0)
    weights = {"a": random.normal(size=(5, 3)), "b": random.normal(size=7)}
    grads = {"a": random.normal(size=(5, 3)), "b": -3 * weights["b"]}
    arrays = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, "float32"), tree)
    found = jax.jit(metrics.naive_loss_minimization_alignment)(
        arrays(grads), arrays(weights)
    )
    norm = np.linalg.norm
    wanted = -(grads["a"] * weights["a"]).sum() / norm(grads["a"]) / norm(weights["a"])
    np.testing.assert_allclose(found["a"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["b"], 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_alignment_of_gradients_whose_squares_do_not_fit(scale):
    weight = jnp.array([3.0, 4.0])
    found = metrics.naive_loss_minimization_alignment(-scale * weight, weight / scale)
    np.testing.assert_allclose(found, 1, rtol=1e-6)


def test_alignment_of_zeros_is_0_and_none_stays():
    tree = [jnp.zeros(3), None, jnp.ones((0,)), jnp.ones(2)]
    found = metrics.naive_loss_minimization_alignment(
        tree, [jnp.ones(3), jnp.ones(3), jnp.ones((0,)), jnp.zeros(2)]
    )
    assert found[1] is None
    assert [float(found[i]) for i in (0, 2, 3)] == [0, 0, 0]


def test_alignment_sums_narrow_weights_in_float32():
    weight = jnp.full(4096, 1.0, "bfloat16")
    grad = jnp.full(4096, -1.0, "bfloat16").at[:1024].set(1)
    found = metrics.naive_loss_minimization_alignment(grad, weight)
    assert found.dtype == jnp.float32
    assert found == 0.5


# ---------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    fraction, name = metrics.softmax_collapse_fraction, "softmax_collapse_fraction"
    with pytest.raises(TypeError, match=f"{name}: `logits` must have a floating"):
        fraction(jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match=f"{name}: `logits` must have at least 1 axis"):
        fraction(jnp.float32(1))
    with pytest.raises(TypeError, match=f"{name}: `dtype` must be floating, got int32"):
        fraction(jnp.zeros((2, 3)), dtype="int32")
    with pytest.raises(ValueError, match=f"{name}: `dtype` must be available, got flo"):
        fraction(jnp.zeros((2, 3)), dtype="float64")
    with pytest.raises(ValueError, match=f"{name}: `where` must broadcast to shape"):
        fraction(jnp.zeros((2, 3)), where=jnp.ones(3, bool))
    name = "zero_loss_fraction"
    with pytest.raises(TypeError, match=f"{name}: `losses` must have a floating"):
        metrics.zero_loss_fraction(jnp.zeros(3, bool))
    with pytest.raises(TypeError, match=f"{name}: `where` must have dtype bool"):
        metrics.zero_loss_fraction(jnp.zeros(3), where=jnp.ones(3))
    name, align = (
        "naive_loss_minimization_alignment",
        (metrics.naive_loss_minimization_alignment),
    )
    with pytest.raises(ValueError, match=f"{name}: `grads` must have shape"):
        align(jnp.ones(2), jnp.ones(3))
    with pytest.raises(TypeError, match=f"{name}: `params` must have a floating"):
        align(jnp.ones(3), jnp.ones(3, int))
    with pytest.raises(ValueError, match="pytree"):
        align([jnp.ones(3)], (jnp.ones(3),))
