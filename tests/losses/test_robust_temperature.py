"""Robust cross-entropy, its best temperature, contrastive losses and their state."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.heads import of, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import assert_agrees
from tests.oracles import robust_temperature as oracle
from tests.oracles.row_statistics import row_statistics

DATA = pathlib.Path(__file__).parent.parent / "data"
ROWS, FEATURES, CLASSES = 8, 3, 7
RANGE: dict[str, Any] = {"temperature_min": 0.05, "temperature_max": 20.0}
both_sources = pytest.mark.parametrize("source", ["linear", "logits"])


def arrays(source, dtype="float32", seed=0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    if source == "logits":
        return {"logits": 2 * draw(ROWS, CLASSES)}
    return {"hidden": draw(ROWS, FEATURES), "weight": draw(CLASSES, FEATURES)}


def function_of(kind, source, **options) -> Any:
    if source == "linear":
        options = {"vocab_chunk": 3, **options}
    names = {"loss": "robust_softmax_cross_entropy", "best": "optimal_temperature"}
    call: Any = getattr(of(source), names[kind])
    return functools.partial(call, **options)


def logits_of(given):
    if "logits" in given:
        return np.asarray(given["logits"], np.float64)
    return _wide(given["hidden"]) @ _wide(given["weight"]).T


def _wide(array):
    return np.asarray(array, np.float64)


TAU = np.linspace(0.3, 2.0, ROWS)


# ----------------------------------------------------------------------------- the loss
@pytest.mark.parametrize(
    ("source", "implementation"),
    [("linear", "xla"), ("linear", "reference"), ("logits", "xla")],
)
def test_matches_oracle(source, implementation):
    """Every exception in one batch; gradients of logits, weight, temperature, rho."""
    with jax.enable_x64():
        given = arrays(source, "float64")
        rows = "hidden" if source == "linear" else "logits"
        spoilt = {**given, rows: given[rows].at[3].set(jnp.nan)}
        tau = jnp.asarray(TAU).at[3].set(jnp.nan)
        where, class_where = np.arange(ROWS) != 3, np.arange(CLASSES) != 2
        labels = np.array([0, 6, 2, -100, -1, CLASSES, 5, 2])
        call = function_of(
            "loss",
            source,
            implementation=implementation,
            where=jnp.asarray(where),
            class_where=jnp.asarray(class_where),
        )

        @jax.jit
        def run(given, tau, rho):
            of = lambda given, tau, rho: call(
                **given, labels=jnp.asarray(labels), temperature=tau, rho=rho
            )
            loss, pull = jax.vjp(of, given, tau, rho)
            return loss, pull(jnp.ones(ROWS))

        loss, (gradients, of_tau, of_rho) = run(spoilt, tau, jnp.asarray(0.4))
        wanted, of_logits, wanted_tau = oracle.robust(
            logits_of(given), labels, TAU, 0.4, where, class_where
        )
        assert_agrees(loss, wanted, jnp.float64, 0)
        assert_agrees(of_tau, wanted_tau, jnp.float64, 0)
        usual = np.isfinite(wanted) & where
        np.testing.assert_allclose(of_rho, TAU[usual].sum(), rtol=1e-12)
        if source == "logits":
            assert_agrees(gradients["logits"], of_logits, jnp.float64, 0)
        else:
            hidden, weight = _wide(given["hidden"]), _wide(given["weight"])
            assert_agrees(gradients["hidden"], of_logits @ weight, jnp.float64, 0)
            assert_agrees(gradients["weight"], of_logits.T @ hidden, jnp.float64, 0)


@both_sources
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_narrow_inputs_give_float32(source, dtype):
    given = arrays(source, dtype)
    labels = jnp.arange(ROWS) % CLASSES
    tau = jnp.asarray(TAU, jnp.float32)
    found = jax.jit(function_of("loss", source, rho=0.4))(
        **given, labels=labels, temperature=tau
    )
    wanted = oracle.robust(logits_of(given), labels, np.float64(tau), 0.4)[0]
    assert found.dtype == jnp.float32
    assert_close(found, wanted, dtype=jnp.float32, length=CLASSES)
    best = jax.jit(function_of("best", source, rho=0.4, **RANGE))(**given)
    assert best.dtype == jnp.float32
    wanted = oracle.best(logits_of(given), 0.4, *RANGE.values())
    np.testing.assert_allclose(best, wanted, rtol=1e-4)


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = {
            name: jnp.asarray(array)
            for name, array in np.load(DATA / "tempnet_case0.npz").items()
        }
        given = (data["in_logits"], data["in_labels"], data["in_temperature"])
        of = functools.partial(
            of_stored.robust_softmax_cross_entropy, rho=data["in_rho"]
        )
        ends: dict[str, Any] = {
            f"temperature_{end}": data[f"in_tau_{end}"] for end in ("min", "max")
        }

        @jax.jit
        def run(logits, labels, tau):
            total = lambda z, tau: of(z, labels, temperature=tau).sum()
            best = of_stored.optimal_temperature(logits, rho=data["in_rho"], **ends)
            slope = jax.grad(total, 1)(logits, best)
            return (
                of(logits, labels, temperature=tau),
                *jax.grad(total, (0, 1))(logits, tau),
                best,
                slope,
            )

        *found, slope = run(*given)
        names = ("loss", "grad_logits", "grad_temperature", "optimal_temperature")
        for actual, name in zip(found, names, strict=True):
            np.testing.assert_allclose(actual, data[f"out_{name}"], atol=1e-13)
        low, high = ends.values()
        inside = (found[-1] > low) & (found[-1] < high)
        np.testing.assert_allclose(slope[inside], 0, atol=1e-12)
        found = jax.jit(losses.robust_contrastive_loss)(
            data["in_similarity"],
            row_temperature=data["in_tau_row"],
            column_temperature=data["in_tau_col"],
            rho=data["in_rho_contrastive"],
        )
        for actual, name in zip(found, ("row", "col"), strict=True):
            np.testing.assert_allclose(
                actual, data[f"out_contrastive_{name}"], atol=1e-13
            )


@both_sources
def test_rho_of_log_v_and_temperature_one_make_it_cross_entropy(source):
    given, labels = arrays(source), jnp.arange(ROWS) % CLASSES
    found = function_of("loss", source, rho=float(np.log(CLASSES)))(
        **given, labels=labels, temperature=1.0
    )
    plain: Any = (
        losses.linear_softmax_cross_entropy
        if source == "linear"
        else of_stored.softmax_cross_entropy
    )
    wanted = plain(**given, labels=labels)
    assert_close(found, wanted, dtype=jnp.float32, length=CLASSES)


def test_no_distribution_near_the_uniform_one_is_worse():
    """Duality: the best temperature gives the worst p, and any other p is less bad."""
    random = np.random.default_rng(0)
    z, label, rho, classes = 2 * random.normal(size=5), 1, 0.3, 5
    h, tau_min = z - z[label], 0.2
    sizes = {"temperature_min": tau_min, "temperature_max": 50.0}
    with jax.enable_x64():
        tau = jax.jit(
            functools.partial(of_stored.optimal_temperature, rho=rho, **sizes)
        )(jnp.asarray(z))
        dual = jax.jit(
            functools.partial(of_stored.robust_softmax_cross_entropy, rho=rho)
        )(jnp.asarray(z), jnp.asarray(label), temperature=tau)
    dual = float(dual) - tau_min * rho
    divergence = lambda p: (p * np.log(p * classes)).sum()
    primal = lambda p: (p * h).sum() - tau_min * divergence(p)
    worst = np.exp(z / float(tau))
    worst = worst / worst.sum()
    assert divergence(worst) <= rho + 1e-12
    np.testing.assert_allclose(primal(worst), dual, rtol=1e-12)
    near = random.dirichlet(np.full(classes, 3.0), 20_000)
    near = np.concatenate([near, 0.9 * worst + 0.1 * near])
    feasible = [p for p in near if divergence(p) <= rho]
    assert len(feasible) > 1000
    assert max(map(primal, feasible)) <= dual


# -------------------------------------------------------------------- best temperature
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rho=st.floats(0.0, 2.5), size=st.floats(0.01, 30.0))
def test_best_temperature_minimises_the_loss(seed, rho, size):
    """Its divergence is rho, or it is an end of the range."""
    z = size * np.random.default_rng(seed).normal(size=(4, CLASSES))
    z = z.astype(np.float32)
    tau = _wide(_best(z, rho, **RANGE))
    low, high = (np.float32(end) for end in RANGE.values())
    loss = lambda tau: oracle.robust(z, np.zeros(4, int), tau, rho)[0]
    for factor in (0.5, 0.9, 1.1, 2.0):
        other = np.clip(tau * factor, low, high)
        assert (loss(tau) <= loss(other) + 1e-5 * np.maximum(1, abs(loss(tau)))).all()
    inside = (tau > low) & (tau < high)
    of_tau = oracle.robust(z, np.zeros(4, int), tau, rho)[2]
    np.testing.assert_allclose(of_tau[inside], 0, atol=1e-4)


_best = jax.jit(
    lambda z, rho, **ends: of_stored.optimal_temperature(
        jnp.asarray(z), rho=rho, **ends
    )
)


@both_sources
def test_ends_of_the_range_and_rows_that_are_not_numbers(source):
    """Flat: the least. Peaked even at the largest: that. NaN and infinity: NaN."""
    z = np.zeros((ROWS, CLASSES), np.float32)
    z[1, 0], z[2, 0], z[3, 3], z[4, 3] = 1e4, 1e-4, np.nan, 3.0
    z[5] = np.arange(CLASSES) * 1e4
    given: dict[str, Any] = {"logits": jnp.asarray(z)}
    if source == "linear":
        given = {"hidden": jnp.asarray(z), "weight": jnp.eye(CLASSES)}
        # NaN times a zero of the weight is NaN everywhere in its row only.
    found = jax.jit(function_of("best", source, rho=0.5, **RANGE))(**given)
    low, high = (np.float32(end) for end in RANGE.values())
    np.testing.assert_array_equal(found[jnp.array([0, 2])], low)
    np.testing.assert_array_equal(found[jnp.array([1, 5])], high)
    assert np.isnan(found[3])
    assert low < found[4] < high


@both_sources
def test_no_class_gives_the_least_temperature_and_no_loss(source):
    nothing = {"class_where": jnp.zeros(CLASSES, bool)}

    @jax.jit
    def run(given):
        best = function_of("best", source, rho=0.5, **RANGE, **nothing)
        loss = function_of("loss", source, rho=0.5, temperature=2.0, **nothing)
        labels = jnp.arange(ROWS) % CLASSES
        total = lambda g: (best(**g) + loss(**g, labels=labels)).sum()
        return best(**given), loss(**given, labels=labels), jax.grad(total)(given)

    best, loss, gradients = run(arrays(source))
    np.testing.assert_array_equal(best, np.float32(0.05))
    for leaf in (loss, *gradients.values()):
        np.testing.assert_array_equal(leaf, 0)


def test_derivative_of_the_best_temperature_is_that_of_the_implicit_function():
    """From both sources; a second one is an error of a linear head."""
    with jax.enable_x64():
        given = arrays("linear", "float64")

        def of_logits(z, rho):
            return of_stored.optimal_temperature(z, rho=rho, **RANGE)

        @jax.jit
        def both(hidden, weight, rho):
            linear = lambda h, w, rho: function_of("best", "linear", rho=rho, **RANGE)(
                h, w
            ).sum()
            stored = lambda h, w, rho: of_logits(h @ w.T, rho).sum()
            arguments = (hidden, weight, rho)
            gradient = lambda f: jax.value_and_grad(f, (0, 1, 2))(*arguments)
            return gradient(linear), gradient(stored)

        point = [np.asarray(a) for a in (*given.values(), 0.4)]
        linear, stored = both(*point)
        for one, two in zip(*map(jax.tree.leaves, (linear, stored)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)
        random = np.random.default_rng(1)
        for step in ([1e-6, 0, 0], [0, 1e-6, 0], [0, 0, 1e-6]):
            steps = [
                s * random.normal(size=a.shape)
                for s, a in zip(step, point, strict=True)
            ]
            ends = [
                both(*(a + sign * s for a, s in zip(point, steps, strict=True)))[1][0]
                for sign in (1, -1)
            ]
            slope = sum((g * s).sum() for g, s in zip(stored[1], steps, strict=True))
            np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=1e-5)

        best = lambda h: function_of("best", "linear", rho=0.4, **RANGE)(
            h, given["weight"]
        )
        with pytest.raises(NotImplementedError, match="second derivative"):
            jax.eval_shape(
                jax.grad(lambda h: (jax.grad(lambda h: best(h).sum())(h) ** 2).sum()),
                given["hidden"],
            )


def test_the_slope_at_an_end_of_the_range_is_that_of_the_end():
    z = jnp.zeros((2, CLASSES)).at[1, 0].set(1e4)
    for call in (
        lambda low, high: of_stored.optimal_temperature(
            z, rho=0.5, temperature_min=low, temperature_max=high
        ),
        lambda low, high: of_head.optimal_temperature(
            z, jnp.eye(CLASSES), rho=0.5, temperature_min=low, temperature_max=high
        ),
    ):
        found = jax.jit(jax.jacrev(call, (0, 1)))(0.1, 10.0)
        np.testing.assert_array_equal(jnp.stack(found), [[1, 0], [0, 1]])


def test_twelve_passes_are_enough_for_float32():
    sizes = np.exp(np.linspace(-3, 4, 50))[:, None]
    z = (np.random.default_rng(0).normal(size=(50, 50)) * sizes).astype(np.float32)
    few = jax.jit(
        functools.partial(of_stored.optimal_temperature, num_steps=12),
        static_argnames=("temperature_min", "temperature_max"),
    )
    for rho in (0.1, 1.0, 2.5):
        ends = {"temperature_min": 0.01, "temperature_max": 100.0}
        found = few(jnp.asarray(z), rho=rho, **ends)
        wanted = oracle.best(z, rho, *ends.values())
        np.testing.assert_allclose(found, wanted, rtol=1e-3 if rho < 1 else 1e-4)


# ------------------------------------------------------------------------------- memory
def test_no_array_of_logits_in_the_program():
    rows, features, vocabulary = 96, 16, 4099

    def loss(hidden, weight, labels):
        head = {"vocab_chunk": 512, "token_chunk": 32}
        tau = of_head.optimal_temperature(hidden, weight, rho=0.5, **RANGE, **head)
        robust = of_head.robust_softmax_cross_entropy
        loss = robust(hidden, weight, labels, temperature=tau, rho=0.5, **head)
        return loss.mean()

    shapes = [(rows, features), (vocabulary, features)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = str(operations.make_jaxpr(jax.grad(loss, (0, 1)))(*operands, labels))
    assert f"f32[{vocabulary},{features}]" in program
    for shape in ((rows, vocabulary), (vocabulary, rows), (32, vocabulary)):
        assert f"[{shape[0]},{shape[1]}]" not in program


@pytest.mark.parametrize(("rows", "features"), [(1024, 256), (256, 32)])
@pytest.mark.parametrize("arguments", [(0, 1), (0, 1, 3)], ids=["frozen", "learned"])
def test_memory_is_that_of_cross_entropy_without_a_temperature(
    rows, features, arguments
):
    vocabulary = 256_000
    struct = jax.ShapeDtypeStruct
    operands = (
        struct((rows, features), jnp.float32),
        struct((vocabulary, features), jnp.float32),
        struct((rows,), jnp.int32),
        struct((rows,), jnp.float32),
    )

    def temporary(loss, arguments):
        function = jax.jit(jax.value_and_grad(loss, arguments))
        found = function.lower(*operands).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    def plain(hidden, weight, labels, tau):
        return losses.linear_softmax_cross_entropy(hidden, weight, labels).mean()

    def robust(hidden, weight, labels, tau):
        loss = of_head.robust_softmax_cross_entropy
        return loss(hidden, weight, labels, temperature=tau, rho=1.0).mean()

    wanted = temporary(plain, (0, 1))
    assert temporary(robust, arguments) <= 1.2 * wanted


def test_a_temperature_alone_costs_no_product_for_the_gradient_of_hidden():
    """A network of temperatures is trained beside a head that is not."""
    struct = jax.ShapeDtypeStruct
    operands = (
        struct((64, 16), jnp.float32),
        struct((2048, 16), jnp.float32),
        struct((64,), jnp.int32),
        struct((64,), jnp.float32),
    )

    def total(hidden, weight, labels, tau):
        loss = of_head.robust_softmax_cross_entropy
        options = {"temperature": tau, "rho": 1.0, "vocab_chunk": 512}
        return loss(hidden, weight, labels, **options).sum()

    def products(function):
        return (jax.jit(function).lower(*operands).compile().as_text() or "").count(
            " dot("
        )

    forward = products(total)
    assert forward == 1
    assert products(jax.grad(total, 3)) == 2 * forward
    assert products(jax.grad(total, (0, 3))) == 3 * forward


def test_the_gradient_of_a_temperature_is_that_of_its_tiles():
    """Without a bias it comes from the gradient of hidden, with one from the tiles."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    hidden, weight, tau, scale = draw(7, 5), draw(300, 5), np.exp(draw(7)), draw(7)
    labels = random.integers(0, 300, 7)
    names = ("lse", "label_logits", "mean_logit", "sum_logits")
    cotangents = {name: draw(7) for name in names}

    @jax.jit
    def gradient(tau):
        def total(tau):
            found = of_head.row_statistics(
                jnp.asarray(hidden),
                jnp.asarray(weight),
                jnp.asarray(labels),
                scale=jnp.asarray(scale),
                temperature=tau,
                statistics=names,
                vocab_chunk=128,
                token_chunk=3,
            )
            return sum((getattr(found, n) * g).sum() for n, g in cotangents.items())

        return jax.grad(total)(tau)

    for temperature in (tau, tau[0]):
        wanted = row_statistics(
            labels,
            cotangents=cotangents,
            hidden=hidden,
            weight=weight,
            scale=scale,
            temperature=temperature,
        ).gradients["temperature"]
        found = gradient(temperature)
        assert_close(found, wanted, dtype=jnp.float32, length=7 * 300)


