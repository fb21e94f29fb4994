"""The spherical family: Z-loss, log-spherical, log-Taylor, squared error."""

import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from softlib import LinearLogits, losses, softmax
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.heads import of, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import as_jax, assert_agrees
from tests.oracles import spherical as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
ROWS, FEATURES, CLASSES = 8, 3, 7


class Loss(NamedTuple):
    public: str
    oracle: Any
    parameters: dict[str, float]


LOSSES = {
    "z": Loss("z_loss", oracle.z, {"a": 0.5, "b": 1.5, "epsilon": 0.01}),
    "log_spherical": Loss(
        "log_spherical_softmax_loss", oracle.log_spherical, {"epsilon": 0.01}
    ),
    "log_taylor": Loss("log_taylor_softmax_loss", oracle.log_taylor, {}),
    "squared_error": Loss("spherical_squared_error", oracle.squared_error, {}),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
both_sources = pytest.mark.parametrize("source", ["linear", "logits"])
rows_of = {"linear": "hidden", "logits": "logits"}


def arrays(source, dtype="float32", seed=0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    if source == "logits":
        return {"logits": 2 * draw(ROWS, CLASSES), "bias": draw(CLASSES)}
    found = {"hidden": draw(ROWS, FEATURES), "weight": draw(CLASSES, FEATURES)}
    return {**found, "bias": draw(CLASSES)}


def function_of(name, source, **options):
    if source == "linear":
        options = {"vocab_chunk": 3, **options}
    call: Any = getattr(of(source), LOSSES[name].public)
    return functools.partial(call, **as_jax(options))


def parameters_of(name):
    return {n: jnp.asarray(p) for n, p in LOSSES[name].parameters.items()}


def differentiated(function, floating, **others):
    """The loss per row, and the gradients of its sum by argument."""

    @jax.jit
    def run(floating, others):
        def total(floating):
            loss = function(**floating, **others)
            return loss.sum(), loss

        return jax.grad(total, has_aux=True)(floating)

    gradients, loss = run(floating, others)
    return loss, gradients


# ----------------------------------------------------------------------------- oracles
SOURCES = [
    ("linear", "xla", None),
    ("logits", "xla", 3.0),
    # The mean of a capped head takes a stream of its own.
    ("linear", "xla", 3.0),
    ("linear", "reference", None),
]


@pytest.mark.parametrize(
    ("name", "source", "implementation", "softcap"),
    [("z", *source) for source in SOURCES]
    + [(name, *source) for name in list(LOSSES)[1:] for source in SOURCES[:2]],
)
def test_matches_oracle(name, source, implementation, softcap):
    """Every exception in one batch, and gradients of every argument and parameter."""
    with jax.enable_x64():
        given = arrays(source, "float64")
        given[rows_of[source]] = given[rows_of[source]].at[3].set(jnp.nan)
        given["temperature"] = jnp.linspace(0.5, 2.0, ROWS)
        given["scale"] = jnp.asarray(1.5)
        options: dict[str, Any] = {
            "class_where": np.arange(CLASSES) != 2,
            "where": np.arange(ROWS) != 3,
            "softcap": softcap,
        }
        labels = np.array([0, 6, 2, -100, -1, CLASSES, 5, 2])
        cotangent = np.random.default_rng(1).normal(size=ROWS)
        call = function_of(name, source, implementation=implementation, **options)

        @jax.jit
        def run(floating, labels, cotangent):
            loss, pull = jax.vjp(lambda f: call(**f, labels=labels), floating)
            return loss, pull(cotangent)[0]

        loss, gradients = run(given | parameters_of(name), labels, cotangent)
        wanted = oracle.spherical_loss(
            LOSSES[name].oracle,
            labels,
            LOSSES[name].parameters,
            cotangent=cotangent,
            **options,
            **given,
        )
        assert_agrees(loss, wanted.values["loss"], jnp.float64, 0)
        assert gradients.keys() == wanted.gradients.keys()
        for argument, gradient in gradients.items():
            assert_agrees(gradient, wanted.gradients[argument], jnp.float64, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_matches_independent_vectors(bias):
    with jax.enable_x64():
        data = np.load(DATA / "z_loss_case0.npz")
        labels = jnp.asarray(data["in_labels"])
        if bias:
            source = {n: jnp.asarray(data[f"in_{n}"]) for n in ("hidden", "weight")}
            source["bias"] = jnp.asarray(data["in_bias"])
            functions = of_head
        else:
            source, functions = {"logits": jnp.asarray(data["out_logits"])}, of_stored
        call = lambda name, **options: jax.jit(
            functools.partial(getattr(functions, name), **options)
        )(**source, labels=labels)
        a, b = float(data["in_a"]), float(data["in_b"])
        eps = float(data["in_eps_spherical"])
        for actual, wanted in (
            (call("z_loss", a=a, b=b, epsilon=0.0), "z_loss"),
            (call("log_spherical_softmax_loss", epsilon=eps), "log_spherical"),
            (call("log_taylor_softmax_loss"), "log_taylor"),
            (call("spherical_squared_error"), "squared_error"),
        ):
            assert_agrees(actual, data[f"out_{wanted}"], jnp.float64, 0)
        if not bias:
            gradient = jax.jit(
                jax.grad(lambda z: of_stored.z_loss(z, labels, a=a, b=b).sum())
            )(source["logits"])
            wanted = data["out_z_loss_grad_logits"]
            np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("z", "bfloat16"), ("log_spherical", "float16"), ("squared_error", "bfloat16")],
)
def test_both_sources_agree_in_narrow_dtypes_and_return_float32(name, dtype):
    """The logits of the linear head are float32, so the other source gets these."""
    given = arrays("linear", dtype)
    parameters = LOSSES[name].parameters
    labels = jnp.arange(ROWS) % CLASSES
    raw = LinearLogits(given["hidden"], given["weight"]).materialize()
    streamed, gradients = differentiated(
        function_of(name, "linear", **parameters), given, labels=labels
    )
    call = jax.jit(function_of(name, "logits", **parameters))
    stored = call(raw, labels, bias=given["bias"])
    rounded = call(raw.astype(dtype), labels)
    assert streamed.dtype == stored.dtype == rounded.dtype == jnp.float32
    assert_close(streamed, stored, dtype=jnp.float32, length=CLASSES)
    for argument, gradient in gradients.items():
        assert gradient.dtype == jnp.dtype(dtype), argument
        assert jnp.isfinite(gradient).all()


SHAPES = [(5, 2, 257), (3, 1, 1), (0, 3, 4)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("z", shape) for shape in SHAPES] + [(name, SHAPES[0]) for name in LOSSES][1:],
)
def test_odd_shapes_in_float32(name, shape):
    """One class, no rows, a prime number of classes over several chunks."""
    rows, features, classes = shape
    random = np.random.default_rng(2)
    hidden = np.float32(random.normal(size=(rows, features)))
    weight = np.float32(random.normal(size=(classes, features)))
    labels = np.arange(rows) % classes
    call = function_of(name, "linear", vocab_chunk=100, **LOSSES[name].parameters)
    given = {"hidden": jnp.asarray(hidden), "weight": jnp.asarray(weight)}
    loss, gradients = differentiated(call, given, labels=jnp.asarray(labels))
    wanted = oracle.spherical_loss(
        LOSSES[name].oracle,
        labels,
        LOSSES[name].parameters,
        hidden=hidden,
        weight=weight,
    )
    assert_close(loss, wanted.values["loss"], dtype="float32", length=classes)
    for argument in given:
        actual, expected = gradients[argument], wanted.gradients[argument]
        # Every class has a part in every number.
        assert_close(actual, expected, dtype="float32", length=classes * 16)


