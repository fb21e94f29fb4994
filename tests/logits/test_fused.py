"""A combination of several models' logits: its definition, edges, memory and errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.logits import (
    BlockwiseLogits,
    FusedLogits,
    LoRALogits,
    StoredLogits,
    VQLogits,
)
from softlib.testing import assert_close
from tests.host import jnp
from tests.losses.problems import assert_agrees, precision

DATA = pathlib.Path(__file__).parent.parent / "data"
ROWS, CLASSES = 7, 141
LABELS = jnp.arange(ROWS) * 19 % CLASSES
SEVERAL = jnp.stack([LABELS, (LABELS + 5) % CLASSES], -1)
CUTS: dict[str, Any] = {"vocab_chunk": 60, "token_chunk": 3}


class Cosines(BlockwiseLogits):
    """A head of somebody else's."""

    of_rows, of_classes = ("hidden",), ("weight",)

    def block(self):
        wide = lambda x: x.astype(self.dtype)
        unit = lambda x: wide(x) / jnp.linalg.norm(wide(x), axis=-1, keepdims=True)
        return unit(self.hidden) @ unit(self.weight).T


# ----------------------------------------------------------------- members of each kind
def draw(shapes, seed, dtype="float32") -> dict[str, Any]:
    random = np.random.default_rng(seed)
    normal = {name: random.normal(size=shape) for name, shape in shapes.items()}
    if "temperature" in normal:
        normal["temperature"] = 0.5 + normal["temperature"] ** 2
    return {name: jnp.asarray(array, dtype) for name, array in normal.items()}


V, B = CLASSES, (ROWS,)
MAPPING = np.arange(CLASSES, dtype=np.int32) * 7 % 20
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rows": {"hidden": (*B, 5), "weight": (V, 5), "bias": (V,), "scale": B},
    "columns": {"hidden": (*B, 3), "weight": (3, V), "temperature": ()},
    "stored": {"logits": (*B, V), "bias": (V,)},
    "array": {"logits": (*B, V)},
    "vq": {"hidden": (*B, 4), "codebook": (20, 4), "token_bias": (V,)},
    "lora": {"hidden": (*B, 4), "weight": (V, 4), "lora_a": (4, 2), "lora_b": (2, V)},
    "own": {"hidden": (*B, 6), "weight": (V, 6)},
}
STATIC: dict[str, dict[str, Any]] = {
    "rows": {"softcap": 4.0},
    "columns": {},
    "stored": {"softcap": 3.0, "scale": 1.5},
    "own": {"temperature": 0.25},
    "lora": {"lora_scale": 0.5},
}


def member(kind, given) -> Any:
    """A value of the library."""
    given = {**given, **STATIC.get(kind, {})}
    if kind in ("rows", "columns"):
        return softlib.LinearLogits(**given, vocab_axis=int(kind == "columns"))
    if kind == "vq":
        return VQLogits(**given, mapping=jnp.asarray(MAPPING))
    if kind == "array":
        return given["logits"]
    return {"stored": StoredLogits, "lora": LoRALogits, "own": Cosines}[kind](**given)


def formed(kind, given, np=np):
    """The final logits of a member by their definition; of NumPy, or of JAX."""
    given = {n: np.asarray(a) for n, a in given.items()} | STATIC.get(kind, {})
    if kind in ("stored", "array"):
        raw = given["logits"]
    elif kind == "columns":
        raw = given["hidden"] @ given["weight"]
    elif kind == "vq":
        raw = (given["hidden"] @ given["codebook"].T)[:, MAPPING]
        return raw + given["token_bias"][None]
    elif kind == "lora":
        change = given["lora_scale"] * given["lora_a"] @ given["lora_b"]
        raw = given["hidden"] @ (given["weight"].T + change)
    else:
        of_rows, of_classes = given["hidden"], given["weight"]
        if kind == "own":
            of_rows = of_rows / np.sqrt((of_rows**2).sum(-1, keepdims=True))
            of_classes = of_classes / np.sqrt((of_classes**2).sum(-1, keepdims=True))
        raw = of_rows @ of_classes.T
    scale = given.get("scale", 1.0)
    u = raw * (scale[:, None] if np.ndim(scale) else scale)
    if "bias" in given:
        u = u + given["bias"][None]
    cap = given.get("softcap")
    u = u if cap is None else cap * np.tanh(u / cap)
    return u / given.get("temperature", 1.0)