# -------------------------------------------------------------------------- contrastive
@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_loss_matches_oracle_and_ignores_dropped_pairs(masked):
    with jax.enable_x64():
        random = np.random.default_rng(0)
        s = random.normal(size=(6, 6))
        tau = np.split(random.uniform(0.05, 0.5, 12), 2)
        where = np.arange(6) % 3 != 1 if masked else None
        wanted = oracle.contrastive(s, tau[0], tau[1], 0.7, where)
        if masked:
            s[1], s[:, 4], tau[0][1] = np.nan, np.inf, np.nan
        mask = None if where is None else jnp.asarray(where)

        @jax.jit
        def run(s, row, col):
            of = lambda s, row, column: losses.robust_contrastive_loss(
                s,
                row_temperature=row,
                column_temperature=column,
                rho=0.7,
                where=mask,
            )
            found = of(s, row, col)
            return found, jax.grad(lambda *a: sum(map(jnp.sum, of(*a))), (0, 1, 2))(
                s, row, col
            )

        found, gradients = run(*map(jnp.asarray, (s, *tau)))
        for actual, expected in zip(found, wanted, strict=True):
            assert_agrees(actual, expected, jnp.float64, 0)
        assert all(np.isfinite(g).all() for g in gradients)
        if masked:
            np.testing.assert_array_equal(gradients[0][1], 0)
            np.testing.assert_array_equal(gradients[0][:, 4], 0)


