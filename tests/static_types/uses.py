"""What type checkers infer of some calls; `make lint` asks three of them.

Nothing here runs. To a checker that knows a package that is loaded on first use by
`__getattr__` alone it is `Any`, which `assert_type` refuses.
"""

from collections.abc import Callable
from typing import assert_type

import jax
import optax
from flax import nnx

import softlib  # and nothing below it: that would tell the checkers


def heads(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> None:
    logits = softlib.LinearLogits(hidden, weight)
    assert_type(logits[:, :-1], softlib.LinearLogits)
    assert_type(logits.reshape(-1), softlib.LinearLogits)
    assert_type(logits.materialize(), jax.Array)
    loss = softlib.losses.softmax_cross_entropy
    assert_type(loss(logits, labels), jax.Array)
    assert_type(loss(weight, labels), jax.Array)
    found = softlib.losses.linear_softmax_cross_entropy(
        hidden, weight, labels, return_lse=True
    )
    assert_type(found, softlib.losses.CrossEntropyResult)
    assert_type(found.lse, jax.Array)
    assert_type(softlib.logits.row_statistics(logits, labels).lse, jax.Array | None)
    assert_type(softlib.logits.token_surprisals(logits), jax.Array)


def layers(mask: softlib.masks.Mask, hidden: jax.Array) -> None:
    assert_type(softlib.nn.attention_fn(mask), Callable[..., jax.Array])
    head = softlib.nn.OutputHead(8, 100, rngs=nnx.Rngs(0))
    assert_type(head(hidden), softlib.LinearLogits)


def optimizers() -> None:
    assert_type(softlib.optim.perp_grad(), optax.GradientTransformation)
    step = softlib.optim.sgld(0.1, key=jax.random.key(0))
    assert_type(step, optax.GradientTransformation)


def comparisons(x: jax.Array) -> None:
    assert_type(softlib.testing.assert_close(x, x, dtype=x.dtype, length=1), None)


def studies(x: jax.Array) -> None:
    pair = softlib.scoring.annotate_preferences(x)
    assert_type(pair.margin, jax.Array)
    assert_type(softlib.scoring.greedy_nll(x), jax.Array)
    test = softlib.scoring.entropy_test(softlib.LinearLogits(x, x), x)
    assert_type(test, softlib.scoring.EntropyTest)
    assert_type(test.z, jax.Array)
    beam = softlib.decoding.value_guided_search(
        *(x, lambda key, states: (states, x), lambda states: x, x),
        num_steps=1,
        num_proposals=1,
    )
    assert_type(beam.values, jax.Array)
    step = softlib.decoding.speculative_verify(x, x, x, x)
    assert_type(step.next_token, jax.Array)
    assert_type(softlib.estimation.ExpertGate().top_k, int | None)
    distance = softlib.estimation.proximity_distance(x)
    assert_type(distance.triangle_excess, jax.Array)
    fit = softlib.numerics.generalized_gaussian_fit(x)
    assert_type(fit.entropy, jax.Array)
    codes = softlib.quantize.FloatFormat(4, 3).encode(x)
    assert_type(codes, jax.Array)
    bound = softlib.information.redundancy_bound(x, x, num_samples=10)
    assert_type(bound.mixture_bound, jax.Array)