def combined(kinds, arrays, weights, np=np) -> Any:
    """The raw logits of a combination by their definition."""
    weights = np.moveaxis(np.asarray(weights), -1, 0)
    tiles = [formed(*pair, np=np) for pair in zip(kinds, arrays, strict=True)]
    per_row = lambda weight: weight[..., None] if weight.ndim else weight
    return sum(per_row(w) * z for w, z in zip(weights, tiles, strict=True))


def arrays_of(kinds, dtype="float32"):
    return [draw(SHAPES[kind], seed, dtype) for seed, kind in enumerate(kinds)]


def fused(kinds, arrays, weights, **options) -> Any:
    members = [member(*pair) for pair in zip(kinds, arrays, strict=True)]
    return FusedLogits(members, weights, **options)


def exact(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


KINDS = tuple(SHAPES)
MIXES = [
    ("rows", "columns", "stored"),
    ("vq", "rows"),
    ("lora", "own", "array"),
    KINDS,
]


def weights_of(kinds, per_row, dtype="float32"):
    shape = (*B, len(kinds)) if per_row else (len(kinds),)
    return draw({"w": shape}, 11, dtype)["w"]


# ------------------------------------------------------------------ values, derivatives
@pytest.mark.parametrize(
    ("kinds", "per_row", "dtype"),
    [
        (MIXES[0], True, "bfloat16"),
        (MIXES[1], False, "float16"),
        (MIXES[2], True, "float32"),
        (KINDS, False, "float64"),
        (KINDS, True, "float64"),
        (KINDS, True, "bfloat16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_logits_are_the_sum_of_final_logits(kinds, per_row, dtype):
    with precision(dtype):
        arrays, weights = arrays_of(kinds, dtype), weights_of(kinds, per_row, dtype)
        logits = jax.jit(lambda *given: fused(kinds, *given))(arrays, weights)
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (arrays, weights))
        found = logits.materialize()
        assert found.dtype == logits.dtype == jnp.promote_types(dtype, jnp.float32)
        assert logits.shape == (ROWS, CLASSES)
        assert_agrees(found, combined(kinds, *wide), found.dtype, 50)


LOSSES: dict[str, Any] = {
    "cross-entropy": lambda z: losses.softmax_cross_entropy(
        z, LABELS, label_smoothing=0.1, where=LABELS != 19
    ),
    "focal": lambda z: losses.softmax_focal_loss(z, LABELS, gamma=2.0),
    "several labels": lambda z: losses.multi_label_cross_entropy(z, SEVERAL),
    "one versus all": lambda z: losses.one_versus_all_loss(z, SEVERAL),
    "z-loss": lambda z: losses.z_loss(z, LABELS, a=0.5, b=1.0),
    "spherical": lambda z: losses.log_taylor_softmax_loss(z, LABELS),
    "sum": lambda z: losses.softmax_cross_entropy_sum(z, LABELS),
    "entropy": softlib.logits.entropy,
    "distillation": lambda z: losses.softmax_kl_divergence(z, teacher()),
    "reversed": lambda z: losses.softmax_jensen_shannon_divergence(teacher(), z),
    "robust": lambda z: losses.robust_softmax_cross_entropy(
        z, LABELS, temperature=jnp.full(ROWS, 1.3), rho=0.1
    ),
    "gathered": lambda z: softlib.logits.gather(z, SEVERAL).sum(-1),
    "author's": lambda z: softlib.logits.labelled_rows(z, LABELS).lse ** 2,
}


def teacher():
    given = draw({"hidden": (*B, 4), "weight": (CLASSES, 4)}, 8)
    return softlib.LinearLogits(**given)


CASES = [(name, MIXES[i % 3], bool(i % 2)) for i, name in enumerate(LOSSES)] + [
    ("cross-entropy", KINDS, True),
    ("distillation", KINDS, False),
]


@pytest.mark.parametrize(
    ("name", "kinds", "per_row"), CASES, ids=[f"{n}-{len(k)}-{r}" for n, k, r in CASES]
)
def test_losses_and_gradients_are_those_of_the_array(name, kinds, per_row):
    """In pieces with a rest of rows and of classes; against float64."""
    factors = jnp.cos(jnp.arange(ROWS))
    modifiers: dict[str, Any] = {"softcap": 6.0, "scale": 1.5}

    def total(given, stored):
        arrays, weights, bias = given
        own = modifiers | {"bias": bias}
        if stored:
            array = combined(kinds, arrays, weights, np=jax.numpy)
            logits: Any = StoredLogits(array, **own)
        else:
            logits = fused(kinds, arrays, weights, **own, **CUTS)
        return (factors * LOSSES[name](logits)).sum()

    given = arrays_of(kinds), weights_of(kinds, per_row), draw({"b": (V,)}, 12)["b"]
    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    ours, gradients = run(given, False)
    with jax.enable_x64():
        theirs, wanted = run(exact(given), True)
    assert_close(ours, theirs, dtype=jnp.float32, length=50 * CLASSES)
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, theirs), gradient in zip(paths, jax.tree.leaves(gradients), strict=True):
        assert np.any(theirs)
        np.testing.assert_allclose(
            gradient,
            theirs,
            rtol=0,
            atol=2e-5 * np.abs(theirs).max(),
            err_msg=str(path),
        )


def test_narrow_arrays_and_weights_keep_their_dtypes():
    kinds = ("rows", "array")
    arrays, weights = arrays_of(kinds, "bfloat16"), weights_of(kinds, True, "bfloat16")

    def total(arrays, weights):
        logits = fused(kinds, arrays, weights, **CUTS)
        return losses.softmax_cross_entropy(logits, LABELS).sum()

    def formed_total(arrays, weights):
        array = combined(kinds, arrays, weights, np=jax.numpy)
        return losses.softmax_cross_entropy(array, LABELS).sum()

    found = jax.grad(total, argnums=(0, 1))(arrays, weights)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, weights))
    wanted = jax.grad(formed_total, argnums=(0, 1))(*wide)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert ours.dtype == jnp.bfloat16
        bound = 0.02 * np.abs(theirs).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), theirs, rtol=0, atol=bound
        )


