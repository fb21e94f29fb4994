"""The rank of a label: its place in the stable descending order of the row."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.compiled import of_head, of_stored
from tests.host import jnp

ROWS, FEATURES, CLASSES = 5, 3, 300


def problem(several: bool):
    """Small integers: products are exact, and most classes tie with others."""
    random = np.random.default_rng(3)
    hidden = random.integers(-2, 3, (ROWS, FEATURES)).astype(np.float32)
    weight = random.integers(-1, 2, (CLASSES, FEATURES)).astype(np.float32)
    labels = random.integers(0, CLASSES, (ROWS, 4) if several else ROWS)
    labels[0], labels[1] = -100, CLASSES
    return hidden, weight, labels


def expected(z, labels, class_where):
    """By sorting, which the library never does."""
    place = np.full(z.shape, CLASSES)
    for row, logits in enumerate(z):
        classes = np.flatnonzero(class_where)
        order = classes[np.argsort(-logits[classes], kind="stable")]
        place[row, order] = np.arange(len(order))
    inside = (labels >= 0) & (labels < CLASSES)
    at = np.where(inside, labels, 0).reshape(ROWS, -1)
    found = np.take_along_axis(place, at, axis=1).reshape(labels.shape)
    return np.where(inside, found, CLASSES)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_place_in_a_stable_sort(several, masked):
    hidden, weight, labels = problem(several)
    where = np.arange(CLASSES) % 3 > 0 if masked else np.ones(CLASSES, bool)
    wanted = expected(hidden @ weight.T, labels, where)
    options = {
        "class_where": jnp.asarray(where) if masked else None,
        "statistics": ("label_rank", "argmax", "lse"),
    }
    logits, labels_array = jnp.asarray(hidden @ weight.T), jnp.asarray(labels)
    arrays = jnp.asarray(hidden), jnp.asarray(weight), labels_array
    found_of = [
        result
        for name in ("xla", "reference")
        for result in (
            of_head.row_statistics(
                *arrays, vocab_chunk=64, implementation=name, **options
            ),
            of_stored.row_statistics(
                logits, labels_array, implementation=name, **options
            ),
        )
    ]
    for found in found_of:
        assert found.label_rank is not None
        assert found.argmax is not None
        assert found.label_rank.dtype == jnp.int32
        np.testing.assert_array_equal(found.label_rank, wanted)
        assert found.label_logits is None  # was needed, was not asked for
        first = wanted == 0
        hit = labels == (found.argmax[:, None] if several else found.argmax)
        np.testing.assert_array_equal(first, hit)


def test_an_empty_row_ranks_its_label_behind_everything():
    hidden, weight, labels = map(jnp.asarray, problem(False))
    found = of_head.row_statistics(
        hidden,
        weight,
        labels,
        class_where=jnp.zeros(CLASSES, bool),
        statistics=("label_rank",),
    )
    np.testing.assert_array_equal(found.label_rank, CLASSES)


def test_a_class_of_logit_minus_infinity_is_ranked_like_any_other():
    logits = jnp.array([[-jnp.inf, 1.0, -jnp.inf, 0.0]] * 4)
    found = of_stored.row_statistics(logits, jnp.arange(4), statistics=("label_rank",))
    np.testing.assert_array_equal(found.label_rank, [2, 0, 3, 1])


def test_ranks_of_a_divided_vocabulary_are_those_of_the_whole():
    hidden, weight, labels = map(jnp.asarray, problem(True))
    mesh = jax.make_mesh((4,), ("vocabulary",), axis_types=(AxisType.Auto,))

    def rank(hidden, weight, labels):
        return of_head.row_statistics(
            hidden,
            weight,
            labels,
            statistics=("label_rank",),
            axis_name="vocabulary",
        ).label_rank

    specs = (PartitionSpec(), PartitionSpec("vocabulary"), PartitionSpec())
    divided = jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    wanted = expected(
        np.asarray(hidden @ weight.T), np.asarray(labels), np.ones(CLASSES, bool)
    )
    np.testing.assert_array_equal(jax.jit(divided)(hidden, weight, labels), wanted)


def test_rank_has_no_gradient_and_spoils_none():
    hidden, weight, labels = map(jnp.asarray, problem(False))

    def loss(hidden):
        found = of_head.row_statistics(
            hidden, weight, labels, statistics=("label_rank", "lse")
        )
        assert found.lse is not None
        assert found.label_rank is not None
        return (found.lse * (1 + found.label_rank)).sum()

    ranks = expected(
        np.asarray(hidden @ weight.T), np.asarray(labels), np.ones(CLASSES, bool)
    )
    plain = lambda h: (jax.nn.logsumexp(h @ weight.T, axis=1) * (1 + ranks)).sum()
    np.testing.assert_allclose(
        jax.grad(loss)(hidden), jax.grad(plain)(hidden), rtol=1e-5
    )


def test_asks_for_labels():
    hidden, weight, _ = map(jnp.asarray, problem(False))
    with pytest.raises(ValueError, match="statistic label_rank, got None"):
        of_head.row_statistics(hidden, weight, statistics=("label_rank",))


@pytest.mark.parametrize("several", [False, True])
def test_rank_functions_count_only_the_rows_asked_for(several):
    hidden, weight, labels = map(jnp.asarray, problem(several))
    where = jnp.arange(ROWS) != 2
    spoilt = hidden.at[2].set(jnp.nan)
    wanted = expected(
        np.asarray(hidden @ weight.T), np.asarray(labels), np.ones(CLASSES, bool)
    )
    wanted[2] = 0
    of_linear = of_head.label_rank(spoilt, weight, labels, where=where, vocab_chunk=64)
    of_logits = of_stored.label_rank(spoilt @ weight.T, labels, where=where)
    for found in (of_linear, of_logits):
        np.testing.assert_array_equal(found, wanted)


def test_rank_functions_check_their_arguments():
    hidden, weight, labels = map(jnp.asarray, problem(False))
    with pytest.raises(ValueError, match="label_rank: `labels` must have the"):
        of_head.label_rank(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match="label_rank: `where` must broadcast"):
        of_stored.label_rank(hidden @ weight.T, labels, where=jnp.ones(3, bool))
