"""Memory of compiled Kronecker attention: linear, never an array of pairs."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from softlib import attention, masks
from tests import operations
from tests.attention.tensor_problems import Between, PerAxis, attend
from tests.attention.test_attention_memory import arrays_of
from tests.host import jnp

struct = jax.ShapeDtypeStruct
N, K, H = 2, 1, 16
BLOCKS: Any = {"block_query": 64, "block_keys": (64, 64)}
WINDOWS = PerAxis(masks.Window(100, 0), masks.Window(40, 0))
MASKS = {
    "none": None,
    "windows": WINDOWS,
    "causal": masks.Causal(),
    "between": PerAxis(masks.Causal(), None, joint=Between(2, 1, masks.Window(100, 0))),
}


def operands(n, dtype=jnp.float32, axes=2):
    of_key = struct((1, n, K, H), dtype)
    query = struct((1, n, N, H), dtype)
    return {"query": query, "keys": (of_key,) * axes, "values": (of_key,) * axes}


def total(arrays, mask, **options):
    out, lse = attend(**arrays, mask=mask, return_lse=True, **options)
    return (out.astype(lse.dtype) ** 2).sum() + lse.sum()


def traced(n, mask, *, gradient=True, **options):
    function = functools.partial(total, mask=mask, **options)
    if gradient:
        function = jax.value_and_grad(function)
    with operations.visible():
        return jax.jit(function).trace(operands(n))


def largest(traced):
    return max(math.prod(a.shape) for a in arrays_of(traced.jaxpr.jaxpr))


def temporary(traced):
    found = traced.lower().compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["none", "windows"])
def test_scratch_is_linear(name, gradient):
    sizes = [512, 1024, 2048] if name == "none" else [1024, 2048, 4096]
    small, middle, large = (
        temporary(traced(n, MASKS[name], gradient=gradient, **BLOCKS)) for n in sizes
    )
    # A token adds its arguments and gradients a few times; a byte per pair is more.
    per_token = 4 * H * (2 * N + 4 * 2 * K)
    assert middle - small < 2 * per_token * (sizes[1] - sizes[0])
    assert large - middle < 2 * per_token * (sizes[2] - sizes[1])
    assert large < sizes[-1] ** 2 + 64**3 * 4 * 8 * N


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_no_array_of_pairs(name, gradient):
    n = 1500  # no multiple of a block: padded arrays of pairs would be larger
    trace = functools.partial(traced, mask=MASKS[name], gradient=gradient, **BLOCKS)
    assert largest(trace(n)) < n * n / 2


def test_the_count_sees_an_array_where_there_is_one():
    assert largest(traced(32, None, implementation="reference")) >= 32**3


def test_masks_of_data_and_functions_make_no_array_of_pairs():
    ids, length = struct((1, 1500), jnp.int32), struct((1,), jnp.int32)
    mask = PerAxis(
        masks.Segments(ids) & masks.Causal(), masks.Padding(key=length), joint=odd
    )
    function = jax.value_and_grad(functools.partial(total, **BLOCKS))
    trace = jax.jit(function).trace(operands(1500), mask)
    assert largest(trace) < 1500**2 / 2


def odd(query, one, two):
    return (query + one + two) % 2 == 1


def test_kept_for_the_backward_pass_are_arguments_output_and_a_number_per_row():
    n = 512
    arrays = operands(n, jnp.bfloat16)

    def residuals(arrays):
        call = functools.partial(attend, mask=WINDOWS, **BLOCKS)
        return jax.vjp(lambda arrays: call(**arrays), arrays)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, arrays))
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    lists = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.integer)]
    assert len(floats) + len(lists) == len(kept)
    assert sum(leaf.size for leaf in lists) < n
    expected = [*(a.size for a in jax.tree.leaves(arrays)), n * N * H, n * N]
    assert sorted(leaf.size for leaf in floats) == sorted(expected)
    assert sum(leaf.dtype == jnp.float32 for leaf in floats) == 1  # the lse


def test_four_axes_need_no_more_scratch_than_their_tiles():
    function = jax.value_and_grad(
        functools.partial(total, mask=masks.Window(9, 0), block_query=16)
    )
    small, large = (
        temporary(
            jax.jit(functools.partial(function, block_keys=(16, 16, 16))).trace(
                operands(n, axes=3)
            )
        )
        for n in (256, 1024)
    )
    per_token = 4 * H * (2 * N + 4 * 3 * K)
    assert large - small < 2 * per_token * 768
    assert large < 4 * 1024 * per_token + 4 * 16**4 * N * 8


# ----------------------------------------------------------------- what a window visits
def visited(mask, n):
    sizes = {"block_query": 64, "block_key": (64, 64)}
    return attention.block_plan(mask, n, (n, n), **sizes).visited


def test_blocks_that_windows_visit_grow_with_the_length():
    counts = [visited(WINDOWS, n) for n in (1024, 2048, 4096)]
    # A block of queries sees at most 3 blocks on one axis and 2 on the other.
    assert counts[2] <= 6 * 4096 // 64
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_blocks_that_masks_leave_are_those_that_hold_a_tuple():
    """Of a joint mask too: an unordered pair once is half of all blocks."""
    n = 8
    assert visited(None, n * 64) == n**3
    of_row = np.arange(1, n + 1)
    assert visited(masks.Causal(), n * 64) == (of_row**2).sum()
    once = PerAxis(None, None, joint=Between(2, 1, masks.Causal(-1)))
    assert visited(once, n * 64) == n * (n * (n + 1) // 2)


def test_lists_of_blocks_are_short_beside_the_arguments():
    """Of all tuples, up to this length; lists of all blocks grow with its cube."""
    n = 4096
    plan = attention.block_plan(None, n, (n, n))
    arguments = sum(a.size for a in jax.tree.leaves(operands(n)))
    assert plan.whole.size + plan.partial.size < arguments
