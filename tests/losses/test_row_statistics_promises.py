"""What the row statistics promise in words, at every edge."""

import functools
import pathlib

import jax
import numpy as np
import pytest

import softlib
from softlib.testing import assert_close
from tests.compiled import of_head, of_stored
from tests.host import jnp
from tests.losses.problems import as_jax, assert_agrees, values_and_gradients
from tests.oracles import row_statistics as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
ALL = [name for name in softlib.logits.RowStatistics._fields if name != "label_rank"]
DIFFERENTIABLE = oracle.DIFFERENTIABLE
FROM_LOGITS = ("lse", "mean_logit", "sum_logits", "sum_squared_logits")

pytestmark = pytest.mark.parametrize("implementation", ["xla", "reference"])


def arrays(rows=4, d=3, v=7, seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    hidden, weight = random.normal(size=(rows, d)), random.normal(size=(v, d))
    return jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype)


def linear(implementation, *, statistics=None, chunk=3, **options):
    """The streamed statistics in several chunks, as a dictionary."""
    options |= {"vocab_chunk": chunk, "implementation": implementation}
    return dictionary(of_head.row_statistics, statistics, options)


def from_logits(implementation, *, statistics=None, **options):
    options |= {"implementation": implementation}
    return dictionary(of_stored.row_statistics, statistics, options)


def dictionary(operation, statistics, options):
    """`operation` with these statistics, or with all that its arguments allow."""

    def function(*arguments, **more):
        labelled = len(arguments) > 2 or more.get("labels") is not None
        chosen = statistics or [n for n in ALL if labelled or n != "label_logits"]
        more = as_jax({**options, **more})
        arrays = map(jnp.asarray, arguments)
        got = operation(*arrays, statistics=tuple(chosen), **more)
        return {name: a for name, a in got._asdict().items() if a is not None}

    return function


def check(function, given, expected, *, cotangents, length=16, **others):
    """Values and gradients against the oracle's."""
    values, gradients = values_and_gradients(function, given, cotangents, **others)
    for name, value in values.items():
        wanted = expected.values[name]
        assert_close(value, wanted, dtype=jnp.float32, length=length)
    for name, gradient in gradients.items():
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype=gradient.dtype, length=length)
    return values, gradients


# ------------------------------------------------------------------- what is returned
def test_matches_independent_vectors(implementation):
    """Made by another program: all statistics, with every cotangent at once."""
    data = np.load(DATA / "linear_row_statistics_case0.npz")
    with jax.enable_x64():
        for vocab_axis in (0, 1):
            function = linear(
                implementation,
                statistics=oracle.STATISTICS,
                chunk=8,
                vocab_axis=vocab_axis,
                class_where=data["in_class_where"],
                softcap=float(data["in_softcap"]),
                scale=float(data["in_logit_scale"]),
            )
            given = {name: data[f"in_{name}"] for name in ("hidden", "weight", "bias")}
            if vocab_axis:
                given["weight"] = given["weight"].T
            cotangents = {name: data[f"in_ct_{name}"] for name in DIFFERENTIABLE}
            values, gradients = values_and_gradients(
                function, given, cotangents, labels=data["in_labels"]
            )
            for name, value in values.items():
                assert_agrees(value, data[f"out_{name}"], jnp.float64, 0)
            for name, gradient in gradients.items():
                wanted = data[f"out_grad_{name}"]
                if name == "weight" and vocab_axis:
                    wanted = wanted.T
                assert_agrees(gradient, wanted, jnp.float64, 0)


def test_the_default_is_lse_and_label_logits_if_labels_are_given(implementation):
    hidden, weight = arrays()
    labels = jnp.array([0, 1, 2, 3])
    options = {"implementation": implementation}
    for operation in (
        functools.partial(of_head.row_statistics, hidden, weight, **options),
        functools.partial(of_stored.row_statistics, hidden @ weight.T, **options),
    ):
        given = operation(labels=labels)
        assert given.lse is not None
        assert given.label_logits is not None
        assert {a is None for a in given[2:]} == {True}
        absent = operation()
        assert absent.lse is not None
        assert {a is None for a in absent[1:]} == {True}