def test_a_pair_without_negatives_has_loss_zero_and_gradient_zero():
    for pairs, where in ((1, None), (3, jnp.array([False, True, False]))):
        s = jnp.ones((pairs, pairs))
        loss = lambda s, where=where: sum(
            map(
                jnp.sum,
                losses.robust_contrastive_loss(
                    s, row_temperature=0.1, column_temperature=0.1, rho=1.0, where=where
                ),
            )
        )
        value, slope = jax.jit(jax.value_and_grad(loss))(s)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


def test_best_temperature_of_negatives_is_where_the_contrastive_loss_is_flat():
    s = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)), jnp.float32)
    others = ~jnp.eye(6, dtype=bool)
    best = functools.partial(of_stored.optimal_temperature, class_where=others, **RANGE)
    tau = jax.jit(best)(s, rho=0.5)
    loss = lambda tau: losses.robust_contrastive_loss(
        s, row_temperature=tau, column_temperature=1.0, rho=0.5
    )[0].sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(tau), 0, atol=1e-5)


def test_state_of_a_data_set_makes_small_batches_unbiased():
    """Averages of the mean over batches of one negative, not of its logarithm."""
    random = np.random.default_rng(0)
    h = random.normal(size=(1000, 3, 1)).astype(np.float32)
    tau, ids = jnp.array([1.0, 1.2, 0.9]), jnp.array([4, 0, 2])

    @jax.jit
    def run(h):
        def step(state, batch):
            found = state.update(ids, batch, temperature=tau, gamma=0.01)
            return found.state, found.log_mean

        start = losses.GlobalContrastiveState(jnp.full(5, -jnp.inf))
        return jax.lax.scan(step, start, h)

    state, log_means = run(jnp.asarray(h))
    wanted = np.log(np.mean(np.exp(h[..., 0] / np.asarray(tau)), axis=0))
    np.testing.assert_allclose(log_means[-1], wanted, atol=0.25)
    np.testing.assert_array_equal(log_means[-1], state.log_mean[ids])
    np.testing.assert_array_equal(state.log_mean[jnp.array([1, 3])], -np.inf)
    assert (np.mean(h[..., 0], 0) / tau < wanted - 0.3).all()  # of each batch alone