def test_forward_over_reverse():
    kinds = ("rows", "stored")
    arrays, weights = arrays_of(kinds), weights_of(kinds, True)

    def total(weights, stored):
        if stored:
            logits = combined(kinds, arrays, weights, np=jax.numpy)
        else:
            logits = fused(kinds, arrays, weights, **CUTS)
        return losses.softmax_cross_entropy(logits, LABELS).sum()

    def product(stored):
        gradient = jax.grad(functools.partial(total, stored=stored))
        return jax.jvp(gradient, (weights,), (jnp.ones_like(weights),))[1]

    assert_close(product(False), product(True), dtype=jnp.float32, length=10**4)


# ---------------------------------------------------------------------------- questions
@pytest.mark.parametrize("kinds", [MIXES[1], MIXES[2]], ids="-".join)
def test_questions_have_the_answers_of_the_array(kinds):
    arrays, weights = arrays_of(kinds), weights_of(kinds, True)
    logits = fused(kinds, arrays, weights, scale=0.7, **CUTS)
    array = logits.materialize()
    best = softlib.logits.top_k(logits, k=3)
    np.testing.assert_array_equal(best.classes, jax.lax.top_k(array, 3)[1])
    key = jax.random.key(0)
    drawn = softlib.logits.sample(key, logits, min_p=0.01)
    wanted = softlib.logits.sample(key, array, min_p=0.01)
    np.testing.assert_array_equal(drawn, wanted)
    rank = softlib.logits.label_rank
    np.testing.assert_array_equal(rank(logits, LABELS), rank(array, LABELS))
    close = functools.partial(assert_close, dtype=jnp.float32, length=50 * CLASSES)
    names = ("lse", "mean_logit", "sum_logits", "sum_squared_logits", "sum_softplus")
    of = softlib.logits.row_statistics
    moments = softlib.logits.moments
    found, wanted = (
        jax.tree.leaves((of(z, statistics=names), moments(z))) for z in (logits, array)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs)
    temperature = functools.partial(
        softlib.logits.optimal_temperature,
        rho=0.5,
        temperature_min=0.05,
        temperature_max=5.0,
    )
    assert_close(
        temperature(logits), temperature(array), dtype=jnp.float32, length=10**6
    )


