"""Perpendicular gradients: the oracle, the properties, and every trap of a chain."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib.optim import perp_grad
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import stablemax as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"


def projected(gradient, weight, *, rescale=False, axes=None, **options):
    if not options:
        return _compiled(rescale, axes)(gradient, weight)
    return _update(perp_grad(rescale=rescale, axes=axes, **options), gradient, weight)


@functools.cache
def _compiled(rescale, axes):
    transformation = perp_grad(rescale=rescale, axes=axes)
    return jax.jit(functools.partial(_update, transformation))


def _update(transformation, gradient, weight) -> Any:
    return transformation.update(gradient, transformation.init(weight), weight)[0]


def tensors(shape=(7, 5), seed=0, dtype="float32"):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(a, dtype) for a in random.normal(size=(2, *shape)))


# --------------------------------------------------------------------------- the oracle
def test_vectors():
    with np.load(DATA / "stablemax_perpgrad_case0.npz") as case:
        weight, gradient = jnp.asarray(case["in_weight"]), jnp.asarray(case["in_grad"])
        for rescale, name in ((False, "out_perp"), (True, "out_perp_rescaled")):
            found = projected(gradient, weight, rescale=rescale)
            assert_close(found, case[name], dtype="float32", length=35)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"axes": 0}, {"axes": (0, -1), "rescale": True}, {"epsilon": 0.5, "axes": 1}],
    ids=str,
)
def test_matches_oracle(options, dtype):
    with jax.enable_x64(dtype == "float64"):
        gradient, weight = tensors((3, 4, 2), dtype=dtype)
        weight = weight.at[:, 1].set(0)
        found = projected(gradient, weight, **options)
        assert found.dtype == gradient.dtype
        wanted = oracle.perpendicular(weight, gradient, **options)
        assert_close(found, wanted, dtype=dtype, length=24)


# --------------------------------------------------------------------------- properties
@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 100]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    st.booleans(),
)
def test_properties(seed, size, scale, rescale):
    g, w = tensors((size,), seed)
    both = functools.partial(projected, rescale=rescale)
    norm = lambda a: np.linalg.norm(np.asarray(a, np.float64))
    dot = lambda a, b: float(np.asarray(a, np.float64) @ np.asarray(b, np.float64))
    p = both(g, w)
    # Perpendicular, however long both are.
    for weight in (w, scale * w):
        found = both(scale * g, weight)
        assert abs(dot(weight, found)) <= 1e-6 * norm(weight) * norm(scale * g)
        np.testing.assert_allclose(found, scale * p, rtol=1e-4, atol=1e-6 * scale)
    # Once is enough.
    assert norm(both(p, w) - p) <= 1e-6 * norm(p)
    # A plain step changes the squared norm by the square of the step alone.
    rate = 0.1
    after = np.asarray(w, np.float64) - rate * np.asarray(p, np.float64)
    np.testing.assert_allclose(
        after @ after - dot(w, w), rate**2 * dot(p, p), atol=1e-6 * dot(w, w)
    )
    kept = norm(p) / norm(g)
    assert abs(kept - 1) <= 1e-6 if rescale else kept <= 1 + 1e-6


# ---------------------------------------------------------------------------- the traps
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("factor", [1.0, -3e-30, 7e20])
@pytest.mark.parametrize("size", [2, 3, 1000, 10**6])
def test_parallel_gradient_becomes_0_and_not_scaled_noise(size, factor, rescale):
    w = tensors((size,))[0]
    found = projected(jnp.float32(factor) * w, w, rescale=rescale)
    np.testing.assert_array_equal(found, jnp.zeros(size))


@pytest.mark.parametrize("rescale", [False, True])
def test_gradient_of_a_weight_of_0_is_unchanged(rescale):
    gradient = tensors()[0].at[0, 0].set(0)
    found = projected(gradient, jnp.zeros((7, 5)), rescale=rescale)
    np.testing.assert_allclose(found, gradient, rtol=1e-6)
    found = projected(0 * gradient, gradient, rescale=rescale)
    np.testing.assert_array_equal(found, jnp.zeros((7, 5)))


def test_small_part_is_kept():
    """Late in training the cosine is nearly 1, and what remains is all there is."""
    w = tensors((1000,))[0]
    across = projected(tensors((1000,), 1)[0], w)
    found = projected(w + 1e-5 * across, w)
    np.testing.assert_allclose(found, 1e-5 * across, atol=3e-7)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_that_do_not_fit_in_float32(size):
    gradient, weight = tensors()
    wanted = oracle.perpendicular(weight, gradient)
    for epsilon in (0.0, jnp.float32(0)):  # an array is not known to be 0
        found = projected(gradient / size, size * weight, epsilon=epsilon)
        np.testing.assert_allclose(size * found, wanted, atol=1e-5)


def test_narrow_tensors_are_summed_in_float32():
    """In bfloat16 the sum of 4096 ones is 256 or 4096, by how it is cut."""
    weight = jnp.ones(4096, "bfloat16")
    gradient = jnp.ones(4096, "bfloat16").at[0].set(5)
    found = projected(gradient, weight)
    np.testing.assert_allclose(found[0], 5 - 4100 / 4096, rtol=2**-8)
    np.testing.assert_allclose(found[1:], np.full(4095, -4 / 4096), rtol=2**-8)


def test_single_numbers_are_left_out_by_default():
    """Nothing is perpendicular to them: they would never be trained."""
    tree = {"scale": jnp.ones(()), "one": jnp.ones((1, 1)), "two": jnp.ones(2)}
    found = projected(tree, tree)
    assert found["scale"] == 1
    assert found["one"] == 1
    np.testing.assert_array_equal(found["two"], jnp.zeros(2))
    # Vectors of one element among several as well.
    np.testing.assert_array_equal(
        projected(jnp.ones((1, 3)), jnp.ones((1, 3)), axes=0), jnp.ones((1, 3))
    )
    # A mask says what the user wants.
    found = projected(tree, tree, mask={"scale": True, "one": False, "two": False})
    assert [float(found["scale"]), *found["two"].tolist()] == [0, 1, 1]


def test_mask_may_be_a_function_or_name_subtrees():
    weight = {
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "kernel": [jnp.ones(3)],
    }
    matrices = lambda params: jax.tree.map_with_path(
        lambda path, _: "kernel" in str(path), params
    )
    for mask in (matrices, {"norm": False, "kernel": True}):
        found = projected(weight, weight, mask=mask)
        np.testing.assert_array_equal(found["norm"]["bias"], jnp.ones(3))
        np.testing.assert_array_equal(found["kernel"][0], jnp.zeros(3))


def test_absent_leaves_stay_absent():
    weight = {"a": jnp.ones(3), "b": jnp.ones(3), "c": None}
    found = projected({"a": jnp.ones(3), "b": None, "c": None}, weight)
    assert found["b"] is None
    assert found["c"] is None
    masked = optax.masked(perp_grad(), {"a": True, "b": False})
    weight = {"a": jnp.ones(3), "b": jnp.ones(3)}
    found = _update(masked, weight, weight)
    np.testing.assert_array_equal(found["a"], jnp.zeros(3))
    np.testing.assert_array_equal(found["b"], jnp.ones(3))
    parts = optax.partition(
        {"matrix": optax.chain(perp_grad(), optax.sgd(1.0)), "rest": optax.sgd(1.0)},
        {"a": "matrix", "b": "rest"},
    )
    found = _update(parts, weight, weight)
    np.testing.assert_array_equal(found["a"], jnp.zeros(3))
    np.testing.assert_array_equal(found["b"], -jnp.ones(3))


def test_gradient_that_is_not_finite_is_seen():
    gradient, weight = tensors()
    for bad in (jnp.nan, jnp.inf):
        assert jnp.isnan(projected(gradient.at[0, 0].set(bad), weight)).any()


# -------------------------------------------------------------------------- in training
def test_weight_decay_works_behind_and_vanishes_in_front():
    gradient, weight = tensors()
    decay = optax.add_decayed_weights(0.1)
    run = lambda *parts: _update(optax.chain(*parts), gradient, weight)
    plain = run(perp_grad())
    np.testing.assert_allclose(run(decay, perp_grad()), plain, atol=1e-6)
    np.testing.assert_allclose(run(perp_grad(), decay), plain + 0.1 * weight, atol=1e-6)


def test_it_has_no_state_and_its_options_can_be_swept():
    transformation = optax.inject_hyperparams(
        lambda epsilon: perp_grad(epsilon=epsilon),
        hyperparam_dtype=jnp.dtype("float32"),
    )(epsilon=0.5)
    gradient, weight = tensors()
    state = transformation.init(weight)
    assert perp_grad().init(weight) == optax.EmptyState()
    found, _ = jax.jit(transformation.update)(gradient, state, weight)
    wanted = oracle.perpendicular(weight, gradient, epsilon=0.5)
    assert_close(found, wanted, dtype="float32", length=35)


def test_norm_of_the_weights_of_a_network_stays():
    """With small steps; a network without it grows its weights."""
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.normal(size=(8, 3)), "float32")
    labels = jnp.asarray(random.integers(0, 2, 8))
    norms = {}
    for name, before in {"plain": optax.identity(), "perp": perp_grad()}.items():
        model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(
            model, optax.chain(before, optax.sgd(0.05)), wrt=nnx.Param
        )

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(
                    model(inputs), labels
                ).mean()

            optimizer.update(model, nnx.grad(loss)(model))

        first = jnp.linalg.norm(model.kernel[...])
        for _ in range(100):
            step(model, optimizer)
        norms[name] = float(jnp.linalg.norm(model.kernel[...]) / first)
    assert abs(norms["perp"] - 1) < 0.05
    assert abs(norms["plain"] - 1) > 2 * abs(norms["perp"] - 1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_products_are_those_of_the_whole_weight_if_it_is_divided(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    gradient, weight = tensors((16, 3))
    wanted = oracle.perpendicular(weight, gradient)
    columns = oracle.perpendicular(weight, gradient, axes=0)
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("x", None)))
    gradient, weight = put(gradient), put(weight)
    assert_close(projected(gradient, weight), wanted, dtype="float32", length=48)
    found = projected(gradient, weight, axes=0)
    assert_close(found, columns, dtype="float32", length=48)


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    gradient, weight = tensors()
    update = lambda *arguments, **options: perp_grad(**options).update(*arguments)
    state = optax.EmptyState()
    with pytest.raises(ValueError, match="perp_grad: `params` must be the weights, go"):
        update(gradient, state)
    with pytest.raises(TypeError, match="perp_grad: `rescale` must be True or False"):
        update(gradient, state, weight, rescale=1)
    with pytest.raises(ValueError, match="perp_grad: `epsilon` must be >= 0, got -1"):
        perp_grad(epsilon=-1)
    with pytest.raises(TypeError, match="perp_grad: `axes` must be an int, a tuple"):
        update(gradient, state, weight, axes="rows")
    with pytest.raises(ValueError, match="perp_grad: `axes` must hold axes of an arra"):
        update(gradient, state, weight, axes=2)
    with pytest.raises(TypeError, match="perp_grad: `params` must have a floating"):
        update(gradient, state, jnp.ones((7, 5), int))