# ---------------------------------------------------------------------------- promises
@pytest.mark.parametrize("source", ["linear", "linear, softcap", "logits"])
def test_a_large_mean_costs_no_digits(source):
    """By the mean of squares, mean 1000 and deviation 1 are 1.09 in float32."""
    random = np.random.default_rng(0)
    classes, rows = 500, 4
    labels = jnp.arange(rows)
    options: dict[str, Any] = {"a": 1.0, "b": 3.0}
    if source == "logits":
        z = np.float32(1000 + random.normal(size=(rows, classes)))
        rtol = 1e-6
        call = jax.jit(functools.partial(of_stored.z_loss, **options))
        actual = call(jnp.asarray(z), labels)
    else:
        # The product of the first feature is 1000 exactly.
        hidden = np.c_[np.full(rows, 8), random.normal(size=(rows, 1))]
        weight = np.c_[np.full(classes, 125), random.normal(size=classes)]
        hidden, weight = hidden.astype(np.float32), weight.astype(np.float32)
        z = hidden.astype(float) @ weight.astype(float).T
        rtol = 2e-4  # the logits themselves are rounded to 6e-5
        if source != "linear":
            options["softcap"] = 1e4
            z = 1e4 * np.tanh(z / 1e4)
            rtol = 5e-3  # 1e4 times the rounding of a tangent
        options["vocab_chunk"] = 90
        call = jax.jit(functools.partial(of_head.z_loss, **options))
        actual = call(jnp.asarray(hidden), jnp.asarray(weight), labels)
    deviation = np.float64(z) - np.float64(z).mean(1, keepdims=True)
    score = deviation[np.arange(rows), np.arange(rows)] / deviation.std(1)
    np.testing.assert_allclose(actual, np.logaddexp(0, 3 - score), rtol=rtol)


