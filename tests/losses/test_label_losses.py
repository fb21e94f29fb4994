"""Losses of the label's probability: focal, comp-sum and its members, mixtures."""

import decimal
import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import LinearLogits
from softlib.testing import assert_close, check_transformations
from tests.compiled import losses, of, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import as_jax, assert_agrees
from tests.oracles import label_losses as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
ROWS, FEATURES, CLASSES = 8, 3, 7


class Loss(NamedTuple):
    public: str
    oracle: Any
    parameters: dict[str, float]
    cross_entropy: dict[str, float]  # the parameters that make it cross-entropy


LOSSES = {
    "focal": Loss(
        "softmax_focal_loss",
        oracle.focal,
        {"gamma": 1.5},
        {"gamma": 0.0},
    ),
    "comp_sum": Loss(
        "comp_sum_loss",
        oracle.comp_sum,
        {"tau": 0.25},
        {"tau": 1.0},
    ),
    "generalized": Loss(
        "generalized_cross_entropy_loss",
        oracle.generalized,
        {"q": 0.7},
        {"q": 0.0},
    ),
    "absolute": Loss(
        "mean_absolute_error_loss",
        oracle.absolute,
        {},
        {},
    ),
    "poly1": Loss(
        "poly1_cross_entropy",
        oracle.poly1,
        {"epsilon": 0.5},
        {"epsilon": 0.0},
    ),
    "symmetric": Loss(
        "symmetric_cross_entropy",
        oracle.symmetric,
        {"alpha": 0.3, "beta": 0.7, "log_zero": -4.0},
        {"alpha": 1.0, "beta": 0.0},
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
both_sources = pytest.mark.parametrize("source", ["linear", "logits"])
FROM_LOG_PROB = {
    "focal": losses.focal_from_log_prob,
    "comp_sum": losses.comp_sum_from_log_prob,
    "poly1": losses.poly1_from_log_prob,
    "symmetric": losses.symmetric_from_log_prob,
}
of_log_prob = pytest.mark.parametrize("name", FROM_LOG_PROB)


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
def test_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(DATA / "classification_losses_case0.npz")
        z, labels = jnp.asarray(data["in_logits"]), jnp.asarray(data["in_labels"])
        focal = functools.partial(
            of_stored.softmax_focal_loss, labels=labels, gamma=float(data["in_gamma"])
        )
        q, epsilon = float(data["in_q"]), float(data["in_poly_eps"])
        for actual, wanted in (
            (focal(z), data["out_focal"]),
            (jax.grad(lambda z: focal(z).sum())(z), data["out_focal_grad"]),
            (
                of_stored.poly1_cross_entropy(z, labels, epsilon=epsilon),
                data["out_poly1"],
            ),
            (
                of_stored.generalized_cross_entropy_loss(z, labels, q=q),
                data["out_gce"],
            ),
            (of_stored.mean_absolute_error_loss(z, labels), data["out_mae"]),
        ):
            assert_agrees(actual, wanted, jnp.float64, 0)


def test_comp_sum_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(DATA / "comp_sum_losses_case0.npz")
        z, labels = jnp.asarray(data["in_logits"]), jnp.asarray(data["in_labels"])

        @jax.jit
        def run(z, tau):
            loss = lambda z: of_stored.comp_sum_loss(z, labels, tau=tau)
            return loss(z), jax.grad(lambda z: loss(z).sum())(z)

        for i, tau in enumerate(data["in_tau"]):
            loss, gradient = run(z, jnp.asarray(tau))
            assert_agrees(loss, data["out_loss"][i], jnp.float64, 0)
            assert_agrees(gradient, data["out_grad_logits"][i], jnp.float64, 0)


@every_loss
def test_both_sources_agree_in_bfloat16_and_return_float32(name):
    """The logits of the linear head are float32, so the other source gets these."""
    given = arrays("linear", "bfloat16")
    labels = jnp.arange(ROWS) % CLASSES
    raw = LinearLogits(given["hidden"], given["weight"]).materialize()
    streamed, gradients = differentiated(
        function_of(name, "linear"), given, labels=labels
    )
    stored = function_of(name, "logits")(raw, labels, bias=given["bias"])
    rounded = function_of(name, "logits")(raw.astype(jnp.bfloat16), labels)
    assert streamed.dtype == stored.dtype == rounded.dtype == jnp.float32
    assert_close(streamed, stored, dtype=jnp.float32, length=CLASSES)
    for argument, gradient in gradients.items():
        assert gradient.dtype == jnp.bfloat16, argument
        assert jnp.isfinite(gradient).all()


@of_log_prob
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtype_of_losses_of_log_probabilities(name, dtype):
    """Also beside the default float64 of numbers, and float64 is never lowered."""
    with jax.enable_x64():
        log_prob = jnp.linspace(-3.0, 0.0, 6, dtype=dtype).reshape(2, 3)
        loss = FROM_LOG_PROB[name](log_prob)
        assert loss.dtype == jnp.promote_types(dtype, jnp.float32)
        assert loss.shape == (2, 3)


# ------------------------------------------------------------------------------- edges
@every_loss
@both_sources
def test_exceptions_in_their_order(name, source):
    """A masked row, a label outside, a label on an excluded class, rows as usual."""
    given = arrays(source)
    rows = "hidden" if source == "linear" else "logits"
    options = {"class_where": np.arange(CLASSES) != 2, "where": np.arange(ROWS) != 0}
    labels = jnp.array([-1, -1, 2, CLASSES, 2, 0, 1, 3])
    parameters = {n: jnp.asarray(p) for n, p in LOSSES[name].parameters.items()}
    function = function_of(name, source, **options)
    loss, gradients = differentiated(function, given | parameters, labels=labels)
    limit = oracle.limit(LOSSES[name].oracle, LOSSES[name].parameters)[0]
    np.testing.assert_array_equal(np.isnan(loss), [0, 1, 0, 1, 0, 0, 0, 0])
    assert loss[0] == 0
    np.testing.assert_allclose(loss[jnp.array([2, 4])], limit, rtol=1e-6)
    np.testing.assert_array_equal(gradients[rows][:5], 0)
    for argument, gradient in gradients.items():
        assert np.isfinite(gradient).all(), argument
    assert (gradients[rows][5:] != 0).any(axis=1).all()


@every_loss
@both_sources
def test_no_class_selected_gives_zero_loss_and_gradient(name, source):
    function = function_of(name, source, class_where=np.zeros(CLASSES, bool))
    labels = jnp.arange(ROWS) % CLASSES
    loss, gradients = differentiated(function, arrays(source), labels=labels)
    for leaf in jax.tree.leaves((loss, gradients)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, loss.parameters) for name, loss in LOSSES.items()),
        *(("focal", {"gamma": gamma}) for gamma in (0.0, 0.5, 2.0)),
    ],
)
def test_gradients_are_finite_for_every_margin(name, parameters):
    """1 - p underflows from a margin of 17 on; log p reaches -10,000."""
    margins = np.array([0, 8, 16, 17, 30, 80, 1e4, -30, -80, -200, -1e4], np.float32)
    logits = jnp.stack([margins, np.zeros_like(margins)], axis=1)
    traced = {n: jnp.asarray(p) for n, p in parameters.items()}
    loss, gradients = differentiated(
        function_of(name, "logits"),
        {"logits": logits} | traced,
        labels=jnp.zeros(len(margins), int),
    )
    assert not np.isnan(loss).any()
    for argument, gradient in gradients.items():
        assert np.isfinite(gradient).all(), argument
    # From float64, where 1 - p is exact up to a margin of 36.
    few = slice(0, 5)
    wanted = oracle.label_loss(
        LOSSES[name].oracle,
        np.zeros(5, int),
        parameters,
        logits=np.float64(logits[few]),
        cotangent=np.ones(5),
    )
    assert_close(loss[few], wanted.values["loss"], dtype="float32", length=2)
    slope = gradients["logits"][few]
    # c (p - 1): 1 - p is a multiple of eps, and c is 3 at most.
    wrong = 2e-6
    np.testing.assert_allclose(slope, wanted.gradients["logits"], atol=wrong)


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].cross_entropy])
@both_sources
def test_its_special_case_is_cross_entropy(name, source):
    """Values and gradients, at large margins too, the parameters traced."""
    given = arrays(source)
    rows = "hidden" if source == "linear" else "logits"
    given[rows] = given[rows] * jnp.asarray([[1], [100]] * 4, jnp.float32)
    labels = jnp.arange(ROWS) % CLASSES
    special = {n: jnp.asarray(p) for n, p in LOSSES[name].cross_entropy.items()}
    actual = differentiated(function_of(name, source), given, labels=labels, **special)
    plain: Any = (
        functools.partial(losses.linear_softmax_cross_entropy, vocab_chunk=3)
        if source == "linear"
        else of_stored.softmax_cross_entropy
    )
    expected = differentiated(plain, given, labels=labels)
    for one, two in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert_close(one, two, dtype=jnp.float32, length=ROWS)


