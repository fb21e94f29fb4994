"""Logits of tokens and draws of tokens from a codebook."""

import functools

import jax
import numpy as np
import pytest

from softlib.logits import VQLogits
from softlib.testing import assert_close, check_transformations
from tests.compiled import nn, of_stored
from tests.heads import vq_cross_entropy
from tests.host import jnp
from tests.losses.test_vq_logits import CODES, DATA, ROWS, TOKENS, arrays, bias
from tests.oracles import vq_logits as oracle

DRAWS = 40_000


def vq_logits(*operands, **options):
    """The array of logits."""
    return VQLogits(*operands, **options).materialize()


def operands(dtype="float32", seed=0):
    given = arrays(dtype, seed)
    return given["hidden"], given["codebook"], given["mapping"]


def test_logits_match_independent_vectors():
    with jax.enable_x64():
        data = np.load(DATA / "vq_logits_case0.npz")
        names = ("hidden", "codebook", "mapping")
        logits = vq_logits(*(jnp.asarray(data[f"in_{name}"]) for name in names))
        assert_close(logits, data["out_full_logits"], dtype="float64", length=5)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_logits_match_oracle_and_are_float32(dtype):
    with jax.enable_x64():
        given = operands(dtype)
        options = {"scale": 0.5, "softcap": 1.5}
        logits = vq_logits(*given, token_bias=bias(dtype), **options)
        assert logits.dtype == jnp.promote_types(dtype, jnp.float32)
        hidden, codebook, mapping = map(np.asarray, given)
        wanted = oracle.cross_entropy(
            hidden,
            codebook,
            mapping,
            np.zeros(ROWS, int),
            np.ones(ROWS),
            token_bias=np.asarray(bias(dtype)),
            **options,
        ).logits
        assert_close(logits, wanted, dtype=logits.dtype, length=5)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    given = arrays() | {"token_bias": bias()}
    labels = given.pop("labels")
    logits = vq_logits(**given, softcap=2.0)
    loss = vq_cross_entropy(labels=labels, **given, softcap=2.0)
    wanted = of_stored.softmax_cross_entropy(logits, labels)
    assert_close(loss, wanted, dtype="float32", length=TOKENS)


def test_a_traced_mapping_out_of_range_has_no_probability():
    hidden, codebook, mapping = operands()
    bad = mapping.at[jnp.array([5, 6])].set(jnp.array([-1, CODES]))
    logits = jax.jit(vq_logits)(hidden, codebook, bad)
    expected = np.isin(np.arange(TOKENS), [5, 6])
    np.testing.assert_array_equal(logits == -np.inf, [expected] * ROWS)
    clusters = jax.jit(nn.vq_clusters, static_argnums=1)(bad, CODES)
    for code in range(CODES):
        own = clusters.tokens[clusters.starts[code] :][: clusters.counts[code]]
        np.testing.assert_array_equal(own, np.flatnonzero(bad == code))


def chi_square_per_freedom(draws, p):
    """Over tokens that are expected five times at least; 1 on average."""
    wanted = np.asarray(p, np.float64) * len(draws)
    kept = wanted >= 5
    seen = np.bincount(draws, minlength=len(p))
    rest = np.array([wanted[~kept].sum()]), np.array([seen[~kept].sum()])
    wanted, seen = np.append(wanted[kept], rest[0]), np.append(seen[kept], rest[1])
    some = wanted > 0
    return np.sum((seen - wanted)[some] ** 2 / wanted[some]) / (some.sum() - 1)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_draws_have_the_probabilities_of_the_logits(biased, prepared):
    hidden, codebook, mapping = operands()
    excluded = 4
    b = 3 * bias().at[excluded].set(-jnp.inf) if biased else None
    options = {"token_bias": b, "softcap": 2.0}
    p = jax.nn.softmax(vq_logits(hidden[:2], codebook, mapping, **options))
    given = nn.vq_clusters(mapping, CODES) if prepared else mapping
    rows = jnp.repeat(hidden[:2], DRAWS, axis=0)
    sample = jax.jit(functools.partial(nn.vq_sample, **options))
    drawn = np.asarray(sample(jax.random.key(0), rows, codebook, given))
    assert drawn.dtype == np.int32
    for row, own in enumerate(drawn.reshape(2, DRAWS)):
        # 30 degrees of freedom: above 2 once in a thousand.
        assert chi_square_per_freedom(own, p[row]) < 2
    if biased:
        assert excluded not in drawn
    wrong = jax.nn.softmax(vq_logits(hidden[2:3], codebook, mapping, **options))[0]
    assert chi_square_per_freedom(drawn[:DRAWS], wrong) > 10