def test_the_first_update_is_the_batch_and_huge_scores_do_not_overflow():
    state = losses.GlobalContrastiveState(jnp.full(3, -jnp.inf))
    h = jnp.array([[1e2, 0.0], [-1e2, -1e2], [1.0, 2.0]])
    ids = jnp.array([0, 7, 2])
    where = jnp.array([[True, True], [True, True], [False, False]])
    found = state.update(ids, h, temperature=0.01, gamma=0.5, where=where)
    # The exponent 1e4 has an error of 5e-4.
    np.testing.assert_allclose(found.weights[0], [1, 0], atol=2e-3)
    np.testing.assert_allclose(found.log_mean[0], 1e4 - np.log(2), rtol=1e-6)
    assert np.isnan(found.weights[1]).all()
    assert np.isnan(found.log_mean[1])
    np.testing.assert_array_equal(found.weights[2], 0)
    np.testing.assert_array_equal(found.state.log_mean[1:], -np.inf)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow
def test_linear_robust_loss_under_every_transformation():
    given = arrays("linear")

    def function(hidden, weight, labels, tau, rho, where):
        return of_head.robust_softmax_cross_entropy(
            hidden, weight, labels, temperature=tau, rho=rho, where=where, vocab_chunk=3
        )

    check_transformations(
        function,
        *given.values(),
        jnp.arange(ROWS) % CLASSES,
        jnp.asarray(TAU, jnp.float32),
        jnp.float32(0.4),
        jnp.arange(ROWS) != 3,
        rows=(0, 2, 3, 5),
        skip={"forward_mode": "the streamed statistics have a custom_vjp"},
    )


