"""Whether a model wrote a text: vectors, level and power, edges, errors."""

import functools
import pathlib

import jax
import numpy as np
import pytest

import softlib
from softlib.logits import StoredLogits
from softlib.testing import assert_close, check_transformations
from tests.compiled import losses, scoring
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/zero_shot_text_tests_case0.npz"


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        logits, labels = jnp.asarray(data["in_logits"]), jnp.asarray(data["in_tokens"])
        where, other = jnp.asarray(data["in_where"]), jnp.asarray(data["in_logits_b"])
        check = functools.partial(assert_close, dtype="float64", length=180)
        test = scoring.entropy_test(logits, labels, where=where)
        check(test.log_perplexity, data["out_log_perplexity"])
        check(test.entropy, data["out_mean_entropy"])
        check(test.difference, data["out_difference"])
        check(test.z, data["out_z"])
        np.testing.assert_array_equal(test.length, where.sum(-1))
        for name, nll in (
            (
                "log_perplexity",
                scoring.sequence_nll(logits, labels, **MEAN, where=where),
            ),
            ("mean_entropy", scoring.sequence_entropy(logits, **MEAN, where=where)),
        ):
            check(nll, data[f"out_{name}"])
        # What text of the other author would cost is a loss that exists.
        crossed = losses.softmax_soft_target_cross_entropy(logits, other, where=where)
        mean = softlib.masked_mean(crossed, where, axis=-1)
        check(mean, data["out_cross_entropy_b_a"])
        two = scoring.two_model_test(other, logits, labels, where=where)
        expected = mean - scoring.sequence_entropy(other, **MEAN, where=where)
        check(two.expected, expected)


MEAN = {"normalize": "mean"}


def texts(logits, count, temperature=1.0, seed=0):
    """Texts of a model whose distributions are those of the rows."""
    random = np.random.default_rng(seed)
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    edges = (p / p.sum(-1, keepdims=True)).cumsum(-1)
    draws = random.uniform(size=(count, len(z), 1))
    return jnp.asarray(np.minimum((draws > edges).sum(-1), z.shape[-1] - 1))


def test_levels_hold_and_errors_fall_with_the_length():
    """Rejects 5 % of the model's own texts, and ever more of those of a warmer one."""
    random = np.random.default_rng(1)
    missed = []
    for length in (16, 64, 256):
        z = jnp.asarray(2 * random.normal(size=(length, 50)), jnp.float32)
        test = lambda y, z=z: scoring.entropy_test(_alike(z, y), y)
        own, other = test(texts(z, 300)), test(texts(z, 300, temperature=1.3))
        assert abs((np.abs(own.z) > 1.96).mean() - 0.05) < 0.035
        missed.append((np.abs(other.z) <= 1.96).mean())
    assert missed[0] > missed[1] > missed[2]
    assert missed[2] < 0.01


def _alike(z, labels):
    return jnp.broadcast_to(z, (*labels.shape, z.shape[-1]))


def test_two_models_tell_their_texts_apart():
    """Where neither is told from the other by its entropy."""
    random = np.random.default_rng(2)
    z = jnp.asarray(2 * random.normal(size=(200, 30)), jnp.float32)
    other = z + 0.7 * jnp.asarray(random.normal(size=z.shape), jnp.float32)
    for author, sign in ((z, 1), (other, -1)):
        labels = texts(author, 100)
        given = _alike(z, labels), _alike(other, labels)
        test = scoring.two_model_test(*given, labels)
        wanted = test.expected if sign > 0 else test.expected_other
        assert (sign * np.asarray(test.log_ratio) > 0).all()
        np.testing.assert_allclose(test.log_ratio.mean(), wanted[0], rtol=0.1)


# ---------------------------------------------------------------------------- promises
def test_texts_without_tokens_without_variance_and_with_impossible_tokens():
    uniform = jnp.zeros((5, 2, 4))
    z = uniform.at[2, 0, 1].set(-jnp.inf).at[3].set(jnp.nan)
    labels = jnp.array([[0, 1], [0, 4], [1, 0], [9, 9], [0, -1]])
    where = jnp.ones((5, 2), bool).at[3].set(False).at[4, 1].set(False)
    test = scoring.entropy_test(z, labels, where=where)
    # Rows of equal classes have no variance: z is 0, not rounding over rounding.
    np.testing.assert_array_equal(test.z, [0, np.nan, np.inf, 0, 0])
    np.testing.assert_array_equal(test.length, [2, 2, 2, 0, 1])
    assert test.difference[3] == test.log_perplexity[3] == test.entropy[3] == 0
    np.testing.assert_allclose(test.entropy[4], np.log(4), rtol=1e-6)
    two = scoring.two_model_test(z, uniform, labels, where=where)
    np.testing.assert_array_equal(two.log_ratio, [0, np.nan, -np.inf, 0, 0])


def test_nucleus_sampling_needs_its_own_logits():
    """A class that sampling excludes is -inf in the array, or not of `class_where`."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    kept = jnp.arange(9) % 3 > 0
    labels = jnp.ones((2, 3), int)
    found = scoring.entropy_test(StoredLogits(z, class_where=kept), labels)
    wanted = scoring.entropy_test(jnp.where(kept, z, -jnp.inf), labels)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_the_test_has_no_gradient():
    z, labels = jnp.ones((1, 2, 3)).at[0, 0, 0].set(2.0), jnp.zeros((1, 2), int)
    total = lambda z: sum(x.sum() for x in scoring.entropy_test(z, labels)[:4])
    np.testing.assert_array_equal(jax.grad(total)(z), 0)


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    z, other = jnp.asarray(random.normal(size=(2, 8, 3, 5)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 5, (8, 3)))

    def function(z, other, labels):
        return tuple(softlib.scoring.two_model_test(z, other, labels))[:3]

    skip = {"forward_mode": "the streamed statistics have a custom_vjp"}
    check_transformations(function, z, other, labels, rows=(0, 1, 2), skip=skip)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    z, labels = jnp.ones((2, 3, 4)), jnp.ones((2, 3), int)
    test, two = scoring.entropy_test, scoring.two_model_test
    pinned = StoredLogits(z, implementation="reference")
    for call, error, message in (
        (lambda: test(z, labels[:, 1:]), ValueError, "`labels` must have shape"),
        (lambda: test(z[0, 0], labels[0, 0]), ValueError, "at least 2 axes"),
        (lambda: test(pinned, labels), ValueError, "`implementation` of the logits"),
        (lambda: test(z, labels, where=z), TypeError, "`where` must have dtype bool"),
        (lambda: two(z, z[:1], labels), ValueError, "`other_logits` must have the"),
        (lambda: two(z, labels, labels), TypeError, "`other_logits` must have a fl"),
        (lambda: two(z, z, z[..., 0]), TypeError, "`labels` must have an integer"),
    ):
        with pytest.raises(error, match=rf"^(entropy|two_model)_test: .*{message}"):
            call()