def batched(kinds):
    """Members whose rows are a batch of two axes, by the values' own reshape."""
    arrays, weights = arrays_of(kinds), weights_of(kinds, True)
    rows = 6
    logits = fused(kinds, arrays, weights)[:rows].reshape(2, 3)
    return logits, combined(kinds, arrays, weights)[:rows].reshape(2, 3, CLASSES)


@pytest.mark.parametrize("kinds", MIXES[:3], ids="-".join)
def test_is_a_value(kinds):
    """Through jit, checkpoint and vmap; rows of it; the gradient is a value too."""
    logits, array = batched(kinds)
    array, labels = jnp.asarray(array, jnp.float32), LABELS[:6].reshape(2, 3)
    loss = losses.softmax_cross_entropy
    wanted = loss(array, labels)
    close = functools.partial(assert_close, dtype=jnp.float32, length=CLASSES)
    close(jax.jit(jax.checkpoint(loss))(logits, labels), wanted)
    axes = logits.batch_axes()
    close(jax.vmap(loss, in_axes=(axes, 0))(logits, labels), wanted)
    twice = jax.vmap(jax.vmap(loss, in_axes=(axes, 0)), in_axes=(axes, 0))
    close(twice(logits, labels), wanted)
    close(loss(logits[:, 1:], labels[:, 1:]), wanted[:, 1:])
    close(loss(logits.reshape(-1), labels.reshape(-1)), wanted.reshape(-1))
    scored = softlib.logits.sequence_log_probs
    close(scored(logits, labels), scored(array, labels))
    edits = losses.edit_invariant_sequence_loss
    close(edits(logits, labels), edits(array, labels))
    assert repr(logits).startswith("FusedLogits(members=(")
    if "vq" not in kinds:  # whose mapping is an array of integers
        gradient = jax.grad(lambda z: loss(z, labels).sum())(logits)
        assert jax.tree.structure(gradient) == jax.tree.structure(logits)
        assert gradient.weights.shape == (2, 3, len(kinds))


def test_a_single_row():
    rows = draw({"hidden": (4,), "weight": (CLASSES, 4)}, 0)
    other = draw({"logits": (CLASSES,)}, 1)["logits"]
    logits = FusedLogits([softlib.LinearLogits(**rows), other], [2, -1])
    wanted = 2 * rows["weight"] @ rows["hidden"] - other
    close = functools.partial(assert_close, dtype=jnp.float32, length=CLASSES)
    close(logits.materialize(), wanted)
    close(softlib.logits.logsumexp(logits), jax.nn.logsumexp(wanted))