@pytest.mark.slow
def test_best_temperature_under_every_transformation():
    best = lambda z, rho: of_stored.optimal_temperature(z, rho=rho, **RANGE)
    check_transformations(
        best, arrays("logits")["logits"], jnp.float32(0.4), rows=(0,), c=64
    )  # a root has the error of its function over its slope


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@both_sources
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rho": -1}, ValueError, "`rho` must be >= 0, got -1"),
        ({"rho": jnp.ones(2)}, ValueError, "`rho` must be a number or a scalar"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive, got 0"),
        ({"temperature": jnp.ones(3)}, ValueError, "`temperature` must have shape"),
        ({"labels": jnp.zeros(ROWS)}, TypeError, "`labels` must have an integer"),
    ],
)
def test_errors_of_the_loss(source, change, error, message):
    options = {"labels": jnp.zeros(ROWS, int), "temperature": 1.0, "rho": 0.1}
    with pytest.raises(error, match=rf"robust_softmax_cross_entropy: {message}"):
        function_of("loss", source)(**{**arrays(source), **options, **change})


@pytest.mark.usefixtures("untyped")
@both_sources
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature_min": 0.0}, ValueError, "`temperature_min` must be positive"),
        ({"temperature_min": 30.0}, ValueError, "`temperature_max` must be at least"),
        ({"temperature": 1.0}, ValueError, "`temperature` of the logits must be None"),
        ({"num_steps": 0}, ValueError, "`num_steps` must be at least 1"),
    ],
)
def test_errors_of_the_search(source, change, error, message):
    with pytest.raises(error, match=rf"optimal_temperature: {message}"):
        function_of("best", source)(**{**arrays(source), "rho": 0.1, **RANGE, **change})