@pytest.mark.parametrize("statistic", ALL)
def test_a_statistic_alone_is_what_it_is_among_all(implementation, statistic):
    hidden, weight = arrays()
    given, labels = {"hidden": hidden, "weight": weight}, jnp.array([6, 0, 3, 3])
    cotangents = {statistic: np.arange(1.0, 5.0, dtype=np.float32)}
    alone = values_and_gradients(
        linear(implementation, statistics=(statistic,)),
        given,
        cotangents,
        labels=labels,
    )
    everything = values_and_gradients(
        linear(implementation), given, cotangents, labels=labels
    )
    assert set(alone[0]) == {statistic}
    np.testing.assert_allclose(
        alone[0][statistic], everything[0][statistic], rtol=1e-6, atol=1e-6
    )
    for one, two in zip(*map(jax.tree.leaves, (alone[1], everything[1])), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0, 3), (2, 1, 2)])
def test_any_number_of_batch_axes(implementation, batch):
    random = np.random.default_rng(1)
    given = {
        "hidden": random.normal(size=(*batch, 3)).astype(np.float32),
        "weight": random.normal(size=(7, 3)).astype(np.float32),
    }
    labels = random.integers(0, 7, batch)
    cotangents = {n: np.ones(batch, np.float32) for n in DIFFERENTIABLE}
    expected = oracle.row_statistics(labels, cotangents=cotangents, **given)
    values, _ = check(
        linear(implementation), given, expected, cotangents=cotangents, labels=labels
    )
    assert all(value.shape == batch for value in values.values())
    logits = given["hidden"] @ given["weight"].T
    again = jax.jit(from_logits(implementation))(logits, labels=labels)
    for name, value in again.items():
        assert_close(value, expected.values[name], dtype=jnp.float32, length=16)


def test_several_labels_per_row_keep_their_axis(implementation):
    hidden, weight = arrays()
    labels = jnp.arange(12).reshape(4, 3) % 7
    logits = hidden @ weight.T
    wanted = np.take_along_axis(np.asarray(logits), np.asarray(labels), 1)
    for function, source in (
        (linear, (hidden, weight)),
        (from_logits, (logits,)),
    ):
        got = jax.jit(function(implementation))(*source, labels=labels)["label_logits"]
        assert got.shape == (4, 3)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "other_dtype"),
    [
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.bfloat16, jnp.float16),
    ],
)
def test_mixed_dtypes_give_float32_and_gradients_in_the_dtype_of_their_argument(
    implementation, hidden_dtype, weight_dtype, other_dtype
):
    random = np.random.default_rng(2)
    given = {
        "hidden": jnp.asarray(random.normal(size=(4, 3)), hidden_dtype),
        "weight": jnp.asarray(random.normal(size=(7, 3)), weight_dtype),
        "bias": jnp.asarray(random.normal(size=7), other_dtype),
        "scale": jnp.asarray(0.7, other_dtype),
        "temperature": jnp.asarray(random.uniform(0.5, 2, 4), other_dtype),
    }
    cotangents = {n: np.ones(4, np.float32) for n in ("lse", "mean_logit")}
    expected = oracle.row_statistics(cotangents=cotangents, **given)
    function = linear(implementation, statistics=("lse", "mean_logit"))
    values, gradients = values_and_gradients(function, given, cotangents)
    for name, value in values.items():
        assert value.dtype == jnp.float32
        assert_close(value, expected.values[name], dtype=jnp.float32, length=8)
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype
        # Tiles of dz may be rounded to the coarser dtype of the two factors.
        coarse = max(
            (gradient.dtype, hidden_dtype, weight_dtype),
            key=lambda t: float(jnp.finfo(t).eps),
        )
        assert_close(gradient, expected.gradients[name], dtype=coarse, length=8)