@settings(deadline=None, max_examples=30)
@given(
    log_prob=st.floats(-60, 0, width=32, allow_subnormal=False),
    tau=st.floats(0, 3, width=32),
    gamma=st.floats(0, 5, width=32),
)
def test_order_and_bounds(log_prob, tau, gamma):
    """Comp-sum falls with tau, focal with gamma; both are cross-entropy between."""
    comp_sum = lambda tau: float(_comp_sum(jnp.float32(log_prob), jnp.float32(tau)))
    focal = lambda g: float(_focal(jnp.float32(log_prob), jnp.float32(g)))
    slack = 1 + 1e-5
    assert comp_sum(tau) >= 0
    assert comp_sum(tau + 0.25) <= slack * comp_sum(tau)
    if tau > 1:
        assert comp_sum(tau) <= slack / (tau - 1)
        assert comp_sum(tau) <= -slack * log_prob
    else:
        assert slack * comp_sum(tau) >= -log_prob
    assert 0 <= focal(gamma + 0.25) <= slack * focal(gamma) <= -(slack**2) * log_prob
    assert comp_sum(1.0) == focal(0.0) == -log_prob


_comp_sum = jax.jit(lambda lp, tau: losses.comp_sum_from_log_prob(lp, tau=tau))
_focal = jax.jit(lambda lp, gamma: losses.focal_from_log_prob(lp, gamma=gamma))


