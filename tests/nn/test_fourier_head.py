"""The Fourier head as a Flax module, and the paper's mixture of two normals."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from softlib.nn import FourierDensity
from softlib.testing import assert_close
from tests.compiled import metrics, nn, of_stored
from tests.host import jnp

FEATURES, BINS = 6, 20


def batch():
    x = jax.random.normal(jax.random.key(0), (2, 5, FEATURES))
    return x, jax.random.randint(jax.random.key(1), (2, 5), 0, BINS)


def head_of(**options):
    given: dict[str, Any] = {"num_frequencies": 4, "rngs": nnx.Rngs(0)} | options
    return nn.FourierHead(FEATURES, BINS, **given)


def test_it_is_a_linear_layer_and_the_functions():
    head, (x, labels) = head_of(), batch()
    a = x @ head.kernel[...] + head.bias[...][None, None]
    assert_close(head.density(x).coefficients, a, dtype="float32", length=FEATURES)
    logits = head(x)
    assert logits.shape == (2, 5, BINS)
    density = FourierDensity(a)
    assert_close(logits, density.logits(BINS), dtype="float32", length=BINS)
    where = labels % 2 == 0
    wanted = density.cross_entropy(labels, num_bins=BINS, where=where)
    assert_close(head(x, labels, where=where), wanted, dtype="float32", length=BINS)
    floored = of_stored.softmax_cross_entropy(logits, labels)
    p, y = jnp.exp(-floored), jnp.exp(-head(x, labels))
    np.testing.assert_allclose(p, (y + 1e-5) / (1 + BINS * 1e-5), rtol=1e-4)


def test_initial_values_are_small_and_uniform():
    head = nn.FourierHead(400, BINS, num_frequencies=50, rngs=nnx.Rngs(0))
    bound = 0.01 / 20
    for values in (head.kernel[...], head.bias[...]):
        assert (jnp.abs(values) <= bound).all()
        assert values.max() > 0.9 * bound
        np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.15)
    large = head_of(weight_scale=1.0, bias_scale=0.0)
    assert large.kernel[...].max() > 0.3
    assert (large.bias[...] == 0).all()
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(head))) == 401 * 102


def test_rows_that_do_not_count_have_no_part_whatever_they_hold():
    head, (x, labels) = head_of(), batch()
    where = jnp.arange(5)[None] != 2
    x = jnp.where(where[..., None], x, jnp.nan)
    loss = lambda head, x: head(x, labels, where=where).sum()
    gradient, of_x = nnx.grad(loss, argnums=(0, 1))(head, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((gradient, of_x)))
    np.testing.assert_array_equal(of_x[:, 2], 0)


def test_dtype_is_that_of_the_product_and_gradients_have_the_parameters_dtype():
    head, (x, labels) = head_of(dtype=jnp.bfloat16), batch()
    assert head(x).dtype == jnp.float32
    cast = x.astype(jnp.bfloat16), head.kernel[...].astype(jnp.bfloat16)
    a = jnp.matmul(*cast, preferred_element_type=jnp.float32)
    a = a + head.bias[...][None, None]
    np.testing.assert_array_equal(head.density(x).coefficients, a)
    gradient = nnx.grad(lambda head: head(x, labels).mean())(head)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="`num_frequencies` must be an integer of at"):
        head_of(num_frequencies=-1)
    with pytest.raises(ValueError, match="`weight_scale` or `bias_scale` must not be"):
        head_of(weight_scale=0, bias_scale=0)
    with pytest.raises(ValueError, match="`where` must be None without `labels`"):
        head_of()(batch()[0], where=jnp.ones((2, 5), bool))


# ---------------------------------------------------------------------- the experiment
def mixture(c, centres):
    normal = lambda mean: jnp.exp(-0.5 * ((centres - mean) / 0.15) ** 2)
    p = normal(c) + normal(-c)
    return p / p.sum(axis=1, keepdims=True)


class Model(nnx.Module):
    def __init__(self, head, rngs):
        self.first = nnx.Linear(1, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.head = head

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def train_on_mixture(frequencies, seed, bins=50):
    """Total variation to the truth, and roughness, over new inputs."""
    rngs = nnx.Rngs(seed)
    centres = -1 + (2 * jnp.arange(bins)[None] + 1) / bins
    c = jax.random.uniform(rngs(), (500, 1), minval=-0.6, maxval=0.6)
    labels = jax.random.categorical(rngs(), jnp.log(mixture(c, centres)))
    if frequencies is None:
        head = nnx.Linear(64, bins, rngs=rngs)
    else:
        head = nn.FourierHead(64, bins, num_frequencies=frequencies, rngs=rngs)
    graph, parameters = nnx.split(Model(head, rngs))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def trained(parameters):
        def step(carry, _):
            parameters, state = carry
            gradient = jax.grad(
                lambda p: of_stored.softmax_cross_entropy(
                    nnx.merge(graph, p)(c), labels
                ).mean()
            )(parameters)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(parameters, updates), state), None

        start = (parameters, optimizer.init(parameters))
        return jax.lax.scan(step, start, length=400)[0][0]

    new = jnp.linspace(-0.6, 0.6, 101)[:, None]
    p = jax.nn.softmax(nnx.merge(graph, trained(parameters))(new))
    distance = 0.5 * jnp.abs(p - mixture(new, centres)).sum(1).mean()
    return float(distance), float(metrics.smoothness_metric(p, max_sigma=20).mean())


@pytest.mark.slow  # trains nine networks
def test_few_frequencies_are_nearer_to_a_mixture_than_a_linear_layer():
    for seed in range(3):
        linear, rough = train_on_mixture(None, seed)
        few, smooth = train_on_mixture(4, seed)
        many, _ = train_on_mixture(20, seed)
        assert few < 0.65 * linear
        assert smooth < 0.5 * rough
        assert many > few + 0.05  # and many fit the sample
