"""Algebra that holds for every head: permutations, shifts, sums, chunks, repetition."""

import functools

import jax
import numpy as np
from hypothesis import given, settings, strategies as st

import softlib
from softlib import losses
from softlib.testing import assert_close
from tests.heads import of_head, of_stored
from tests.host import jnp

CLASSES, FEATURES = 13, 4
rows_and_seeds = given(
    rows=st.sampled_from([1, 5]), seed=st.integers(0, 2**31), chunk=st.just(5)
)
examples = functools.partial(settings, deadline=None)


def problem(rows, seed):
    random = np.random.default_rng(seed)
    gain = random.choice([0.1, 1.0, 10.0])
    return (
        random,
        {
            "hidden": random.normal(size=(rows, FEATURES)).astype(np.float32),
            "weight": (gain * random.normal(size=(CLASSES, FEATURES))).astype(
                np.float32
            ),
            "bias": random.normal(size=CLASSES).astype(np.float32),
        },
        random.integers(0, CLASSES, rows),
    )


@functools.partial(jax.jit, static_argnames=("chunk", "softcap"))
def loss_and_gradients(arrays, labels, cotangent=1.0, *, chunk=5, softcap=None):
    def total(arrays):
        loss, lse = losses.linear_softmax_cross_entropy(
            **arrays,
            labels=labels,
            vocab_chunk=chunk,
            softcap=softcap,
            return_lse=True,
        )
        return (cotangent * loss).sum(), (loss, lse)

    gradients, outputs = jax.grad(total, has_aux=True)(arrays)
    return outputs, gradients


@functools.partial(jax.jit, static_argnames=("chunk", "statistics"))
def row_statistics(arrays, labels=None, class_where=None, *, statistics, chunk=5):
    return of_head.row_statistics(
        **arrays,
        labels=labels,
        class_where=class_where,
        statistics=statistics,
        vocab_chunk=chunk,
    )


def close(actual, expected, scale=1.0):
    """Logits of 40 at most, so errors of a few times 40 eps."""
    for one, two in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        top = max(scale, float(np.max(np.abs(two), initial=0)))
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5 * top)


@examples(max_examples=20)
@rows_and_seeds
def test_the_order_of_the_classes_does_not_matter(rows, seed, chunk):
    random, arrays, labels = problem(rows, seed)
    order = random.permutation(CLASSES)
    moved = arrays | {n: arrays[n][order] for n in ("weight", "bias")}
    outputs, gradients = loss_and_gradients(arrays, labels, chunk=chunk)
    again, shuffled = loss_and_gradients(moved, np.argsort(order)[labels], chunk=chunk)
    close(again, outputs)
    close(shuffled["hidden"], gradients["hidden"], 10)
    for name in ("weight", "bias"):
        close(shuffled[name], gradients[name][order])


@examples(max_examples=20)
@rows_and_seeds
def test_a_constant_in_the_bias_moves_lse_and_nothing_else(rows, seed, chunk):
    _, arrays, labels = problem(rows, seed)
    outputs, gradients = loss_and_gradients(arrays, labels, chunk=chunk)
    moved = arrays | {"bias": arrays["bias"] + 3}
    again, shifted = loss_and_gradients(moved, labels, chunk=chunk)
    close(again[0], outputs[0], 40)
    close(again[1], outputs[1] + 3, 40)
    close(shifted, gradients, 40)


@examples(max_examples=20)
@rows_and_seeds
def test_the_gradient_of_the_loss_sums_to_zero_over_the_classes(rows, seed, chunk):
    random, arrays, labels = problem(rows, seed)
    cotangent = random.normal(size=rows).astype(np.float32)
    _, gradients = loss_and_gradients(arrays, labels, cotangent, chunk=chunk)
    np.testing.assert_allclose(gradients["bias"].sum(), 0, atol=1e-4)


@examples(max_examples=20)
@given(
    rows=st.sampled_from([1, 5]),
    seed=st.integers(0, 2**31),
    chunk=st.sampled_from([1, 4, 12, 99]),
    softcap=st.just(3.0),
)
def test_the_size_of_the_chunks_changes_nothing_but_rounding(
    rows, seed, chunk, softcap
):
    _, arrays, labels = problem(rows, seed)
    whole = loss_and_gradients(arrays, labels, chunk=CLASSES, softcap=softcap)
    parts = loss_and_gradients(arrays, labels, chunk=chunk, softcap=softcap)
    close(parts, whole, 40)


