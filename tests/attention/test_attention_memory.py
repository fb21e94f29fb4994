"""Memory of compiled attention: linear for a window, never an array of all pairs."""

import functools
import math

import jax
import pytest
from jax.extend import core

from softlib import attention, masks
from tests import operations
from tests.host import jnp

struct = jax.ShapeDtypeStruct
N, K, H = 2, 1, 16
WINDOW = masks.Window(100, 0)


def gradient(mask, bias, **options):
    """Values and gradients, of both results."""

    def total(arrays, mask):
        out, lse = attention.dot_product_attention(
            **arrays, mask=mask, return_lse=True, **options
        )
        return (out.astype(lse.dtype) ** 2).sum() + lse.sum()

    function = jax.value_and_grad(total)

    def trace(n):
        with operations.visible():
            return jax.jit(function).trace(operands(n, bias), mask)

    return trace


def operands(n, bias, dtype=jnp.float32):
    heads = {"query": N, "key": K, "value": K}
    arrays = {name: struct((1, n, heads[name], H), dtype) for name in heads}
    if bias is not None:
        axes = zip("bnts", (1, N, n, n), strict=True)
        shape = tuple(size if axis in bias else 1 for axis, size in axes)
        arrays["bias"] = struct(shape, dtype)
    return arrays


def arrays_of(jaxpr):
    """Every array that is computed, also inside loops and calls."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(inner, core.ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, core.Jaxpr):
                yield from arrays_of(inner)


def largest(traced):
    return max(math.prod(a.shape) for a in arrays_of(traced.jaxpr.jaxpr))


def temporary(traced):
    found = traced.lower().compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


@pytest.mark.parametrize("bias", [None, "ns"])
def test_scratch_of_a_window_is_linear(bias):
    trace = gradient(WINDOW, bias, block_query=128, block_key=128)
    sizes = [2048, 4096, 8192]
    small, middle, large = (temporary(trace(n)) for n in sizes)
    # The first term: the arguments and gradients in float32, a few times.
    per_token = 4 * H * (2 * N + 4 * K)
    tiles = 4 * 128 * N * 128 * 8
    assert large < 3 * 8192 * per_token + tiles
    assert large - middle < 2.2 * (middle - small)
    scores = 4 * N * 8192**2
    assert large < scores / 50


@pytest.mark.parametrize("normalizer", ["softmax", "softplus", "stablemax"])
@pytest.mark.parametrize("mask", [None, WINDOW, masks.Causal()])
def test_no_array_of_all_pairs(mask, normalizer):
    n = 1000  # no multiple of a block: padded arrays of all pairs would be larger
    trace = gradient(mask, None, normalizer=normalizer, softcap=3.0)
    assert largest(trace(n)) < n * n
    # The count itself sees one where there is one.
    reference = gradient(mask, None, normalizer=normalizer, implementation="reference")
    assert largest(reference(n)) >= n * n


@pytest.mark.parametrize("bias", ["s", "t", "ns", "bnt"])
def test_the_gradient_of_a_bias_is_summed_tile_by_tile(bias):
    assert largest(gradient(WINDOW, bias)(1000)) < 1000**2


def test_masks_of_data_make_no_array_of_all_pairs():
    ids = struct((1, 1000), jnp.int32)
    lengths = struct((1,), jnp.int32)
    mask = masks.Segments(ids) & masks.Padding(key=lengths) & masks.Causal()
    assert largest(gradient(mask, None)(1000)) < 1000**2


def test_kept_for_the_backward_pass_are_arguments_output_and_a_number_per_row():
    n = 1024
    arrays = operands(n, None, jnp.bfloat16)

    def residuals(arrays):
        call = functools.partial(attention.dot_product_attention, mask=WINDOW)
        return jax.vjp(lambda arrays: call(**arrays), arrays)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, arrays))
    lists = [leaf for leaf in kept if leaf.dtype == jnp.int32]
    assert sum(leaf.size for leaf in lists) < n // 8
    floats = [leaf for leaf in kept if leaf.dtype != jnp.int32]
    expected = [*(a.size for a in arrays.values()), n * N * H, n * N]
    assert sorted(leaf.size for leaf in floats) == sorted(expected)
    assert sum(leaf.dtype == jnp.float32 for leaf in floats) == 1  # the lse
