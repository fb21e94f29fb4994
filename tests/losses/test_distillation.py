"""Distillation with a teacher, without one, and of a teacher: oracles and promises."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib.testing import assert_close, check_transformations
from tests.compiled import losses, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import assert_agrees, precision
from tests.oracles import divergences as oracle

ROWS, CLASSES = 6, 9
LABELS = np.array([0, 8, 3, 3, 1, 5])


@pytest.fixture
def vectors(request):
    folder = request.path.parent.parent / "data"
    return lambda name: np.load(folder / f"{name}_case0.npz")


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(2 * np.random.default_rng(seed).normal(size=shape), dtype)


WITH_TEACHER: dict[str, tuple[Any, Any, dict[str, float]]] = {
    "normalized": (
        of_stored.normalized_distillation_loss,
        oracle.normalized_distillation,
        {"temperature": 1.7, "gamma": 1.2},
    ),
    "decoupled": (
        of_stored.decoupled_knowledge_distillation_loss,
        oracle.decoupled_distillation,
        {"alpha": 0.7, "beta": 6.0, "temperature": 2.5},
    ),
    "plain": (
        lambda z, t, labels, **o: of_stored.knowledge_distillation_loss(z, t, **o),
        lambda z, t, labels, temperature: (
            temperature**2
            * oracle.divergence(
                oracle.kl, {"logits": z / temperature}, {"logits": t / temperature}
            )[0]
        ),
        {"temperature": 3.0},
    ),
}
every = pytest.mark.parametrize("name", WITH_TEACHER)


def difference_quotient(function, z, step=1e-6):
    """The gradient of a sum over rows that do not see each other."""
    gradient = np.zeros(z.shape)
    for k in range(z.shape[1]):
        more, less = z.copy(), z.copy()
        more[:, k] += step
        less[:, k] -= step
        gradient[:, k] = (function(more) - function(less)) / (2 * step)
    return gradient


# ----------------------------------------------------------------------- with a teacher
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Every loss, every dtype; the full product is slow.
PAIRS = {
    ("normalized", "float64"),
    ("normalized", "bfloat16"),
    ("decoupled", "float64"),
    ("decoupled", "float16"),
    ("plain", "float32"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*pair, marks=() if pair in PAIRS else pytest.mark.slow)
        for pair in itertools.product(WITH_TEACHER, DTYPES)
    ],
)
def test_matches_the_oracle(name, dtype):
    function, brute, parameters = WITH_TEACHER[name]
    with precision(dtype):
        z, teacher = (draw(ROWS, CLASSES, seed=s, dtype=dtype) for s in (0, 1))

        @jax.jit
        def run(z, teacher, parameters):
            total = lambda z: function(z, teacher, jnp.asarray(LABELS), **parameters)
            return total(z), jax.grad(lambda z: total(z).sum())(z)

        traced = {n: jnp.asarray(p, jnp.float32) for n, p in parameters.items()}
        exact = {n: float(p) for n, p in traced.items()}
        value, gradient = run(z, teacher, traced)
        own, given = (np.asarray(a, np.float64) for a in (z, teacher))
        expected = lambda z: brute(z, given, LABELS, **exact)
        computed = jnp.promote_types(dtype, jnp.float32)
        assert value.dtype == computed
        assert gradient.dtype == z.dtype
        assert_agrees(value, expected(own), computed, CLASSES * 4)
        wanted = difference_quotient(expected, own)
        if dtype == "float64":
            np.testing.assert_allclose(gradient, wanted, atol=1e-6)
        else:
            assert_close(gradient, wanted, dtype=dtype, length=CLASSES, c=8)


def test_normalized_distillation_matches_independent_vectors(vectors):
    data = vectors("nkd_uskd")
    with jax.enable_x64():
        z, teacher, labels = (
            jnp.asarray(data[f"in_{name}"])
            for name in ("student_logits", "teacher_logits", "labels")
        )
        options = {n: float(data[f"in_{n}"]) for n in ("temperature", "gamma")}
        loss = functools.partial(of_stored.normalized_distillation_loss, **options)
        assert_agrees(loss(z, teacher, labels), data["out_nkd"], jnp.float64, 9)
        total = lambda z: loss(z, teacher, labels).sum()
        gradient = jax.jit(jax.grad(total))(z)
        assert_agrees(gradient, data["out_nkd_grad"], jnp.float64, 9)


@every
def test_the_teacher_gets_no_gradient_and_labels_outside_are_nan(name):
    function, _, parameters = WITH_TEACHER[name]
    z, teacher = draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1)
    z = z.at[0].set(jnp.nan)
    labels = jnp.asarray(LABELS).at[1].set(-1).at[2].set(CLASSES)
    where = jnp.arange(ROWS) != 0

    def total(z, teacher):
        loss = function(z, teacher, labels, where=where, **parameters)
        return loss.sum(), loss

    gradients, loss = jax.jit(jax.grad(total, (0, 1), has_aux=True))(z, teacher)
    np.testing.assert_array_equal(gradients[1], 0)
    assert loss[0] == 0
    bad = [] if name == "plain" else [1, 2]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(loss)), bad)
    np.testing.assert_array_equal(gradients[0][jnp.array([0, *bad])], 0)
    assert (gradients[0][3:] != 0).any(1).all()


def test_the_terms_of_a_normalized_loss_share_one_gradient_of_the_weight():
    """One more would be 32 MiB: each of the two heads may take as much as one alone."""
    rows, features, vocabulary = 256, 32, 262144
    struct = jax.ShapeDtypeStruct
    head = (
        struct((rows, features), "float32"),
        struct((vocabulary, features), "float32"),
    )
    labels = struct((rows,), "int32")

    def temporary(loss, *operands):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*operands)
        found = program.compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    single = losses.linear_softmax_cross_entropy
    normalized = of_head.normalized_distillation_loss
    one = temporary(lambda *a: single(*a).sum(), *head, labels)
    two = temporary(lambda *a: normalized(*a).sum(), *head, *head, labels)
    assert two < 2.4 * one
    assert two < 4 * vocabulary * features


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_normalized_loss_of_divided_classes_is_that_of_one_device(kind, inside):
    """Of its terms, which share a gradient; also forward over reverse.

    Inside `shard_map`, and by the shardings of the arrays alone.
    """
    shapes = ((4, 3), (24, 3), (4, 5), (24, 5))
    arrays = tuple(draw(*shape, seed=seed) for seed, shape in enumerate(shapes))
    labels = jnp.array([0, 23, 7, 12])
    mesh = jax.make_mesh((2, 4), ("data", "classes"), (getattr(AxisType, kind),) * 2)
    rows, classes = P("data"), P("classes")
    specs = (rows, classes, rows, classes)

    def loss(arrays, labels, **options):
        hidden, weight, *teacher = arrays
        return of_head.normalized_distillation_loss(
            hidden,
            weight,
            *teacher,
            labels=labels,
            vocab_chunk=4,
            temperature=1.5,
            **options,
        )

    def divided(arrays, labels):
        own = functools.partial(loss, axis_name="classes")
        return jax.shard_map(own, mesh=mesh, in_specs=(specs, rows), out_specs=rows)(
            arrays, labels
        )

    def every_number(loss, arrays, labels):
        total = lambda a: (jnp.arange(1.0, 5.0) * loss(a, labels)).sum()
        return loss(arrays, labels), jax.jvp(jax.grad(total), (arrays,), (arrays,))

    wanted = jax.jit(functools.partial(every_number, loss))(arrays, labels)
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        many = jax.jit(functools.partial(every_number, divided if inside else loss))(
            tuple(map(place, arrays, specs)), place(labels, rows)
        )
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, dtype=jnp.float32, length=96)


def test_normalized_gradient_in_closed_form():
    """P_y (S - onehot), and gamma lambda (S - P) among the other classes."""
    z, teacher = draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1)
    labels, temperature, gamma = jnp.asarray(LABELS), 2.0, 1.5
    loss = functools.partial(
        of_stored.normalized_distillation_loss, temperature=temperature, gamma=gamma
    )
    differentiated = jax.jit(jax.grad(lambda z: loss(z, teacher, labels).sum()))
    gradient = differentiated(z)
    own = jax.nn.one_hot(labels, CLASSES)
    confidence = (jax.nn.softmax(teacher) * own).sum(1, keepdims=True)
    others = lambda a: jax.nn.softmax(jnp.where(own > 0, -jnp.inf, a / temperature))
    target = confidence * (jax.nn.softmax(z) - own)
    wanted = target + gamma * temperature * (others(z) - others(teacher))
    np.testing.assert_allclose(gradient, wanted, atol=2e-6)
    # The non-target part sums to 0, and sees no target logit.
    part = gradient - target
    np.testing.assert_allclose(part.sum(1), 0, atol=1e-5)
    moved = z + 3 * own
    there = differentiated(moved)
    target = confidence * (jax.nn.softmax(moved) - own)
    np.testing.assert_allclose(there - target, part, atol=5e-6)


def test_equal_logits_cost_the_teachers_entropy_among_the_others():
    z, labels = draw(ROWS, CLASSES), jnp.asarray(LABELS)
    own = jax.nn.one_hot(labels, CLASSES) > 0
    found = of_stored.normalized_distillation_loss(z, z, labels, gamma=2.0)
    log_p = jax.nn.log_softmax(z)
    label = jnp.where(own, log_p, 0).sum(1)
    entropy = of_stored.entropy(z, class_where=~own)
    wanted = -jnp.exp(label) * label + 2 * entropy
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_two_classes_have_no_other_class_to_match():
    z, teacher, labels = draw(3, 2), draw(3, 2, seed=1), jnp.array([0, 1, 1])
    found = of_stored.normalized_distillation_loss(z, teacher, labels, gamma=5.0)
    without = of_stored.normalized_distillation_loss(z, teacher, labels, gamma=0.0)
    np.testing.assert_array_equal(found, without)


def test_decoupled_distillation_is_plain_for_the_right_weights():
    """With beta = 1 - P_y, row by row."""
    z, teacher, labels = draw(1, CLASSES), draw(1, CLASSES, seed=1), jnp.array([4])
    t = 2.0
    rest = 1 - jax.nn.softmax(teacher / t)[0, 4]
    decoupled = of_stored.decoupled_knowledge_distillation_loss(
        z, teacher, labels, beta=rest, temperature=t
    )
    plain = of_stored.knowledge_distillation_loss(z, teacher, temperature=t)
    np.testing.assert_allclose(decoupled, plain, rtol=1e-5)


def test_extreme_logits():
    z = jnp.array([[1e4, 0.0, -1e4], [-1e4, 0, 0], [0, -jnp.inf, 0]])
    teacher = jnp.array([[0.0, 1e4, 0], [1e4, 0, -1e4], [1, -jnp.inf, 0]])
    labels = jnp.array([0, 0, 2])
    for function, _, parameters in WITH_TEACHER.values():
        total = lambda z, f=function, p=parameters: f(z, teacher, labels, **p).sum()
        value, gradient = jax.jit(jax.value_and_grad(total))(z)
        assert not np.isnan(value)
        assert not np.isnan(gradient).any()


@pytest.mark.slow
@every
def test_under_every_transformation(name):
    function, _, parameters = WITH_TEACHER[name]
    check_transformations(
        lambda z, t, labels: function(z, t, labels, **parameters),
        draw(8, 5),
        draw(8, 5, seed=1),
        jnp.arange(8) % 5,
        rows=(0, 1, 2),
        differentiable=(0,),
        skip={"forward_mode": "the statistics have a custom_vjp"},
    )


# -------------------------------------------------------------------- without a teacher
def test_self_distillation_matches_independent_vectors(vectors):
    data = vectors("nkd_uskd")
    with jax.enable_x64():
        z, weak, labels = (
            jnp.asarray(data[f"in_{name}"])
            for name in ("student_logits", "weak_logits", "labels")
        )
        found = losses.universal_self_distillation_loss(z, weak, labels)
        for name, term in found._asdict().items():
            assert_agrees(term, data[f"out_uskd_{name}"], jnp.float64, 9)
        zipf = losses.zipf_soft_labels(jax.nn.softmax(z), labels)
        assert_agrees(zipf, data["out_zipf_labels"], jnp.float64, 9)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_self_distillation_matches_the_oracle(mixed, dtype):
    with precision(dtype):
        z, weak = (draw(ROWS, CLASSES, seed=s, dtype=dtype) for s in (0, 1))
        labels = LABELS
        if mixed:
            # Of two classes, the last row of one.
            share = np.array([0.75, 0.5, 0.625, 1, 0.875, 1])
            other = np.eye(CLASSES)[(LABELS + 2) % CLASSES]
            labels = share[:, None] * np.eye(CLASSES)[LABELS]
            labels += (1 - share)[:, None] * other
        options = (0.8, 0.3, 0.5, 0.2)
        found = losses.universal_self_distillation_loss(
            z,
            weak,
            jnp.asarray(labels, dtype if mixed else None),
            alpha=options[0],
            beta=options[1],
            mu=options[2],
            label_smoothing=options[3],
        )
        own, other = (np.asarray(a, np.float64) for a in (z, weak))
        wanted = oracle.self_distillation(own, other, labels, *options)
        for term, expected in zip(found, wanted, strict=True):
            computed = jnp.promote_types(dtype, jnp.float32)
            assert term.dtype == computed
            assert_agrees(term, expected, computed, CLASSES)


def test_self_distillation_trains_each_head_by_its_terms():
    z, weak, labels = draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1), LABELS
    labels = jnp.asarray(labels)
    loss = losses.universal_self_distillation_loss
    gradient = lambda name, i: jax.grad(
        lambda z, w: getattr(loss(z, w, labels), name).sum(), i
    )(z, weak)
    for name, i in (("target", 1), ("non_target", 1), ("weak", 0)):
        np.testing.assert_array_equal(gradient(name, i), 0)
    for name, i in (("target", 0), ("non_target", 0), ("weak", 1)):
        assert (gradient(name, i) != 0).any()
    # Soft labels are constants: a term is linear in log S.
    others = gradient("non_target", 0)
    np.testing.assert_allclose(others.sum(1), 0, atol=1e-6)
    np.testing.assert_array_equal(others[jnp.arange(ROWS), labels], 0)


def test_self_distillation_leaves_out_rows_and_takes_a_mean_from_elsewhere():
    z, weak = draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1)
    labels, loss = jnp.asarray(LABELS), losses.universal_self_distillation_loss
    where = jnp.arange(ROWS) < 4
    bad = z.at[4].set(jnp.nan)
    masked = loss(bad, weak, labels.at[5].set(-1), where=where)
    alone = loss(z[:4], weak[:4], labels[:4])
    for a, b in zip(masked, alone, strict=True):
        np.testing.assert_allclose(a[:4], b, rtol=1e-6)
        np.testing.assert_array_equal(a[4:], 0)
    outside = loss(z, weak, labels.at[1].set(99))
    for term in outside:
        np.testing.assert_array_equal(np.isnan(term), np.arange(ROWS) == 1)
    own = jnp.take_along_axis(jax.nn.softmax(z), labels[:, None], 1)
    given = loss(z, weak, labels, mean_square_target=(own**2).mean())
    np.testing.assert_allclose(given.target, loss(z, weak, labels).target, rtol=1e-5)
    # With a mean from elsewhere no row sees another.
    mean = jnp.float32(0.2)
    one = loss(z[:1], weak[:1], labels[:1], mean_square_target=mean)
    every_row = loss(z, weak, labels, mean_square_target=mean)
    np.testing.assert_allclose(one.target, every_row.target[:1], rtol=1e-6)


def test_zipf_labels_rank_the_label_too_and_break_ties_by_class():
    scores = jnp.array([[0.5, 0.5, 0.0, 0.5]])
    found = losses.zipf_soft_labels(scores, jnp.array([1]))
    wanted = np.array([1, 0, 1 / 4, 1 / 3])
    np.testing.assert_allclose(found[0], wanted / wanted.sum(), rtol=1e-6)
    assert np.isnan(losses.zipf_soft_labels(scores, jnp.array([4]))).all()
    np.testing.assert_array_equal(
        losses.zipf_soft_labels(scores[:, :1], jnp.array([0])), 0
    )


# ------------------------------------------------------------------------- of a teacher
def test_mcmi_loss_matches_independent_vectors(vectors):
    data = vectors("mcmi")
    with jax.enable_x64():
        z, labels = jnp.asarray(data["in_logits"]), jnp.asarray(data["in_labels"])
        centroids = jnp.asarray(data["out_centroids"])
        weight = float(data["in_lambda"])
        loss = lambda z: losses.mcmi_loss(z, labels, centroids, weight=weight)
        assert_agrees(loss(z), data["out_loss"], jnp.float64, 4)
        gradient = jax.jit(jax.grad(lambda z: loss(z).sum()))(z)
        assert_agrees(gradient, data["out_grad_logits"], jnp.float64, 4)
        log_p = jax.nn.log_softmax(z)
        ratio = log_p - jnp.log(centroids)[labels]
        p = jnp.exp(log_p)
        tilt = p * (ratio - (p * ratio).sum(1, keepdims=True))
        closed = p - jax.nn.one_hot(labels, 4) - weight * tilt
        np.testing.assert_allclose(gradient, closed, atol=1e-12)


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda z, y: losses.mcmi_loss(z, y, z, weight=-1), ValueError, "`weight`"),
        (
            lambda z, y: losses.mcmi_loss(z[0], y[0], z, weight=1),
            ValueError,
            r"mcmi_loss: `logits` must have shape \(N, C\)",
        ),
        (
            lambda z, y: losses.mcmi_loss(z, y, z[:1], weight=1),
            ValueError,
            "`centroids` must have shape",
        ),
        (
            lambda z, y: losses.mcmi_loss(z, y, jnp.ones((3, 3), int), weight=1),
            TypeError,
            "mcmi_loss: `centroids` must have a floating dtype",
        ),
        (
            lambda z, y: of_stored.normalized_distillation_loss(z, z, y, gamma=-1),
            ValueError,
            "`gamma` must be >= 0",
        ),
        (
            lambda z, y: of_stored.normalized_distillation_loss(z, z, y * 1.0),
            TypeError,
            "`labels` must have an integer dtype",
        ),
        (
            lambda z, y: of_stored.knowledge_distillation_loss(z, z, temperature=0),
            ValueError,
            "`temperature` must be positive",
        ),
        (
            lambda z, y: of_stored.knowledge_distillation_loss(
                z, z, temperature=jnp.ones(3)
            ),
            ValueError,
            "`temperature` must be a number or a scalar",
        ),
        (
            lambda z, y: of_stored.decoupled_knowledge_distillation_loss(z, z, y[:2]),
            ValueError,
            r"`labels` must have shape \(3,\)",
        ),
        (
            lambda z, y: losses.universal_self_distillation_loss(z, z[:, :2], y),
            ValueError,
            "`weak_logits` must have shape",
        ),
        (
            lambda z, y: losses.universal_self_distillation_loss(z[0], z[0], y),
            ValueError,
            r"`logits` must have shape \(N, C\)",
        ),
        (
            lambda z, y: losses.zipf_soft_labels(z, y[:2]),
            ValueError,
            r"`labels` must have shape \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(jnp.zeros((3, 3)), jnp.zeros(3, int))
