"""Losses of rows with many positives among very many labels."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import LinearLogits
from softlib.softmax import soft_top_k
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.compiled import losses, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import as_jax, assert_agrees
from tests.oracles import extreme as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
ROWS, FEATURES, CLASSES = 8, 3, 11
# One positive, several, all in one part of the table, none; padding anywhere.
IDS = np.array(
    [
        [0, -1, -1],
        [2, 5, 10],
        [9, -1, 8],
        [-1, -1, -1],
        [1, 4, -1],
        [-1, 7, -1],
        [0, 1, 2],
        [3, 6, -1],
    ]
)


class Loss(NamedTuple):
    public: str
    linear: bool  # whether it takes a head
    oracle: Any
    options: dict[str, Any]


LOSSES = {
    "decoupled": Loss("decoupled_softmax_loss", True, oracle.decoupled, {}),
    "one_versus_all": Loss("one_versus_all_loss", True, oracle.one_versus_all, {}),
    "soft_top_k": Loss(
        "soft_top_k_loss", False, oracle.soft_top_k, {"k": 2.5, "alpha": 1.5}
    ),
}
FORMS = [
    (name, source)
    for name, loss in LOSSES.items()
    for source in ("mask", "ids", "linear")
    if source != "linear" or loss.linear
]
every_form = pytest.mark.parametrize(("name", "source"), FORMS)
LINEAR = [name for name, loss in LOSSES.items() if loss.linear]


def linear(name) -> Any:
    return getattr(of_head, LOSSES[name].public)


def mask_of(ids, classes=CLASSES):
    return (ids[..., None] == np.arange(classes)).any(-2)


def arrays(source, dtype="float32", seed=0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    hidden, weight = draw(ROWS, FEATURES), draw(CLASSES, FEATURES)
    if source == "linear":
        return {"hidden": hidden, "weight": weight}
    return {"logits": (hidden.astype(jnp.float32) @ weight.T).astype(dtype)}


def function_of(name, source, ids=IDS, **options):
    """The loss of floating arrays by name, with positives of this kind."""
    loss = LOSSES[name]
    options = {**loss.options, **options}
    functions = of_head if source == "linear" else of_stored
    call = getattr(functions, loss.public)
    if source == "linear":
        options = {"vocab_chunk": 4, **options}
    positives = mask_of(ids) if source == "mask" else ids
    return functools.partial(call, positives=jnp.asarray(positives), **as_jax(options))


def differentiated(function, floating):
    @jax.jit
    def run(floating):
        def total(floating):
            loss = function(**floating)
            return loss.sum(), loss

        return jax.grad(total, has_aux=True)(floating)

    gradients, loss = run(floating)
    return loss, gradients


def expected_of(name, floating, ids=IDS, *, scale=1.0, bias=0.0, **options):
    """Losses, and gradients by argument, from the oracle of the rounded arrays."""
    floating = {n: np.asarray(a, np.float64) for n, a in floating.items()}
    options = {**LOSSES[name].options, **options}
    weights = floating.get("weights")
    hidden, table = floating.get("hidden"), floating.get("weight")
    z = floating["logits"] if hidden is None or table is None else hidden @ table.T
    z = scale * z + bias
    loss, dz, dw = oracle.losses_of(
        LOSSES[name].oracle, z, ids, weights=weights, **options
    )
    dz = scale * dz
    gradients = {"logits": dz}
    if hidden is not None and table is not None:
        gradients = {"hidden": dz @ table, "weight": dz.T @ hidden}
    if weights is not None:
        gradients["weights"] = dw
    return loss, gradients


# ----------------------------------------------------------------------------- oracles
@every_form
def test_matches_oracle(name, source):
    """Weights, excluded labels, dropped rows, bad ids and no positives in one batch."""
    with jax.enable_x64():
        floating = arrays(source, "float64")
        rows = next(iter(floating))
        floating[rows] = floating[rows].at[4].set(jnp.nan)
        ids = IDS.copy()
        if source != "mask":
            ids[5, 0] = CLASSES  # outside: NaN, without gradient
        options: dict[str, Any] = {
            "class_where": np.arange(CLASSES) != 2,
            "where": np.arange(ROWS) != 4,
        }
        if source != "mask":
            random = np.random.default_rng(1)
            floating["weights"] = jnp.asarray(random.uniform(0.5, 2, IDS.shape))
        bias = np.linspace(-1, 1, CLASSES)
        more = {**options, "bias": jnp.asarray(bias), "scale": 1.5}
        loss, gradients = differentiated(
            function_of(name, source, ids, **more), floating
        )
        floating[rows] = floating[rows].at[4].set(0)  # the oracle multiplies by it
        wanted, slopes = expected_of(
            name, floating, ids, bias=bias, scale=1.5, **options
        )
        assert np.isinf(wanted[[1, 6]]).all()  # positives on the excluded label
        assert np.isnan(wanted[5]) == (source != "mask")
        assert_agrees(loss, wanted, jnp.float64, 0)
        assert gradients.keys() == slopes.keys()
        for argument, gradient in gradients.items():
            assert_agrees(gradient, slopes[argument], jnp.float64, 0)


@every_form
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_give_float32(name, source, dtype):
    floating = arrays(source, dtype)
    loss, gradients = differentiated(function_of(name, source), floating)
    wanted, slopes = expected_of(name, floating)
    assert loss.dtype == jnp.float32
    assert_close(loss, wanted, dtype=jnp.float32, length=CLASSES)
    for argument, gradient in gradients.items():
        assert gradient.dtype == jnp.dtype(dtype), argument
        assert_close(gradient, slopes[argument], dtype=dtype, length=ROWS)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(
    ("implementation", "vocab_axis"), [("xla", 1), ("reference", 0)]
)
def test_linear_head_in_both_layouts(name, implementation, vocab_axis):
    """Softcap, scale and temperature per row, chunks that do not divide the labels."""
    floating = arrays("linear")
    scores = LinearLogits(*floating.values()).materialize()
    per_row = jnp.linspace(0.5, 1.5, ROWS)
    options = {"softcap": 2.0, "temperature": per_row, "scale": 1.5}
    wanted = function_of(name, "mask", **options)(logits=scores)
    if vocab_axis:
        floating["weight"] = floating["weight"].T
    call = function_of(
        name,
        "linear",
        vocab_axis=vocab_axis,
        implementation=implementation,
        **options,
    )
    loss, gradients = differentiated(call, floating)
    assert_close(loss, wanted, dtype=jnp.float32, length=CLASSES)
    stored = functools.partial(function_of(name, "mask", **options))
    slope = jax.jit(jax.grad(lambda s: stored(logits=s).sum()))(scores)
    dense = slope @ arrays("linear")["weight"]
    assert_close(gradients["hidden"], dense, dtype=jnp.float32, length=CLASSES)


def test_matches_independent_vectors():
    data = np.load(DATA / "dexml_xmc_losses_case0.npz")
    with jax.enable_x64():
        x = jnp.asarray(data["in_scores"])
        positives = jnp.asarray(data["in_positives"])
        k, alpha = float(data["in_k"]), float(data["in_alpha"])

        @jax.jit
        def run(x):
            top = functools.partial(
                of_stored.soft_top_k_loss, positives=positives, alpha=alpha
            )
            z, pull = jax.vjp(lambda x: soft_top_k(x, k=k, alpha=alpha), x)
            slope = lambda f: jax.grad(lambda x: f(x).sum())(x)
            decoupled = lambda x: of_stored.decoupled_softmax_loss(x, positives)
            return {
                "decoupled": decoupled(x),
                "decoupled_grad": slope(decoupled),
                "multilabel_softmax": of_stored.softmax_cross_entropy(
                    x, positives.astype(x.dtype)
                ),
                "soft_top_k": z,
                "threshold": (jnp.log(z / (1 - z)) / alpha - x).mean(-1),
                "soft_top_k_vjp": pull(jnp.asarray(data["in_ct_soft_top_k"]))[0],
                "soft_top_k_loss": top(x, k=k),
                "soft_top_k_loss_grad": slope(lambda x: top(x, k=k)),
                "soft_top_k_loss_k_num_pos": top(x, k=None),
            }

        found = run(x)
    assert {f"out_{name}" for name in found} == {n for n in data if n[:4] == "out_"}
    for name, value in found.items():
        assert_agrees(value, data[f"out_{name}"], jnp.float64, 0)


# ---------------------------------------------------------------------------- promises
@every_form
def test_a_row_without_positives(name, source):
    """Does not count, whatever it holds; in one-versus-all all of it are negatives."""
    ids = np.full_like(IDS, -1)
    ids[0] = IDS[0]
    floating = arrays(source)
    rows = next(iter(floating))
    if name != "one_versus_all":
        floating[rows] = floating[rows].at[1].set(jnp.nan)
    loss, gradients = differentiated(function_of(name, source, ids), floating)
    if name == "one_versus_all":
        assert (loss > 0).all()
        return
    np.testing.assert_array_equal(loss[1:], 0)
    np.testing.assert_array_equal(gradients[rows][1:], 0)
    assert loss[0] > 0
    assert all(np.isfinite(g).all() for g in gradients.values())


@every_form
def test_nan_stays_in_its_row(name, source):
    floating = arrays(source)
    rows = next(iter(floating))
    floating[rows] = floating[rows].at[1].set(jnp.nan)
    loss, gradients = differentiated(function_of(name, source), floating)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(ROWS) == 1)
    assert np.isfinite(np.delete(gradients[rows], 1, axis=0)).all()


@every_form
def test_no_label_selected_gives_zero_loss_and_gradient(name, source):
    options = {"class_where": np.zeros(CLASSES, bool)}
    found = differentiated(function_of(name, source, **options), arrays(source))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("source", ["mask", "ids", "linear"])
def test_without_negatives_decoupled_is_zero(source):
    """All labels are positives."""
    ids = np.tile(np.arange(CLASSES), (ROWS, 1))
    found = differentiated(function_of("decoupled", source, ids), arrays(source))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("source", ["mask", "ids", "linear"])
@pytest.mark.parametrize("name", ["decoupled", "multilabel"])
def test_one_positive_is_cross_entropy(name, source):
    if (name, source) not in FORMS:
        return
    ids = np.arange(ROWS)[:, None]
    floating = arrays(source)
    found = differentiated(function_of(name, source, ids), floating)
    labels = jnp.arange(ROWS)
    plain: Any = of_stored.softmax_cross_entropy
    if source == "linear":
        plain = losses.linear_softmax_cross_entropy
    wanted = (
        differentiated(functools.partial(plain, labels=labels), floating)
        if (source == "linear")
        else differentiated(lambda logits: plain(logits, labels), floating)
    )
    for one, two in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert_close(one, two, dtype=jnp.float32, length=CLASSES)


@pytest.mark.parametrize("source", ["mask", "ids", "linear"])
def test_a_positive_that_stands_out_leaves_all_digits_of_the_negatives(source):
    """Lse - z of 30 over 99,999 zeros: log1p(-p) would be -inf in float32."""
    count = 100_000
    ids = np.array([[7]])
    if source == "linear":
        table = np.zeros((count, 1), np.float32)
        table[7] = 30
        floating = {"hidden": jnp.ones((1, 1)), "weight": jnp.asarray(table)}
    else:
        floating = {"logits": jnp.zeros((1, count)).at[0, 7].set(30)}
    positives = mask_of(ids, count) if source == "mask" else ids
    call = (
        of_head.decoupled_softmax_loss
        if source == "linear"
        else of_stored.decoupled_softmax_loss
    )
    wanted = np.log1p(99_999 * np.exp(-30.0))
    loss = jax.jit(lambda f: call(**f, positives=jnp.asarray(positives)))(floating)
    np.testing.assert_allclose(loss, [wanted], rtol=1e-5)


@pytest.mark.parametrize(("name", "source"), FORMS)
def test_scores_of_ten_thousand(name, source):
    """Losses and gradients are finite, and right in the limit."""
    random = np.random.default_rng(0)
    scores = jnp.asarray(1e4 * random.choice([-1, 1], (ROWS, CLASSES)), jnp.float32)
    floating = {"logits": scores}
    if source == "linear":
        table = jnp.asarray(np.eye(CLASSES), jnp.float32)
        floating = {"hidden": scores, "weight": table}
    loss, gradients = differentiated(function_of(name, source), floating)
    wanted, _ = expected_of(name, floating) if name != "multilabel" else (loss, 0)
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(loss, wanted, rtol=1e-3, atol=1e-3)
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LINEAR)
def test_a_score_of_minus_infinity_cannot_be_chosen(name):
    scores = arrays("mask")["logits"].at[:, 2].set(-jnp.inf)
    loss, gradients = differentiated(function_of(name, "mask"), {"logits": scores})
    np.testing.assert_array_equal(np.isinf(loss), mask_of(IDS)[:, 2])
    assert np.isfinite(gradients["logits"]).all()
    np.testing.assert_array_equal(gradients["logits"][:, 2], 0)


def test_a_second_positive_does_not_change_the_first_ones_term():
    """But for the negative that it no longer is; it competes with nothing else."""
    scores = arrays("mask")["logits"].at[:, 1].set(-jnp.inf)  # as good as no negative
    weights = jnp.asarray([1.0, 0.0])[None].repeat(ROWS, 0)
    call = jax.jit(of_stored.decoupled_softmax_loss)
    both = jnp.asarray([[0, 1]] * ROWS)
    one = call(scores, both[:, :1], weights=weights[:, :1])
    two = call(scores, both, weights=weights)
    assert_close(two, one, dtype=jnp.float32, length=CLASSES)


def test_softmax_pushes_a_certain_positive_down_and_decoupled_does_not():
    scores = jnp.zeros((1, 6)).at[0, 0].set(4.0)
    positives = jnp.asarray([[True, True, False, False, False, False]])
    slope = lambda loss: jax.grad(lambda s: loss(s, positives).sum())(scores)[0]
    softmax = lambda s, p: of_stored.softmax_cross_entropy(s, p.astype(s.dtype))
    assert slope(softmax)[0] > 0.5
    assert (slope(of_stored.decoupled_softmax_loss)[:2] < 0).all()


# -------------------------------------------------------------------------- properties
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50, width=32))
def test_algebra(seed, shift):
    random = np.random.default_rng(seed)
    scores = jnp.asarray(3 * random.normal(size=(ROWS, CLASSES)), jnp.float32)
    positives = random.uniform(size=(ROWS, CLASSES)) < 0.4
    found = _families(scores, jnp.asarray(positives))
    shifted = _families(scores + jnp.float32(shift), jnp.asarray(positives))
    order = random.permutation(CLASSES)
    permuted = _families(scores[:, order], jnp.asarray(positives[:, order]))
    for name in ("decoupled", "multilabel", "soft_top_k"):
        close = functools.partial(assert_close, dtype=jnp.float32, length=600)
        close(shifted[name][0], found[name][0])
        close(permuted[name][0], found[name][0])
    count = positives.sum(1)
    mean = np.asarray(found["multilabel"][0]) / np.maximum(count, 1)
    assert (found["decoupled"][0] <= mean + 1e-5).all()
    assert (np.asarray(found["decoupled"][1])[positives] <= 0).all()
    for loss, _ in found.values():
        assert (loss >= 0).all()


@jax.jit
def _families(scores, positives):
    slope = lambda f: (f(scores), jax.grad(lambda s: f(s).sum())(scores))
    masses = positives.astype(scores.dtype)
    summed = lambda s: of_stored.softmax_cross_entropy(s, masses)
    return {"multilabel": slope(summed)} | {
        name: slope(
            lambda s, name=name: getattr(of_stored, LOSSES[name].public)(
                s, positives, **LOSSES[name].options
            )
        )
        for name in LOSSES
    }


def test_soft_top_k_loss_is_near_zero_as_soon_as_all_positives_are_among_the_first():
    scores = jnp.asarray([[5.0, 3.0, 4.0, -5.0, -6.0, -7.0]])
    positives = jnp.asarray([[0, 2, -1]])
    top = functools.partial(of_stored.soft_top_k_loss, scores, positives, alpha=10.0)
    assert top(k=3)[0] < 1e-4
    assert top(k=1)[0] > 1
    np.testing.assert_array_equal(top(k=6), 0)  # all labels are chosen


# --------------------------------------------------------------------- transformations
@pytest.mark.slow  # the statistics underneath are transformed in every run
@pytest.mark.parametrize("name", LINEAR)
def test_linear_heads_under_every_transformation(name):
    call = linear(name)

    def function(hidden, table, ids, weights):
        return call(hidden, table, ids, weights=weights, vocab_chunk=4)

    check_transformations(
        function,
        *arrays("linear").values(),
        jnp.asarray(IDS),
        jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, IDS.shape), jnp.float32),
        rows=(0, 2, 3),
        skip={"forward_mode": "the streamed statistics have a custom_vjp"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoupled", "one_versus_all"])
def test_scores_under_every_transformation(name):
    call = getattr(of_stored, LOSSES[name].public)
    check_transformations(
        lambda scores, positives: call(scores, positives, implementation="reference"),
        arrays("mask")["logits"],
        jnp.asarray(mask_of(IDS)),
        rows=(0, 1),
    )


@pytest.mark.slow
def test_soft_top_k_loss_under_every_transformation():
    check_transformations(
        lambda scores, positives: of_stored.soft_top_k_loss(scores, positives, k=2.5),
        arrays("mask")["logits"],
        jnp.asarray(mask_of(IDS)),
        rows=(0, 1),
    )


def test_soft_top_k_loss_refuses_a_pinned_implementation():
    with pytest.raises(ValueError, match="soft_top_k_loss: `implementation` of the"):
        of_stored.soft_top_k_loss(
            jnp.zeros((1, 4)), jnp.array([[0]]), k=1, implementation="xla"
        )


@pytest.mark.parametrize("name", LINEAR)
def test_hessian_vector_products_of_a_linear_head(name):
    """Forward over reverse, against the stored scores differentiated twice."""
    with jax.enable_x64():
        floating = arrays("linear", "float64")
        direction = jax.tree.map(jnp.cos, floating)

        def product(source):
            def total(floating):
                if source == "linear":
                    return function_of(name, "linear")(**floating).sum()
                scores = floating["hidden"] @ floating["weight"].T
                call = function_of(name, "mask", implementation="reference")
                return call(logits=scores).sum()

            return jax.jit(lambda f: jax.jvp(jax.grad(total), (f,), (direction,))[1])(
                floating
            )

        pair = map(jax.tree.leaves, (product("linear"), product("mask")))
        for one, two in zip(*pair, strict=True):
            assert_agrees(one, np.asarray(two), jnp.float64, 0)


@pytest.mark.parametrize(
    ("shape", "kind", "check_vma"),
    [((2, 4), AxisType.Explicit, True), ((1, 8), AxisType.Auto, False)],
)
@pytest.mark.parametrize("name", LINEAR)
def test_divided_labels_give_the_numbers_of_one_device(name, shape, kind, check_vma):
    """Some rows have all labels of a device as positives."""
    classes = 16
    mesh = jax.make_mesh(shape, ("data", "classes"), (kind, kind))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    floating = {
        "hidden": draw(ROWS, FEATURES),
        "weight": draw(classes, FEATURES),
        "weights": jnp.abs(draw(ROWS, 4)),
    }
    ids = np.stack([random.permutation(classes)[:4] for _ in range(ROWS)])
    ids[0], ids[1], ids[2, 1:], ids[3, 0] = [4, 5, 6, 7], -1, -1, classes
    ids = jnp.asarray(ids)
    specs = {
        "hidden": P("data"),
        "weight": P("classes"),
        "weights": P("data"),
    }
    call = linear(name)

    def loss(axis_name, floating, ids):
        return call(**floating, positives=ids, axis_name=axis_name)

    mapped = jax.shard_map(
        functools.partial(loss, "classes"),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    one = differentiated(lambda **f: loss(None, f, ids), floating)
    assert np.isnan(one[0][3])
    with jax.set_mesh(mesh):
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
        placed = {n: put(array, specs[n]) for n, array in floating.items()}
        placed_ids = put(ids, P("data"))
        several = differentiated(lambda **f: mapped(f, placed_ids), placed)
        results = (jax.device_get(several), one)
    for found, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(found, wanted, dtype=jnp.float32, length=classes)


# ------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_head_has_no_array_of_rows_by_labels(name):
    rows, features, classes = 256, 16, 4099
    call = linear(name)
    total = lambda h, w, ids: call(h, w, ids, vocab_chunk=512).sum()
    struct = jax.ShapeDtypeStruct
    text = str(
        operations.make_jaxpr(jax.grad(total, (0, 1)))(
            struct((rows, features), jnp.float32),
            struct((classes, features), jnp.float32),
            struct((rows, 5), jnp.int32),
        )
    )
    for shape in (f"{rows},{classes}", f"{classes},{rows}"):
        assert f"[{shape}]" not in text
    assert f"[{classes},{features}]" in text


@pytest.mark.parametrize("name", LINEAR)
def test_scratch_is_that_of_cross_entropy(name):
    rows, features, classes = 1024, 256, 256_000

    def scratch(loss):
        struct = jax.ShapeDtypeStruct
        operands = (
            struct((rows, features), jnp.float32),
            struct((classes, features), jnp.float32),
        )
        gradient = jax.value_and_grad(lambda h, w: loss(h, w).mean(), (0, 1))
        analysis = jax.jit(gradient).lower(*operands).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    ids = jnp.zeros((rows, 8), jnp.int32)
    call = linear(name)
    plain = scratch(lambda h, w: losses.linear_softmax_cross_entropy(h, w, ids[:, 0]))
    assert scratch(lambda h, w: call(h, w, ids)) < 1.2 * plain


def test_a_gradient_filter_keeps_the_blocks_of_positives():
    """With a threshold that drops everything else, and with one that drops nothing."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(128, 8)), jnp.float32)
    table = jnp.asarray(random.normal(size=(512, 8)) / 4, jnp.float32)
    ids = jnp.asarray(random.integers(0, 128, (128, 2)))  # of the first block
    call = functools.partial(of_head.decoupled_softmax_loss, vocab_chunk=128)

    def gradient(eps):
        loss = lambda w: call(hidden, w, ids, gradient_filter_eps=eps).sum()
        return jax.jit(jax.grad(loss))(table)

    exact, none, most = gradient(None), gradient(1e-9), gradient(0.9)
    assert_close(none, exact, dtype=jnp.float32, length=128)
    assert_close(most[:128], exact[:128], dtype=jnp.float32, length=128)
    np.testing.assert_array_equal(most[128:], 0)