def test_members_may_be_combinations():
    kinds = ("rows", "vq", "array")
    arrays, weights = arrays_of(kinds), weights_of(kinds, True)
    inner = fused(kinds[:2], arrays[:2], weights[:, :2], scale=0.5, softcap=5.0)
    outer = FusedLogits([inner, arrays[2]["logits"]], [1.0, -0.5], **CUTS)
    z = 5.0 * np.tanh(0.5 * combined(kinds[:2], arrays[:2], weights[:, :2]) / 5.0)
    wanted = z - 0.5 * np.asarray(arrays[2]["logits"])
    found = softlib.logits.logsumexp(outer)
    assert_close(found, jax.nn.logsumexp(wanted, -1), dtype=jnp.float32, length=CLASSES)


# -------------------------------------------------------------------------------- edges
def excluding(kind, given, out):
    """A member that excludes classes, in each of the ways that there are."""
    if kind == "stored -inf":
        return jnp.where(out[None], -jnp.inf, given["logits"])
    if kind == "stored per row":
        where = jnp.broadcast_to(~out[None], (ROWS, CLASSES))
        garbage = jnp.where(out[None], jnp.nan, given["logits"])
        return StoredLogits(garbage, class_where=where)
    head = {"hidden": given["hidden"], "weight": given["weight"]}
    if kind == "bias":
        return softlib.LinearLogits(**head, bias=jnp.where(out, -jnp.inf, 1.0))
    if kind == "class_where":
        return softlib.LinearLogits(**head, class_where=~out)
    assert kind == "no code"
    mapping = jnp.where(out, -1, jnp.asarray(MAPPING))
    return VQLogits(given["hidden"], given["weight"][:20], mapping)


WAYS = ("stored -inf", "stored per row", "bias", "class_where", "no code")


@pytest.mark.parametrize("way", WAYS)
def test_a_class_without_one_member_is_excluded(way):
    """Never NaN, nor one in a derivative: with weights of 0 and below, and twice."""
    out = jnp.arange(CLASSES) % 5 == 2
    other_out = jnp.arange(CLASSES) % 7 == 3
    shapes = {"hidden": (*B, 4), "weight": (CLASSES, 4), "logits": (*B, CLASSES)}
    given = draw(shapes, 4)
    counts = np.asarray(~(out | other_out))
    labels = jnp.where(LABELS == 19, 2, jnp.where(counts[LABELS], LABELS, 0))
    stay = np.asarray(labels != 2)

    @jax.jit
    def run(given, weights, out):  # traced: that a token has no code is not known
        def total(given, weights):
            first = excluding(way, given, out)
            second = StoredLogits(jnp.where(other_out[None], -jnp.inf, given["logits"]))
            logits = FusedLogits([first, second], weights, **CUTS)
            loss = losses.softmax_cross_entropy(logits, labels)
            z = losses.z_loss(logits, labels, a=0.5, b=1.0)
            kl = losses.softmax_kl_divergence(logits, logits, reverse=True)
            parts = loss, z, kl, softlib.logits.entropy(logits)
            finite = (jnp.where(jnp.isfinite(part), part, 0).sum() for part in parts)
            return sum(finite), (
                *parts,
                softlib.logits.row_statistics(
                    logits, statistics=("argmax", "max_logit")
                ).argmax,
            )

        return jax.grad(total, argnums=(0, 1), has_aux=True)(given, weights)

    for scale in (-1.0, 0.0):
        gradients, found = run(given, jnp.asarray([scale, 1.0]), out)
        loss, z_loss, divergence, entropy, argmax = map(np.asarray, found)
        assert np.isposinf(loss[~stay]).all()
        assert np.isposinf(z_loss[~stay]).all()
        assert np.isfinite(loss[stay]).all()
        assert np.isfinite(z_loss[stay]).all()
        assert np.isfinite(entropy).all()
        np.testing.assert_allclose(divergence, 0, atol=1e-6)
        assert counts[argmax].all()
        for leaf in jax.tree.leaves(gradients):
            assert np.isfinite(leaf).all()
        # The definition, over the classes that are left.
        hidden, weight = np.asarray(given["hidden"]), np.asarray(given["weight"])
        z = hidden @ weight.T
        if way.startswith("stored"):
            z = np.asarray(given["logits"])
        if way == "no code":
            z = hidden @ weight[:20].T[:, MAPPING]
        if way == "bias":
            z = z + 1
        z = np.where(counts, scale * z + np.asarray(given["logits"]), -np.inf)
        wanted = jax.nn.logsumexp(z, -1) - z[np.arange(ROWS), labels]
        assert_close(loss, wanted, dtype=jnp.float32, length=CLASSES)


