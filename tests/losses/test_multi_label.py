"""Several labels per row: the cross-entropy of the distribution that they list."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given as given_examples, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.losses.problems import assert_agrees
from tests.oracles import extreme
from tests.oracles.weighted_cross_entropy import target_of, weighted_cross_entropy

ROWS, FEATURES, CLASSES, LABELS = 8, 3, 7, 3
LINEAR: Any = functools.partial(of_head.multi_label_cross_entropy, vocab_chunk=3)
STORED: Any = of_stored.multi_label_cross_entropy
both_sources = pytest.mark.parametrize("name", ["linear", "logits"])


def source(name, dtype="float32", batch=(ROWS,)) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    hidden, weight = draw(*batch, FEATURES), draw(CLASSES, FEATURES)
    if name == "linear":
        return LINEAR, {"hidden": hidden, "weight": weight}
    return STORED, {"logits": hidden @ weight.T}


def differentiated(function, floating, **others):
    @jax.jit
    def run(floating, others):
        def total(floating):
            loss = function(**floating, **others)
            return loss.sum(), loss

        return jax.grad(total, has_aux=True)(floating)

    gradients, loss = run(floating, others)
    return loss, gradients


# Repeated; excluded with a weight and without; outside, kept and not; none; masked.
LISTS = np.array(
    [
        [0, 0, 6],
        [5, 2, 1],
        [5, 2, 1],
        [CLASSES, 3, 4],
        [-100, 3, 4],
        [1, 1, 1],
        [-1, 3, 99],
        [6, 5, 4],
    ]
)
KEPT = np.array([[1, 1, 1]] * 4 + [[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], bool)
WHERE = np.arange(ROWS) != 6


def weights_of_labels():
    weights = np.random.default_rng(1).uniform(0.5, 2, (ROWS, LABELS))
    weights[2, 1] = 0  # the excluded one
    return weights


@both_sources
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("weighted", [True, False])
def test_matches_oracle(name, implementation, weighted):
    """Every exception in one batch, with the gradients of every argument."""
    with jax.enable_x64():
        function, given = source(name, "float64")
        rows = next(iter(given))
        given[rows] = given[rows].at[6].set(jnp.nan)
        chosen = np.arange(CLASSES) != 2
        options: dict[str, Any] = {"logsumexp_penalty": 0.1}
        floating = dict(given)
        classes = None
        if weighted:
            floating["label_weights"] = jnp.asarray(weights_of_labels())
        if name == "logits" or weighted:
            classes = np.linspace(0.5, 2.0, CLASSES)
            floating["class_weights"] = jnp.asarray(classes)
        if name == "logits" or not weighted:
            options["label_smoothing"] = 0.2
        if classes is not None and name == "linear":
            options.pop("label_smoothing", None)
        weights = weights_of_labels() if weighted else None
        target, broken = target_of(LISTS, CLASSES, weights, KEPT)
        cotangent = np.random.default_rng(2).normal(size=ROWS)
        expected = weighted_cross_entropy(
            target,
            class_weights=classes,
            class_where=chosen,
            where=WHERE & KEPT.any(axis=1),
            broken=broken,
            cotangent=cotangent,
            **options,
            **given,
        )
        call = functools.partial(
            function,
            labels=jnp.asarray(LISTS),
            label_where=jnp.asarray(KEPT),
            where=jnp.asarray(WHERE),
            class_where=jnp.asarray(chosen),
            implementation=implementation,
            **options,
        )

        @jax.jit
        def run(floating, cotangent):
            loss, pull = jax.vjp(lambda f: call(**f), floating)
            return loss, pull(cotangent)[0]

        loss, gradients = run(floating, cotangent)
        np.testing.assert_array_equal(np.isnan(loss), np.arange(ROWS) == 3)
        infinite = [1] if weighted else [1, 2]
        np.testing.assert_array_equal(np.flatnonzero(np.isinf(loss)), infinite)
        assert_agrees(loss, expected.values["loss"], jnp.float64, 0)
        for argument, gradient in gradients.items():
            if argument == "label_weights":
                inside = np.clip(LISTS, 0, CLASSES - 1)
                found = np.take_along_axis(expected.gradients["target"], inside, -1)
                wanted = np.where(KEPT, found, 0)
            else:
                wanted = expected.gradients[argument]
            assert_agrees(gradient, wanted, jnp.float64, 0)


# Excluded, all of a row or one; outside; padding anywhere; none; masked.
DISTINCT = np.array(
    [
        [0, 6, 1],
        [2, -1, -1],
        [5, 2, 1],
        [CLASSES, 3, -1],
        [-1, 3, 4],
        [-1, -1, -1],
        [1, 4, -1],
        [6, -1, 5],
    ]
)


@both_sources
@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_mean_and_sum_match_the_oracle(name, normalization):
    """Positives one by one: the sum of their cross-entropies, or their mean."""
    with jax.enable_x64():
        function, given = source(name, "float64")
        rows = next(iter(given))
        given[rows] = given[rows].at[6].set(jnp.nan)
        chosen = {"class_where": np.arange(CLASSES) != 2, "where": WHERE}
        loss, gradients = differentiated(
            functools.partial(function, normalization=normalization),
            given,
            labels=jnp.asarray(DISTINCT),
            label_where=jnp.asarray(DISTINCT != -1),
            **{option: jnp.asarray(value) for option, value in chosen.items()},
        )
        exact = {key: np.array(value) for key, value in given.items()}
        exact[rows][6] = 0  # the oracle multiplies by it
        z = exact.get("logits")
        z = exact["hidden"] @ exact["weight"].T if z is None else z
        wanted, dz, _ = extreme.losses_of(extreme.multilabel, z, DISTINCT, **chosen)
        if normalization == "mean":
            count = np.maximum((DISTINCT != -1).sum(-1), 1)
            wanted, dz = wanted / count, dz / count[:, None]
        slopes = {"logits": dz}
        if name == "linear":
            weight, hidden = exact["weight"], exact["hidden"]
            slopes = {"hidden": dz @ weight, "weight": dz.T @ hidden}
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(wanted)), [3])
        np.testing.assert_array_equal(np.flatnonzero(np.isinf(wanted)), [1, 2])
        assert_agrees(loss, wanted, jnp.float64, 0)
        for argument, gradient in gradients.items():
            assert_agrees(gradient, slopes[argument], jnp.float64, 0)


@both_sources
def test_one_label_is_cross_entropy(name):
    """With the same exceptions, and smoothing and penalty alike."""
    function, given = source(name)
    labels = jnp.array([0, 6, -1, 3, 2, CLASSES, 1, 5])
    options = {
        "class_where": jnp.arange(CLASSES) != 2,
        "where": jnp.arange(ROWS) != 7,
        "label_smoothing": 0.1,
        "logsumexp_penalty": 0.1,
    }
    one = {"linear": losses.linear_softmax_cross_entropy}
    plain: Any = one.get(name, of_stored.softmax_cross_entropy)
    wanted = differentiated(functools.partial(plain, **options), given, labels=labels)
    actual = differentiated(
        functools.partial(function, **options), given, labels=labels[:, None]
    )
    for one, two in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        assert_close(one, two, dtype=jnp.float32, length=CLASSES)


@settings(deadline=None, max_examples=15)
@given_examples(seed=st.integers(0, 2**31))
def test_it_is_the_cross_entropy_of_the_listed_distribution(seed):
    """Whatever the lists hold twice; the order of a list does not matter."""
    random = np.random.default_rng(seed)
    logits = jnp.asarray(3 * random.normal(size=(ROWS, CLASSES)), jnp.float32)
    labels = random.integers(0, CLASSES, (ROWS, LABELS))
    weights = random.dirichlet(np.ones(LABELS), ROWS).astype(np.float32)
    q, _ = target_of(labels, CLASSES, weights)
    order = random.permutation(LABELS)
    wanted = _dense(logits, jnp.asarray(q, jnp.float32))
    for columns in (np.arange(LABELS), order):
        listed = jnp.asarray(labels[:, columns]), jnp.asarray(weights[:, columns])
        assert_close(
            _listed(logits, *listed), wanted, dtype=jnp.float32, length=CLASSES
        )


@jax.jit
def _dense(logits, q):
    return of_stored.softmax_cross_entropy(logits, q, label_smoothing=0.1)


@jax.jit
def _listed(logits, labels, weights):
    return STORED(logits, labels, label_weights=weights, label_smoothing=0.1)


@both_sources
@pytest.mark.parametrize("batch", [(), (0,), (2, 4)])
def test_any_number_of_batch_axes(name, batch):
    function, given = source(name, batch=batch)
    labels = jnp.asarray(np.arange(np.prod(batch, dtype=int) * LABELS) % CLASSES)
    labels = labels.reshape(*batch, LABELS)
    loss, gradients = differentiated(function, given, labels=labels)
    target, _ = target_of(labels, CLASSES)
    wanted = weighted_cross_entropy(target, cotangent=np.ones(batch), **given)
    assert_close(loss, wanted.values["loss"], dtype=jnp.float32, length=CLASSES)
    for argument, gradient in gradients.items():
        expected = wanted.gradients[argument]
        assert_close(gradient, expected, dtype=jnp.float32, length=CLASSES)


@both_sources
def test_a_list_without_labels_does_not_count(name):
    """L = 0, or none kept: no penalty and no smoothing either."""
    function, given = source(name)
    function = functools.partial(function, label_smoothing=0.1, logsumexp_penalty=0.1)
    for labels, more in (
        (jnp.zeros((ROWS, 0), int), {}),
        (jnp.full((ROWS, 2), -1), {"label_where": jnp.zeros((ROWS, 2), bool)}),
    ):
        found = differentiated(function, given, labels=labels, **more)
        for leaf in jax.tree.leaves(found):
            np.testing.assert_array_equal(leaf, 0)


@both_sources
def test_no_class_selected_gives_zero_loss_and_gradient(name):
    function, given = source(name)
    call = functools.partial(
        function, class_where=jnp.zeros(CLASSES, bool), label_smoothing=0.1
    )
    labels = jnp.asarray(LISTS % CLASSES)
    given["label_weights"] = jnp.ones((ROWS, LABELS))
    for leaf in jax.tree.leaves(differentiated(call, given, labels=labels)):
        np.testing.assert_array_equal(leaf, 0)


def test_classes_may_be_selected_per_row():
    """One `class_where` (rows, V): each list is judged by its own row."""
    _, given = source("logits")
    chosen = np.arange(CLASSES) != (np.arange(ROWS) % CLASSES)[:, None]
    labels = np.full((ROWS, 2), [4, 5])
    loss = STORED(**given, labels=jnp.asarray(labels), class_where=jnp.asarray(chosen))
    target, _ = target_of(labels, CLASSES)
    wanted = weighted_cross_entropy(target, class_where=chosen, **given)
    np.testing.assert_array_equal(np.flatnonzero(np.isinf(loss)), [4, 5])
    assert_close(loss, wanted.values["loss"], dtype=jnp.float32, length=CLASSES)


@both_sources
def test_a_logit_of_minus_infinity_costs_nothing_without_a_weight(name):
    function, given = source(name)
    bias = jnp.zeros(CLASSES).at[2].set(-jnp.inf)
    weights = jnp.array([[1.0, 0.0], [1.0, 0.5]] * 4)
    given["label_weights"] = weights
    loss, gradients = differentiated(
        functools.partial(function, bias=bias), given, labels=jnp.array([[0, 2]] * ROWS)
    )
    np.testing.assert_array_equal(np.isposinf(loss), [False, True] * 4)
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()


@both_sources
def test_bfloat16_gives_float32(name):
    function, given = source(name, "bfloat16")
    given["label_weights"] = jnp.ones((ROWS, LABELS), jnp.bfloat16)
    loss, gradients = differentiated(function, given, labels=jnp.asarray(LISTS % 7))
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in gradients.values()} == {jnp.dtype("bfloat16")}


@both_sources
def test_float32_stays_float32_where_float64_exists(name):
    with jax.enable_x64():
        function, given = source(name)
        labels, kept = jnp.asarray(LISTS), jnp.asarray(KEPT)
        assert function(**given, labels=labels, label_where=kept).dtype == jnp.float32


@pytest.mark.slow  # cross-entropy goes the same way, every time
def test_linear_head_under_every_transformation():
    function, given = source("linear")

    def call(hidden, weight, labels, weights, kept):
        return function(hidden, weight, labels, label_weights=weights, label_where=kept)

    check_transformations(
        call,
        given["hidden"],
        given["weight"],
        jnp.asarray(LISTS % CLASSES),
        jnp.asarray(weights_of_labels(), jnp.float32),
        jnp.asarray(KEPT),
        rows=(0, 2, 3, 4),
        skip={"forward_mode": "the streamed statistics have a custom_vjp"},
    )


@pytest.mark.parametrize(
    ("shape", "kind", "check_vma"),
    [((2, 4), AxisType.Explicit, True), ((1, 8), AxisType.Auto, False)],
)
def test_divided_classes_give_the_numbers_of_one_device(shape, kind, check_vma):
    classes = 16
    mesh = jax.make_mesh(shape, ("data", "classes"), (kind, kind))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    given = {
        "hidden": draw(ROWS, FEATURES),
        "weight": draw(classes, FEATURES),
        "label_weights": draw(ROWS, LABELS),
        "class_weights": draw(classes),
    }
    labels = jnp.asarray(random.integers(0, classes, (ROWS, LABELS))).at[0, 0].set(-1)
    specs = {
        "hidden": P("data"),
        "weight": P("classes"),
        "label_weights": P("data"),
        "class_weights": P("classes"),
    }

    def loss(axis_name, given, labels):
        keep = labels >= 0
        return LINEAR(**given, labels=labels, label_where=keep, axis_name=axis_name)

    mapped = jax.shard_map(
        functools.partial(loss, "classes"),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    one = differentiated(lambda **g: loss(None, g, labels), given)
    with jax.set_mesh(mesh):
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
        placed = {name: put(array, specs[name]) for name, array in given.items()}
        several = differentiated(
            lambda labels, **g: mapped(g, labels), placed, labels=put(labels, P("data"))
        )
        results = (jax.device_get(several), one)
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(one, two, dtype=jnp.float32, length=classes)


# ------------------------------------------------------------------------------- errors
BAD = [
    ("labels", jnp.zeros((ROWS, 2)), TypeError, "float32."),
    ("labels", jnp.zeros(ROWS, int), ValueError, "(8,)."),
    ("labels", jnp.zeros((ROWS - 1, 2), int), ValueError, "(7, 2)."),
    ("labels", jnp.zeros((ROWS, 1, 2), int), ValueError, "(8, 1, 2)."),
    ("label_weights", jnp.ones((ROWS, 2), int), TypeError, "int32."),
    ("label_weights", jnp.ones((ROWS, 3)), ValueError, "(8, 3)."),
    ("label_where", jnp.ones((ROWS, 2)), TypeError, "float32."),
    ("label_where", jnp.ones(ROWS, bool), ValueError, "(8,)."),
    ("class_weights", jnp.ones(3), ValueError, "(3,)."),
    ("where", jnp.ones(ROWS), TypeError, "float32."),
    ("label_smoothing", 1.5, ValueError, "1.5."),
    ("logsumexp_penalty", -1.0, ValueError, "-1.0."),
]


@pytest.mark.usefixtures("untyped")
@both_sources
@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_error_names_function_argument_and_value(name, argument, value, error, got):
    function, given = source(name)
    arguments = {"labels": jnp.zeros((ROWS, 2), int), argument: value}
    with pytest.raises(error) as raised:
        function(**given, **arguments)
    message = str(raised.value)
    assert message.startswith(f"multi_label_cross_entropy: `{argument}` must ")
    assert message.endswith(f"got {got}")


@pytest.mark.usefixtures("untyped")
def test_a_linear_head_does_not_smooth_with_weights():
    function, given = source("linear")
    with pytest.raises(ValueError, match=r"`label_smoothing` must be 0 .*got 0\.1\."):
        function(
            **given,
            labels=jnp.zeros((ROWS, 2), int),
            class_weights=jnp.ones(CLASSES),
            label_smoothing=0.1,
        )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "max"}, r"must be one of 'mean', 'sum', got 'max'\."),
        (
            {"normalization": "sum", "label_weights": jnp.ones((ROWS, 2))},
            r"must be 'mean', .* where `label_weights` are given, got 'sum'\.",
        ),
    ],
)
def test_normalization_is_one_of_two_and_not_of_given_weights(options, message):
    function, given = source("logits")
    with pytest.raises(
        ValueError, match=rf"^multi_label_.*: `normalization` {message}"
    ):
        function(**given, labels=jnp.zeros((ROWS, 2), int), **options)
