"""Counts the loops and kernels that XLA compiles for attention, which take its time.

Every kernel of a program for CPUs takes XLA about as long as any other, whatever is in
it; equal ones of a loop count once. Counted is the text of the compiled program, so
that no clock decides.
"""

import re
from typing import Any

import jax
import numpy as np
import pytest

from softlib import masks
from softlib.attention import dot_product_attention
from softlib.attention._engine import batch_heads as _batch_heads
from tests.compiled import f32

BLOCKS: Any = {"block_query": 8, "block_key": 8}
# Causal, with a row of its own at the end, beyond which there is padding.
LENGTH = 20


def gradient(**options):
    def total(*arrays):
        out, lse = dot_product_attention(*arrays, return_lse=True, **options)
        return (out * out).sum() + (lse * lse).sum()

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))


def arrays(length):
    random = np.random.default_rng(0)
    return [f32(random.normal(size=(2, length, 4, 8))) for _ in range(3)]


def compiled(function, length) -> str:
    return function.lower(*arrays(length)).compile().as_text()


def loops(text):
    return len(re.findall(r" while\(", text))


def kernels(text):
    """Fusions but for those of products, which XLA takes from a library."""
    return len(re.findall(r" fusion\((?!.*kind=kCustom)", text))


@pytest.mark.parametrize(
    ("options", "length", "most_loops", "most_kernels"),
    [
        ({}, 16, 0, 23),
        ({"is_causal": True}, 16, 0, 25),
        ({"is_causal": True, **BLOCKS}, LENGTH, 2, 57),
        ({"mask": masks.Window(9, 0), **BLOCKS}, 32, 2, 55),
    ],
    ids=["one block", "one block, causal", "causal", "window"],
)
def test_a_small_gradient_has_few_kernels(options, length, most_loops, most_kernels):
    text = compiled(gradient(**options), length)
    assert loops(text) <= most_loops
    assert 0 < kernels(text) <= most_kernels


def test_few_whole_blocks_share_the_loop_of_the_others(monkeypatch):
    """Masked as well, which changes nothing; many have a loop without the mask."""
    given = arrays(LENGTH)
    results, found = [], []
    for most in (_batch_heads.MASKED, 0):
        monkeypatch.setattr(_batch_heads, "MASKED", most)
        jax.clear_caches()  # a trace does not know of what was replaced
        call = gradient(is_causal=True, **BLOCKS)
        found.append(loops(compiled(call, LENGTH)))
        results.append(call(*given))
    assert found == [2, 4]
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *results)


def test_barriers_for_cpus_are_in_no_program_for_gpus():
    """XLA for GPUs fails where one stands between a loop's counter and a slice."""
    call = gradient(**BLOCKS, implementation="xla").trace(*arrays(16))
    barriers = {
        platform: call.lower(lowering_platforms=(platform,))
        .as_text()
        .count("optimization_barrier")
        for platform in ("cpu", "cuda")
    }
    assert barriers["cpu"] > 0 == barriers["cuda"]
