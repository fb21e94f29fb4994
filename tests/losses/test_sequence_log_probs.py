"""Log-probabilities of sequences, from a linear head and from logits."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from softlib import LinearLogits, losses
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.oracles import preference as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
B, T, D, V = 4, 5, 3, 11
NAN = jnp.nan
both = pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])


def problem(dtype="float32", shape=(B, T)):
    """Hidden states, weight, labels, and which tokens count; none of the last row."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(*shape, D)), dtype)
    weight = jnp.asarray(random.normal(size=(V, D)), dtype)
    labels = jnp.asarray(random.integers(0, V, shape))
    where = random.uniform(size=shape) < 0.7
    where[-1:] = False
    return hidden, weight, labels, jnp.asarray(where)


def of(linear, **options):
    """A function of hidden, weight, labels, where; also for logits."""
    if linear:
        return functools.partial(of_head.sequence_log_probs, **options)

    def run(hidden, weight, labels, where):
        logits = LinearLogits(hidden, weight).materialize()
        return of_stored.sequence_log_probs(logits, labels, where=where, **options)

    return run


@both
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_oracle(linear, dtype):
    with jax.enable_x64(dtype == "float64"):
        hidden, weight, labels, where = problem(dtype)
        hidden_64, weight_64 = (np.asarray(a).astype(float) for a in (hidden, weight))
        wide = hidden_64 @ weight_64.T
        wanted = oracle.sequence_log_probs(wide, np.asarray(labels), np.asarray(where))
        options = {"vocab_chunk": 4} if linear else {}
        call = of(linear, **options)
        actual = jax.jit(lambda *a: call(*a[:3], where=a[3]))(
            hidden, weight, labels, where
        )
        assert actual.dtype == jnp.promote_types(dtype, jnp.float32)
        assert_close(actual, wanted, dtype=actual.dtype, length=V * T)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA / "npo_case0.npz") as data:
        labels, where = (jnp.asarray(data[f"in_{n}"]) for n in ("labels", "where"))
        run = jax.jit(lambda z: of_stored.sequence_log_probs(z, labels, where=where))
        for logits, wanted in (("logits", "logp"), ("ref_logits", "ref_logp")):
            actual = run(jnp.asarray(data[f"in_{logits}"]))
            assert_close(actual, data[f"out_{wanted}"], dtype="float64", length=77)


@pytest.mark.parametrize("shape", [(7,), (0,), (2, 0), (2, 1, 5)])
def test_any_batch_axes(shape):
    hidden, weight, labels, _ = problem(shape=shape)
    tokens = jax.jit(of_head.token_log_probs)(hidden, weight, labels)
    actual = jax.jit(of_head.sequence_log_probs)(hidden, weight, labels)
    assert actual.shape == shape[:-1]
    assert_close(actual, np.asarray(tokens).sum(-1), dtype="float32", length=5)


@both
def test_a_sequence_without_tokens_is_zero_even_with_nan(linear):
    hidden, weight, labels, where = problem()
    logits = LinearLogits(hidden, weight).materialize()
    arrays = (hidden, weight) if linear else (logits,)
    arrays = (arrays[0].at[-1].set(NAN), *arrays[1:])
    labels = labels.at[-1].set(-100)
    functions = of_head if linear else of_stored

    def run(arrays):
        total = functions.sequence_log_probs(*arrays, labels, where=where)
        return total.sum(), total

    gradients, total = jax.jit(jax.grad(run, has_aux=True))(arrays)
    assert total[-1] == 0
    assert (total[:-1] < 0).all()
    np.testing.assert_array_equal(gradients[0][~where], 0)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@both
def test_a_bad_label_makes_its_sequence_nan_without_a_gradient(linear):
    """Also of a loss whose slope at NaN is NaN."""
    hidden, weight, labels, _ = problem()
    labels = labels.at[0, 1].set(V).at[1, 2].set(-1).at[2, 0].set(4)
    options = {"class_where": jnp.arange(V) != 4}
    labels = jnp.where((labels == 4) & (jnp.arange(B)[:, None] != 2), 5, labels)
    where = jnp.ones((B, T), bool)

    def run(hidden, weight):
        total = of(linear, **options)(hidden, weight, labels, where=where)
        loss = losses.dpo_loss(total, 2 * total, total, total)
        return loss.sum(), (total, loss)

    gradients, (total, loss) = jax.jit(jax.grad(run, (0, 1), has_aux=True))(
        hidden, weight
    )
    np.testing.assert_array_equal(np.isnan(total), [True, True, False, False])
    assert total[2] == -jnp.inf
    assert np.isfinite(loss[3])
    np.testing.assert_array_equal(gradients[0][:3], 0)
    assert (gradients[0][3] != 0).all()
    assert np.isfinite(gradients[1]).all()


