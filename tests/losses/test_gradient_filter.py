"""The gradient filter: which blocks it drops, what it leaves exact, its error bound."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import softlib
from softlib import LinearLogits, losses
from tests.host import jnp

ROWS, FEATURES, CLASSES = 300, 8, 700
EPS = 1e-3
BLOCK = 128


def problem(peak):
    """Probabilities that fall with the class; with a peak, later rows are certain."""
    random = np.random.default_rng(7)
    hidden = random.normal(size=(ROWS, FEATURES))
    weight = 0.3 * random.normal(size=(CLASSES, FEATURES))
    labels = random.integers(0, 200, ROWS)  # some blocks hold no label
    hidden[BLOCK:] += peak * weight[labels[BLOCK:]]
    bias = -np.linspace(0, 9, CLASSES)
    return {"hidden": hidden, "weight": weight, "bias": bias}, labels


def by_definition(arrays, labels, weights, eps):
    """Float64: both gradients with the filter, without it, and the bound per row."""
    hidden, weight = arrays["hidden"], arrays["weight"]
    z = hidden @ weight.T + arrays["bias"]
    e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    distance = p.copy()
    distance[np.arange(ROWS), labels] -= 1
    kept = np.zeros(z.shape, bool)
    active = weights != 0
    for i in range(0, ROWS, BLOCK):
        for j in range(0, CLASSES, BLOCK):
            block = np.abs(distance[i : i + BLOCK, j : j + BLOCK])
            kept[i : i + BLOCK, j : j + BLOCK] = (
                block[active[i : i + BLOCK]].max(initial=0) >= eps
            )
    dz = weights[:, None] * distance
    filtered = np.where(kept, dz, 0)
    norms = np.linalg.norm(weight, axis=1)
    bound = eps * np.abs(weights) * (~kept * norms).sum(1)
    found = {
        "hidden": filtered @ weight,
        "weight": filtered.T @ hidden,
        "bias": dz.sum(0),
    }
    exact = {"hidden": dz @ weight, "weight": dz.T @ hidden}
    return found, exact, bound, kept


def gradients(arrays, labels, weights, eps=EPS, vocab_axis=0, **options):
    def loss(arrays):
        arrays = dict(arrays)
        if vocab_axis == 1:
            arrays["weight"] = arrays["weight"].T
        rows = losses.linear_softmax_cross_entropy(
            **arrays,
            labels=labels,
            vocab_axis=vocab_axis,
            gradient_filter_eps=eps,
            **options,
        )
        return (weights * rows).sum()

    return jax.jit(jax.grad(loss))({n: jnp.asarray(a) for n, a in arrays.items()})


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("peak", [0, 400])
@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"vocab_chunk": 128},
        {"vocab_chunk": 256, "token_chunk": 128},
        {"vocab_chunk": 640, "token_chunk": 256},
    ],
)
def test_drops_the_same_blocks_however_the_work_is_cut(cut, peak, vocab_axis):
    arrays, labels = problem(peak)
    weights = np.linspace(-1, 1, ROWS)
    found, _, _, kept = by_definition(arrays, labels, weights, EPS)
    assert 0.1 < kept.mean() < 0.9  # or the test would show nothing
    with jax.enable_x64():
        actual = gradients(
            arrays, jnp.asarray(labels), jnp.asarray(weights), EPS, vocab_axis, **cut
        )
        for name, wanted in found.items():
            np.testing.assert_allclose(
                actual[name], wanted, rtol=0, atol=1e-12 * np.abs(wanted).max()
            )


@pytest.mark.parametrize("peak", [0, 400])
def test_error_is_within_the_stated_bound(peak):
    arrays, labels = problem(peak)
    weights = np.linspace(0.1, 1, ROWS)
    _, exact, bound, _ = by_definition(arrays, labels, weights, EPS)
    with jax.enable_x64():
        actual = gradients(arrays, jnp.asarray(labels), jnp.asarray(weights))
    error = np.linalg.norm(np.asarray(actual["hidden"]) - exact["hidden"], axis=1)
    assert error.max() > 1e-9  # something was dropped
    assert (error <= bound * (1 + 1e-9) + 1e-12).all()


def test_rows_without_a_cotangent_keep_no_block():
    arrays, labels = problem(400)
    weights = np.where(np.arange(ROWS) % 2, 1.0, 0.0)
    found, _, _, _ = by_definition(arrays, labels, weights, EPS)
    with jax.enable_x64():
        actual = gradients(
            arrays,
            jnp.asarray(labels),
            1.0,
            where=jnp.asarray(weights != 0),
        )
    for name, wanted in found.items():
        np.testing.assert_allclose(
            actual[name], wanted, rtol=0, atol=1e-12 * np.abs(wanted).max()
        )


def test_a_cotangent_of_one_is_one():
    """The logsumexp alone, summed, has a cotangent of 1 in every row."""
    arrays, _ = problem(400)
    hidden, weight, bias = (jnp.asarray(a, jnp.float32) for a in arrays.values())

    def slope(hidden, eps):
        logits = LinearLogits(hidden, weight, bias=bias, gradient_filter_eps=eps)
        return softlib.logits.logsumexp(logits).sum()

    exact, found = (jax.grad(slope)(hidden, eps) for eps in (None, EPS))
    assert jnp.abs(found).max() > 0.1
    bound = EPS * jnp.linalg.norm(weight, axis=1).sum()
    assert (jnp.linalg.norm(found - exact, axis=1) <= bound).all()


def test_a_threshold_below_every_probability_drops_nothing():
    arrays, labels = problem(0)
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    off = gradients(arrays, jnp.asarray(labels), 1.0, None)
    tiny = gradients(arrays, jnp.asarray(labels), 1.0, 1e-30)
    for name, wanted in off.items():
        np.testing.assert_array_equal(tiny[name], wanted)


def test_the_loss_itself_is_exact():
    arrays, labels = problem(400)
    hidden, weight, bias = (jnp.asarray(a, jnp.float32) for a in arrays.values())
    run = lambda eps: losses.linear_softmax_cross_entropy(
        hidden, weight, jnp.asarray(labels), bias=bias, gradient_filter_eps=eps
    )
    np.testing.assert_array_equal(run(0.5), run(None))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_auto_is_a_fraction_of_the_spacing_at_one(dtype):
    arrays, labels = problem(400)
    arrays = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}
    auto = gradients(arrays, jnp.asarray(labels), 1.0, "auto")
    number = gradients(
        arrays, jnp.asarray(labels), 1.0, float(jnp.finfo(dtype).eps) / 32
    )
    for name, wanted in number.items():
        np.testing.assert_array_equal(auto[name], wanted)


def test_explain_says_that_it_saves_no_time():
    arrays, labels = problem(0)
    text = str(
        softlib.explain(
            lambda arrays: gradients(arrays, jnp.asarray(labels), 1.0), arrays
        )
    )
    assert "drops blocks of the gradient, saves no time" in text


def test_a_divided_vocabulary_cannot_be_filtered():
    """One device's classes may look certain only because it does not see a rival."""
    arrays, labels = problem(0)
    mesh = jax.make_mesh((1,), ("classes",), axis_types=(AxisType.Auto,))
    divided = jax.shard_map(
        lambda arrays: gradients(arrays, jnp.asarray(labels), 1.0, axis_name="classes"),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match="`gradient_filter_eps` must be None with `ax"):
        divided({name: jnp.asarray(a) for name, a in arrays.items()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0}, ValueError, "`gradient_filter_eps` must be positive"),
        ({"label_smoothing": 0.1}, ValueError, "`gradient_filter_eps` must be None"),
        ({"vocab_chunk": 100}, ValueError, "`vocab_chunk` must be a multiple of 128"),
        ({"token_chunk": 64}, ValueError, "`token_chunk` must be a multiple of 128"),
        (
            {"implementation": "reference"},
            NotImplementedError,
            "it has no gradient filter",
        ),
    ],
)
def test_what_cannot_be_filtered_raises(options, error, message):
    arrays, labels = problem(0)
    with pytest.raises(error, match=message):
        gradients(arrays, jnp.asarray(labels), 1.0, **options)