def test_float32_stays_float32_where_float64_exists(implementation):
    with jax.enable_x64():
        hidden, weight = arrays()
        given = {"hidden": hidden, "weight": weight}
        values, gradients = values_and_gradients(
            linear(implementation, scale=2.0, temperature=0.5),
            given,
            {"lse": np.ones(4)},
            labels=np.zeros(4, np.int64),
        )
    dtypes = {a.dtype for name, a in values.items() if name != "argmax"}
    assert dtypes == {jnp.dtype(jnp.float32)}
    assert values["argmax"].dtype == jnp.int32
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(jnp.float32)}


def test_python_numbers_scale_as_arrays_do(implementation):
    hidden, weight = arrays()
    numbers = linear(implementation, scale=3, temperature=0.5)(hidden, weight)
    scale, heat = jnp.float32(3), jnp.float32(0.5)
    as_arrays = linear(implementation, scale=scale, temperature=heat)
    for name, value in as_arrays(hidden, weight).items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-6)


def test_temperature_divides_after_the_cap_and_scale_acts_before_the_bias(
    implementation,
):
    logits, bias = jnp.array([[3.0, -40.0, 0.5]]), jnp.array([1.0, 0.0, -2.0])
    options = {"scale": 2.0, "softcap": 4.0, "temperature": 0.5}
    z = 4 * np.tanh((2 * np.asarray(logits) + np.asarray(bias)) / 4) / 0.5
    got = from_logits(implementation, **options)(logits, bias=bias)
    assert_close(got["max_logit"], z.max(1), dtype=jnp.float32, length=1)
    assert_close(got["sum_logits"], z.sum(1), dtype=jnp.float32, length=3)
    got = linear(implementation, chunk=2, **options)(logits, jnp.eye(3), bias=bias)
    assert_close(got["sum_logits"], z.sum(1), dtype=jnp.float32, length=3)


# ------------------------------------------------------------------- maximum and index
def test_argmax_is_the_lowest_index_of_equal_logits_in_any_chunk(implementation):
    weight = jnp.array([0.0, 2.0, 1.0, 2.0, 2.0, -1.0, 2.0])[:, None]
    hidden = jnp.array([[1.0], [0.0], [-1.0]])
    for chunk in (1, 2, 3, 7):
        got = linear(implementation, chunk=chunk)(hidden, weight)
        np.testing.assert_array_equal(got["argmax"], [1, 0, 5])
        np.testing.assert_array_equal(got["max_logit"], [2.0, 0.0, 1.0])
        assert got["argmax"].dtype == jnp.int32
    logits = hidden @ weight.T
    got = from_logits(implementation)(logits)
    np.testing.assert_array_equal(got["argmax"], [1, 0, 5])


def test_argmax_looks_at_selected_classes_only(implementation):
    hidden, weight = jnp.ones((1, 1)), jnp.arange(7.0)[:, None]
    chosen = jnp.array([False, False, True, False, True, False, False])
    got = linear(implementation, class_where=chosen)(hidden, weight)
    assert (got["argmax"][0], got["max_logit"][0]) == (4, 4.0)


def test_maximum_and_index_carry_no_gradient(implementation):
    hidden, weight = arrays()
    function = linear(implementation, statistics=("max_logit", "argmax"))
    given = {"hidden": hidden, "weight": weight}
    _, gradients = values_and_gradients(function, given, {"max_logit": np.ones(4)})
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


