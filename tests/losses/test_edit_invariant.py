"""The edit-invariant sequence loss, from logits and from a linear head."""

import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given as given_examples, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.oracles import edit_invariant as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/eisl_case0.npz"
BATCH, LENGTH, TOKENS, FEATURES, CLASSES = 4, 6, 4, 3, 7
NGRAMS, WEIGHTS = (1, 3), (0.6, 0.4)
# Two lengths of n-grams: each is compiled for itself.
LINEAR: Any = functools.partial(
    of_head.edit_invariant_sequence_loss, vocab_chunk=4, ngrams=(1, 2)
)
STORED: Any = functools.partial(of_stored.edit_invariant_sequence_loss, ngrams=(1, 2))
both_sources = pytest.mark.parametrize("name", ["linear", "logits"])


def source(name, dtype="float32", seed=0) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(1.5 * random.normal(size=shape), dtype)
    hidden, weight = draw(BATCH, LENGTH, FEATURES), draw(CLASSES, FEATURES)
    if name == "linear":
        return LINEAR, {"hidden": hidden, "weight": weight}
    return STORED, {"logits": hidden @ weight.T}


def logits_of(arrays) -> np.ndarray:
    exact = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    return exact["logits"] if "logits" in exact else exact["hidden"] @ exact["weight"].T


