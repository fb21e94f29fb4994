"""Fusion by weights that match divergences: oracles, edges, memory, errors."""

import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import LinearLogits
from softlib.logits import StoredLogits
from softlib.testing import assert_close, check_transformations
from tests.compiled import decoding
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/dynamic_logits_fusion_case0.npz"
ROWS, CLASSES = 4, 37


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(p, q):
    """Of two rows of log-probabilities; a class without p adds nothing."""
    return sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -np.inf)


def objective(alpha, large, experts, small):
    """What one row's weights give, by its definition in float64."""
    fused = large + sum(a * (e - small) for a, e in zip(alpha, experts, strict=True))
    fused, p, q = map(log_softmax, (fused, large, small))
    total = 0.0
    for expert in map(log_softmax, experts):
        total += (kl(fused, p) - kl(expert, q)) ** 2
        total += (kl(p, fused) - kl(q, expert)) ** 2
    return total


def best(candidates, *models):
    """The first of the best weights of a row, and its objective."""
    found = [(objective(alpha, *models), alpha) for alpha in candidates]
    return min(found, key=lambda pair: pair[0])


def models(seed, dtype="float32", experts=1, scale=0.7):
    random = np.random.default_rng(seed)
    make = lambda size: jnp.asarray(size * random.normal(size=(ROWS, CLASSES)), dtype)
    large, small = make(2.0), make(2.0)
    wide = lambda x: np.asarray(x, np.float64)
    moved = [wide(small) + wide(make(scale)) for _ in range(experts)]
    return large, [jnp.asarray(x, dtype) for x in moved], small


def wide_rows(large, experts, small):
    """The models of each row in float64."""
    wide = lambda x: np.asarray(x, np.float64)
    for row in range(len(large)):
        yield wide(large)[row], [wide(e)[row] for e in experts], wide(small)[row]


# ----------------------------------------------------------------------------- oracles
def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        base, small = (jnp.asarray(data[f"in_{n}_logits"]) for n in ("base", "anti"))
        expert = jnp.asarray(data["in_expert_logits"][:, 0])
        of = lambda **options: decoding.dynamic_logit_fusion(
            base, [expert], small, **options
        )
        found = of(num_candidates=len(data["in_grid"]))
        np.testing.assert_allclose(found.expert_weights, data["out_alpha"], atol=1e-12)
        np.testing.assert_allclose(found.objective, data["out_objective"], atol=1e-12)
        fused = found.logits.materialize()
        assert_close(fused, data["out_fused_logits"], dtype="float64", length=16)
        # A finer search of fewer candidates finds no worse weights.
        finer = of(num_candidates=11, num_refinements=3)
        assert (finer.objective <= found.objective + 1e-12).all()
        np.testing.assert_allclose(
            finer.expert_weights[1:], data["out_alpha"][1:], atol=0.006
        )


@pytest.mark.parametrize("experts", ["one_active", "each"])
def test_two_experts_oracle(experts):
    with jax.enable_x64():
        given = models(1, "float64", experts=2)
        found = decoding.dynamic_logit_fusion(*given, num_candidates=9, experts=experts)
    grid = np.linspace(0, 2, 9)
    for row, own in enumerate(wide_rows(*given)):
        if experts == "one_active":
            candidates = [(a, 0.0) for a in grid] + [(0.0, a) for a in grid]
            least, alpha = best(candidates, *own)
        else:
            _, (first, _) = best([(a, 0.0) for a in grid], *own)
            least, alpha = best([(first, a) for a in grid], *own)
        np.testing.assert_allclose(found.objective[row], least, atol=1e-12)
        np.testing.assert_allclose(found.expert_weights[row], alpha, atol=1e-12)