# ------------------------------------------------------------------------------ labels
@pytest.mark.parametrize("bad", [-1, -100, 7, 2**31 - 1, -(2**31)])
def test_label_outside_the_classes_has_logit_zero_and_no_gradient(implementation, bad):
    hidden, weight = arrays()
    given, labels = {"hidden": hidden, "weight": weight}, np.array([bad, 0, 6, bad])
    cotangents = {"label_logits": np.ones(4, np.float32)}
    expected = oracle.row_statistics(labels, cotangents=cotangents, **given)
    function = linear(implementation, statistics=("label_logits",))
    values, gradients = check(
        function, given, expected, cotangents=cotangents, labels=labels
    )
    np.testing.assert_array_equal(values["label_logits"][np.array([0, 3])], 0)
    np.testing.assert_array_equal(gradients["hidden"][np.array([0, 3])], 0)
    logits = {"logits": hidden @ weight.T}
    expected = oracle.row_statistics(labels, cotangents=cotangents, **logits)
    function = from_logits(implementation, statistics=("label_logits",))
    check(function, logits, expected, cotangents=cotangents, labels=labels)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_label_dtype_does_not_limit_the_classes(implementation, dtype):
    """300 does not fit into int8, which must not make a label of 100 invalid."""
    with jax.enable_x64(dtype == "int64"):
        hidden, weight = arrays(rows=2, v=300)
        labels = np.array([100, 17], dtype)
        got = linear(implementation, chunk=128)(hidden, weight, labels)
        logits = np.asarray(hidden @ weight.T)
        wanted = logits[[0, 1], [100, 17]]
        np.testing.assert_allclose(got["label_logits"], wanted, rtol=1e-5)
        got = from_logits(implementation)(jnp.asarray(logits), labels=labels)
        np.testing.assert_allclose(got["label_logits"], wanted, rtol=1e-6)


def test_label_on_an_excluded_class_keeps_its_logit_and_gradient(implementation):
    hidden, weight = arrays()
    given, labels = {"hidden": hidden, "weight": weight}, np.array([2, 5, 2, 0])
    chosen = np.array([True, True, False, True, True, False, True])
    cotangents = {n: np.ones(4, np.float32) for n in DIFFERENTIABLE}
    expected = oracle.row_statistics(labels, chosen, cotangents=cotangents, **given)
    function = linear(implementation, class_where=chosen)
    values, _ = check(function, given, expected, cotangents=cotangents, labels=labels)
    wanted = np.asarray(hidden @ weight.T)[np.arange(4), labels]
    np.testing.assert_allclose(values["label_logits"], wanted, rtol=1e-6)


# ---------------------------------------------------------------- nothing, -inf, large
def test_no_class_selected(implementation):
    hidden, weight = arrays()
    given = {"hidden": hidden, "weight": weight, "bias": jnp.ones(7)}
    labels = np.array([0, 1, 2, 3])
    nothing = np.zeros(7, bool)
    wanted = {"lse": -np.inf, "max_logit": -np.inf}
    cotangents = {n: np.ones(4, np.float32) for n in DIFFERENTIABLE}
    function = linear(implementation, class_where=nothing)
    logits = from_logits(implementation, class_where=nothing)
    for call, source in ((function, given), (logits, {"logits": hidden @ weight.T})):
        values, gradients = values_and_gradients(
            call, source, cotangents, labels=labels
        )
        assert set(values) == set(ALL)
        for name, value in values.items():
            np.testing.assert_array_equal(value, wanted.get(name, 0), err_msg=name)
        for gradient in gradients.values():
            np.testing.assert_array_equal(gradient, 0)


