"""Codebook heads: the cross-entropy over V tokens from K logits."""

import functools
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import losses
from softlib.logits import VQLogits
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.heads import vq_cross_entropy
from tests.host import jnp
from tests.losses.test_memory import temporary
from tests.oracles import vq_logits as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
ROWS, FEATURES, CODES, TOKENS = 8, 5, 7, 31
VQ: Any = functools.partial(vq_cross_entropy, vocab_chunk=3)


def arrays(dtype="float32", seed=0) -> dict[str, Any]:
    """Code 3 has no token, code 5 one."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    mapping = random.choice([0, 1, 2, 4, 6], TOKENS)
    mapping[11] = 5
    return {
        "hidden": draw(ROWS, FEATURES),
        "codebook": draw(CODES, FEATURES),
        "mapping": jnp.asarray(mapping),
        "labels": jnp.asarray(random.integers(0, TOKENS, ROWS)).at[1].set(11),
    }


def bias(dtype="float32"):
    return jnp.asarray(np.random.default_rng(3).normal(size=TOKENS), dtype)


def run_vq(arrays, cotangent, **options):
    """Loss and gradients of the floating arguments."""
    floating = {
        n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)
    }
    others = {n: a for n, a in arrays.items() if n not in floating}

    @jax.jit
    def run(floating, others, cotangent):
        loss, pull = jax.vjp(lambda f: VQ(**f, **others, **options), floating)
        return loss, pull(cotangent)[0]

    return run(floating, others, cotangent)


# ----------------------------------------------------------------------------- oracles
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_matches_independent_vectors(implementation):
    with jax.enable_x64():
        data = np.load(DATA / "vq_logits_case0.npz")
        names = ("hidden", "codebook", "mapping", "labels")
        given = {name: jnp.asarray(data[f"in_{name}"]) for name in names}
        cotangent = jnp.asarray(data["in_cotangent"])
        loss, gradients = run_vq(given, cotangent, implementation=implementation)
        close = functools.partial(assert_close, dtype="float64", length=40)
        close(loss, data["out_loss"])
        close(gradients["hidden"], data["out_grad_hidden"])
        close(gradients["codebook"], data["out_grad_codebook"])
        counts = VQLogits.token_counts(given["mapping"], 8)
        np.testing.assert_array_equal(counts, data["out_counts"])
        assert counts.dtype == jnp.int32


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("everything", [False, True])
def test_matches_oracle(dtype, everything):
    """Every exception in one batch, and gradients of every argument."""
    with jax.enable_x64():
        given = arrays(dtype)
        cotangent = np.random.default_rng(1).normal(size=ROWS)
        where = jnp.arange(ROWS) != 3
        given["hidden"] = given["hidden"].at[3].set(jnp.nan)
        given["labels"] = (
            given["labels"].at[jnp.array([2, 4])].set(jnp.array([-1, TOKENS]))
        )
        options: dict[str, Any] = {"where": where}
        if everything:
            given["token_bias"] = bias(dtype)
            scales = jnp.linspace(0.5, 1.5, ROWS).astype(dtype)
            given["temperature"] = scales
            options |= {"scale": 1.5, "softcap": 2.0}
        wide = jnp.promote_types(dtype, jnp.float32)
        loss, gradients = run_vq(given, jnp.asarray(cotangent, wide), **options)
        assert loss.dtype == wide
        wanted = oracle.cross_entropy(
            **{n: np.asarray(a) for n, a in given.items()},
            cotangent=cotangent,
            **options,
        )
        assert_close(loss, wanted.loss, dtype=wide, length=TOKENS)
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            # The products of the backward pass take the dtype of their operands.
            assert_close(gradient, wanted.gradients[name], dtype=dtype, length=TOKENS)


@pytest.mark.parametrize(
    ("batch", "tokens", "codes"),
    [((), 1, 1), ((1,), 3, 2), ((2, 3), 128, 5), ((0,), 3, 2), ((3,), 5, 127)],
)
def test_shapes(batch, tokens, codes):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(*batch, 4)), jnp.float32)
    codebook = jnp.asarray(random.normal(size=(codes, 4)), jnp.float32)
    mapping = jnp.asarray(random.integers(0, codes, tokens))
    labels = jnp.asarray(random.integers(0, tokens, batch))
    loss = vq_cross_entropy(hidden, codebook, mapping, labels)
    assert loss.shape == batch
    rows = hidden.reshape(-1, 4)
    wanted = oracle.cross_entropy(
        rows, codebook, np.asarray(mapping), labels.reshape(-1), np.ones(len(rows))
    )
    assert_close(loss.reshape(-1), wanted.loss, dtype="float32", length=tokens)


# ----------------------------------------------------------------------------- promises
def test_one_code_per_token_is_the_plain_head():
    given = arrays("bfloat16")
    table, labels = given["codebook"], given["labels"] % CODES
    permutation = jnp.array([3, 0, 6, 2, 5, 1, 4])
    vq = VQ(given["hidden"], table, permutation, labels)
    plain = losses.linear_softmax_cross_entropy(
        given["hidden"], table[permutation], labels
    )
    assert_close(vq, plain, dtype="float32", length=CODES)
    with_bias = VQ(
        given["hidden"], table, permutation, labels, token_bias=bias()[:CODES]
    )
    plain = losses.linear_softmax_cross_entropy(
        given["hidden"], table[permutation], labels, bias=bias()[:CODES]
    )
    assert_close(with_bias, plain, dtype="float32", length=CODES)


def test_one_code_is_the_uniform_distribution_and_with_a_bias_the_unigram():
    given = arrays() | {"mapping": jnp.zeros(TOKENS, int)}
    given["codebook"] = given["codebook"][:1]
    np.testing.assert_allclose(VQ(**given), np.log(TOKENS), rtol=1e-6)
    unigram = VQ(**given, token_bias=bias())
    wanted = -jax.nn.log_softmax(bias())[given["labels"]]
    assert_close(unigram, wanted, dtype="float32", length=TOKENS)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 30))
def test_loss_is_at_least_the_logarithm_of_the_size_of_the_code(seed, size):
    found = arrays(seed=seed)
    found["hidden"] = size * found["hidden"]
    counts = VQLogits.token_counts(found["mapping"], CODES)
    floor = jnp.log(counts[found["mapping"][found["labels"]]])
    assert (jax.jit(VQ)(**found) >= floor - 1e-5 * (1 + size)).all()


def test_probabilities_sum_to_one_and_are_equal_within_a_code():
    given = arrays()
    mapping = np.asarray(given["mapping"])
    hidden = jnp.broadcast_to(given["hidden"][:1], (TOKENS, FEATURES))
    given |= {"hidden": hidden, "labels": jnp.arange(TOKENS)}
    p = np.exp(-np.float64(VQ(**given)))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    for code in np.unique(mapping):
        np.testing.assert_array_equal(p[mapping == code], p[mapping == code][0])
    b = np.asarray(bias())
    p = np.exp(-np.float64(VQ(**given, token_bias=bias())))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    for code in np.unique(mapping):
        ratio = p[mapping == code] / np.exp(b[mapping == code])
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_it_is_not_the_loss_over_codes():
    """Without the counts it would be the probability of the code alone."""
    given = arrays()
    codes = given["mapping"][given["labels"]]
    over_codes = losses.linear_softmax_cross_entropy(
        given["hidden"], given["codebook"], codes
    )
    counts = VQLogits.token_counts(given["mapping"], CODES)
    lone = np.asarray(counts[codes] == 1)
    assert lone.any()
    assert not lone.all()
    assert (np.abs(VQ(**given) - over_codes) > 1e-2).all()
    # What it is instead: over codes with the logarithm as a bias, plus the share in it.
    among = losses.linear_softmax_cross_entropy(
        given["hidden"], given["codebook"], codes, bias=jnp.log(counts.astype(float))
    )
    assert_close(
        VQ(**given), among + jnp.log(counts[codes]), dtype="float32", length=31
    )


def test_a_code_without_tokens_has_no_part_and_no_gradient():
    given, empty = arrays(), 3
    moved = given | {"codebook": given["codebook"].at[empty].set(50.0)}
    np.testing.assert_array_equal(VQ(**given), VQ(**moved))
    for options in ({}, {"token_bias": bias()}):
        gradient = run_vq(given | options, jnp.ones(ROWS))[1]["codebook"]
        np.testing.assert_array_equal(gradient[empty], 0)
        assert (gradient[:3] != 0).all()


def test_counts_given_and_counted_are_the_same():
    found = arrays()
    counts = VQLogits.token_counts(found["mapping"], CODES)
    for same in (counts, counts.astype(jnp.float32)):
        np.testing.assert_array_equal(VQ(**found), VQ(**found, counts=same))


def test_a_token_of_bias_minus_infinity_is_excluded():
    given, out = arrays(), 4
    without = jnp.zeros(TOKENS).at[out].set(-jnp.inf)
    given["labels"] = given["labels"].at[0].set(out)
    loss, gradients = run_vq(given | {"token_bias": without}, jnp.ones(ROWS))
    assert loss[0] == np.inf
    # The others are those of a vocabulary without that token.
    keep = np.arange(TOKENS) != out
    fewer = given | {"mapping": given["mapping"][keep]}
    fewer["labels"] = jnp.where(given["labels"] > out, given["labels"] - 1, 0)
    sure = np.asarray((given["labels"] > out) & (given["labels"] != out))
    assert sure.sum() >= 4
    assert_close(loss[sure], VQ(**fewer)[sure], dtype="float32", length=TOKENS)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    # A whole code without a token that counts is an empty code.
    lone = jnp.where(given["mapping"] == 5, -jnp.inf, 0.0)
    gradient = run_vq(
        given | {"token_bias": lone, "labels": jnp.zeros(ROWS, int)}, jnp.ones(ROWS)
    )[1]
    np.testing.assert_array_equal(gradient["codebook"][5], 0)


def test_rows_that_do_not_count_are_zero_whatever_they_hold():
    given, where = arrays(), jnp.arange(ROWS) % 2 == 0
    given["hidden"] = jnp.where(where[:, None], given["hidden"], jnp.nan)
    given["labels"] = jnp.where(where, given["labels"], -5)
    given["token_bias"] = bias()
    loss, gradients = run_vq(given, jnp.ones(ROWS), where=where)
    np.testing.assert_array_equal(loss[1::2], 0)
    np.testing.assert_array_equal(gradients["hidden"][1::2], 0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((loss, gradients)))


def test_nan_stays_in_its_row_and_extreme_logits_are_exact():
    given = arrays()
    given["hidden"] = given["hidden"].at[0].set(jnp.nan).at[1].multiply(1e4)
    loss, gradients = run_vq(given, jnp.ones(ROWS))
    np.testing.assert_array_equal(np.isnan(loss), np.arange(ROWS) == 0)
    wanted = oracle.cross_entropy(
        **{n: np.asarray(a) for n, a in given.items()}, cotangent=np.ones(ROWS)
    )
    assert_close(loss[1:], wanted.loss[1:], dtype="float32", length=FEATURES)
    assert np.isfinite(gradients["hidden"][1:]).all()


def test_a_traced_mapping_out_of_range_has_no_probability():
    given = arrays()
    bad = given["mapping"].at[jnp.array([5, 6])].set(jnp.array([-1, CODES]))
    given["labels"] = given["labels"].at[:2].set(jnp.array([5, 6]))
    loss = jax.jit(VQ)(**given | {"mapping": bad})
    np.testing.assert_array_equal(np.isnan(loss), np.arange(ROWS) < 2)
    keep = jnp.array([i for i in range(TOKENS) if i not in (5, 6)])
    where = jnp.isin(given["labels"], keep)
    fewer = given | {"mapping": given["mapping"][keep]}
    fewer["labels"] = jnp.searchsorted(keep, given["labels"])
    wanted = jnp.where(where, VQ(**fewer), jnp.nan)
    assert_close(loss, wanted, dtype="float32", length=TOKENS)
    biased = jax.jit(VQ)(**given | {"mapping": bad, "token_bias": jnp.zeros(TOKENS)})
    assert_close(biased, wanted, dtype="float32", length=TOKENS)
    assert jax.jit(VQLogits.token_counts, static_argnums=1)(bad, CODES).sum() == 29


def test_temperature_is_of_codes_and_softcap_does_not_see_the_counts():
    """Against the oracle at the value of one option each; the counts stay the same."""
    given = arrays()
    for options in ({"temperature": 0.25}, {"softcap": 0.5}):
        wanted = oracle.cross_entropy(
            **{n: np.asarray(a) for n, a in given.items()},
            cotangent=np.ones(ROWS),
            **options,
        )
        loss = VQ(**given, **options)
        assert_close(loss, wanted.loss, dtype="float32", length=TOKENS)


# ------------------------------------------------------------------------------- memory
def vq_program(rows, features, codes, tokens, *, with_counts=True, dtype=jnp.float32):
    struct = jax.ShapeDtypeStruct

    def loss(hidden, codebook, mapping, labels, counts):
        return vq_cross_entropy(
            hidden, codebook, mapping, labels, counts=counts if with_counts else None
        ).mean()

    operands = (
        struct((rows, features), dtype),
        struct((codes, features), dtype),
        struct((tokens,), jnp.int32),
        struct((rows,), jnp.int32),
        struct((codes,), jnp.int32),
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*operands).compile()


def test_memory_does_not_depend_on_the_vocabulary():
    sizes = [8192, 262_144]
    few, many = (temporary(vq_program(256, 64, 512, v)) for v in sizes)
    assert many == few
    # Without counts they are counted: V integers that pass, at most a few copies.
    few, many = (
        temporary(vq_program(256, 64, 512, v, with_counts=False)) for v in sizes
    )
    assert many - few <= 2 * 4 * (sizes[1] - sizes[0])


def test_no_array_of_rows_times_tokens_and_none_of_rows_times_codes():
    rows, codes, tokens = 384, 4099, 50_257
    struct = jax.ShapeDtypeStruct
    loss = functools.partial(vq_cross_entropy, vocab_chunk=512)
    operands = (
        struct((rows, 16), jnp.float32),
        struct((codes, 16), jnp.float32),
        struct((tokens,), jnp.int32),
        struct((rows,), jnp.int32),
    )
    step = jax.value_and_grad(lambda *a: loss(*a).sum(), argnums=(0, 1))
    text = str(operations.make_jaxpr(step)(*operands))
    shapes = {
        tuple(map(int, found.split(",")))
        for found in re.findall(r"(?:f32|i32|bool)\[([\d,]+)\]", text)
    }
    largest = max(np.prod(shape) for shape in shapes)
    assert largest < rows * codes
    assert (rows, 512) in shapes or (512, rows) in shapes


def test_scratch_is_that_of_a_plain_head_of_as_many_classes_and_one_tile():
    rows, features, codes = 512, 128, 16_384

    def plain(hidden, weight, labels):
        return losses.linear_softmax_cross_entropy(hidden, weight, labels).mean()

    struct = jax.ShapeDtypeStruct
    program = (
        jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))
        .lower(
            struct((rows, features), jnp.float32),
            struct((codes, features), jnp.float32),
            struct((rows,), jnp.int32),
        )
        .compile()
    )
    ours = temporary(vq_program(rows, features, codes, 262_144))
    assert ours < 1.35 * temporary(program)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow  # the engine goes the same way, every time
def test_under_every_transformation():
    given = arrays()

    def function(hidden, codebook, mapping, labels, token_bias, where):
        return VQ(
            hidden,
            codebook,
            mapping,
            labels,
            token_bias=token_bias,
            where=where,
            softcap=3.0,
        )

    check_transformations(
        function,
        *given.values(),
        bias(),
        jnp.arange(ROWS) != 3,
        rows=(0, 3, 5),
        skip={"forward_mode": "the streamed statistics have a custom_vjp"},
    )


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mapping": np.full(TOKENS, 7)}, ValueError, r"codes in \[0, 7\), got 7"),
        ({"mapping": np.full(TOKENS, -1)}, ValueError, r"codes in \[0, 7\), got -1"),
        ({"mapping": np.zeros((2, 3), int)}, ValueError, r"`mapping`.*\(2, 3\)"),
        ({"mapping": np.zeros(0, int)}, ValueError, r"`mapping`.*\(0,\)"),
        ({"mapping": np.zeros(TOKENS)}, TypeError, "`mapping` must have an integer"),
        ({"labels": np.zeros(ROWS)}, TypeError, "`labels` must have an integer"),
        ({"labels": np.zeros(3, int)}, ValueError, r"`labels`.*\(8,\)"),
        ({"counts": np.ones(3)}, ValueError, r"`counts`.*\(7,\).*one per code"),
        ({"counts": np.ones(7, bool)}, TypeError, "`counts` must have a floating"),
        ({"token_bias": np.ones(3)}, ValueError, r"`token_bias`.*one per token"),
        ({"token_bias": np.ones(TOKENS, int)}, TypeError, "`token_bias` must have a"),
        (
            {"token_bias": np.ones(TOKENS), "counts": np.ones(7)},
            ValueError,
            "`counts` must be None with `token_bias`",
        ),
        (
            {"class_where": np.ones(TOKENS, bool), "counts": np.ones(7)},
            ValueError,
            "`counts` must be None with `token_bias` or `class_where`",
        ),
        ({"class_where": np.ones(7, bool)}, ValueError, r"`class_where`.*\(31,\)"),
    ],
)
def test_wrong_arguments_are_errors(change, error, message):
    with pytest.raises(error, match=f"^(VQLogits|softmax_cross_entropy): .*{message}"):
        VQ(**arrays() | change)


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_of_the_counts_are_errors():
    with pytest.raises(ValueError, match="`num_codes` must be at least 1, got 0"):
        VQLogits.token_counts(jnp.zeros(3, int), 0)
    with pytest.raises(ValueError, match=r"token_counts: .*\[0, 2\), got 2"):
        VQLogits.token_counts(jnp.array([0, 2]), 2)