def test_counts_the_classes_of_all_members():
    thirds, halves = jnp.arange(CLASSES) % 3 != 0, jnp.arange(CLASSES) % 2 != 0
    given = draw({"hidden": (*B, 4), "weight": (CLASSES, 4)}, 0)
    head = softlib.LinearLogits(**given, class_where=thirds)
    logits = FusedLogits([head, head], [1.0, 1.0], class_where=halves)
    np.testing.assert_array_equal(logits.class_where, thirds & halves)
    assert logits.count_classes() == np.sum(thirds & halves)
    nothing = FusedLogits([head, head], [1.0, 1.0], class_where=~thirds)
    assert (softlib.logits.logsumexp(nothing) == -np.inf).all()
    assert not np.any(losses.softmax_cross_entropy(nothing, LABELS))


def test_dropped_rows_and_wrong_labels():
    kinds = ("rows", "stored", "vq")
    arrays = arrays_of(kinds)
    spoilt = [
        {n: a.at[0].set(jnp.nan) if a.shape[:1] == B else a for n, a in given.items()}
        for given in arrays
    ]
    weights = weights_of(kinds, True).at[0].set(jnp.nan)
    labels = LABELS.at[1].set(CLASSES).at[2].set(-5)
    where = jnp.arange(ROWS) != 0

    def total(arrays, weights):
        logits = fused(kinds, arrays, weights, **CUTS)
        loss = losses.softmax_cross_entropy(logits, labels, where=where)
        return jnp.where(jnp.isfinite(loss), loss, 0).sum(), loss

    gradient, loss = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
        spoilt, weights
    )
    assert loss[0] == 0
    assert np.isnan(loss[1:3]).all()
    assert np.isfinite(loss[3:]).all()
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    assert not np.any(gradient[1][:3])