@settings(deadline=None, max_examples=25)
@given(
    scale=st.floats(2.0**-10, 2.0**10),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 5),
)
def test_shift_and_scale_do_not_change_the_z_loss(scale, shift, seed):
    with jax.enable_x64():
        logits = arrays("logits", "float64", seed)["logits"]
        labels = jnp.arange(ROWS) % CLASSES
        moved = _z_loss(scale * logits + shift, labels)
        np.testing.assert_allclose(moved, _z_loss(logits, labels), rtol=1e-8)


@jax.jit
def _z_loss(logits, labels):
    return of_stored.z_loss(logits, labels, a=0.5, b=2.0, epsilon=0.0)


def test_the_gradient_is_orthogonal_to_ones_and_to_the_logits():
    logits = arrays("logits")["logits"]
    call = function_of("z", "logits", a=0.5, b=2.0)
    _, gradients = differentiated(
        call, {"logits": logits}, labels=jnp.arange(ROWS) % CLASSES
    )
    gradient = gradients["logits"]
    assert (jnp.abs(gradient).max(1) > 0.01).all()
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-6)
    np.testing.assert_allclose((gradient * logits).sum(1), 0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_largest_score_is_the_root_of_classes_less_one(classes):
    """There the loss is log(2) / a; b = 890 is what 793,471 classes allow."""
    logits = jnp.zeros((1, classes)).at[0, 1].set(3.0)
    most = float(np.sqrt(classes - 1))
    call = jax.jit(functools.partial(of_stored.z_loss, a=2.0, b=most, epsilon=0.0))
    np.testing.assert_allclose(call(logits, jnp.array([1])), np.log(2) / 2, rtol=1e-4)
    assert int(np.sqrt(793_471 - 1)) == 890


@pytest.mark.parametrize("name", ["log_spherical", "log_taylor"])
def test_it_is_the_negative_logarithm_of_the_map(name):
    logits, labels = arrays("logits")["logits"], jnp.arange(ROWS) % CLASSES
    exists = jnp.arange(CLASSES) != 6
    of_map = getattr(softmax, f"{name}_softmax")(logits, where=exists)
    wanted = -jnp.take_along_axis(of_map, labels[:, None], 1)[:, 0]
    actual = function_of(name, "logits")(logits, labels, class_where=exists)
    np.testing.assert_array_equal(np.isinf(actual), np.isinf(wanted))
    finite = np.isfinite(wanted)
    assert_close(actual[finite], wanted[finite], dtype="float32", length=CLASSES)


@pytest.mark.parametrize("name", ["z", "log_spherical"])
@both_sources
def test_exceptions_in_their_order(name, source):
    """A masked row, a label outside, a label on an excluded class, rows as usual."""
    options = {"class_where": np.arange(CLASSES) != 2, "where": np.arange(ROWS) != 0}
    labels = jnp.array([-1, -1, 2, CLASSES, 2, 0, 1, 3])
    function = function_of(name, source, **options)
    loss, gradients = differentiated(
        function, arrays(source) | parameters_of(name), labels=labels
    )
    np.testing.assert_array_equal(np.isnan(loss), [0, 1, 0, 1, 0, 0, 0, 0])
    assert loss[0] == 0
    np.testing.assert_array_equal(loss[jnp.array([2, 4])], np.inf)
    rows = gradients[rows_of[source]]
    np.testing.assert_array_equal(rows[:5], 0)
    for argument, gradient in gradients.items():
        assert np.isfinite(gradient).all(), argument
    assert (rows[5:] != 0).any(axis=1).all()


@pytest.mark.parametrize("name", ["z"])
@both_sources
def test_no_class_selected_gives_zero_loss_and_gradient(name, source):
    function = function_of(name, source, class_where=np.zeros(CLASSES, bool))
    labels = jnp.arange(ROWS) % CLASSES
    given = arrays(source) | parameters_of(name)
    for leaf in jax.tree.leaves(differentiated(function, given, labels=labels)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    ("name", "source"), [("z", "linear"), ("z", "logits"), ("log_taylor", "linear")]
)
def test_a_class_of_minus_infinity_is_excluded_by_definition(name, source):
    """It is as if `class_where` excluded it, in values and in gradients."""
    given, labels = arrays(source), jnp.array([0, 1, 2, 3, 4, 5, 6, 0])
    function = function_of(name, source, **LOSSES[name].parameters)
    infinite = {**given, "bias": given["bias"].at[2].set(-jnp.inf)}
    actual = differentiated(function, infinite, labels=labels)
    exists = jnp.arange(CLASSES) != 2
    wanted = differentiated(function, given, labels=labels, class_where=exists)
    assert actual[0][2] == np.inf
    for one, two in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["z", "log_spherical"])