def test_no_class_selected_in_some_rows_of_logits(implementation):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    chosen = np.array([[True] * 5, [False] * 5, [False, True, False, True, True]])
    labels = np.array([4, 4, 0])
    cotangents = {n: np.arange(1, 4, dtype=np.float32) for n in DIFFERENTIABLE}
    expected = oracle.row_statistics(
        labels, chosen, cotangents=cotangents, logits=logits
    )
    function = from_logits(implementation, class_where=chosen)
    values, gradients = check(
        function, {"logits": logits}, expected, cotangents=cotangents, labels=labels
    )
    assert values["lse"][1] == -np.inf
    np.testing.assert_array_equal(gradients["logits"][1], 0)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    "out", [[1, 4], [0, 1, 2], [3, 4, 5, 6], [0, 1, 2, 3, 4, 5]], ids=str
)
def test_logits_of_minus_infinity_have_probability_zero(implementation, out, softcap):
    """The first chunk, the last chunks or all but one class may be -inf throughout.

    With a cap such a logit is minus the cap and takes part like any other.
    """
    hidden, weight = arrays()
    bias = np.linspace(-1, 1, 7, dtype=np.float32)
    bias[out] = -np.inf
    given = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "scale": jnp.float32(1.5),
        "temperature": jnp.float32(0.7),
    }
    statistics = ("lse", "mean_logit", "max_logit", "argmax")
    cotangents = {n: np.arange(1, 5, dtype=np.float32) for n in statistics[:2]}
    options = {"softcap": softcap}
    expected = oracle.row_statistics(cotangents=cotangents, **options, **given)
    # The sum is infinite, but no cotangent comes from it: no harm is done.
    function = linear(implementation, statistics=(*statistics, "sum_logits"), **options)
    _, gradients = check(function, given, expected, cotangents=cotangents)
    if softcap is None:
        np.testing.assert_array_equal(gradients["weight"][np.array(out)], 0)
    logits = {"logits": np.asarray(hidden @ weight.T)} | {"bias": bias}
    expected = oracle.row_statistics(cotangents=cotangents, **options, **logits)
    function = from_logits(implementation, statistics=statistics, **options)
    check(function, logits, expected, cotangents=cotangents)


def test_sums_over_a_logit_of_minus_infinity_are_infinite(implementation):
    hidden, weight = arrays()
    bias = jnp.array([0.0, 0.0, -jnp.inf, 0.0, 0.0, 0.0, 0.0])
    got = linear(implementation)(hidden, weight, bias=bias)
    np.testing.assert_array_equal(got["sum_logits"], -np.inf)
    np.testing.assert_array_equal(got["sum_squared_logits"], np.inf)


def test_all_logits_of_minus_infinity(implementation):
    hidden, weight = arrays()
    given = {"hidden": hidden, "weight": weight, "bias": jnp.full(7, -jnp.inf)}
    statistics = ("lse", "mean_logit", "max_logit", "argmax")
    cotangents = {n: np.ones(4, np.float32) for n in statistics[:2]}
    for function, source in (
        (linear(implementation, statistics=statistics), given),
        (
            from_logits(implementation, statistics=statistics),
            {"logits": jnp.full((4, 7), -jnp.inf)},
        ),
    ):
        values, gradients = values_and_gradients(function, source, cotangents)
        np.testing.assert_array_equal(values["lse"], -np.inf)
        np.testing.assert_array_equal(values["max_logit"], -np.inf)
        np.testing.assert_array_equal(values["mean_logit"], 0)
        np.testing.assert_array_equal(values["argmax"], 0)
        for gradient in gradients.values():
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand(implementation, sign):
    hidden = jnp.array([[1e4 * sign], [-1e4], [1e2]])
    weight = jnp.linspace(0.25, 1.0, 7)[:, None]
    given, labels = {"hidden": hidden, "weight": weight}, np.array([0, 6, 3])
    names = ("lse", "label_logits", "mean_logit")
    cotangents = {n: np.ones(3, np.float32) for n in names}
    expected = oracle.row_statistics(labels, cotangents=cotangents, **given)
    function = linear(implementation, statistics=names, chunk=2)
    values, gradients = values_and_gradients(function, given, cotangents, labels=labels)
    for name, value in values.items():
        np.testing.assert_allclose(value, expected.values[name], rtol=1e-5)
    for name, gradient in gradients.items():
        # A logit of 1e4 is rounded to 1e-3, and z - E[z] is that far off.
        wanted = expected.gradients[name]
        bound = 2e-3 * np.max(np.abs(wanted))
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=bound)