# ------------------------------------------------------------------------------- memory
def test_neither_a_member_nor_the_combination_is_an_array():
    """A gradient of heads of two widths and of weights per row; nothing is run."""
    rows, classes, widths = 2048, 65_536, (64, 32)
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    hidden = [shape(rows, width) for width in widths]
    tables = [shape(classes, widths[0]), shape(widths[1], classes)]
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def total(hidden, tables, weights, stored, labels):
        heads = [
            softlib.LinearLogits(h, w, vocab_axis=axis, softcap=30.0)
            for axis, (h, w) in enumerate(zip(hidden, tables, strict=True))
        ]
        logits = FusedLogits([*heads, stored], weights)
        return losses.softmax_cross_entropy(logits, labels).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    compiled = gradient.lower(
        hidden, tables, shape(rows, 3), shape(rows, classes), labels
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.12 * rows * classes * 4


def test_a_low_rank_member_projects_its_rows_once():
    """One product with the first factor in the program, outside of every loop."""
    given = draw(SHAPES["lora"], 0)
    logits = FusedLogits([LoRALogits(**given), jnp.zeros((ROWS, CLASSES))], [1.0, 1.0])
    text = str(jax.make_jaxpr(lambda z: softlib.logits.logsumexp(z))(logits))
    assert text.count(f"f32[{ROWS},2] = dot_general") == 1


# ------------------------------------------------------------------- a published search
def test_dynamic_fusion():
    """Fused logits, and the divergences of the search of the weight, from its file."""
    with (
        precision("float64"),
        np.load(DATA / "dynamic_logits_fusion_case0.npz") as case,
    ):
        base, small = (jnp.asarray(case[f"in_{n}_logits"]) for n in ("base", "anti"))
        expert = jnp.asarray(case["in_expert_logits"][:, 0])
        kl = losses.softmax_kl_divergence

        def objective(alpha):
            weights = jnp.stack([jnp.ones_like(alpha), alpha, -alpha], -1)
            fusion = FusedLogits([base, expert, small], weights)
            toward = kl(base, fusion) - kl(small, expert)
            away = kl(fusion, base) - kl(expert, small)
            return fusion, toward**2 + away**2

        fusion, found = objective(jnp.asarray(case["out_alpha"][:, 0]))
        assert_agrees(fusion.materialize(), case["out_fused_logits"], "float64", 16)
        np.testing.assert_allclose(found, case["out_objective"], rtol=0, atol=1e-12)
        _, of_ones = objective(jnp.ones(6))
        wanted = case["out_objective_at_alpha1"]
        np.testing.assert_allclose(of_ones, wanted, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------- errors
def test_explain_names_the_operation():
    logits = fused(("rows", "array"), arrays_of(("rows", "array")), [1.0, 1.0])
    text = str(softlib.explain(losses.softmax_cross_entropy, logits, LABELS))
    assert "blockwise_row_statistics" in text


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    hidden, weight = jnp.ones((2, 3)), jnp.ones((5, 3))
    head: Any = functools.partial(softlib.LinearLogits, hidden, weight)
    pair: Any = [head(), jnp.ones((2, 5))]
    make: Any = FusedLogits
    for members, error, message in (
        (jnp.ones((2, 5)), TypeError, "`members` must be a sequence of logits"),
        (head(), TypeError, "`members` must be a sequence of logits"),
        ([], ValueError, "`members` must hold at least one"),
        ([head(), "z"], TypeError, "`members` must be an array"),
        ([head(), jnp.ones((2, 5), int)], TypeError, "`members` must have a floating"),
        ([head(), jnp.ones((2, 4))], ValueError, r"\(2, 5\) .* got \(2, 4\) of mem"),
        ([head(), jnp.ones((3, 5))], ValueError, r"\(2, 5\) .* got \(3, 5\) of mem"),
        ([head(gradient_filter_eps="auto")], ValueError, "`gradient_filter_eps` of m"),
        ([head(implementation="reference")], ValueError, "`implementation` of member"),
    ):
        with pytest.raises(error, match=message):
            make(members, [1.0, 1.0])
    for weights, error, message in (
        ([1.0], ValueError, r"`weights` must have shape \(2,\)"),
        (jnp.ones((2, 3)), ValueError, r"`weights` must have shape \(2,\)"),
        (jnp.ones(2, int), TypeError, "`weights` must have a floating"),
        ([True, False], TypeError, "`weights` must have a floating"),
        (None, TypeError, "`weights` must be an array"),
    ):
        with pytest.raises(error, match=message):
            make(pair, weights)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(5,\)"):
        make(pair, [1.0, 1.0], bias=jnp.ones(3))
    with pytest.raises(ValueError, match="`vocab_chunk` must be at least 1"):
        make(pair, [1.0, 1.0], vocab_chunk=0)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        make(pair, [1.0, 1.0], temperature=-1.0)
    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        losses.softmax_cross_entropy(
            make(pair, [1.0, 1.0], implementation="pallas_tpu"), jnp.zeros(2, int)
        )
    with pytest.raises(TypeError, match="must not become an array operation"):
        jax.numpy.exp(make(pair, [1.0, 1.0]))


def test_divided_heads_are_refused():
    hidden, weight = jnp.ones((2, 3)), jnp.ones((8, 3))
    mesh = jax.make_mesh((8,), ("v",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss(hidden, weight):
        head = softlib.LinearLogits(hidden, weight, axis_name="v")
        return softlib.logits.logsumexp(FusedLogits([head, head], [1.0, -1.0]))

    specs = (spec(), spec("v"))
    run = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=spec())
    with pytest.raises(ValueError, match="`axis_name` of member 0 must be None"):
        run(hidden, weight)
