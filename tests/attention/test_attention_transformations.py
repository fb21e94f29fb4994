"""dot_product_attention under every transformation of JAX."""

import functools

import jax
import numpy as np
import pytest

from softlib import attention, masks
from softlib.testing import assert_close, check_transformations
from tests.attention.problems import Shape, mask, problem
from tests.compiled import f32
from tests.host import jnp

SHAPE = Shape(T=3, S=5, H=2, E=3, N=4, K=2, B=2)
CUSTOM = {"forward_mode": "the stream has a custom_vjp"}
LATER = {
    "checkpoint": "in test_inside_scan_over_layers_with_checkpoint",
    "gradient_of_gradient": "compared with the other second derivative further down",
}
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("normalizer", "implementation", "at_once", "later"),
    [
        ("softmax", "xla", "all", LATER),
        SLOW("softmax", "xla", "all", {}),
        SLOW("softmax", "xla", "one", {}),
        SLOW("softplus", "xla", "all", {}),
        SLOW("stablemax", "xla", "one", {}),
        SLOW("softmax", "reference", "all", {}),
        SLOW("softplus", "reference", "all", {}),
        SLOW("stablemax", "reference", "all", {}),
    ],
)
def test_everything_at_once(normalizer, implementation, at_once, later, monkeypatch):
    """Both results, with respect to every array, with data in the mask."""
    if at_once == "one":  # of batch entries and heads at a time, as if they were many
        monkeypatch.setattr("softlib.attention._engine.batch_heads.SCORES", 1)
    softmax = normalizer == "softmax"
    arrays = problem(SHAPE, scale="traced", bias="ns", sinks=softmax)

    def function(query, key, value, lengths, bias, scale, sinks=None):
        return attention.dot_product_attention(
            query,
            key,
            value,
            key_value_seq_lengths=lengths,
            is_causal=True,
            bias=bias,
            scale=scale,
            sinks=sinks,
            softcap=3.0,
            normalizer=normalizer,
            return_lse=True,
            block_query=2,
            block_key=2,
            implementation=implementation,
        )

    rows = [arrays[name] for name in ("query", "key", "value")]
    rest = [arrays[name] for name in ("bias", "scale", "sinks")[: 3 if softmax else 2]]
    # Every query sees the first key: a row without keys has no slope of the lse.
    check_transformations(
        function,
        *rows,
        np.array([5, 2], np.int32),
        *rest,
        rows=(0, 1, 2, 3),
        skip={} if implementation == "reference" else CUSTOM | later,
    )


@pytest.mark.slow  # the parts of the mask that the test above lacks
def test_a_boolean_array_and_segments():
    arrays = problem(SHAPE, bias="bt")
    ids = jnp.array([[0, 0, 1], [0, 1, 1]])
    keys = jnp.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    pairs = jnp.ones((2, 1, 1, 5), bool).at[0, 0, 0, 1].set(False)

    def function(query, key, value, bias, ids, keys, pairs):
        call = functools.partial(
            attention.dot_product_attention,
            query,
            key,
            value,
            bias=bias,
            block_query=2,
            block_key=2,
        )
        segments = masks.Segments(ids, keys)
        return call(mask=segments), call(mask=pairs, return_lse=True)

    names = ("query", "key", "value", "bias")
    check_transformations(
        function,
        *(arrays[name] for name in names),
        ids,
        keys,
        pairs,
        rows=range(7),
        skip=CUSTOM,
    )


@pytest.mark.parametrize("normalizer", ["softmax", "softplus", "stablemax"])
def test_second_derivatives_are_finite_where_rows_are_empty(normalizer):
    shape = Shape(T=5, S=5, H=2, E=3, N=2, K=1, B=1)
    arrays = problem(shape, bias="bnts-")
    late = mask("late", shape).options["mask"]
    assert not late.materialize(5)[0].any()

    def total(arrays):
        out, lse = attention.dot_product_attention(
            **arrays,
            mask=late,
            normalizer=normalizer,
            return_lse=True,
            block_query=2,
            block_key=2,
        )
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return (out**2).sum() + (lse**2).sum()

    tangent = jax.tree.map(lambda x: np.cos(np.maximum(x, -9)), arrays)

    def dot(gradient):
        both = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
        return sum((one * two).sum() for one, two in both)

    @jax.jit
    def both(arrays):
        forward = jax.jvp(jax.grad(total), (arrays,), (tangent,))[1]
        return forward, jax.grad(lambda x: dot(jax.grad(total)(x)))(arrays)

    forward, reverse = jax.device_get(both(arrays))
    for name in arrays:
        assert np.isfinite(forward[name]).all()
        assert_close(reverse[name], forward[name], dtype="float32", length=30, c=8)
    assert (forward["query"][:, :2] == 0).all()


def test_forward_mode_of_the_reference_is_that_of_differences():
    arrays = problem(Shape(T=4, S=6, H=2, E=3, N=2, K=1, B=1), bias="ns")

    def both(query):
        return attention.dot_product_attention(
            query,
            arrays["key"],
            arrays["value"],
            bias=arrays["bias"],
            is_causal=True,
            normalizer="softplus",
            return_lse=True,
            implementation="reference",
        )

    query, tangent = arrays["query"], np.cos(f32(range(16))).reshape(1, 4, 2, 2)

    @jax.jit
    def run(query):
        slopes = jax.jvp(both, (query,), (tangent,))[1]
        sums = lambda query: tuple(result.sum() for result in both(query))
        return slopes, jax.jacrev(sums)(query)

    for slope, gradient in zip(*jax.device_get(run(query)), strict=True):
        assert_close(slope.sum(), (gradient * tangent).sum(), dtype="float32", length=9)


def test_inside_scan_over_layers_with_checkpoint():
    shape = Shape(T=9, S=9, H=4, E=4, N=2, K=2, B=1)
    x = problem(shape)["query"]

    def total(weights, remat):
        def layer(x, weight):
            block = lambda x, weight: (
                x
                + attention.dot_product_attention(
                    x * weight, x, x, is_causal=True, block_query=4, block_key=4
                )
            )
            return (jax.checkpoint(block) if remat else block)(x, weight), None

        return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

    weights = f32([0.5, 1.0, 2.0])
    plain, remat = (
        jax.jit(jax.value_and_grad(functools.partial(total, remat=r)))(weights)
        for r in (False, True)
    )
    for one, two in zip(remat, plain, strict=True):
        assert_close(one, two, dtype="float32", length=81)
