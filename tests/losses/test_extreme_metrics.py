"""Rankings of many labels: the first k of a linear head, and how good they are."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from softlib import LinearLogits
from tests import operations
from tests.compiled import losses, of_head
from tests.host import jnp
from tests.oracles import extreme as oracle

ROWS, FEATURES, CLASSES = 6, 3, 13


def problem():
    random = np.random.default_rng(0)
    ranking = np.stack([random.permutation(CLASSES)[:5] for _ in range(ROWS)])
    positives = np.stack([random.permutation(CLASSES)[:4] for _ in range(ROWS)])
    positives[0, 1:], positives[1] = -1, -1
    ranking[2, 4] = -1
    return ranking, positives


@pytest.mark.parametrize("k", [1, 3, 5])
def test_measures_are_those_of_loops(k):
    ranking, positives = problem()
    counts = np.arange(CLASSES) ** 2
    known = losses.label_propensities(jnp.asarray(counts), 1000)
    p = oracle.propensities(counts, 1000, 0.55, 1.5)
    np.testing.assert_allclose(known, p, rtol=1e-5)
    precision, recall, scored = oracle.ranking_scores(ranking, positives, 1 / p, k)
    arrays = jnp.asarray(ranking), jnp.asarray(positives)
    np.testing.assert_allclose(losses.precision_at_k(*arrays, k=k), precision)
    np.testing.assert_allclose(losses.recall_at_k(*arrays, k=k), recall, rtol=1e-6)
    ours = losses.propensity_scored_precision_at_k(*arrays, known, k=k)
    np.testing.assert_allclose(ours, scored, rtol=1e-5)


def test_a_positive_without_a_propensity_is_nan_and_not_that_of_another():
    ranking, positives = (jnp.asarray(a) for a in problem())
    score = losses.propensity_scored_precision_at_k
    known = jnp.full(CLASSES, 0.5)
    bad = positives.at[2, 0].set(CLASSES)
    assert np.isnan(score(ranking, bad, known, k=3))
    others = jnp.arange(ROWS) != 2
    wanted = score(ranking, positives, known, k=3, where=others)
    assert score(ranking, bad, known, k=3, where=others) == wanted > 0


def test_where_leaves_rows_out():
    ranking, positives = (jnp.asarray(a) for a in problem())
    where = jnp.arange(ROWS) % 2 == 0
    p = jnp.linspace(0.1, 1, CLASSES)
    score = losses.propensity_scored_precision_at_k
    half = score(ranking[::2], positives[::2], p, k=3)
    np.testing.assert_allclose(score(ranking, positives, p, k=3, where=where), half)
    precision = losses.precision_at_k(ranking, positives, k=3, where=where)
    np.testing.assert_array_equal(precision[1::2], 0)
    none = jnp.zeros((ROWS, 0), int)
    assert score(ranking, none, p, k=3) == 0
    np.testing.assert_array_equal(losses.recall_at_k(ranking, none, k=3), 0)


def test_the_best_ranking_has_a_propensity_scored_precision_of_one():
    p = jnp.linspace(0.9, 0.1, CLASSES)  # the last label is the rarest
    positives = jnp.array([[3, 7, 1], [5, -1, -1]])
    ranking = jnp.array([[7, 3, 0], [5, 0, 1]])
    score = losses.propensity_scored_precision_at_k(ranking, positives, p, k=2)
    np.testing.assert_allclose(score, 1, rtol=1e-6)


# ------------------------------------------------------------------------------- top k
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("token_chunk", [None, 4])
def test_top_k_is_that_of_the_stored_logits(vocab_axis, token_chunk):
    """Ties to the lower class, rows cut with a rest, chunks shorter than k."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.integers(-2, 3, (ROWS, FEATURES)), jnp.float32)
    table = jnp.asarray(random.integers(-2, 3, (CLASSES, FEATURES)), jnp.float32)
    where = jnp.asarray(random.uniform(size=CLASSES) < 0.8)
    logits = LinearLogits(hidden, table, class_where=where).materialize()
    values, classes = jax.lax.top_k(logits, 7)
    found = jax.jit(
        functools.partial(
            of_head.top_k,
            k=7,
            vocab_axis=vocab_axis,
            vocab_chunk=5,
            token_chunk=token_chunk,
            class_where=where,
        )
    )(hidden, table.T if vocab_axis else table)
    np.testing.assert_array_equal(found.logits, values)
    np.testing.assert_array_equal(found.classes, classes)


