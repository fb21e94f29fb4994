"""A call outside `jax.jit` compiles nothing that a call before it has compiled."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from softlib import attention, information, losses, quantize, recurrent, softmax
from tests import example_calls
from tests.example_calls import FUNCTIONS, Call
from tests.heads import of_head, of_stored

# Calls that compile each time, and why.
COMPILING = {
    "softlib.decoding.beam_search": "its loop calls the caller's function",
    "softlib.decoding.generate": "its loop calls the caller's function",
    "softlib.decoding.sample_gumbel_flow": "its loop calls the caller's function",
    "softlib.decoding.speculative_generate": "its loop calls the caller's function",
    "softlib.decoding.value_guided_search": "its loop calls the caller's function",
    "softlib.estimation.fit_exponential_family": "its loop calls the caller's function",
    "softlib.optim.projected_gradient_ascent": "its loop calls the caller's function",
}
NOT_CALLED = {
    "softlib.explain": "traces what it is called with, and computes nothing",
    "softlib.attention.sequence_parallel_attention": "runs inside jax.shard_map",
}
NOT_REVERSED = {
    "softlib.decoding.beam_search",  # their loops end when all sequences have
    "softlib.decoding.generate",
    "softlib.decoding.speculative_generate",
    "softlib.estimation.fit_annealing_law",  # and those that fit
    "softlib.estimation.fit_exponential_family",
    "softlib.estimation.fit_gaussian_experts",  # loops until it has converged
    "softlib.estimation.fit_gaussian_mixture",
    "softlib.estimation.fit_logistic_regression",
    "softlib.estimation.fit_separator",
    "softlib.estimation.fit_softmax_regression",
}
CALLED = [name for name in FUNCTIONS if name.address not in NOT_CALLED]
KEPT = [name for name in CALLED if name.address not in COMPILING]


@pytest.fixture
def count() -> Iterator[list[int]]:
    """One entry, the number of compilations so far."""
    counted = [0]

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        counted[0] += "backend_compile" in event

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield counted
    jax.monitoring.unregister_event_duration_listener(heard)


def compilations(count: list[int], call: Callable[[], Any]) -> int:
    """Those of the third of three calls; a second may meet results of the first."""
    for _ in range(2):
        jax.block_until_ready(jax.tree.leaves(call()))
    before = count[0]
    jax.block_until_ready(jax.tree.leaves(call()))
    return count[0] - before


def gradient(call: Call) -> Callable[[], Any] | None:
    """By everything that is floating, of the sum of all floating results."""
    function, arrays = call.split()
    floating = [array for array in arrays if example_calls.is_floating(array)]

    def total(floating: list[Any]) -> Any:
        rest = iter(floating)
        own = [next(rest) if example_calls.is_floating(a) else a for a in arrays]
        found = filter(example_calls.is_floating, function(own))
        return sum((array.astype(jnp.float32).sum() for array in found), jnp.zeros(()))

    return (lambda: jax.grad(total)(floating)) if floating else None


@pytest.mark.parametrize("name", KEPT, ids=lambda name: name.address)
def test_calls_compile_once(name, count):
    assert compilations(count, example_calls.of(name.address)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT, ids=lambda name: name.address)
def test_gradients_compile_once(name, count):
    derivative = gradient(example_calls.of(name.address))
    if derivative is not None and name.address not in NOT_REVERSED:
        assert compilations(count, derivative) == 0


def test_exceptions_are_exceptions(count):
    for name in CALLED:
        if name.address in COMPILING:
            call = example_calls.of(name.address)
            assert compilations(count, call) > 0, name.address


# ------------------------------------------------------------------ loops of many steps
def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


HIDDEN, HEAD, LOGITS = _normal(64, 32), _normal(8192, 32), _normal(64, 8192)
LABELS = jnp.arange(64) * 100
TOKENS = _normal(1, 300, 2, 8)
STEPS = _normal(2, 300, 4)
LOOPS: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    "cross-entropy": (lambda z: of_stored.softmax_cross_entropy(z, LABELS), (LOGITS,)),
    "linear cross-entropy": (
        lambda h, w: losses.linear_softmax_cross_entropy(h, w, LABELS),
        (HIDDEN, HEAD),
    ),
    "linear cross-entropy, sum": (
        lambda h, w: of_head.softmax_cross_entropy_sum(h, w, LABELS),
        (HIDDEN, HEAD),
    ),
    "temperature": (
        lambda h: of_head.optimal_temperature(
            h, HEAD, rho=0.5, temperature_min=0.1, temperature_max=10.0
        ),
        (HIDDEN,),
    ),
    "attention": (
        lambda x: attention.dot_product_attention(
            x[:, :128], x[:, :128], x[:, :128], is_causal=True
        ),
        (TOKENS,),
    ),
    "decode": (
        lambda x: attention.decode_attention(x[:, :1], x, x),
        (TOKENS,),
    ),
    "linear attention": (
        lambda x: recurrent.linear_attention(x, x, x, is_causal=True),
        (TOKENS,),
    ),
    "linear attention, both sides": (
        lambda x: recurrent.linear_attention(x, x, x, feature_map="taylor2"),
        (TOKENS,),
    ),
    "recurrence": (lambda x: recurrent.linear_recurrence(x, x, axis=1), (STEPS,)),
    "sequential recurrence": (
        lambda x: recurrent.linear_recurrence(x, x, axis=1, method="sequential"),
        (STEPS,),
    ),
    "selective scan": (
        lambda x: recurrent.selective_scan(x, x, jnp.ones((4, 4)), x, x),
        (STEPS,),
    ),
    "kernel densities": (
        lambda p: information.cauchy_schwarz_divergence(
            p, p[:40] + 1, bandwidth=1.0, row_chunk=16
        ),
        (HIDDEN,),
    ),
    "sparsemax": (softmax.sparsemax, (LOGITS,)),
    "entmax": (lambda z: softmax.entmax(z, alpha=1.7), (LOGITS,)),
    "soft top k": (lambda z: softmax.soft_top_k(z, k=5), (LOGITS,)),
}


@pytest.mark.parametrize("case", LOOPS)
def test_loops_compile_once(case, count):
    function, arrays = LOOPS[case]
    assert compilations(count, lambda: function(*arrays)) == 0
    total = lambda arrays: function(*arrays).sum()
    assert compilations(count, lambda: jax.grad(total)(arrays)) == 0


def test_searches_compile_once(count):
    search = lambda: of_head.top_k(HIDDEN, HEAD, k=5)
    assert compilations(count, search) == 0
    assert compilations(count, lambda: softmax.top_k_logits(LOGITS, k=500)) == 0
    assert compilations(count, lambda: softmax.soft_top_k(LOGITS, k=500)) == 0
    assert compilations(count, lambda: softmax.top_p_logits(LOGITS, p=0.9)) == 0
    cluster = lambda: quantize.kmeans(HIDDEN, 4, key=jax.random.key(0))
    assert compilations(count, cluster) == 0


def test_a_function_of_the_caller_is_called_in_each_call():
    # What it reads may have changed; a program that is kept would not notice.
    factor = 1.0
    features = lambda x: factor * jnp.exp(x)
    read = lambda: recurrent.linear_attention(
        *[TOKENS] * 3, feature_map=features, normalizer="none"
    )
    before = read()
    factor = 2.0
    assert jnp.allclose(read(), 4 * before, rtol=1e-5)


# Of small arrays: what the allocator keeps of large ones is no growth.
SMALL: dict[str, tuple[Callable[..., Any], jax.Array]] = {
    "cross-entropy": (
        lambda h: losses.linear_softmax_cross_entropy(h, HEAD[:2100], LABELS[:8]),
        HIDDEN[:8],
    ),
    "attention": (LOOPS["attention"][0], TOKENS),
    "sparsemax": (softmax.sparsemax, LOGITS[:8, :300]),
}


@pytest.mark.usefixtures("untyped")  # the checks of types take most of the time
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of memory")
@pytest.mark.parametrize("case", SMALL)
def test_memory_does_not_grow(case):
    function, array = SMALL[case]
    derivative = jax.grad(lambda array: function(array).sum())

    def resident(calls: int) -> int:
        for _ in range(calls):
            jax.block_until_ready(derivative(array))
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    resident(10)
    before = resident(10)
    assert resident(50) - before < 2 * 2**20