def test_refinements_of_each_expert_only_gain():
    given = models(2, experts=2)
    found = decoding.dynamic_logit_fusion(
        *given, num_candidates=5, num_refinements=2, experts="each"
    )
    grid = np.linspace(0, 2, 5)
    before = []
    for own in wide_rows(*given):
        _, (first, _) = best([(a, 0.0) for a in grid], *own)
        before.append(best([(first, a) for a in grid], *own)[0])
    assert (found.objective <= np.array(before) + 1e-6).all()
    assert (found.objective < 0.9 * np.array(before)).any()


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_heads_in_pieces_have_the_weights_of_their_logits(dtype):
    """Of several steps of classes and rows, with a rest; a head beside an array."""
    random = np.random.default_rng(3)
    make = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    hidden, weight = make(ROWS, 5), make(CLASSES, 5)
    large = LinearLogits(hidden, weight, softcap=3.0, vocab_chunk=10, token_chunk=3)
    small = LinearLogits(make(ROWS, 3), make(CLASSES, 3), bias=make(CLASSES))
    expert = StoredLogits(small.materialize() + 0.5 * make(ROWS, CLASSES), scale=1.1)
    found = decoding.dynamic_logit_fusion(large, [expert], small)
    formed = [large.materialize(), [expert.materialize()], small.materialize()]
    assert found.expert_weights.dtype == jnp.float32
    grid = [(a,) for a in np.linspace(0, 2, 21)]
    for row, own in enumerate(wide_rows(*formed)):
        least, alpha = best(grid, *own)
        np.testing.assert_allclose(found.objective[row], least, rtol=1e-3, atol=1e-5)
        assert objective(found.expert_weights[row], *own) < least + 1e-5
        fused = own[0] + alpha[0] * (own[1][0] - own[2])
        if found.expert_weights[row, 0] == np.float32(alpha[0]):
            got = found.logits.materialize()[row]
            assert_close(got, fused, dtype="float32", length=60)


# ----------------------------------------------------------------------------- promises
def test_equal_large_and_small_models_take_the_whole_expert():
    _, (expert,), small = models(4)
    found = decoding.dynamic_logit_fusion(small, [expert], small)
    np.testing.assert_allclose(found.expert_weights, 1, atol=1e-6)
    np.testing.assert_allclose(found.objective, 0, atol=1e-9)


def test_an_expert_that_has_not_moved_has_the_least_weight():
    large, _, small = models(5)
    found = decoding.dynamic_logit_fusion(large, [small], small)
    assert not found.expert_weights.any()
    assert not found.objective.any()
    np.testing.assert_array_equal(found.logits.materialize(), large)


def test_constants_added_to_a_model_change_nothing():
    large, (expert,), small = models(6)
    of = decoding.dynamic_logit_fusion
    found = of(large + 3.0, [expert - 2.0], small + 1.0)
    wanted = of(large, [expert], small)
    np.testing.assert_array_equal(found.expert_weights, wanted.expert_weights)
    np.testing.assert_allclose(found.objective, wanted.objective, atol=1e-5)


def test_a_class_that_one_model_excludes_is_excluded_in_all():
    large, (expert,), small = models(7)
    out = np.arange(CLASSES) % 5 == 2
    spoilt = jnp.where(jnp.asarray(out)[None], jnp.nan, small)
    banned = expert.at[:, 3].set(-jnp.inf)
    found = decoding.dynamic_logit_fusion(
        large, [banned], StoredLogits(spoilt, class_where=jnp.asarray(~out))
    )
    out = out | (np.arange(CLASSES) == 3)
    assert np.isneginf(found.logits.materialize()[:, out]).all()
    kept = [np.asarray(x)[:, ~out] for x in (large, expert, small)]
    for row, own in enumerate(wide_rows(kept[0], [kept[1]], kept[2])):
        least, _ = best([(a,) for a in np.linspace(0, 2, 21)], *own)
        np.testing.assert_allclose(found.objective[row], least, atol=1e-5)


def test_rows_without_classes_and_with_nan():
    large, (expert,), small = models(8)
    large = large.at[0].set(-jnp.inf).at[1, 3].set(jnp.nan)
    found = decoding.dynamic_logit_fusion(large, [expert], small)
    assert found.expert_weights[0] == found.objective[0] == 0
    assert np.isnan(found.objective[1])
    assert np.isnan(found.expert_weights[1])
    assert np.isfinite(found.expert_weights[2:]).all()