def test_fewer_classes_than_places_are_minus_one():
    table = jnp.asarray(np.eye(4), jnp.bfloat16)
    where = jnp.array([False, True, False, True])
    found = of_head.top_k(table[:2], table, k=3, class_where=where)
    assert found.logits.dtype == jnp.float32
    np.testing.assert_array_equal(found.classes, [[1, 3, -1], [1, 3, -1]])
    np.testing.assert_array_equal(found.logits[:, 2], -jnp.inf)
    slope = jax.grad(lambda h: of_head.top_k(h, table, k=1).logits.sum())
    np.testing.assert_array_equal(slope(table[:2]), 0)


@pytest.mark.parametrize(
    ("kind", "check_vma"), [(AxisType.Explicit, True), (AxisType.Auto, False)]
)
def test_top_k_of_divided_classes(kind, check_vma):
    mesh = jax.make_mesh((2, 4), ("data", "classes"), (kind, kind))
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, table = draw(8, FEATURES), draw(16, FEATURES)
    one = of_head.top_k(hidden, table, k=3)
    call = functools.partial(of_head.top_k, k=3, axis_name="classes")
    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(P("data"), P("classes")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(
            a, jax.sharding.NamedSharding(mesh, spec)
        )
        operands = place(hidden, P("data")), place(table, P("classes"))
        several = jax.device_get(jax.jit(mapped)(*operands))
    np.testing.assert_allclose(several.logits, one.logits, rtol=1e-6)
    np.testing.assert_array_equal(several.classes, one.classes)


def test_top_k_has_no_array_of_rows_by_classes():
    struct = jax.ShapeDtypeStruct
    top = functools.partial(of_head.top_k, k=5, vocab_chunk=512)
    rows, classes = struct((100, 8), jnp.float32), struct((5000, 8), jnp.float32)
    text = str(operations.make_jaxpr(top)(rows, classes))
    assert "[100,5000]" not in text
    assert "[100,512]" in text


def test_top_k_searches_few_large_tiles_and_sorts_none():
    struct = jax.ShapeDtypeStruct
    top = functools.partial(of_head.top_k, k=5)
    arrays = struct((256, 128), jnp.float32), struct((40_000, 128), jnp.float32)
    text = str(operations.make_jaxpr(top)(*arrays))
    assert "[256,40000]" not in text
    assert "[256,16384]" in text
    program = jax.jit(top).lower(*arrays).compile().as_text() or ""
    assert 'custom_call_target="TopK"' in program
    assert " sort(" not in program


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_named():
    ranking, positives = (jnp.asarray(a) for a in problem())
    eye = jnp.eye(4)
    for call, error, message in (
        (
            lambda: losses.precision_at_k(ranking, positives, k=6),
            ValueError,
            "precision_at_k: `k` must be at most the 5 ids .* got 6",
        ),
        (
            lambda: losses.recall_at_k(ranking, positives[1:], k=1),
            ValueError,
            r"recall_at_k: `positives` must have shape \(6, K\)",
        ),
        (
            lambda: losses.precision_at_k(ranking * 1.0, positives, k=1),
            TypeError,
            "precision_at_k: `ranking` must have an integer dtype",
        ),
        (
            lambda: losses.label_propensities(ranking[0], 0),
            ValueError,
            "label_propensities: `num_examples` must be at least 1, got 0",
        ),
        (
            lambda: of_head.top_k(eye, eye, k=5),
            ValueError,
            "top_k: `k` must be at most the number of classes, 4, got 5",
        ),
        (
            lambda: of_head.top_k(eye, eye, k=1, implementation="reference"),
            ValueError,
            "top_k: `implementation` of the logits must be None or 'xla', got 'ref",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