def test_excluded_classes_may_hold_anything(name):
    """Padding of the vocabulary changes neither mean nor deviation."""
    given, labels = arrays("linear"), jnp.array([0, 1, 3, 4, 5, 3, 1, 0])
    function = function_of(name, "linear", **LOSSES[name].parameters)
    exists = jnp.arange(CLASSES) < 6
    padded = {**given, "weight": given["weight"].at[6].set(100.0)}
    loss, gradients = differentiated(
        function, padded, labels=labels, class_where=exists
    )
    fewer = {**given, "weight": given["weight"][:6], "bias": given["bias"][:6]}
    expected = differentiated(function, fewer, labels=labels)
    assert_close(loss, expected[0], dtype="float32", length=64)
    assert_close(gradients["hidden"], expected[1]["hidden"], dtype="float32", length=64)
    np.testing.assert_array_equal(gradients["weight"][6], 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
@both_sources
def test_equal_logits_give_a_finite_loss_and_gradient(source, epsilon):
    """A head of zeros; with epsilon = 0 nothing moves."""
    given = {name: jnp.zeros_like(array) for name, array in arrays(source).items()}
    if source == "linear":
        given["hidden"] = arrays(source)["hidden"]
    function = function_of("z", source, a=1.0, b=2.0, epsilon=epsilon)
    loss, gradients = differentiated(function, given, labels=jnp.arange(ROWS) % 5)
    np.testing.assert_allclose(loss, np.logaddexp(0, 2.0), rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    if epsilon == 0:
        assert largest == 0
    else:
        assert 0 < largest < 2 * ROWS / np.sqrt(epsilon)


@every_loss
@pytest.mark.parametrize("size", [1e4])
def test_extreme_logits(name, size):
    logits = np.float32(size * np.array([[1, -1, 0.5], [-1, -1, 1], [0, 0, 1]]))
    labels = np.array([0, 1, 0])
    function = function_of(name, "logits", **LOSSES[name].parameters)
    loss, gradients = differentiated(
        function, {"logits": jnp.asarray(logits)}, labels=jnp.asarray(labels)
    )
    wanted = oracle.spherical_loss(
        LOSSES[name].oracle, labels, LOSSES[name].parameters, logits=logits
    )
    np.testing.assert_allclose(loss, wanted.values["loss"], rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradients["logits"]).all()


@every_loss
@pytest.mark.parametrize("source", ["logits"])
def test_what_overflows_is_nan_in_its_own_row(name, source):
    given = arrays(source)
    given[rows_of[source]] = given[rows_of[source]].at[1].set(1e30).at[2].set(jnp.nan)
    call = jax.jit(function_of(name, source, **LOSSES[name].parameters))
    loss = call(**given, labels=jnp.arange(ROWS) % CLASSES)
    np.testing.assert_array_equal(np.isnan(loss), np.isin(np.arange(ROWS), (1, 2)))


def test_a_loss_is_never_negative():
    """Where the label has it all, rounding would put it on either side of 0."""
    random = np.random.default_rng(3)
    logits = 1e-4 * random.normal(size=(64, 50)).astype(np.float32)
    logits[np.arange(64), np.arange(64) % 50] = random.uniform(0.9, 1.1, 64)
    labels = jnp.arange(64) % 50
    for name, scale in (
        ("log_spherical", 1.0),
        ("log_taylor", 1e4),
        ("squared_error", 1.0),
    ):
        loss = function_of(name, "logits")(scale * jnp.asarray(logits), labels)
        assert (loss >= 0).all(), name


# ------------------------------------------------------------------------------ devices
@pytest.mark.parametrize(
    ("name", "kind", "softcap"),
    [("z", "Auto", 5.0), ("z", "Explicit", None), ("log_spherical", "Auto", None)],
)
def test_a_divided_vocabulary_gives_the_numbers_of_one_device(name, kind, softcap):
    classes = 16
    random = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    given = {
        "hidden": draw(ROWS, FEATURES),
        "weight": draw(classes, FEATURES) + 10,
        "bias": draw(classes),
    }
    labels = jnp.array([0, 15, 8, 3, 4, 7, 12, 1])
    exists = jnp.arange(classes) < 14  # the label 15 is on none
    options = {**LOSSES[name].parameters, "softcap": softcap, "vocab_chunk": 3}
    call = function_of(name, "linear", **options)
    finite = lambda loss: jnp.where(jnp.isinf(loss), -1.0, loss)
    wanted = differentiated(
        lambda **x: finite(call(**x)), given, labels=labels, class_where=exists
    )
    mesh = jax.make_mesh(
        (2, 4), ("data", "classes"), axis_types=(getattr(AxisType, kind),) * 2
    )
    where = {
        "hidden": P("data"),
        "weight": P("classes"),
        "bias": P("classes"),
        "labels": P("data"),
        "class_where": P("classes"),
    }
    divided = jax.shard_map(
        lambda x: finite(call(**x, axis_name="classes")),
        mesh=mesh,
        in_specs=(where,),
        out_specs=P("data"),
    )
    place = lambda **x: {
        n: jax.device_put(a, NamedSharding(mesh, where[n])) for n, a in x.items()
    }
    actual = differentiated(
        lambda **x: divided(x),
        place(**given),
        **place(labels=labels, class_where=exists),
    )
    for one, two in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        # Logits of 10 are rounded in another order.
        assert_close(one, two, dtype="float32", length=64, c=16)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow  # the other losses go the same way
@both_sources
def test_z_loss_under_every_transformation(source):
    given = arrays(source)

    def function(data, bias, labels, a, b, where):
        rest = {"weight": given["weight"]} if source == "linear" else {}
        call = function_of("z", source, epsilon=0.01)
        data = {rows_of[source]: data}
        return call(**data, **rest, labels=labels, bias=bias, a=a, b=b, where=where)

    check_transformations(
        function,
        given[rows_of[source]],
        given["bias"],
        jnp.arange(ROWS) % CLASSES,
        jnp.float32(0.5),
        jnp.float32(1.5),
        jnp.arange(ROWS) != 3,
        rows=(0, 2, 5),
        skip={"forward_mode": "the statistics have a custom_vjp"},
    )


# ------------------------------------------------------------------------------- memory
def _temporary(loss, rows=1024, features=256, classes=262_144):
    struct = jax.ShapeDtypeStruct
    operands = (
        struct((rows, features), jnp.float32),
        struct((classes, features), jnp.float32),
        struct((rows,), jnp.int32),
    )
    value = lambda h, w, y: loss(h, w, y).mean()
    program = jax.jit(jax.value_and_grad(value, (0, 1))).lower(*operands).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("shape", [(1024, 256), (256, 32)])
@pytest.mark.parametrize("name", ["z", "log_taylor"])
def test_memory_is_that_of_cross_entropy(name, shape):
    call = getattr(of_head, LOSSES[name].public)
    loss = functools.partial(call, **LOSSES[name].parameters)
    plain = _temporary(losses.linear_softmax_cross_entropy, *shape)
    assert _temporary(loss, *shape) <= 1.2 * plain


@every_loss
def test_no_array_of_logits_is_formed(name):
    rows, classes = 96, 4099
    call = function_of(name, "linear", vocab_chunk=512, **LOSSES[name].parameters)
    value = lambda h, w, y: call(h, w, y).mean()
    jaxpr = operations.make_jaxpr(jax.value_and_grad(value, (0, 1)))(
        jnp.zeros((rows, 8)), jnp.zeros((classes, 8)), jnp.zeros(rows, int)
    )
    text = str(jaxpr)
    assert f"[{classes},8]" in text
    for shape in (f"[{rows},{classes}]", f"[{classes},{rows}]"):
        assert shape not in text


# ------------------------------------------------------------------------------- errors
BAD = {
    "z": [
        ("a", 0.0, "0.0"),
        ("a", jnp.ones(2), "(2,)"),
        ("b", jnp.ones(2), "(2,)"),
        ("epsilon", -1.0, "-1.0"),
    ],
    "log_spherical": [("epsilon", 0.0, "0.0"), ("epsilon", jnp.ones(2), "(2,)")],
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("name", "argument", "value", "got"),
    [(name, *bad) for name, several in BAD.items() for bad in several],
)
def test_a_parameter_out_of_range_is_an_error(name, argument, value, got):
    for source in ("linear", "logits"):
        options = {**LOSSES[name].parameters, argument: value}
        function = function_of(name, source, **options)
        public = LOSSES[name].public
        with pytest.raises(
            ValueError, match=rf"^{public}: `{argument}` must .*{re.escape(got)}\.$"
        ):
            function(**arrays(source), labels=jnp.zeros(ROWS, int))


@pytest.mark.usefixtures("untyped")
def test_a_and_b_have_no_defaults():
    with pytest.raises(TypeError, match="'a' and 'b'"):
        of_stored.z_loss(jnp.zeros((1, 3)), jnp.zeros(1, int))  # pyrefly: ignore


@pytest.mark.usefixtures("untyped")
@every_loss
@both_sources
def test_labels_are_ids_and_keywords_known(name, source):
    function = function_of(name, source, **LOSSES[name].parameters)
    with pytest.raises(TypeError, match="`labels` must have an integer dtype"):
        function(**arrays(source), labels=jnp.zeros(ROWS))
    with pytest.raises(ValueError, match=r"`labels` must have shape \(8,\)"):
        function(**arrays(source), labels=jnp.zeros((ROWS, 2), int))


@pytest.mark.usefixtures("untyped")
@every_loss
def test_a_gradient_filter_is_refused(name):
    call = getattr(of_head, LOSSES[name].public)
    with pytest.raises(ValueError, match="`gradient_filter_eps` must be None"):
        call(
            **arrays("linear"),
            labels=jnp.zeros(ROWS, int),
            gradient_filter_eps="auto",
            **LOSSES[name].parameters,
        )


def test_the_other_z_loss_is_named():
    for function in (of_stored.z_loss, of_head.z_loss):
        assert "`logsumexp_penalty`" in (function.__doc__ or "")
    for function in (
        of_stored.softmax_cross_entropy,
        losses.linear_softmax_cross_entropy,
    ):
        assert "`z_loss`" in (function.__doc__ or "")