@examples(max_examples=10)
@rows_and_seeds
def test_two_runs_are_equal_to_the_last_bit(rows, seed, chunk):
    _, arrays, labels = problem(rows, seed)
    runs = [loss_and_gradients(arrays, labels, chunk=chunk) for _ in range(2)]
    for one, two in zip(*map(jax.tree.leaves, runs), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@examples(max_examples=10)
@rows_and_seeds
def test_the_probabilities_of_all_labels_sum_to_one(rows, seed, chunk):
    _, arrays, _ = problem(rows, seed)
    every = np.broadcast_to(np.arange(CLASSES), (rows, CLASSES))
    got = row_statistics(arrays, every, statistics=("lse", "label_logits"), chunk=chunk)
    p = np.exp(got.label_logits - got.lse[:, None])
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-4)


@examples(max_examples=20)
@given(
    rows=st.sampled_from([1, 5]),
    seed=st.integers(0, 2**31),
    cut=st.integers(0, CLASSES),
)
def test_the_parts_of_a_vocabulary_add_up(rows, seed, cut):
    """Lse by logaddexp, sums by sums; a part may be empty."""
    _, arrays, _ = problem(rows, seed)
    names = ("lse", "sum_logits", "sum_squared_logits", "max_logit")
    run = functools.partial(row_statistics, arrays, statistics=names)
    low = np.arange(CLASSES) < cut
    whole, one, two = (run(class_where=c) for c in (np.ones_like(low), low, ~low))
    close(jnp.logaddexp(one.lse, two.lse), whole.lse, 40)
    close(one.sum_logits + two.sum_logits, whole.sum_logits, 100)
    both = one.sum_squared_logits + two.sum_squared_logits
    close(both, whole.sum_squared_logits, 100)
    np.testing.assert_array_equal(
        np.maximum(one.max_logit, two.max_logit), whole.max_logit
    )


@examples(max_examples=20)
@rows_and_seeds
def test_bounds(rows, seed, chunk):
    """Max <= lse <= max + log V; 0 <= entropy <= log V; mean <= max; loss >= 0."""
    _, arrays, labels = problem(rows, seed)
    names = ("lse", "label_logits", "mean_logit", "max_logit")
    got = row_statistics(arrays, labels, statistics=names, chunk=chunk)
    slack = 1e-4
    assert (got.max_logit <= got.lse).all()
    assert (got.lse <= got.max_logit + np.log(CLASSES) + slack).all()
    assert (got.mean_logit <= got.max_logit + slack).all()
    assert (got.lse - got.mean_logit >= -slack).all()
    assert (got.lse - got.mean_logit <= np.log(CLASSES) + slack).all()
    assert (got.label_logits <= got.lse).all()


# Rounding may exchange two nearly equal logits of different products.
WITHOUT_RANK = tuple(
    n for n in softlib.logits.RowStatistics._fields if n != "label_rank"
)


@examples(max_examples=20)
@rows_and_seeds
def test_both_sources_of_logits_agree(rows, seed, chunk):
    _, arrays, labels = problem(rows, seed)
    statistics = WITHOUT_RANK
    streamed = row_statistics(arrays, labels, statistics=statistics, chunk=chunk)
    logits = arrays["hidden"] @ arrays["weight"].T
    stored = _stored(logits, labels, arrays["bias"])
    for name in statistics:
        one, two = getattr(streamed, name), getattr(stored, name)
        if name == "argmax":
            np.testing.assert_array_equal(one, two)
        else:
            scale = 2000 if name == "sum_squared_logits" else 40
            close(one, two, scale)


@jax.jit
def _stored(logits, labels, bias):
    return of_stored.row_statistics(logits, labels, bias=bias, statistics=WITHOUT_RANK)


@examples(max_examples=10)
@given(seed=st.integers(0, 2**31), smoothing=st.sampled_from([0.0, 0.25, 1.0]))
def test_smoothing_interpolates_between_the_label_and_all_classes(seed, smoothing):
    _, arrays, labels = problem(5, seed)
    run = lambda e: _smoothed(arrays, labels, label_smoothing=e)
    expected = (1 - smoothing) * run(0.0) + smoothing * run(1.0)
    assert_close(run(smoothing), expected, dtype=jnp.float32, length=13, c=16)


@functools.partial(jax.jit, static_argnames="label_smoothing")
def _smoothed(arrays, labels, *, label_smoothing):
    return losses.linear_softmax_cross_entropy(
        **arrays, labels=labels, label_smoothing=label_smoothing, vocab_chunk=5
    )