def labels_and_masks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A full example, holes on both sides, no position, one token."""
    labels = np.random.default_rng(3).integers(0, CLASSES, (BATCH, TOKENS))
    labels[0, 1] = labels[0, 3]  # a label that comes twice
    where = np.ones((BATCH, LENGTH), bool)
    where[1, 2], where[2] = False, False
    label_where = np.ones((BATCH, TOKENS), bool)
    label_where[1, 3:], label_where[3, 1:] = False, False
    return labels, where, label_where


def differentiated(function, floating, **others):
    @jax.jit
    def run(floating, others):
        def total(floating):
            loss = function(**floating, **others)
            return loss.sum(), loss

        return jax.grad(total, has_aux=True)(floating)

    gradients, loss = run(floating, others)
    return loss, gradients


# ------------------------------------------------------------------------------ oracles
@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [
        ("linear", "float64", "softmax"),
        ("linear", "bfloat16", "logsumexp"),
        ("logits", "float32", "softmax"),
        ("logits", "float16", "logsumexp"),
    ],
)
def test_matches_oracle(name, dtype, mode):
    """What does not count is NaN, or a label out of range."""
    with jax.enable_x64(dtype == "float64"):
        function, arrays = source(name, dtype)
        labels, where, label_where = labels_and_masks()
        z = logits_of(arrays)
        rows = next(iter(arrays))
        bad = dict(arrays)
        bad[rows] = jnp.where(where[..., None], arrays[rows], jnp.nan)
        options = {"ngrams": NGRAMS, "mode": mode, "floor": -4.0}
        loss, gradients = differentiated(
            functools.partial(function, weights=WEIGHTS, **options),
            bad,
            labels=jnp.asarray(np.where(label_where, labels, -100)),
            where=jnp.asarray(where),
            label_where=jnp.asarray(label_where),
        )
        of = lambda z, b: oracle.loss(
            z, labels[b], NGRAMS, WEIGHTS, mode, -4.0, where[b], label_where[b]
        )
        computed = jnp.promote_types(dtype, jnp.float32)
        assert loss.dtype == computed
        wanted = [of(z[b], b) for b in range(BATCH)]
        assert_close(loss, wanted, dtype=computed, length=CLASSES)
        of_logits = np.stack(
            [oracle.gradient(lambda z, b=b: of(z, b), z[b]) for b in range(BATCH)]
        )
        expected = {"logits": of_logits}
        if name == "linear":
            exact = {n: np.asarray(a, np.float64) for n, a in arrays.items()}
            expected = {
                "hidden": of_logits @ exact["weight"],
                "weight": np.einsum("btv,btd->vd", of_logits, exact["hidden"]),
            }
        for argument, gradient in gradients.items():
            assert gradient.dtype == arrays[argument].dtype
            # Central differences are good to 1e-9.
            coarser = "float32" if dtype == "float64" else dtype
            length = BATCH * LENGTH
            assert_close(gradient, expected[argument], dtype=coarser, length=length)


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = {name: jnp.asarray(array) for name, array in np.load(DATA).items()}
        options = {
            "ngrams": tuple(map(int, data["in_ngrams"])),
            "where": data["in_output_where"],
            "label_where": data["in_target_where"],
        }
        close = functools.partial(assert_close, dtype="float64", length=9)
        loss, gradients = differentiated(
            functools.partial(STORED, labels=data["in_targets"], **options),
            {"logits": data["in_logits"]},
        )
        close(loss, data["out_loss"])
        close(gradients["logits"], data["out_grad_logits_of_sum"])
        sums = functools.partial(STORED, mode="logsumexp", **options)
        other = jax.jit(sums)(data["in_logits"], data["in_targets"])
        close(other, data["out_loss_logsumexp"])


@pytest.mark.parametrize(
    ("vocab_axis", "implementation"),
    [(1, "xla"), pytest.param(0, "reference", marks=pytest.mark.slow)],
)
def test_both_sources_agree_with_every_option(vocab_axis, implementation):
    """Also where a label is excluded, in gradients of every argument."""
    with jax.enable_x64():
        _, arrays = source("linear", "float64")
        random = np.random.default_rng(1)
        draw = lambda *shape: jnp.asarray(random.uniform(0.5, 2, shape))
        more = {
            "bias": draw(CLASSES),
            "scale": draw(BATCH, LENGTH),
            "temperature": draw(BATCH, LENGTH),
            "weights": draw(2),
            "floor": jnp.asarray(-2.5),
        }
        labels, where, label_where = labels_and_masks()
        options = {
            "ngrams": NGRAMS,
            "softcap": 3.0,
            "class_where": jnp.arange(CLASSES) != labels[0, 0],
            "where": jnp.asarray(where),
            "label_where": jnp.asarray(label_where),
            "labels": jnp.asarray(labels),
        }

        def streamed(weight, **others):
            weight = weight if vocab_axis == 0 else weight.T
            return LINEAR(
                weight=weight,
                vocab_axis=vocab_axis,
                implementation=implementation,
                **others,
                **options,
            )

        def stored(hidden, weight, **others):
            return STORED(hidden @ weight.T, **others, **options)

        pair = [differentiated(f, arrays | more) for f in (streamed, stored)]
        for one, two in zip(*map(jax.tree.leaves, pair), strict=True):
            assert_close(one, two, dtype="float64", length=BATCH * LENGTH, c=8)


@pytest.mark.parametrize("shape", [(6, 1), (9, 9), (3, 8)])
def test_every_pair_of_lengths(shape):
    random = np.random.default_rng(0)
    length, tokens = shape
    z = random.normal(size=(length, CLASSES)).astype(np.float32)
    labels = random.integers(0, CLASSES, tokens)
    every = np.ones(length, bool), np.ones(tokens, bool)
    lengths = (1, 2, 3, 7)
    run = lambda z: [STORED(z, jnp.asarray(labels), ngrams=(n,)) for n in lengths]
    for n, found in zip(lengths, jax.jit(run)(jnp.asarray(z)), strict=True):
        wanted = oracle.loss(
            np.float64(z), labels, (n,), (1.0,), "softmax", -20.0, *every
        )
        assert_close(found, wanted, dtype="float32", length=CLASSES)


# ----------------------------------------------------------------------------- promises
@both_sources
def test_an_n_gram_as_long_as_both_is_the_mean_cross_entropy(name):
    function, arrays = source(name)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, CLASSES, (BATCH, LENGTH)))
    found = differentiated(
        functools.partial(function, ngrams=(LENGTH,)), arrays, labels=labels
    )
    plain: Any = (
        losses.linear_softmax_cross_entropy
        if name == "linear"
        else of_stored.softmax_cross_entropy
    )
    wanted = differentiated(
        lambda labels, **arrays: plain(**arrays, labels=labels).mean(-1),
        arrays,
        labels=labels,
    )
    for one, two in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert_close(one, two, dtype="float32", length=CLASSES)


def test_a_shifted_sequence_is_expensive_for_cross_entropy_alone():
    """Sure of every token, one place late: 8.01 against less than 1."""
    random = np.random.default_rng(1)
    labels = jnp.asarray(random.permutation(30)[:12])
    aligned = 8 * jax.nn.one_hot(labels, 30)
    shifted = jnp.roll(aligned, 1, axis=0)
    assert of_stored.softmax_cross_entropy(shifted, labels).mean() > 8
    pairs = jax.jit(functools.partial(STORED, ngrams=(2,)))
    assert pairs(shifted, labels) < 1
    assert pairs(aligned, labels) < 0.1


@both_sources
def test_no_n_gram_that_counts_gives_loss_and_gradient_zero(name):
    function, arrays = source(name)
    labels = jnp.asarray(labels_and_masks()[0])
    masks = {
        "where": jnp.ones((BATCH, LENGTH), bool),
        "label_where": jnp.ones((BATCH, TOKENS), bool),
        "class_where": jnp.ones(CLASSES, bool),
    }

    @jax.jit
    def run(arrays, masks):
        total = lambda arrays: function(**arrays, labels=labels, **masks).sum()
        return jax.value_and_grad(total)(arrays)

    for mask, every in masks.items():
        for leaf in jax.tree.leaves(run(arrays, masks | {mask: ~every})):
            np.testing.assert_array_equal(leaf, 0)
    assert run(arrays, masks)[0] > 0


@both_sources
@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_a_label_outside_makes_its_example_nan_without_gradient(name, wrong):
    function, arrays = source(name)
    labels, _, _ = labels_and_masks()
    labels[1, 2] = wrong
    loss, gradients = differentiated(function, arrays, labels=jnp.asarray(labels))
    np.testing.assert_array_equal(np.isnan(loss), np.arange(BATCH) == 1)
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients[next(iter(arrays))][1], 0)


@both_sources
def test_nan_stays_in_its_example(name):
    function, arrays = source(name)
    labels, _, _ = labels_and_masks()
    rows = next(iter(arrays))
    arrays[rows] = arrays[rows].at[2, 3].set(jnp.nan)
    loss, gradients = differentiated(function, arrays, labels=jnp.asarray(labels))
    others = np.arange(BATCH) != 2
    np.testing.assert_array_equal(np.isnan(loss), ~others)
    assert np.isfinite(gradients[rows][others]).all()


def test_extreme_logits_are_cut_at_the_floor_without_gradient():
    """Also a logit of -inf, and one on an excluded class."""
    logits = jnp.full((1, 3, 4), -1e4).at[:, :, 0].set(1e4).at[0, 1, 2].set(-jnp.inf)
    labels = jnp.array([[1, 2, 3]])
    loss, gradients = differentiated(
        functools.partial(STORED, ngrams=(1, 2, 4), class_where=jnp.arange(4) != 3),
        {"logits": logits},
        labels=labels,
        floor=-7.5,
    )
    np.testing.assert_allclose(loss, 2 / 3 * 7.5)  # there is no n-gram of length 4
    np.testing.assert_array_equal(gradients["logits"], 0)


def test_a_window_that_matches_badly_is_pushed_down_unless_weights_are_fixed():
    """The slope in g is -w (1 + g - f), or -w."""
    log_p = jnp.log(jnp.array([[0.9, 0.1], [0.01, 0.99], [0.5, 0.5]]))

    # Adding a number per position leaves the softmax, so logits are free of gauge.
    def slope(**options):
        loss = lambda z: STORED(z, jnp.array([0]), ngrams=(1,), **options)
        return jax.jit(jax.grad(loss))(log_p)[:, 0]

    assert slope()[1] > 0
    assert slope()[0] < 0
    assert (slope(stop_weight_gradient=True) < 0).all()


@both_sources
def test_gumbel_weights_are_random_and_fixed_by_the_key(name):
    function, arrays = source(name)
    labels, _, _ = labels_and_masks()

    @jax.jit
    def run(key):
        return function(**arrays, labels=jnp.asarray(labels), mode="gumbel", key=key)

    one, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).all()


def test_gumbel_loss_is_at_least_that_of_the_best_window():
    """A weighted mean of g, whatever the weights; of one window exactly g."""
    _, arrays = source("logits")
    labels = jnp.asarray(labels_and_masks()[0])
    draw = jax.jit(
        lambda key: STORED(
            **arrays, labels=labels, ngrams=(1,), mode="gumbel", key=jax.random.key(key)
        )
    )
    log_p = jax.nn.log_softmax(arrays["logits"])
    g = jnp.take_along_axis(log_p, labels[:, None], axis=-1)
    least, most = 0 - g.max(1).mean(-1), 0 - g.min(1).mean(-1)
    for key in range(5):
        assert (draw(key) >= least - 1e-6).all()
        assert (draw(key) <= most + 1e-6).all()


@settings(max_examples=8)
@given_examples(seed=st.integers(0, 2**31))
def test_algebra(seed):
    """A number added to a position, the order of words, and of the two modes.

    No n-gram minds the first, the unigram loss not the second; logsumexp is below.
    """
    random = np.random.default_rng(seed)
    logits = jnp.asarray(2 * random.normal(size=(6, CLASSES)), jnp.float32)
    labels = jnp.asarray(random.integers(0, CLASSES, 5))
    loss = _algebra(logits, labels)
    shifted = _algebra(logits + random.normal(size=(6, 1)).astype("float32"), labels)
    assert_close(shifted, loss, dtype="float32", length=CLASSES, c=8)
    one, two = random.permutation(6), random.permutation(5)
    moved = _algebra(logits[one], labels[two])
    assert_close(moved[0], loss[0], dtype="float32", length=CLASSES, c=8)
    assert (loss[2:] <= loss[:2] + 1e-5).all()


@jax.jit
def _algebra(logits, labels):
    return jnp.stack(
        [
            STORED(logits, labels, ngrams=(n,), mode=mode)
            for mode, n in itertools.product(("softmax", "logsumexp"), (1, 2))
        ]
    )


def test_a_frequent_token_is_summed_before_it_is_rounded():
    """512 equal labels in bfloat16: one at a time the sum would stop growing."""
    hidden = jnp.ones((64, 8, 2), jnp.bfloat16)
    weight = jnp.zeros((3, 2), jnp.bfloat16)
    labels = jnp.zeros((64, 8), int)
    loss = lambda w: LINEAR(hidden, w, labels, ngrams=(1,)).sum()
    gradient = jax.jit(jax.grad(loss))(weight)
    # Of log p(0): 1 - 1/3 for each example, at all its positions together.
    wanted = 64 * np.array([[-2 / 3] * 2, [1 / 3] * 2, [1 / 3] * 2])
    assert_close(gradient, wanted, dtype="bfloat16", length=1)


@pytest.mark.parametrize("batch", [(0,), (2, 3)])
@both_sources
def test_any_number_of_batch_axes(name, batch):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, weight = draw(*batch, LENGTH, FEATURES), draw(CLASSES, FEATURES)
    labels = jnp.asarray(random.integers(0, CLASSES, (*batch, TOKENS)))
    if name == "linear":
        function = lambda hidden, labels: LINEAR(hidden, weight, labels)
    else:
        function = lambda hidden, labels: STORED(hidden @ weight.T, labels)
    found = jax.jit(function)(hidden, labels)
    assert found.shape == batch
    flat = hidden.reshape(-1, LENGTH, FEATURES), labels.reshape(-1, TOKENS)
    one = jax.jit(lambda h, y: STORED(h @ weight.T, y))
    each = [one(h, y) for h, y in zip(*flat, strict=True)]
    assert_close(found.reshape(-1), np.array(each), dtype="float32", length=CLASSES)


@pytest.mark.slow
@both_sources
def test_under_every_transformation(name):
    function, arrays = source(name)
    labels, where, label_where = labels_and_masks()

    def call(labels, where, label_where, *arrays):
        return function(
            *arrays, labels, where=where, label_where=label_where, ngrams=(1, 2)
        )

    skip = {"forward_mode": "the streamed statistics have a custom_vjp"}
    check_transformations(
        call,
        jnp.asarray(labels),
        jnp.asarray(where),
        jnp.asarray(label_where),
        *arrays.values(),
        rows=(0, 1, 2, 3),
        skip=skip,
    )


@pytest.mark.parametrize(
    ("shape", "kind", "check_vma"),
    [
        ((2, 4), AxisType.Explicit, True),
        pytest.param((1, 8), AxisType.Auto, False, marks=pytest.mark.slow),
    ],
)
def test_divided_classes_give_the_numbers_of_one_device(shape, kind, check_vma):
    classes = 16
    mesh = jax.make_mesh(shape, ("data", "classes"), (kind, kind))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    given = {
        "hidden": draw(4, 5, FEATURES),
        "weight": draw(classes, FEATURES),
        "bias": draw(classes),
    }
    labels = jnp.asarray(random.integers(0, classes, (4, 6)))
    specs = {"hidden": P("data"), "weight": P("classes"), "bias": P("classes")}

    def loss(axis_name, given, labels):
        return LINEAR(**given, labels=labels, ngrams=(1, 2), axis_name=axis_name)

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


# ----------------------------------------------------------------------------- headline
@pytest.mark.slow
def test_targets_with_edits_blur_cross_entropy_more_than_n_grams():
    """Logits per position, trained on copies with words inserted, dropped or repeated.

    The share of the pairs that the most likely sequence has in common with the clean
    target.
    """
    length, classes, copies = 12, 20, 64
    random = np.random.default_rng(0)
    clean = random.permutation(classes)[:length]

    def edited():
        words = list(clean)
        for _ in range(2):
            place = random.integers(0, len(words))
            kind = random.integers(0, 3)
            if kind == 0:
                words.insert(place, random.integers(0, classes))
            elif kind == 1:
                del words[place]
            else:
                words.insert(place, words[place])
        return (words + [0] * length)[: length + 2], len(words)

    pairs = [edited() for _ in range(copies)]
    labels = jnp.asarray([words for words, _ in pairs])
    size = jnp.asarray([min(n, length + 2) for _, n in pairs])
    label_where = jnp.arange(length + 2)[None] < size[:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def trained(share):
        def loss(logits):
            at_place = of_stored.softmax_cross_entropy(
                jnp.broadcast_to(logits, (copies, *logits.shape)),
                labels[:, :length],
                where=label_where[:, :length],
            ).mean()
            if share == 0:
                return at_place
            of_n_grams = of_stored.edit_invariant_sequence_loss(
                jnp.broadcast_to(logits, (copies, *logits.shape)),
                labels,
                ngrams=(2, 3),
                label_where=label_where,
            ).mean()
            return of_n_grams + share * at_place

        optimizer = optax.adam(0.05)

        def step(carry, _):
            logits, state = carry
            updates, state = optimizer.update(jax.grad(loss)(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        logits = 0.01 * jax.random.normal(jax.random.key(0), (length, classes))
        return jax.lax.scan(step, (logits, optimizer.init(logits)), length=400)[0][0]

    def precision(share):
        words = np.asarray(trained(share).argmax(-1))
        wanted = set(itertools.pairwise(clean.tolist()))
        return np.mean([pair in wanted for pair in itertools.pairwise(words.tolist())])

    plain, invariant = precision(0), precision(0.1)
    assert invariant > plain


# ------------------------------------------------------------------------------- errors
BAD = [
    ("labels", {"labels": jnp.zeros((BATCH, 3))}, TypeError, "float32."),
    ("labels", {"labels": jnp.zeros(3, int)}, ValueError, "(3,)."),
    ("labels", {"labels": jnp.zeros((3, 3), int)}, ValueError, "(3, 3)."),
    ("where", {"where": jnp.zeros((BATCH, LENGTH))}, TypeError, "float32."),
    ("where", {"where": jnp.zeros((BATCH, 3), bool)}, ValueError, "(4, 3)."),
    ("label_where", {"label_where": jnp.zeros((BATCH, 3))}, TypeError, "float32."),
    (
        "label_where",
        {"label_where": jnp.zeros((BATCH, 4), bool)},
        ValueError,
        "(4, 4).",
    ),
    ("ngrams", {"ngrams": (0,)}, ValueError, "0."),
    ("ngrams", {"ngrams": ()}, ValueError, "none."),
    ("ngrams", {"ngrams": (1.0,)}, TypeError, "float."),
    ("weights", {"weights": (1.0, 2.0, 3.0)}, ValueError, "(3,)."),
    ("weights", {"weights": jnp.ones(2, int)}, TypeError, "int32."),
    ("mode", {"mode": "hard"}, ValueError, "'hard'."),
    ("key", {"mode": "gumbel"}, TypeError, "None."),
    ("floor", {"floor": 1.0}, ValueError, "1.0."),
    ("floor", {"floor": -np.inf}, ValueError, "-inf."),
    ("floor", {"floor": jnp.zeros(2)}, ValueError, "shape (2,)."),
]


@pytest.mark.usefixtures("untyped")
@both_sources
@pytest.mark.parametrize(("argument", "options", "error", "got"), BAD)
def test_error_names_function_argument_and_value(name, argument, options, error, got):
    function, arrays = source(name)
    arguments = {"labels": jnp.zeros((BATCH, 3), int)} | options
    with pytest.raises(error) as raised:
        function(**arrays, **arguments)
    message = str(raised.value)
    start = f"edit_invariant_sequence_loss: `{argument}` must "
    assert message.startswith(start)
    assert message.endswith(f"got {got}")


@pytest.mark.usefixtures("untyped")
@both_sources
def test_positions_are_needed(name):
    function, arrays = source(name)
    rows = next(iter(arrays))
    arrays[rows] = arrays[rows][0, 0]
    with pytest.raises(ValueError, match="`logits` must have at least 2 axes"):
        function(**arrays, labels=jnp.zeros(3, int))
