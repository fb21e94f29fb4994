"""Divergences of two heads: oracles, promises, transformations."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import softlib
from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.heads import of_head, of_stored
from tests.host import jnp
from tests.losses.problems import assert_agrees, precision
from tests.oracles import divergences as oracle

NAMES = {
    "kl": "softmax_kl_divergence",
    "jensen_shannon": "softmax_jensen_shannon_divergence",
    "cross_entropy": "softmax_soft_target_cross_entropy",
}
every = pytest.mark.parametrize("name", NAMES)
both_sources = pytest.mark.parametrize("source", ["linear", "softmax"])
# Every divergence and both sources: the selections do not depend on the pair.
some_pairs = pytest.mark.parametrize(
    ("name", "source"),
    [("kl", "linear"), ("jensen_shannon", "softmax"), ("cross_entropy", "linear")],
)


def function_of(name, source, **options) -> Any:
    functions = of_head if source == "linear" else of_stored
    return functools.partial(getattr(functions, NAMES[name]), **options)


class Pair:
    """Arguments of both sources, as the library and as the oracle take them."""

    def __init__(
        self,
        source="linear",
        dtype="float32",
        batch=(6,),
        classes=37,
        features=(5, 3),
        axes=(0, 1),
        seed=0,
        modified=True,
    ):
        random = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
        self.batch, self.classes, self.dtype = batch, classes, dtype
        self.linear = source == "linear"
        self.static: dict[str, Any] = {}
        sources: list[dict[str, Any]] = []
        for d, axis in zip(features, axes, strict=True):
            if self.linear:
                shape = (classes, d) if axis == 0 else (d, classes)
                arrays = {"hidden": draw(*batch, d), "weight": draw(*shape)}
            else:
                arrays = {"logits": 2 * draw(*batch, classes)}
            if modified:
                arrays["bias"] = draw(classes)
            sources.append(arrays)
        names = ("", "teacher_")
        self.arrays = {
            prefix + name: array
            for prefix, arrays in zip(names, sources, strict=True)
            for name, array in arrays.items()
        }
        self.oracle_static: list[dict[str, Any]] = [{}, {}]
        if self.linear:
            self.static = {"vocab_axis": axes[0], "teacher_vocab_axis": axes[1]}
            self.oracle_static = [{"vocab_axis": axis} for axis in axes]
        if modified:
            self.arrays["teacher_scale"] = jnp.asarray(0.7, dtype)
            self.arrays["temperature"] = jnp.asarray(
                random.uniform(0.8, 1.5, batch), dtype
            )
            self.static["softcap"] = 4.0
            self.oracle_static[0]["softcap"] = 4.0
        self.random = random

    def oracle(self, function, **options):
        own: dict[str, Any] = {}
        target: dict[str, Any] = {}
        for name, array in self.arrays.items():
            if name == "temperature":
                own[name] = target[name] = array
            elif name.startswith("teacher_"):
                target[name.removeprefix("teacher_")] = array
            else:
                own[name] = array
        own |= self.oracle_static[0]
        target |= self.oracle_static[1]
        value, d_own, d_target, dw = oracle.divergence(function, own, target, **options)
        gradients = {n: g for n, g in d_own.items() if n != "temperature"}
        gradients |= {f"teacher_{n}": g for n, g in d_target.items()}
        if "temperature" in self.arrays:
            del gradients["teacher_temperature"]
            gradients["temperature"] = d_own["temperature"] + d_target["temperature"]
        return value, gradients, dw


CASES = [
    # divergence, source, reverse, dtype, batch, classes, features, axes, chunks
    ("kl", "linear", False, "float64", (6,), 37, (5, 3), (0, 1), (7, None)),
    ("kl", "linear", True, "float32", (2, 3), 130, (3, 5), (1, 0), (64, 4)),
    ("kl", "softmax", False, "float32", (7,), 37, (1, 1), (0, 0), None),
    ("kl", "softmax", True, "bfloat16", (2, 2), 19, (1, 1), (0, 0), None),
    ("kl", "linear", False, "bfloat16", (5,), 40, (4, 8), (0, 0), (40, None)),
    ("kl", "linear", False, "float32", (300,), 29, (4, 2), (0, 0), (10, None)),
    ("kl", "linear", False, "float32", (3,), 1, (2, 2), (0, 0), None),
    ("kl", "linear", False, "float32", (0,), 5, (2, 2), (0, 0), None),
    ("jensen_shannon", "linear", False, "float64", (1,), 37, (5, 3), (0, 0), (9, None)),
    ("jensen_shannon", "linear", True, "float32", (5,), 131, (3, 4), (1, 1), (37, 2)),
    ("jensen_shannon", "softmax", False, "float64", (6,), 2, (1, 1), (0, 0), None),
    ("jensen_shannon", "linear", False, "float16", (5,), 17, (3, 4), (0, 1), (8, None)),
    ("cross_entropy", "linear", True, "float64", (6,), 37, (5, 3), (1, 0), (11, 3)),
    ("cross_entropy", "softmax", False, "float32", (6,), 37, (1, 1), (0, 0), None),
    ("cross_entropy", "linear", False, "float16", (4,), 33, (5, 3), (0, 1), (32, None)),
]


# Every pair of a divergence and a dtype, a source, a layout; the others are slow.
SLOW = (0, 2, 4, 9, 12, 14)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id="-".join(map(str, case[:4])),
            marks=pytest.mark.slow if i in SLOW else (),
        )
        for i, case in enumerate(CASES)
    ],
)
def test_values_and_gradients_match_the_oracle(case):
    name, source, reverse, dtype, batch, classes, features, axes, chunks = case
    with precision(dtype):
        pair = Pair(source, dtype, batch, classes, features, axes)
        static = dict(pair.static)
        if chunks is not None:
            static["vocab_chunk"], static["token_chunk"] = chunks
        if name == "kl":
            static["reverse"] = reverse
        others: dict[str, Any] = {}
        if classes > 2:
            others["class_where"] = np.arange(classes) != 2
            others["excluded_labels"] = pair.random.integers(-1, classes, (*batch, 2))
        if batch and batch[0] > 1:
            others["where"] = pair.random.uniform(size=batch) < 0.8
        mixture = {"mixture": 0.3} if name == "jensen_shannon" else {}
        arrays = pair.arrays | {n: jnp.asarray(m) for n, m in mixture.items()}
        cotangent = jnp.asarray(pair.random.normal(size=batch), dtype)
        function = function_of(name, source, **static)

        @jax.jit
        def run(arrays, others, cotangent):
            value, pull = jax.vjp(lambda a: call(function, a, others), arrays)
            return value, pull(cotangent.astype(value.dtype))[0]

        as_jax = {n: jnp.asarray(o) for n, o in others.items()}
        value, gradients = run(arrays, as_jax, cotangent)
        wanted, wanted_gradients, dw = pair.oracle(
            getattr(oracle, name),
            reverse=reverse and name == "kl",
            cotangent=cotangent,
            **mixture,
            **others,
        )
        if mixture:
            wanted_gradients["mixture"] = np.asarray(dw)
        computed = jnp.promote_types(dtype, jnp.float32)
        assert value.dtype == computed
        length = max(classes, *features) * 4
        assert_agrees(value, wanted, computed, length)
        assert gradients.keys() == wanted_gradients.keys()
        for argument, gradient in gradients.items():
            assert gradient.dtype == arrays[argument].dtype, argument
            terms = length * max(1, int(np.prod(batch)))
            assert_agrees(gradient, wanted_gradients[argument], gradient.dtype, terms)


def call(function, arrays, others):
    """With the arguments that have positions at these."""
    arrays = {**arrays, **others}
    if "logits" in arrays:
        order = ("logits", "teacher_logits")
    else:
        order = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    positional = [arrays.pop(name) for name in order]
    return function(*positional, **arrays)


@pytest.mark.parametrize("name", ["jensen_shannon"])
def test_reference_and_stream_agree(name):
    pair = Pair()
    results = []
    for options in ({"implementation": "reference"}, {"vocab_chunk": 5}):
        function = function_of(name, "linear", **pair.static, **options)

        def total(arrays, function=function):
            value = call(function, arrays, {})
            return (jnp.arange(1.0, 7.0) * value).sum(), value

        results.append(jax.jit(jax.grad(total, has_aux=True))(pair.arrays))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(a, b, dtype=jnp.float32, length=6 * pair.classes, c=8)


# ----------------------------------------------------------------------------- promises
@pytest.mark.parametrize("name", ["kl", "jensen_shannon"])
@both_sources
def test_nothing_cancels_where_distributions_are_close(name, source):
    """Divergences down to 1e-11, below the rounding of the terms p log(p / q)."""
    random = np.random.default_rng(0)
    for scale in (1e-2, 1e-5):
        # Logits that float32 holds exactly, as do both weights.
        z = np.round(random.normal(size=(4, 50)) * 64) / 64
        step = 2.0 ** np.round(np.log2(scale))
        target = z + step * random.integers(-3, 4, size=z.shape)
        eye = np.eye(50)
        sources = [{"logits": z}, {"logits": target}]
        w = 0.3 if name == "jensen_shannon" else None
        wanted, *_ = oracle.divergence(getattr(oracle, name), *sources, mixture=w)
        options = {} if w is None else {"mixture": w}
        f32 = lambda a: jnp.asarray(a, jnp.float32)
        if source == "linear":
            heads = (f32(z), f32(eye), f32(target), f32(eye))
            found = function_of(name, source, vocab_chunk=7, **options)(*heads)
        else:
            found = function_of(name, source, **options)(f32(z), f32(target))
        # The logits' own rounding is 2**-24 of their size, against the step.
        np.testing.assert_allclose(found, wanted, rtol=max(1e-4, 2e-6 / step))
        assert (wanted > 0).all()


@some_pairs
def test_equal_distributions_have_divergence_and_gradient_zero(name, source):
    pair = Pair(source, modified=False, axes=(0, 0), features=(3, 3))
    arrays = {n: pair.arrays[n.removeprefix("teacher_")] for n in pair.arrays}
    function = function_of(name, source)

    def total(arrays):
        return call(function, arrays, {}).sum()

    value, gradients = jax.jit(jax.value_and_grad(total))(arrays)
    if name == "cross_entropy":
        entropy = {"linear": of_head.entropy, "softmax": of_stored.entropy}
        own = [a for n, a in arrays.items() if not n.startswith("teacher_")]
        np.testing.assert_allclose(value, entropy[source](*own).sum(), rtol=1e-5)
    else:
        np.testing.assert_allclose(value, 0, atol=1e-10)
        for gradient in gradients.values():
            np.testing.assert_allclose(gradient, 0, atol=2e-6)


@some_pairs
def test_masked_row_is_zero_even_with_nan(name, source):
    pair = Pair(source, modified=False)
    rows = "hidden" if source == "linear" else "logits"
    arrays = {
        n: a.at[2].set(jnp.nan) if n.endswith(rows) else a
        for n, a in pair.arrays.items()
    }
    function = function_of(name, source, **pair.static)
    where = {"where": jnp.arange(6) != 2}

    def total(arrays, where):
        value = call(function, arrays, where)
        return value.sum(), value

    gradients, value = jax.jit(jax.grad(total, has_aux=True))(arrays, where)
    assert value[2] == 0
    assert np.isfinite(value).all()
    for argument, gradient in gradients.items():
        assert np.isfinite(gradient).all(), argument
        if argument.endswith(rows):
            np.testing.assert_array_equal(gradient[2], 0)
    # Without `where`, NaN stays in its row.
    bare = call(function, arrays, {})
    np.testing.assert_array_equal(np.isnan(bare), np.arange(6) == 2)


@some_pairs
def test_a_row_without_classes_is_zero(name, source):
    pair = Pair(source, modified=False)
    function = function_of(name, source, **pair.static)
    for others in (
        {"class_where": jnp.zeros(37, bool)},
        {"excluded_labels": jnp.broadcast_to(jnp.arange(37), (6, 37))},
    ):

        def total(arrays, others=others):
            value = call(function, arrays, others)
            return value.sum(), value

        gradients, value = jax.jit(jax.grad(total, has_aux=True))(pair.arrays)
        for leaf in jax.tree.leaves((value, gradients)):
            np.testing.assert_array_equal(leaf, 0)


@both_sources
def test_a_class_that_only_the_target_has_costs_infinity(source):
    pair = Pair(source)
    arrays = dict(pair.arrays)
    static = {n: o for n, o in pair.static.items() if n != "softcap"}
    arrays["bias"] = arrays["bias"].at[3].set(-jnp.inf)
    function = function_of("kl", source, **static)

    def total(arrays, reverse):
        value = call(functools.partial(function, reverse=reverse), arrays, {})
        return value.sum(), value

    for reverse, infinite in ((False, True), (True, False)):
        run = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
        gradients, value = run(arrays, reverse)
        np.testing.assert_array_equal(np.isinf(value), infinite)
        assert not np.isnan(value).any()
        for argument, gradient in gradients.items():
            assert np.isfinite(gradient).all(), argument
    js = call(function_of("jensen_shannon", source, **static), arrays, {})
    assert np.isfinite(js).all()


@every
def test_extreme_logits_give_no_nan(name):
    z = jnp.array([[1e4, 0, -1e4], [0, 1e4, -jnp.inf], [-1e4, -1e4, -1e4]])
    target = jnp.array([[-1e4, 0, 1e4], [0, 1e4, -jnp.inf], [0, 0, -1e4]])
    function = function_of(name, "softmax")

    def total(z, target):
        value = function(z, target)
        return value.sum(), value

    gradients, value = jax.jit(jax.grad(total, (0, 1), has_aux=True))(z, target)
    assert not np.isnan(value).any()
    for gradient in gradients:
        assert not np.isnan(gradient).any()
    expected = {"kl": 2e4, "cross_entropy": 2e4, "jensen_shannon": np.log(2)}
    np.testing.assert_allclose(value[0], expected[name], rtol=1e-6)


def test_reverse_exchanges_the_sources():
    pair = Pair("softmax", modified=False)
    a, b = pair.arrays["logits"], pair.arrays["teacher_logits"]
    kl = of_stored.softmax_kl_divergence
    np.testing.assert_allclose(kl(a, b, reverse=True), kl(b, a), rtol=1e-6)


def test_jensen_shannon_tends_to_both_directions():
    pair = Pair("softmax", dtype="float32", modified=False)
    a, b = pair.arrays["logits"], pair.arrays["teacher_logits"]
    js, kl = (
        of_stored.softmax_jensen_shannon_divergence,
        of_stored.softmax_kl_divergence,
    )
    end = 1e-4
    np.testing.assert_allclose(js(a, b, mixture=end) / end, kl(a, b), rtol=0.02)
    other = js(a, b, mixture=1 - end) / end
    np.testing.assert_allclose(other, kl(a, b, reverse=True), rtol=0.02)


def test_cross_entropy_is_entropy_plus_divergence():
    pair = Pair("softmax", modified=False)
    a, b = pair.arrays["logits"], pair.arrays["teacher_logits"]
    whole = of_stored.softmax_soft_target_cross_entropy(a, b)
    parts = of_stored.entropy(b) + of_stored.softmax_kl_divergence(a, b)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    mixture=st.floats(0.01, 0.99),
    classes=st.sampled_from([1, 2, 9]),
)
def test_bounds_and_invariances(seed, scale, mixture, classes):
    """0 <= KL; 0 <= JS <= H(mixture); shifts and permutations change nothing."""
    random = np.random.default_rng(seed)
    z, target = (scale * random.normal(size=(3, classes)) for _ in range(2))
    z, target = jnp.asarray(z, jnp.float32), jnp.asarray(target, jnp.float32)
    kl = COMPILED["kl"](z, target)
    js = COMPILED["js"](z, target, jnp.float32(mixture))
    bound = -mixture * np.log(mixture) - (1 - mixture) * np.log(1 - mixture)
    assert (kl >= -1e-6).all()
    assert (js >= -1e-6).all()
    assert (js <= bound + 1e-5).all()
    order = random.permutation(classes)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(1, scale)}
    moved = COMPILED["kl"](z[:, order] + 1, target[:, order] - 2)
    np.testing.assert_allclose(moved, kl, **tolerance)
    swapped = COMPILED["js"](target, z, jnp.float32(1 - mixture))
    np.testing.assert_allclose(swapped, js, **tolerance)


COMPILED = {
    "kl": jax.jit(of_stored.softmax_kl_divergence),
    "js": jax.jit(
        lambda z, t, w: of_stored.softmax_jensen_shannon_divergence(z, t, mixture=w)
    ),
}


def test_kl_to_reference_matches_independent_vectors(data):
    vectors = data("oreo_case0.npz")
    with jax.enable_x64():
        names = ("in_logits", "in_ref_logits", "in_where")
        z, ref, where = (jnp.asarray(vectors[name]) for name in names)
        found = of_stored.kl_to_reference(z, ref, where=where)
        assert_agrees(found, vectors["out_kl"], jnp.float64, 8)
        # An identity as the weight makes hidden states of logits.
        eye = jnp.eye(6)
        linear = of_head.kl_to_reference(z, eye, ref, eye, where=where)
        assert_agrees(linear, vectors["out_kl"], jnp.float64, 8)
        gradient = jax.grad(lambda r: of_stored.kl_to_reference(z, r).sum())(ref)
        np.testing.assert_array_equal(gradient, 0)
        moved = jax.grad(
            lambda z: of_stored.kl_to_reference(z, ref, where=where).sum()
        )(z)
        np.testing.assert_array_equal((moved != 0).any(-1), where)


@pytest.fixture
def data(request):
    folder = request.path.parent.parent / "data"
    return lambda name: np.load(folder / name)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow
@every
def test_heads_under_every_transformation(name):
    pair = Pair(batch=(8,), classes=7, features=(3, 2), modified=False)
    order = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    function = function_of(name, "linear", vocab_chunk=3, **pair.static)
    check_transformations(
        lambda h, w, g, u, labels: function(h, w, g, u, excluded_labels=labels),
        *(pair.arrays[name] for name in order),
        jnp.arange(8) % 7,
        rows=(0, 2, 4),
        skip={"forward_mode": "the stream of two heads has a custom_vjp"},
    )


@pytest.mark.slow
def test_logits_under_every_transformation():
    pair = Pair("softmax", batch=(8,), classes=5, modified=False)
    check_transformations(
        lambda z, t, w: of_stored.softmax_jensen_shannon_divergence(z, t, mixture=w),
        pair.arrays["logits"],
        pair.arrays["teacher_logits"],
        jnp.float32(0.3),
        rows=(0, 1),
        skip={"forward_mode": "the statistics have a custom_vjp"},
    )


@every
def test_hessian_vector_products_are_those_of_stored_logits(name):
    """Where both distributions are equal too, where first derivatives vanish."""
    pair = Pair(classes=11, modified=False, features=(3, 3), axes=(0, 0))
    equal = {n: pair.arrays[n.removeprefix("teacher_")] for n in pair.arrays}
    direction = Pair(classes=11, modified=False, features=(3, 3), axes=(0, 0), seed=1)

    def product(arrays, **options):
        total = lambda a: call(function_of(name, "linear", **options), a, {}).sum()
        return jax.jvp(jax.grad(total), (arrays,), (direction.arrays,))[1]

    streamed = jax.jit(functools.partial(product, vocab_chunk=4))
    stored = jax.jit(functools.partial(product, implementation="reference"))
    for arrays in (pair.arrays, equal):
        found, wanted = streamed(arrays), stored(arrays)
        for argument in arrays:
            assert_close(
                found[argument], wanted[argument], dtype=jnp.float32, length=66
            )
            assert (wanted[argument] != 0).any()


# ------------------------------------------------------------------- divided vocabulary
@pytest.mark.parametrize(
    ("name", "check_vma", "kind", "axis"),
    [
        pytest.param("kl", True, "Auto", 0, marks=pytest.mark.slow),
        ("jensen_shannon", False, "Explicit", 1),
        pytest.param("cross_entropy", True, "Explicit", 0, marks=pytest.mark.slow),
        pytest.param("kl", False, "Auto", 1, marks=pytest.mark.slow),
    ],
)
def test_a_divided_vocabulary_gives_the_numbers_of_one_device(
    name, check_vma, kind, axis
):
    """Values, gradients and a Hessian-vector product, labels excluded."""
    pair = Pair(batch=(4,), classes=24, modified=False, axes=(axis, axis))
    order = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    arrays = {n: pair.arrays[n] for n in order}
    labels = jnp.array([0, 23, 7, -1])
    mesh = jax.make_mesh((2, 4), ("data", "classes"), (getattr(AxisType, kind),) * 2)
    weight = P(None, "classes") if axis else P("classes")
    specs = dict(zip(order, (P("data"), weight) * 2, strict=True))
    direction = {n: jnp.cos(a) for n, a in arrays.items()}

    def divided(arrays, axis_name=None):
        function = function_of(
            name, "linear", axis_name=axis_name, vocab_chunk=4, **pair.static
        )
        return call(function, arrays, {"excluded_labels": arrays.pop("labels")})

    def found(arrays, labels, axis_name):
        if axis_name is None:
            return divided({**arrays, "labels": labels})
        return jax.shard_map(
            lambda arrays, labels: divided({**arrays, "labels": labels}, axis_name),
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )(arrays, labels)

    def every_number(arrays, direction, labels, axis_name):
        total = lambda a: (jnp.arange(1.0, 5.0) * found(a, labels, axis_name)).sum()
        gradient = jax.grad(total)
        return (
            found(arrays, labels, axis_name),
            *jax.jvp(gradient, (arrays,), (direction,)),
        )

    one = jax.jit(functools.partial(every_number, axis_name=None))
    expected = one(arrays, direction, labels)
    with jax.set_mesh(mesh):
        place = lambda name, a: jax.device_put(a, NamedSharding(mesh, specs[name]))
        arrays = {name: place(name, a) for name, a in arrays.items()}
        direction = {name: place(name, a) for name, a in direction.items()}
        labels = jax.device_put(labels, NamedSharding(mesh, P("data")))
        many = jax.jit(functools.partial(every_number, axis_name="classes"))(
            arrays, direction, labels
        )
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, dtype=jnp.float32, length=96)


# ------------------------------------------------------------------------------- memory
def heads(rows, features, vocabulary, dtype=jnp.float32):
    struct = jax.ShapeDtypeStruct
    head = lambda d: (struct((rows, d), dtype), struct((vocabulary, d), dtype))
    return (*head(features), *head(features // 2))


def temporary(function, arguments, *operands) -> int:
    program = jax.jit(jax.value_and_grad(function, arguments))
    found = program.lower(*operands).compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


@every
def test_no_array_of_logits_and_no_second_weight(name):
    """Forward, backward and forward over reverse."""
    rows, features, vocabulary = 384, 512, 4099
    total = lambda *a: function_of(name, "linear", vocab_chunk=512)(*a).sum()
    operands = heads(rows, features, vocabulary)
    gradient = jax.grad(total, (0, 1, 2, 3))
    product = lambda *a: jax.jvp(gradient, a, a)
    large = rows * vocabulary
    for function in (gradient, product):
        shapes = set()
        visit(operations.make_jaxpr(function)(*operands).jaxpr, shapes)
        allowed = {a.shape for a in operands}
        assert not {s for s in shapes if np.prod(s) >= large} - allowed


def visit(jaxpr, shapes):
    for equation in jaxpr.eqns:
        shapes |= {v.aval.shape for v in equation.outvars}
        for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                visit(getattr(inner, "jaxpr", inner), shapes)


def is_jaxpr(leaf) -> bool:
    return hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")


def test_a_constant_target_costs_no_gradient():
    operands = heads(512, 128, 32768)
    constant = jax.lax.stop_gradient
    kl = of_head.softmax_kl_divergence
    both = lambda h, w, g, u: kl(h, w, g, u).sum()
    one = lambda h, w, g, u: kl(h, w, constant(g), constant(u)).sum()
    text = lambda f, arguments: (
        jax.jit(jax.grad(f, arguments)).lower(*operands).compile().as_text() or ""
    )
    count = lambda *arguments: text(*arguments).count(" dot(")
    whole, part = count(both, (0, 1, 2, 3)), count(one, (0, 1))
    # Of the backward step's six products the two of the target's gradient are gone.
    assert part <= whole - 2
    assert temporary(one, (0, 1), *operands) <= temporary(both, (0, 1, 2, 3), *operands)


@pytest.mark.slow
@every
@pytest.mark.parametrize(
    ("rows", "features", "dtype"),
    [
        (8192, 2304, jnp.float32),
        (4096, 512, jnp.float32),
        (2048, 1024, jnp.float32),
        (8192, 2304, jnp.bfloat16),
    ],
)
def test_two_large_heads_take_less_than_the_memory_of_two(name, rows, features, dtype):
    vocabulary = 256000
    struct = jax.ShapeDtypeStruct
    head = (struct((rows, features), dtype), struct((vocabulary, features), dtype))
    labels = struct((rows,), jnp.int32)
    single = lambda h, w, y: losses.linear_softmax_cross_entropy(h, w, y).mean()
    paired = lambda *a: function_of(name, "linear")(*a).mean()
    one = temporary(single, (0, 1), *head, labels)
    two = temporary(paired, (0, 1, 2, 3), *head, *head)
    assert two < 2.4 * one
    # The logits of one head alone.
    assert two < 0.05 * rows * vocabulary * 4


def test_memory_at_a_large_vocabulary():
    """The smallest case of the slow test, and the tightest."""
    test_two_large_heads_take_less_than_the_memory_of_two(
        "jensen_shannon", 4096, 512, jnp.float32
    )


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"teacher_hidden": jnp.zeros((5, 3))},
            ValueError,
            r"softmax_kl_divergence: `teacher_logits` must.*\(5,",
        ),
        (
            {"teacher_weight": jnp.zeros((8, 3))},
            ValueError,
            r"softmax_kl_divergence: `teacher_logits` must.* 8\.",
        ),
        (
            {"teacher_weight": jnp.zeros((7, 4))},
            ValueError,
            r"LinearLogits: `weight` must",
        ),
        (
            {"teacher_hidden": jnp.zeros((4, 3), int)},
            TypeError,
            "`hidden` must .*int32",
        ),
        ({"teacher_bias": jnp.zeros(3)}, ValueError, r"`bias` must .*\(3,\)"),
        ({"where": jnp.ones(3, bool)}, ValueError, r"`where` must .*\(3,\)"),
        ({"excluded_labels": jnp.zeros(3, int)}, ValueError, r"`excluded_labels` must"),
        ({"excluded_labels": jnp.zeros(4)}, TypeError, "`excluded_labels` must"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be positive"),
    ],
)
def test_bad_arguments_of_heads(change, error, match):
    arguments: dict[str, Any] = {
        "hidden": jnp.zeros((4, 3)),
        "weight": jnp.zeros((7, 3)),
        "teacher_hidden": jnp.zeros((4, 3)),
        "teacher_weight": jnp.zeros((7, 3)),
        **change,
    }
    with pytest.raises(error, match=match):
        of_head.softmax_kl_divergence(**arguments)


@pytest.mark.usefixtures("untyped")
def test_bad_mixtures():
    z = jnp.zeros((2, 3))
    for value in (0, 1.0, -0.5, 2, jnp.ones(2)):
        with pytest.raises(ValueError, match="`mixture` must"):
            of_stored.softmax_jensen_shannon_divergence(z, z, mixture=value)


@pytest.mark.usefixtures("untyped")
def test_bad_logits():
    z = jnp.zeros((2, 3))
    for other, match in (
        (jnp.zeros((2, 4)), r"`teacher_logits` must have 3 classes.*4\."),
        (jnp.zeros((3, 3)), r"`teacher_logits` must have the batch shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            of_stored.softmax_kl_divergence(z, other)
    with pytest.raises(ValueError, match="tokens must have an axis"):
        of_stored.kl_to_reference(z[0], z[0])


def test_no_kernel_stands_behind_two_heads():
    pair = Pair(modified=False)
    function = function_of("kl", "linear", **pair.static)
    with pytest.raises(NotImplementedError, match="linear_divergence"):
        call(functools.partial(function, implementation="pallas"), pair.arrays, {})


def test_explain_names_both_passes():
    pair = Pair(modified=False)
    function = function_of("kl", "linear", **pair.static)
    gradient = jax.grad(lambda arrays: call(function, arrays, {}).sum())
    text = str(softlib.explain(gradient, pair.arrays))
    for operation in ("linear_row_statistics", "linear_divergence_gradient"):
        assert operation in text