def test_a_saturated_cap_has_no_gradient(implementation):
    given = {"hidden": jnp.array([[1e4]]), "weight": jnp.linspace(1.0, 2.0, 7)[:, None]}
    function = linear(implementation, softcap=2.0, statistics=("sum_logits",))
    values, gradients = values_and_gradients(function, given, {"sum_logits": [1.0]})
    np.testing.assert_array_equal(values["sum_logits"], 14)
    np.testing.assert_array_equal(gradients["hidden"], 0)
    np.testing.assert_array_equal(gradients["weight"], 0)


def test_a_cap_far_above_the_logits_changes_nothing(implementation):
    hidden, weight = arrays()
    free, capped = (
        linear(implementation, softcap=cap)(hidden, weight) for cap in (None, 1e6)
    )
    for name, value in free.items():
        np.testing.assert_allclose(capped[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_touches_no_other_row(implementation, value):
    hidden, weight = arrays()
    broken = hidden.at[1, 0].set(value)
    labels = np.array([0, 1, 2, 3])
    cotangents = {n: np.ones(4, np.float32) for n in FROM_LOGITS}
    others = np.array([0, 2, 3])

    def run(hidden):
        return values_and_gradients(
            linear(implementation, weight=weight),
            {"hidden": hidden},
            cotangents,
            labels=labels,
        )

    expected, actual = run(hidden), run(broken)
    assert not np.isfinite(actual[0]["lse"][1])
    for one, two in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
        np.testing.assert_array_equal(one[others], two[others])


# ----------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_logsumexp_of_131072_classes_in_bfloat16(implementation, vocab_axis):
    """A logsumexp kept in bfloat16 is off by 0.4 nats here."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(3, 8)), jnp.bfloat16)
    weight = jnp.asarray(random.normal(size=(131072, 8)) / 3, jnp.bfloat16)
    expected = oracle.row_statistics(
        hidden=hidden, weight=weight, cotangents={"lse": np.ones(3)}
    )
    if vocab_axis:
        weight = weight.T
    function = linear(
        implementation, statistics=("lse",), chunk=None, vocab_axis=vocab_axis
    )
    given = {"hidden": hidden, "weight": weight, "bias": jnp.zeros(131072)}
    values, gradients = values_and_gradients(function, given, {"lse": np.ones(3)})
    assert values["lse"].dtype == jnp.float32
    np.testing.assert_allclose(values["lse"], expected.values["lse"], atol=2e-3)
    # The probabilities of each row sum to one: three in all.
    np.testing.assert_allclose(gradients["bias"].sum(), 3, rtol=1e-4)


def test_gradients_of_many_rows_and_classes_are_summed_in_float32(implementation):
    """A bfloat16 sum of ones stops at 256."""
    rows, classes = 1024, 512
    given = {
        "hidden": jnp.ones((rows, 2), jnp.bfloat16),
        "weight": jnp.ones((classes, 2), jnp.bfloat16),
        "bias": jnp.zeros(classes, jnp.bfloat16),
    }
    function = linear(implementation, statistics=("sum_logits",), chunk=96)
    cotangents = {"sum_logits": np.ones(rows, np.float32)}
    values, gradients = values_and_gradients(function, given, cotangents)
    np.testing.assert_array_equal(values["sum_logits"], 2 * classes)
    np.testing.assert_array_equal(gradients["hidden"].astype(np.float32), classes)
    np.testing.assert_array_equal(gradients["weight"].astype(np.float32), rows)
    np.testing.assert_array_equal(gradients["bias"].astype(np.float32), rows)


@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 100])
def test_every_chunk_size_is_allowed(implementation, chunk):
    hidden, weight = arrays()
    given, labels = {"hidden": hidden, "weight": weight}, np.array([0, 6, 3, 1])
    cotangents = {n: np.ones(4, np.float32) for n in DIFFERENTIABLE}
    expected = oracle.row_statistics(labels, cotangents=cotangents, **given)
    for axis in (0, 1):
        function = linear(implementation, chunk=chunk, vocab_axis=axis)
        if axis:
            given["weight"] = weight.T
            expected.gradients["weight"] = expected.gradients["weight"].T
        check(function, given, expected, cotangents=cotangents, labels=labels)