def test_the_weights_are_constant_to_differentiation():
    large, (expert,), small = models(9)

    def total(large):
        found = decoding.dynamic_logit_fusion(large, [expert], small)
        loss = softlib.logits.logsumexp(found.logits)
        return loss.sum() + found.expert_weights.sum() + found.objective.sum(), found

    gradient, found = jax.grad(total, has_aux=True)(large)
    wanted = jax.nn.softmax(found.logits.materialize(), -1)
    assert_close(gradient, wanted, dtype="float32", length=CLASSES)


def test_any_axes_of_a_batch_may_precede_the_classes():
    large, (expert,), small = models(10)
    of = decoding.dynamic_logit_fusion
    wanted = of(large, [expert], small).expert_weights
    shaped = (x.reshape(2, 2, CLASSES) for x in (large, expert, small))
    a, b, c = shaped
    found = of(a, [b], c).expert_weights
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_no_logits_are_formed():
    """Search, fusion and a drawn token of three heads; nothing is run."""
    rows, classes, widths = 2048, 262_144, (32, 16, 16)
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    heads = [(shape(rows, width), shape(classes, width)) for width in widths]

    def draw(heads):
        large, expert, small = itertools.starmap(LinearLogits, heads)
        found = softlib.decoding.dynamic_logit_fusion(large, [expert], small)
        return softlib.logits.sample(jax.random.key(0), found.logits)

    memory = jax.jit(draw).lower(heads).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.02 * rows * classes * 4


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    make = lambda: jnp.asarray(random.normal(size=(8, 12)), jnp.float32)

    def function(large, expert, small):
        found, each = (
            decoding.dynamic_logit_fusion(
                large, [expert], small, num_candidates=3, num_refinements=1, experts=way
            )
            for way in ("one_active", "each")
        )
        weights = found.expert_weights, each.expert_weights
        return *weights, softlib.logits.logsumexp(found.logits)

    reason = "the weights are constant, and a combination has a custom derivative"
    skip = dict.fromkeys(
        (
            "forward_mode",
            "reverse_mode",
            "gradient_of_gradient",
            "hessian_vector_product",
        ),
        reason,
    )
    check_transformations(function, make(), make(), make(), rows=(0, 1, 2), skip=skip)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    z = jnp.ones((2, 5))
    of: Any = decoding.dynamic_logit_fusion
    filtered = LinearLogits(z, jnp.ones((5, 5)), gradient_filter_eps=1e-3)
    for call, error, message in (
        (lambda: of(z, z, z), TypeError, "`expert_logits` must be a list or tuple"),
        (lambda: of(z, [], z), ValueError, "`expert_logits` must hold at least one"),
        (lambda: of(z, [z[:, 1:]], z), ValueError, "`expert_logits` must have the row"),
        (lambda: of(z, [z], z[:1]), ValueError, "`small_logits` must have the rows"),
        (lambda: of(z > 0, [z], z), TypeError, "`logits` must"),
        (lambda: of(filtered, [z], z), ValueError, "`gradient_filter_eps` of member"),
        (lambda: of(z, [z], z, bounds=(2, 1)), ValueError, "`bounds` must be finite"),
        (lambda: of(z, [z], z, bounds=3), TypeError, "`bounds` must be two Python"),
        (lambda: of(z, [z], z, num_candidates=0), ValueError, "`num_candidates` must"),
        (lambda: of(z, [z], z, num_refinements=-1), ValueError, "`num_refinements` m"),
        (lambda: of(z, [z], z, num_refinements=1.0), TypeError, "`num_refinements` m"),
        (lambda: of(z, [z], z, experts="all"), ValueError, "`experts` must be"),
    ):
        with pytest.raises(error, match=rf"^dynamic_logit_fusion: .*{message}"):
            call()