@pytest.mark.usefixtures("untyped")
def test_the_search_in_given_logits_has_one_implementation():
    with pytest.raises(ValueError, match="`implementation` of stored logits must be"):
        function_of("best", "logits")(
            **arrays("logits"), rho=0.1, implementation="xla", **RANGE
        )


@pytest.mark.usefixtures("untyped")
def test_errors_of_contrastive_functions():
    square = jnp.ones((3, 3))

    def loss(similarity, row, column):
        return losses.robust_contrastive_loss(
            similarity, row_temperature=row, column_temperature=column, rho=0.1
        )

    with pytest.raises(ValueError, match=r"`similarity` must have shape \(B, B\)"):
        loss(jnp.ones((3, 2)), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"`row_temperature` must have shape \(\) or"):
        loss(square, jnp.ones(2), 1.0)
    with pytest.raises(ValueError, match="`column_temperature` must be positive"):
        loss(square, 1.0, -1.0)
    state = losses.GlobalContrastiveState(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"`h` must have shape \(B, K\)"):
        state.update(jnp.arange(2), square, temperature=1.0, gamma=0.5)
    with pytest.raises(ValueError, match=r"`gamma` must be in \[0, 1\], got 2"):
        state.update(jnp.arange(3), square, temperature=1.0, gamma=2)