def test_temperature_sharpens_codes():
    hidden, codebook, mapping = operands()
    logits = vq_logits(hidden[:1], codebook, mapping)
    rows = jnp.repeat(hidden[:1], DRAWS, axis=0)
    sample = jax.jit(functools.partial(nn.vq_sample, temperature=0.5))
    drawn = np.asarray(sample(jax.random.key(1), rows, codebook, mapping))
    p = jax.nn.softmax(logits / 0.5)[0]
    assert chi_square_per_freedom(drawn, p) < 2


def test_draws_of_one_token_of_a_huge_code_reach_all_of_it():
    """Cumulative sums start anew with every code, so that late tokens keep digits."""
    tokens = 2**12
    mapping = jnp.where(jnp.arange(tokens) < 4, 1, 0)
    codebook = jnp.array([[0.0], [8.0]])
    b = jnp.zeros(tokens)
    rows = jnp.zeros((20_000, 1))
    sample = jax.jit(nn.vq_sample)
    drawn = sample(jax.random.key(0), rows, codebook, mapping, token_bias=b)
    quarters = np.bincount(np.asarray(drawn) // (tokens // 4), minlength=4)
    assert (np.abs(quarters - 5000) < 5 * 5000**0.5).all()
    drawn = sample(jax.random.key(0), rows + 1, codebook, mapping, token_bias=b)
    seen = np.bincount(np.asarray(drawn), minlength=4)[:4]
    share = np.exp(8) / (4 * np.exp(8) + tokens - 4)
    assert (np.abs(seen / 20_000 - share) < 5 * (0.25 / 20_000) ** 0.5).all()


def test_shapes_of_draws():
    hidden, codebook, mapping = operands()
    sample = jax.jit(nn.vq_sample)
    for batch, b in (((), None), ((2, 4), bias()), ((0,), None)):
        rows = jnp.zeros((*batch, hidden.shape[-1]))
        drawn = sample(jax.random.key(0), rows, codebook, mapping, token_bias=b)
        assert drawn.shape == batch
        assert ((drawn >= 0) & (drawn < TOKENS)).all()


@pytest.mark.slow  # a gather after the product of every head
def test_logits_under_every_transformation():
    check_transformations(
        lambda h, c, m, b: vq_logits(h, c, m, token_bias=b, softcap=2.0),
        *operands(),
        bias(),
        rows=(0,),
    )


@pytest.mark.usefixtures("untyped", "eager")
def test_wrong_arguments_are_errors():
    hidden, codebook, mapping = operands()
    for function in (vq_logits, functools.partial(nn.vq_sample, jax.random.key(0))):
        with pytest.raises(ValueError, match=r"`mapping` must hold codes in \[0, 7\)"):
            function(hidden, codebook, mapping + 1)
        with pytest.raises(TypeError, match="`mapping` must have an integer dtype"):
            function(hidden, codebook, mapping * 1.0)
        with pytest.raises(ValueError, match=r"`token_bias` must have.*per token"):
            function(hidden, codebook, mapping, token_bias=jnp.zeros(3))
        with pytest.raises(ValueError, match="`codebook` must have shape"):
            function(hidden[:, 1:], codebook, mapping)
    clusters = nn.vq_clusters(mapping, CODES)
    with pytest.raises(ValueError, match=r"`mapping.counts`.*\(6,\).*one per code"):
        nn.vq_sample(jax.random.key(0), hidden, codebook[:6], clusters)