# ------------------------------------------------------------------------------- errors
BAD = [
    ("positives", jnp.zeros((ROWS, 2)), TypeError, "float32."),
    ("positives", jnp.zeros(ROWS, int), ValueError, "(8,)."),
    ("positives", jnp.zeros((ROWS - 1, 2), int), ValueError, "(7, 2)."),
    ("weights", jnp.ones((ROWS, 3), int), TypeError, "int32."),
    ("weights", jnp.ones((ROWS, 2)), ValueError, "(8, 2)."),
    ("where", jnp.ones(ROWS), TypeError, "float32."),
    ("where", jnp.ones(ROWS - 1, bool), ValueError, "(7,)."),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("name", "source"), [("decoupled", "linear"), ("one_versus_all", "ids")]
)
@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_error_names_function_argument_and_value(
    name, source, argument, value, error, got
):
    loss = LOSSES[name]
    function = loss.public
    functions = of_head if source == "linear" else of_stored
    arguments = {**arrays(source), "positives": jnp.asarray(IDS), argument: value}
    with pytest.raises(error) as raised:
        getattr(functions, function)(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{function}: `{argument}` must ")
    assert message.endswith(f"got {got}")


@pytest.mark.usefixtures("untyped")
def test_a_mask_must_have_the_shape_of_the_scores_and_does_not_go_with_a_head():
    mask = jnp.zeros((ROWS, CLASSES), bool)
    with pytest.raises(ValueError, match=r"`positives` must have shape \(8, 11\).*10"):
        of_stored.decoupled_softmax_loss(arrays("mask")["logits"], mask[:, 1:])
    with pytest.raises(TypeError, match=r"`positives` must be class ids .* got bool"):
        linear("decoupled")(**arrays("linear"), positives=mask)


@pytest.mark.usefixtures("untyped", "eager")
def test_wrong_options_are_named():
    head, scores = arrays("linear"), arrays("ids")["logits"]
    ids = jnp.asarray(IDS)
    every: Any = of_stored
    with pytest.raises(ValueError, match=r"`gradient_filter_eps` must be None where"):
        of_head.one_versus_all_loss(**head, positives=ids, gradient_filter_eps=0.1)
    with pytest.raises(
        ValueError, match=r"soft_top_k_loss: `k` must be positive and finite, got -1"
    ):
        every.soft_top_k_loss(scores, ids, k=-1)
