"""What is logged about rounding: thresholds, dtypes, rows, and alignment."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from tests.compiled import losses, of_stored
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
                float(losses.softmax_collapse_fraction(row, dtype=dtype))
                for row in given
            ]
            assert lost == [1, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_by_default_the_dtype_is_that_of_the_losses(dtype):
    logits = jnp.array([[0.0, -10.0], [0.0, -16.0], [0.0, -17.0]], dtype)
    found = jax.jit(losses.softmax_collapse_fraction)(logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 / 3)


def test_it_is_when_a_plain_loss_has_no_gradient():
    margin = jnp.linspace(10, 25, 31)
    logits = jnp.stack([margin, 0 * margin, 0 * margin - 5], axis=1)
    labels = jnp.zeros(31, int)
    plain = -jax.nn.log_softmax(logits)[:, 0]  # the logarithm of that sum
    collapsed = jax.jit(jax.vmap(losses.softmax_collapse_fraction))(logits)
    np.testing.assert_array_equal(collapsed, plain == 0)
    assert 0 < losses.softmax_collapse_fraction(logits) < 1
    exact = of_stored.softmax_cross_entropy(logits, labels)
    assert losses.zero_loss_fraction(exact) == 0


def test_many_small_terms_are_not_lost():
    logits = jnp.zeros(10_001).at[1:].set(-17.5)  # each of them would be
    assert losses.softmax_collapse_fraction(logits) == 0


def test_rows_that_are_not_collapsed():
    inf = jnp.inf
    rows = [[jnp.nan, 0.0], [-inf, -inf], [inf, 0.0], [50.0, 50.0], [-inf, 0.0]]
    found = [float(losses.softmax_collapse_fraction(jnp.array(row))) for row in rows]
    assert found == [0, 0, 0, 0, 1]
    assert losses.softmax_collapse_fraction(jnp.array([[3.0], [4.0]])) == 1


def test_only_rows_that_count_are_counted():
    logits = jnp.array([[[30.0, 0], [0, 0]], [[jnp.nan, 0], [50, 0]]])
    where = jnp.array([[True, False], [True, False]])
    assert losses.softmax_collapse_fraction(logits, where=where) == 0.5
    assert losses.softmax_collapse_fraction(logits, where=~where[:, :1]) == 0
    assert losses.softmax_collapse_fraction(jnp.zeros((0, 3))) == 0


def test_fractions_have_no_gradient():
    logits = jnp.array([[30.0, 0.0], [0.0, 1.0]])
    for function in (losses.softmax_collapse_fraction, losses.zero_loss_fraction):
        np.testing.assert_array_equal(jax.grad(function)(logits), jnp.zeros((2, 2)))


def test_zero_losses_that_count():
    values = jnp.array([0.0, 1e-37, 0.0, jnp.nan], "bfloat16")
    assert losses.zero_loss_fraction(values) == 0.5
    where = jnp.array([False, True, True, True])
    np.testing.assert_allclose(losses.zero_loss_fraction(values, where=where), 1 / 3)
    assert losses.zero_loss_fraction(jnp.zeros((0,))) == 0
    assert losses.zero_loss_fraction(values).dtype == jnp.float32


# ----------------------------------------------------- the loss that does not collapse
MARGINS = np.array([0, 5, 16, 17, 20, 40, 60, 80, -20, -80], np.float32)
OTHERS = np.array([0, -0.7, 0.3, -np.inf], np.float32)


def separated():
    """Logits whose label, class 1, is so far above the others."""
    rows = [np.insert(OTHERS, 1, margin) for margin in MARGINS]
    return np.stack(rows)


def separated_oracle():
    """Loss and gradient, of sums without the label."""
    z = separated().astype(np.float64)
    others = np.exp(np.delete(z, 1, axis=1) - z[:, 1:2])
    total = 1 + others.sum(1, keepdims=True)
    slope = np.insert(others, 1, -others.sum(1), axis=1) / total
    return np.log1p(others.sum(1)), slope


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(
    "name",
    ["softmax_cross_entropy", "softmax_token_log_probs", "class_weights", "divided"],
)
def test_loss_of_class_ids_is_accurate_relative_to_itself(name, implementation):
    loss_of = of_stored.softmax_cross_entropy
    if name == "softmax_token_log_probs":
        loss_of = lambda *a, **o: -of_stored.token_log_probs(*a, **o)
    factor = 1.0
    options: dict[str, Any] = {"implementation": implementation}
    if name == "class_weights":
        factor, options["class_weights"] = 3.0, jnp.full(5, 3.0)
    if name == "divided":  # the final logits count
        options["temperature"] = jnp.float32(0.5)
        options["bias"] = jnp.array([0.0, 1.0, 0.0, 0.0, 0.0])
        options["class_where"] = jnp.array([True] * 4 + [False])
    logits, labels = jnp.asarray(separated()), jnp.ones(len(MARGINS), int)
    if name == "divided":
        logits = (0.5 * logits).at[:, 1].add(-1).at[:, 4].set(0)
    run = lambda z: loss_of(z, labels, **options)
    value, pull = jax.jit(lambda z: jax.vjp(run, z))(logits)
    wanted, slope = separated_oracle()
    np.testing.assert_allclose(value, factor * wanted, rtol=1e-5)
    (found,) = jax.jit(pull)(jnp.ones(len(MARGINS)))
    if name == "divided":
        factor = 2  # by the temperature
    np.testing.assert_allclose(found, factor * slope, rtol=2e-5, atol=1e-37)


def test_loss_is_0_where_exp_underflows():
    logits = jnp.array([[86.0, 0.0], [105.0, 0.0], [1e4, 0.0], [3.0, -jnp.inf]])
    run = lambda z: of_stored.softmax_cross_entropy(z, jnp.zeros(4, int))
    value, found = jax.jit(lambda z: (run(z), jax.grad(lambda z: run(z).sum())(z)))(
        logits
    )
    np.testing.assert_array_equal(value[1:], jnp.zeros(3))
    assert value[0] > 0
    np.testing.assert_array_equal(found[1:], jnp.zeros((3, 2)))
    assert found[0, 0] < 0 < found[0, 1]


def test_terms_of_options_are_added_to_an_accurate_label_term():
    """Smoothing and penalty belong to all classes, with the lse of all."""
    logits, labels = jnp.asarray(separated()[:, :4]), jnp.ones(len(MARGINS), int)
    epsilon, coefficient = 0.1, 0.01

    def run(z):
        return of_stored.softmax_cross_entropy(
            z,
            labels,
            label_smoothing=epsilon,
            logsumexp_penalty=coefficient,
            return_lse=True,
        )

    (value, lse), pull = jax.jit(lambda z: jax.vjp(run, z))(logits)
    z = separated()[:, :4].astype(np.float64)
    label, slope = separated_oracle()
    wanted_lse = z[:, 1] + label
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    uniform = wanted_lse - z.mean(1)
    wanted = 0.9 * label + epsilon * uniform + coefficient * wanted_lse**2
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    p = np.exp(z - wanted_lse[:, None])
    wanted = 0.9 * slope[:, :4] + epsilon * (p - 0.25)
    wanted += 2 * coefficient * wanted_lse[:, None] * p
    (found,) = jax.jit(pull)((jnp.ones_like(value), jnp.zeros_like(lse)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_entropy_beside_the_loss_is_that_of_all_classes():
    logits = jnp.asarray(separated())
    labels = jnp.ones(len(MARGINS), int)
    metrics = functools.partial(of_stored.token_metrics, metrics=("loss", "entropy"))
    found = jax.jit(metrics)(logits, labels)
    alone = jax.jit(of_stored.entropy)(logits)
    np.testing.assert_allclose(found.entropy, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_logit_makes_loss_and_lse_nan(place, bad):
    run = functools.partial(of_stored.softmax_cross_entropy, return_lse=True)
    logits = np.zeros((1, 3), np.float32)
    logits[0, place] = bad
    for found in jax.jit(run)(jnp.asarray(logits), jnp.array([1])):
        assert jnp.isnan(found).all()


# ------------------------------------------------------------------------- alignment
def test_alignment_is_the_cosine_of_every_tensor():
    random = np.random.default_rng(0)
    weights = {"a": random.normal(size=(5, 3)), "b": random.normal(size=7)}
    grads = {"a": random.normal(size=(5, 3)), "b": -3 * weights["b"]}
    arrays = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, "float32"), tree)
    found = jax.jit(losses.naive_loss_minimization_alignment)(
        arrays(grads), arrays(weights)
    )
    norm = np.linalg.norm
    wanted = -(grads["a"] * weights["a"]).sum() / norm(grads["a"]) / norm(weights["a"])
    np.testing.assert_allclose(found["a"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["b"], 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_alignment_of_gradients_whose_squares_do_not_fit(scale):
    weight = jnp.array([3.0, 4.0])
    found = losses.naive_loss_minimization_alignment(-scale * weight, weight / scale)
    np.testing.assert_allclose(found, 1, rtol=1e-6)


def test_alignment_of_zeros_is_0_and_none_stays():
    tree = [jnp.zeros(3), None, jnp.ones((0,)), jnp.ones(2)]
    found = losses.naive_loss_minimization_alignment(
        tree, [jnp.ones(3), jnp.ones(3), jnp.ones((0,)), jnp.zeros(2)]
    )
    assert found[1] is None
    assert [float(found[i]) for i in (0, 2, 3)] == [0, 0, 0]


def test_alignment_sums_narrow_weights_in_float32():
    weight = jnp.full(4096, 1.0, "bfloat16")
    grad = jnp.full(4096, -1.0, "bfloat16").at[:1024].set(1)
    found = losses.naive_loss_minimization_alignment(grad, weight)
    assert found.dtype == jnp.float32
    assert found == 0.5


# ---------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    fraction, name = losses.softmax_collapse_fraction, "softmax_collapse_fraction"
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
        losses.zero_loss_fraction(jnp.zeros(3, bool))
    with pytest.raises(TypeError, match=f"{name}: `where` must have dtype bool"):
        losses.zero_loss_fraction(jnp.zeros(3), where=jnp.ones(3))
    name, align = (
        "naive_loss_minimization_alignment",
        (losses.naive_loss_minimization_alignment),
    )
    with pytest.raises(ValueError, match=f"{name}: `grads` must have shape"):
        align(jnp.ones(2), jnp.ones(3))
    with pytest.raises(TypeError, match=f"{name}: `params` must have a floating"):
        align(jnp.ones(3), jnp.ones(3, int))
    with pytest.raises(ValueError, match="pytree"):
        align([jnp.ones(3)], (jnp.ones(3),))