# ---------------------------------------------------------------------- comp-sum family
def exact_comp_sum(log_prob, tau):
    """The loss and its slopes in log p and tau, to 60 digits."""
    with decimal.localcontext(prec=60, Emin=-(10**8), Emax=10**8):
        x, a = decimal.Decimal(log_prob), decimal.Decimal(tau) - 1
        if a == 0:
            return -x, decimal.Decimal(-1), -x * x / 2
        power = (a * x).exp()
        value = (1 - power) / a
        return value, -power, (-x * power - value) / a


TAUS = (0.0, 0.5, 1 - 2.0**-10, 1.0, 1 + 2.0**-20, 1.02, 1.5, 2.0, 3.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_comp_sum_is_accurate_for_every_tau(dtype):
    """(1 - p**q) / q at q = 1e-6 and p = e^-30 is 29.981 in float32, not 29.9996."""
    with jax.enable_x64(dtype == "float64"):
        slopes = jax.value_and_grad(
            lambda lp, tau: losses.comp_sum_from_log_prob(lp, tau=tau), (0, 1)
        )
        run = jax.jit(jax.vmap(slopes))
        points = [(x, tau) for x in (-1e-5, -0.3, -4.0, -30.0) for tau in TAUS]
        x, tau = (jnp.asarray(column, dtype) for column in np.transpose(points))
        value, (of_log_prob, of_tau) = run(x, tau)
        for i in range(len(points)):
            wanted = exact_comp_sum(float(x[i]), float(tau[i]))
            actual = (value[i], of_log_prob[i], of_tau[i])
            np.testing.assert_allclose(
                np.array(actual, float),
                np.array(wanted, float),
                # e^u has the error of u, which is 30 at most.
                rtol=30 * float(jnp.finfo(dtype).eps),
                err_msg=str(points[i]),
            )


def test_second_derivatives_of_comp_sum_at_one():
    """L = x - a x^2 / 2 + a^2 x^3 / 6 - ... for x = -log p and a = tau - 1."""
    with jax.enable_x64():
        loss = lambda tau: losses.comp_sum_from_log_prob(jnp.array(-2.0), tau=tau)
        np.testing.assert_allclose(jax.grad(loss)(1.0), -2.0, rtol=1e-14)
        second = jax.grad(jax.grad(loss))(1.0)
        np.testing.assert_allclose(second, 8 / 3, rtol=1e-14)


def test_members_of_the_comp_sum_family():
    logits, labels = arrays("logits")["logits"], jnp.arange(ROWS) % CLASSES
    p = jax.nn.softmax(logits)[jnp.arange(ROWS), labels]
    distance = jnp.abs(jax.nn.softmax(logits) - jnp.eye(CLASSES)[labels]).sum(1)
    comp_sum = lambda tau: of_stored.comp_sum_loss(logits, labels, tau=tau)
    absolute = of_stored.mean_absolute_error_loss(logits, labels)
    generalized = of_stored.generalized_cross_entropy_loss
    for actual, wanted in (
        (comp_sum(0.0), 1 / p - 1),
        (comp_sum(2.0), absolute),
        (absolute, 1 - p),
        (generalized(logits, labels), comp_sum(1.7)),
        (generalized(logits, labels, q=1), absolute),
        (generalized(logits, labels, q=1e-12), comp_sum(1.0)),
        (distance / 2, absolute),
    ):
        assert_close(actual, wanted, dtype=jnp.float32, length=CLASSES)


def test_an_overflowing_comp_sum_is_infinite_without_gradient():
    log_prob = jnp.array([-80.0, -88.0, -89.0, -1e4])
    slopes = jax.value_and_grad(
        lambda lp, tau: losses.comp_sum_from_log_prob(lp, tau=tau), (0, 1)
    )
    value, gradients = jax.jit(jax.vmap(slopes, (0, None)))(log_prob, 0.0)
    np.testing.assert_allclose(value[:2], np.exp([80.0, 88.0]), rtol=1e-4)
    np.testing.assert_array_equal(value[2:], np.inf)
    np.testing.assert_allclose(gradients[0][0], -np.exp(80.0), rtol=1e-4)
    np.testing.assert_array_equal(gradients[0][2:], 0)
    np.testing.assert_array_equal(gradients[1][2:], 0)
    assert np.isfinite(gradients[1]).all()


# --------------------------------------------------------------- of log-probabilities
@of_log_prob
def test_limits_at_probability_zero_one_and_at_nan(name):
    log_prob = jnp.array([-jnp.inf, 0.0, jnp.nan, -1.0])
    parameters = {n: jnp.asarray(p) for n, p in LOSSES[name].parameters.items()}
    loss, gradients = differentiated(
        lambda log_prob, **p: FROM_LOG_PROB[name](log_prob, **p),
        {"log_prob": log_prob} | parameters,
    )
    np.testing.assert_array_equal(loss[:3], [np.inf, 0, np.nan])
    np.testing.assert_array_equal(gradients["log_prob"][jnp.array([0, 2])], 0)
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()
    bounded = {"comp_sum": {"tau": 3.0}, "symmetric": {"alpha": 0.0, "log_zero": -4.0}}
    if name in bounded:
        wanted = {"comp_sum": 0.5, "symmetric": 4.0}[name]
        got = FROM_LOG_PROB[name](log_prob[:1], **bounded[name])
        np.testing.assert_allclose(got, wanted)


@pytest.mark.parametrize(("gamma", "slope"), [(0.0, -1), (0.5, 0), (2.0, 0)])
def test_slope_of_focal_loss_at_probability_one(gamma, slope):
    """A flat loss for gamma = 0 would not be cross-entropy."""
    loss = lambda log_prob, gamma: losses.focal_from_log_prob(log_prob, gamma=gamma)
    found = jax.grad(loss, (0, 1))(jnp.array(0.0), jnp.array(gamma))
    np.testing.assert_array_equal(found, [slope, 0])


@of_log_prob
def test_losses_of_log_probabilities_are_those_of_a_linear_head(name):
    given, labels = arrays("linear"), jnp.arange(ROWS) % CLASSES
    parameters = LOSSES[name].parameters
    log_prob = of_head.token_log_probs(**given, labels=labels)
    actual = FROM_LOG_PROB[name](log_prob, **parameters)
    wanted = function_of(name, "linear")(**given, labels=labels, **parameters)
    assert_close(actual, wanted, dtype=jnp.float32, length=CLASSES)


@pytest.mark.slow  # plain JAX, without a derivative rule
@pytest.mark.parametrize("name", ["focal", "comp_sum"])  # the others are linear in p
def test_losses_of_log_probabilities_under_every_transformation(name):
    parameters = {n: jnp.asarray(p) for n, p in LOSSES[name].parameters.items()}

    def function(log_prob, *values):
        return FROM_LOG_PROB[name](
            log_prob, **dict(zip(parameters, values, strict=True))
        )

    check_transformations(
        function, jnp.linspace(-4.0, -0.1, 8), *parameters.values(), rows=(0,)
    )


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow  # cross-entropy goes the same way, every time
def test_linear_focal_loss_under_every_transformation():
    given = arrays("linear")

    def function(hidden, weight, labels, class_weights, gamma, where):
        return of_head.softmax_focal_loss(
            hidden,
            weight,
            labels,
            class_weights=class_weights,
            gamma=gamma,
            where=where,
            vocab_chunk=3,
        )

    check_transformations(
        function,
        given["hidden"],
        given["weight"],
        jnp.arange(ROWS) % CLASSES,
        jnp.linspace(0.5, 2.0, CLASSES),
        jnp.float32(1.5),
        jnp.arange(ROWS) != 3,
        rows=(0, 2, 5),
        skip={"forward_mode": "the streamed statistics have a custom_vjp"},
    )


# ------------------------------------------------------------------------------- errors
BAD = {
    "focal": [("gamma", -0.5, "-0.5"), ("gamma", jnp.ones(ROWS), "(8,)")],
    "comp_sum": [("tau", -0.5, "-0.5"), ("tau", jnp.ones(ROWS), "(8,)")],
    "generalized": [("q", -1, "-1"), ("q", jnp.ones(2), "(2,)")],
    "poly1": [("epsilon", -1.5, "-1.5"), ("epsilon", jnp.ones(2), "(2,)")],
    "symmetric": [("alpha", -1, "-1"), ("beta", -2, "-2"), ("log_zero", 1, "1")],
}


@pytest.mark.usefixtures("untyped", "eager")
@pytest.mark.parametrize(
    ("name", "argument", "value", "got"),
    [(name, *bad) for name, several in BAD.items() for bad in several],
)
def test_a_parameter_out_of_range_is_an_error(name, argument, value, got):
    labels = jnp.zeros(ROWS, int)
    for source in ("linear", "logits"):
        function = function_of(name, source, **{argument: value})
        public = LOSSES[name].public
        with pytest.raises(
            ValueError, match=rf"^{public}: `{argument}` must .*{re.escape(got)}\.$"
        ):
            function(**arrays(source), labels=labels)
    if name in FROM_LOG_PROB:
        with pytest.raises(ValueError, match=f"_from_log_prob: `{argument}` must"):
            FROM_LOG_PROB[name](jnp.zeros(3), **{argument: value})


@pytest.mark.usefixtures("untyped")
@every_loss
@both_sources
def test_labels_are_ids(name, source):
    """Distributions are not averaged over: their loss is another one."""
    for labels in (jnp.zeros((ROWS, CLASSES)), jnp.zeros(ROWS)):
        with pytest.raises(TypeError, match="`labels` must have an integer dtype"):
            function_of(name, source)(**arrays(source), labels=labels)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(8,\)"):
        function_of(name, source)(**arrays(source), labels=jnp.zeros((ROWS, 2), int))


@pytest.mark.usefixtures("untyped")
@of_log_prob
def test_log_probabilities_are_floating(name):
    with pytest.raises(TypeError, match="_from_log_prob: `log_prob` must have a float"):
        FROM_LOG_PROB[name](jnp.zeros(3, int))