def test_gradient_of_npo_through_logits_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA / "npo_case0.npz") as data:
        labels, where = (jnp.asarray(data[f"in_{n}"]) for n in ("labels", "where"))
        reference = jnp.asarray(data["out_ref_logp"])
        beta = float(data["in_beta"])

        @jax.jit
        @jax.grad
        def run(logits):
            log_prob = of_stored.sequence_log_probs(logits, labels, where=where)
            return losses.negative_preference_loss(log_prob, reference, beta=beta).sum()

        gradient = run(jnp.asarray(data["in_logits"]))
        wanted = data["out_grad_logits_of_sum"]
        assert_close(gradient, wanted, dtype="float64", length=77)


def test_the_head_of_a_preference_loss_forms_no_logits():
    """No array of tokens times classes, nor of its size, in the program or backward."""
    pairs, length, features, vocabulary = 2, 12, 8, 2048
    rows = 2 * pairs * length

    def loss(hidden, weight, reference, labels, where):
        log_prob = of_head.sequence_log_probs(
            hidden, weight, labels, where=where, vocab_chunk=512
        )
        return losses.dpo_loss(
            log_prob[:pairs], log_prob[pairs:], reference[:pairs], reference[pairs:]
        ).sum()

    struct = jax.ShapeDtypeStruct
    jaxpr = operations.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(
        struct((2 * pairs, length, features), jnp.float32),
        struct((vocabulary, features), jnp.float32),
        struct((2 * pairs,), jnp.float32),
        struct((2 * pairs, length), jnp.int32),
        struct((2 * pairs, length), bool),
    )
    shapes = {
        tuple(int(n) for n in shape.split(","))
        for shape in re.findall(r"\w+\[([\d,]+)\]", str(jaxpr))
    }
    assert (vocabulary, features) in shapes
    assert max(np.prod(shape) for shape in shapes) < rows * vocabulary
    assert not any(rows in s and vocabulary in s for s in shapes)
    assert any(s[-1] == 512 or s[0] == 512 for s in shapes)  # a tile


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_is_that_of_cross_entropy(dtype):
    sequences, length, features, vocabulary = 16, 128, 256, 256_000
    struct = jax.ShapeDtypeStruct
    operands = (
        struct((sequences, length, features), dtype),
        struct((vocabulary, features), dtype),
        struct((sequences, length), jnp.int32),
    )

    def preference(hidden, weight, labels):
        log_prob = of_head.sequence_log_probs(hidden, weight, labels)
        half = sequences // 2
        reference = jnp.zeros(half)
        return losses.dpo_loss(
            log_prob[:half], log_prob[half:], reference, reference
        ).sum()

    def entropy(hidden, weight, labels):
        return losses.linear_softmax_cross_entropy(hidden, weight, labels).sum()

    sizes = []
    for loss in (preference, entropy):
        run = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands).compile()
        found = run.memory_analysis()
        assert found is not None
        sizes.append(found.temp_size_in_bytes)
    print("temporary bytes, dpo and cross-entropy:", sizes)
    assert sizes[0] < 1.2 * sizes[1]


@pytest.mark.slow  # as the log-probabilities of tokens go, by default
def test_under_every_transformation():
    hidden, weight, labels, where = problem(shape=(8, 3))

    def function(hidden, weight, labels, where):
        return of_head.sequence_log_probs(
            hidden, weight, labels, where=where, vocab_chunk=4
        )

    check_transformations(
        function,
        hidden,
        weight,
        labels,
        where,
        rows=(0, 2, 3),
        skip={"forward_mode": "the streamed statistics have a custom_vjp"},
    )


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_function_and_the_argument():
    hidden, weight, labels, where = problem()
    logits = LinearLogits(hidden, weight).materialize()
    linear, given = of_head.sequence_log_probs, of_stored.sequence_log_probs
    for call, error, message in (
        (
            lambda: linear(hidden[0, 0], weight, labels[0, 0]),
            ValueError,
            "`logits` must",
        ),
        (
            lambda: given(logits[0, 0], labels[0, 0]),
            ValueError,
            "`logits` must",
        ),
        (lambda: linear(hidden, weight, labels[0]), ValueError, "`labels` must have"),
        (
            lambda: given(logits, labels * 1.0),
            TypeError,
            "`labels` must have an integer dtype",
        ),
        (
            lambda: given(logits, labels, where=where * 1),
            TypeError,
            "`where` must have dtype bool",
        ),
    ):
        with pytest.raises(error, match=rf"^sequence_log_probs: {message}"):
            call()
