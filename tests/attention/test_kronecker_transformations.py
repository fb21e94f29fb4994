"""kronecker_attention under every transformation of JAX."""

import functools

import jax
import numpy as np
import pytest

from softlib import attention, masks
from softlib.testing import assert_close, check_transformations
from tests.attention.tensor_problems import (
    Between,
    PerAxis,
    Shape,
    attend,
    mask,
    problem,
)
from tests.host import jnp

SHAPE = Shape(T=3, S=(4, 5), H=2, E=3, N=2, K=1, B=8)
CUSTOM = {"forward_mode": "the stream has a custom_vjp"}
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def not_both_last(query, one, two):
    return one + two < 7


@pytest.mark.slow  # that of dot_product_attention, the same engine, is not
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_everything_at_once(implementation):
    """Both results, with respect to every array, with data in the mask.

    The batch is divided over 8 devices, which share the scale.
    """
    arrays = problem(SHAPE, scale="traced")

    def function(query, k1, k2, v1, v2, lengths, scale):
        # Every query sees the first keys: an empty row has no slope of the lse.
        given = PerAxis(
            masks.Padding(key=lengths),
            masks.Causal(1),
            joint=(not_both_last, Between(1, 2, masks.Window(2, 3))),
        )
        return attend(
            query,
            (k1, k2),
            (v1, v2),
            mask=given,
            scale=scale,
            return_lse=True,
            block_query=2,
            block_keys=(2, 2),
            implementation=implementation,
        )

    check_transformations(
        function,
        arrays["query"],
        *arrays["keys"],
        *arrays["values"],
        jnp.array([4, 2, 1, 4, 3, 2, 4, 1]),
        arrays["scale"],
        rows=range(6),
        skip={} if implementation == "reference" else CUSTOM,
    )


@pytest.mark.slow
def test_four_axes():
    arrays = problem(Shape(T=3, S=(2, 3, 2), H=2, E=3, N=2, K=2, B=2))

    def function(query, k1, k2, k3, v1, v2, v3):
        given = PerAxis(masks.Causal(), None, masks.Window(1, 1))
        return attend(
            query,
            (k1, k2, k3),
            (v1, v2, v3),
            mask=given,
            return_lse=True,
            block_query=2,
            block_keys=(2, 2, 1),
        )

    check_transformations(
        function,
        arrays["query"],
        *arrays["keys"],
        *arrays["values"],
        rows=range(7),
        skip=CUSTOM,
    )


@pytest.mark.slow
def test_two_simplicial():
    arrays = problem(Shape(T=4, S=(4, 4), H=2, E=3, N=2, K=1, B=2))

    def function(*arrays):
        return attention.two_simplicial_attention(
            *arrays,
            window1=3,
            window2=2,
            key2_bias=0.5,
            value2_bias=1.0,
            return_lse=True,
        )

    check_transformations(
        function,
        arrays["query"],
        *arrays["keys"],
        *arrays["values"],
        rows=range(5),
        skip=CUSTOM,
    )


def scalar_of(arrays, given, **options):
    """A function of both results, smooth where rows are empty."""
    out, lse = attend(**arrays, mask=given, return_lse=True, **options)
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    return (out**2).sum() + (lse**2).sum()


@pytest.mark.parametrize("name", ["late", SLOW("several")])
def test_second_derivatives_are_finite_where_rows_are_empty(name):
    shape = Shape(T=5, S=(4, 5), H=2, E=3, N=2, K=1, B=1)
    arrays = problem(shape, scale="traced")
    given = mask(name, shape)
    empty = ~given.allowed[0, 0].any((1, 2))
    total = functools.partial(
        scalar_of, given=given.options["mask"], block_query=2, block_keys=(2, 2)
    )
    tangent = jax.tree.map(np.cos, arrays)

    def dot(gradient):
        both = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
        return sum((one * two).sum() for one, two in both)

    @jax.jit
    def both(arrays):
        forward = jax.jvp(jax.grad(total), (arrays,), (tangent,))[1]
        return forward, jax.grad(lambda x: dot(jax.grad(total)(x)))(arrays)

    forward, reverse = jax.device_get(both(arrays))
    leaves = zip(jax.tree.leaves(reverse), jax.tree.leaves(forward), strict=True)
    for one, two in leaves:
        assert np.isfinite(two).all()
        assert_close(one, two, dtype="float32", length=120, c=8)
    assert empty.any() == (name == "late")
    assert (forward["query"][:, empty] == 0).all()
    assert (reverse["query"][:, empty] == 0).all()


def test_forward_mode_of_the_reference_is_reverse_mode():
    shape = Shape(T=4, S=(5, 3), H=2, E=3, N=2, K=1, B=1)
    arrays, given = problem(shape, scale="traced"), mask("windows", shape)
    tangent = jax.tree.map(np.cos, arrays)
    both = functools.partial(
        attend, **given.options, return_lse=True, implementation="reference"
    )
    call = lambda arrays: both(**arrays)

    @jax.jit
    def run(arrays):
        results, slopes = jax.jvp(call, (arrays,), (tangent,))
        (gradients,) = jax.vjp(call, arrays)[1](jax.tree.map(jnp.ones_like, results))
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(tangent), strict=True)
        return sum(s.sum() for s in slopes), sum((g * t).sum() for g, t in pairs)

    forward, reverse = run(arrays)
    assert_close(forward, reverse, dtype="float32", length=120)


def test_the_gradient_is_that_of_the_reference_in_float64():
    with jax.enable_x64(True):
        shape = Shape(T=9, S=(7, 5), B=1)
        arrays = problem(shape, "float64", scale="traced")
        given = mask("several", shape)
        xla, reference = (
            jax.jit(
                jax.grad(
                    functools.partial(
                        scalar_of,
                        given=given.options["mask"],
                        implementation=implementation,
                        block_query=4,
                        block_keys=(4, 4),
                    )
                )
            )(arrays)
            for implementation in ("xla", "reference")
        )
        for one, two in zip(*map(jax.tree.leaves, (xla, reference)), strict=True):
            assert_close(one, two, dtype="float64", length=315)


@pytest.mark.slow
def test_inside_scan_over_layers_with_checkpoint():
    x = problem(Shape(T=6, H=4, E=4, N=2, K=2, B=1))["query"]

    def total(weights, remat):
        def layer(x, weight):
            def block(x, weight):
                return x + attend(
                    x * weight,
                    (x, x),
                    (x, x),
                    mask=masks.Causal(),
                    block_query=4,
                    block_keys=(4, 4),
                )

            return (jax.checkpoint(block) if remat else block)(x, weight), None

        return (jnp.tanh(jax.lax.scan(layer, x, weights)[0]) ** 2).sum()

    weights = jnp.array([0.5, 1.0])
    plain, remat = (
        jax.jit(jax.value_and_grad(functools.partial(total, remat=r)))(weights)
        for r in (False, True)
    )
    for one, two in zip(remat, plain, strict=True):
        assert_close(one, two, dtype="float32", length=216)
