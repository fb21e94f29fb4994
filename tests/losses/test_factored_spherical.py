"""A head in factors: the numbers of a stored weight, at a cost without the classes."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import softlib
from softlib import losses
from softlib.losses import SphericalStatistics
from softlib.testing import assert_close
from tests.heads import of_head
from tests.host import jnp
from tests.oracles import spherical as oracle

CLASSES, FEATURES, ROWS = 41, 5, 12
LOSSES: dict[str, Any] = {
    "z": (
        losses.SphericalStatistics.z_loss,
        of_head.z_loss,
        oracle.z,
        {"a": 0.5, "b": 3.0, "epsilon": 0.01},
    ),
    "log_spherical": (
        losses.SphericalStatistics.log_spherical_softmax_loss,
        of_head.log_spherical_softmax_loss,
        oracle.log_spherical,
        {"epsilon": 0.01},
    ),
    "log_taylor": (
        losses.SphericalStatistics.log_taylor_softmax_loss,
        of_head.log_taylor_softmax_loss,
        oracle.log_taylor,
        {},
    ),
    "squared_error": (
        losses.SphericalStatistics.squared_error,
        of_head.spherical_squared_error,
        oracle.squared_error,
        {},
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def mean_loss(name):
    of_statistics, *_, parameters = LOSSES[name]
    return lambda s: of_statistics(s, **parameters).mean()


def problem(dtype, seed=0, classes=CLASSES, features=FEATURES, rows=ROWS):
    """A head with a mean, and labels of which some are the same."""
    random = np.random.default_rng(seed)
    weight = np.asarray(random.normal(size=(classes, features)) + 2, dtype)
    hidden = np.asarray(random.normal(size=(rows, features)), dtype)
    return weight, hidden, random.integers(0, classes // 3, rows)


@functools.partial(jax.jit, static_argnames=("name", "rebase"))
def steps(state, hidden, labels, *, name, learning_rate, decay=0.0, rebase=None):
    """As many steps as there are leading entries; losses and cotangents of each."""

    def one(state, given):
        i, hidden, labels = given
        step = state.sgd_step(
            hidden,
            labels,
            mean_loss(name),
            learning_rate=learning_rate,
            weight_decay=decay,
        )
        state = step.state
        if rebase is not None:
            again = losses.FactoredSphericalState.rebase
            state = jax.lax.cond((i + 1) % rebase == 0, again, lambda s: s, state)
        return state, (step.loss, step.hidden_cotangents)

    return jax.lax.scan(one, state, (jnp.arange(len(labels)), hidden, labels))


init = jax.jit(losses.FactoredSphericalState.init)
weight_of = jax.jit(losses.FactoredSphericalState.weight)
rebase = jax.jit(losses.FactoredSphericalState.rebase)


# ------------------------------------------------------------------------------- oracle
@every_loss
def test_steps_are_those_of_a_stored_weight(name):
    """Five steps with equal labels and weight decay, brute force beside them."""
    *_, of_oracle, parameters = LOSSES[name]
    with jax.enable_x64():
        weight, _, _ = problem(np.float64)
        given = [problem(np.float64, seed)[1:] for seed in range(5)]
        hidden, labels = (jnp.stack(x) for x in zip(*given, strict=True))
        state, (found, cotangents) = steps(
            init(jnp.asarray(weight)),
            hidden,
            labels,
            name=name,
            learning_rate=0.05,
            decay=0.1,
        )
        for i, (h, y) in enumerate(given):
            loss, gradient, weight = oracle.sgd(
                of_oracle, weight, h, y, parameters, 0.05, 0.1
            )
            np.testing.assert_allclose(found[i], loss.mean(), rtol=1e-12)
            np.testing.assert_allclose(cotangents[i], gradient, rtol=1e-9, atol=1e-12)
        assert len(np.unique(labels[0])) < ROWS
        np.testing.assert_allclose(weight_of(state), weight, rtol=1e-11, atol=1e-12)
        deviations = weight - weight.mean(0)
        np.testing.assert_allclose(state.gram, deviations.T @ deviations, rtol=1e-10)
        np.testing.assert_allclose(state.mean, weight.mean(0), rtol=1e-11)


@every_loss
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_are_those_of_a_linear_head(name, dtype):
    of_statistics, linear, _, parameters = LOSSES[name]
    weight, hidden, labels = problem(np.float32)
    hidden = jnp.asarray(hidden, dtype).reshape(3, 4, FEATURES)
    ids = jnp.asarray(labels).reshape(3, 4)

    @jax.jit
    def run(state, hidden):
        of = losses.FactoredSphericalState.statistics
        loss = lambda h: of_statistics(of(state, h, ids), **parameters)
        return loss(hidden), jax.grad(lambda h: loss(h).sum())(hidden)

    loss, gradient = run(init(jnp.asarray(weight)), hidden)
    wanted = jax.jit(functools.partial(linear, **parameters))(
        hidden, jnp.asarray(weight), ids
    )
    assert loss.dtype == jnp.float32
    assert loss.shape == (3, 4)
    assert gradient.dtype == jnp.dtype(dtype)
    assert_close(loss, wanted, dtype="float32", length=CLASSES * FEATURES)


# ----------------------------------------------------------------------------- promises
def test_a_large_mean_row_costs_no_digits():
    """Its square is 1e6 times the variance, which float32 would not see."""
    weight, hidden, labels = problem(np.float32)
    moved = weight + np.float32(1024)
    state = init(jnp.asarray(moved))
    found = state.statistics(jnp.asarray(hidden), jnp.asarray(labels))
    z = hidden.astype(float) @ moved.astype(float).T
    deviations = z - z.mean(1, keepdims=True)
    np.testing.assert_allclose(found.mean_logit, z.mean(1), rtol=1e-5)
    own = deviations[np.arange(ROWS), labels]
    np.testing.assert_allclose(found.label_deviation, own, rtol=1e-4, atol=1e-4)
    squares = (deviations**2).sum(1)
    np.testing.assert_allclose(found.sum_squared_deviations, squares, rtol=1e-4)


def test_equal_labels_add_up():
    with jax.enable_x64():
        weight, hidden, _ = problem(np.float64)
        same, args = jnp.full(ROWS, 7), {"name": "squared_error", "learning_rate": 0.1}
        once, _ = steps(
            init(jnp.asarray(weight)), jnp.asarray(hidden)[None], same[None], **args
        )
        *_, wanted = oracle.sgd(oracle.squared_error, weight, hidden, same, {}, 0.1)
        np.testing.assert_allclose(weight_of(once)[7], wanted[7], rtol=1e-11)


def test_a_z_loss_leaves_the_mean_row_where_it_is():
    """The gradients of a row's logits add up to 0."""
    weight, hidden, labels = problem(np.float32)
    state = init(jnp.asarray(weight))
    after, _ = steps(
        state,
        jnp.asarray(hidden)[None],
        jnp.asarray(labels)[None],
        name="z",
        learning_rate=1.0,
    )
    np.testing.assert_array_equal(after.mean, state.mean)
    assert float(jnp.abs(after.rows - state.rows).max()) > 0.01


def test_rows_that_do_not_count_move_nothing():
    """Masked ones may hold NaN; a label outside gives NaN for its row alone."""
    weight, hidden, labels = problem(np.float32)
    hidden[0], labels[1], labels[2] = np.nan, -1, CLASSES
    where = np.arange(ROWS) != 0
    state = init(jnp.asarray(weight))

    @jax.jit
    def step(state, hidden, labels, where):
        seen = state.statistics(hidden, labels, where=where)
        values = seen.z_loss(a=1.0, b=2.0)
        return values, state.sgd_step(
            hidden,
            labels,
            lambda s: jnp.where(where, s.z_loss(a=1.0, b=2.0), 0).sum(),
            learning_rate=0.1,
            where=where,
        )

    values, found = step(state, hidden, labels, where)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(values)), [1, 2])
    np.testing.assert_array_equal(found.hidden_cotangents[:3], 0)
    _, expected = step(state, hidden[3:], labels[3:], where[3:])
    for one, two in zip(found.state, expected.state, strict=True):
        assert_close(one, two, dtype="float32", length=ROWS)
    np.testing.assert_allclose(
        found.hidden_cotangents[3:], expected.hidden_cotangents, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("classes", [41, 2048, 4099])
def test_a_rebase_changes_the_basis_and_not_the_head(classes):
    """Also of a head that is not a whole number of parts."""
    with jax.enable_x64():
        weight, hidden, labels = problem(np.float64, classes=classes)
        state, _ = steps(
            init(jnp.asarray(weight)),
            jnp.asarray(hidden)[None],
            jnp.asarray(labels)[None],
            name="log_taylor",
            learning_rate=50.0,
        )
        again = rebase(state)
        assert float(jnp.abs(state.mixing - jnp.eye(FEATURES)).max()) > 1e-4
        np.testing.assert_array_equal(again.mixing, np.eye(FEATURES))
        np.testing.assert_allclose(weight_of(again), weight_of(state), rtol=1e-12)
        np.testing.assert_allclose(again.gram, state.gram, rtol=1e-11, atol=1e-9)
        np.testing.assert_allclose(again.mean, state.mean, rtol=1e-12)


def test_a_head_without_deviations_stays_finite():
    """Of zeros: all logits are equal, and epsilon bounds the slope."""
    state = init(jnp.zeros((CLASSES, FEATURES)))
    _, hidden, labels = problem(np.float32)
    state, (loss, cotangents) = steps(
        state,
        jnp.asarray(hidden)[None],
        jnp.asarray(labels)[None],
        name="z",
        learning_rate=0.1,
    )
    for leaf in jax.tree.leaves((state, loss, cotangents)):
        assert np.isfinite(leaf).all()
    assert float(jnp.abs(weight_of(state)).max()) > 0.001


@pytest.mark.parametrize("what", ["step", "rebase"])
def test_a_donated_state_is_updated_in_place(what):
    """No array of the size of the rows beside them, at any number of classes."""
    classes, features, rows = 65_536, 16, 32
    struct = jax.ShapeDtypeStruct
    state = jax.eval_shape(init, struct((classes, features), jnp.float32))
    if what == "rebase":
        call, args = losses.FactoredSphericalState.rebase, (state,)
    else:

        def call(state, hidden, labels):
            return state.sgd_step(hidden, labels, mean_loss("z"), learning_rate=0.1)

        hidden = struct((rows, features), jnp.float32)
        args = (state, hidden, struct((rows,), jnp.int32))
    program = jax.jit(call, donate_argnums=0).lower(*args).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < classes * features  # a quarter of the rows
    assert memory.alias_size_in_bytes >= 4 * classes * features


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-8), ("float32", 1e-3)])
def test_a_thousand_steps_equal_dense_updates(dtype, bound):
    """With a rebase every 100; the head moves by as much as it was large."""
    with jax.enable_x64(dtype == "float64"):
        change, error = _beside_dense(jnp.dtype(dtype), 1000, 300, 8, rebase=100)
        assert change > 0.5
        assert error < bound


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-8), ("float32", 1e-3)])
def test_a_hundred_thousand_steps_are_stable(dtype, bound):
    """At the documented period of max(1000, classes / 16)."""
    with jax.enable_x64(dtype == "float64"):
        change, error = _beside_dense(jnp.dtype(dtype), 100_000, 2000, 16, rebase=1000)
        assert change > 0.5
        assert error < bound


def _beside_dense(dtype, count, classes, features, rebase, rows=8):
    """Largest change of the weight, and its largest error, by its largest number."""
    key = jax.random.key(0)
    weight = jax.random.normal(key, (classes, features), dtype) / 4 + 0.5
    centres = jax.random.normal(jax.random.key(1), (classes, features), dtype)
    of_statistics, linear, _, parameters = LOSSES["z"]
    rate = 1.0

    @jax.jit
    def run(weight, state):
        def one(carry, i):
            weight, state = carry
            key = jax.random.fold_in(jax.random.key(2), i)
            u = jax.random.uniform(key, (rows,), dtype)
            labels = (classes * u**3).astype(int)
            hidden = centres[labels] + jax.random.normal(key, (rows, features), dtype)
            loss = lambda w: linear(hidden, w, labels, **parameters).mean()
            weight = weight - rate * jax.grad(loss)(weight)
            step = state.sgd_step(
                hidden,
                labels,
                lambda s: of_statistics(s, **parameters).mean(),
                learning_rate=rate,
            )
            again = losses.FactoredSphericalState.rebase
            last = (i + 1) % rebase == 0
            state = jax.lax.cond(last, again, lambda s: s, step.state)
            return (weight, state), None

        return jax.lax.scan(one, (weight, state), jnp.arange(count))[0]

    after, state = run(weight, init(weight))
    largest = float(jnp.abs(after).max())
    error = float(jnp.abs(weight_of(state) - after).max()) / largest
    return float(jnp.abs(after - weight).max()) / largest, error


# ----------------------------------------------------------------------------- training
def test_adam_below_the_head_and_sgd_in_it():
    """A network learns with the documented training step, as with a stored weight."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(32, 6)), jnp.float32)
    labels = jnp.asarray(random.integers(0, CLASSES, 32))
    optimizer = optax.adam(0.01)
    of_statistics, linear, _, parameters = LOSSES["z"]
    network = jnp.asarray(random.normal(size=(6, FEATURES)), jnp.float32)
    weight = jnp.asarray(problem(np.float32)[0])

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def in_factors(network, optimizer_state, state):
        hidden, pull = jax.vjp(lambda network: jnp.tanh(x @ network), network)
        step = state.sgd_step(
            hidden,
            labels,
            lambda s: of_statistics(s, **parameters).mean(),
            learning_rate=0.5,
        )
        (gradient,) = pull(step.hidden_cotangents)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        network = optax.apply_updates(network, updates)
        return network, optimizer_state, step.state, step.loss

    @jax.jit
    def stored(network, optimizer_state, weight):
        loss = lambda n, w: linear(jnp.tanh(x @ n), w, labels, **parameters).mean()
        value, (gradient, of_weight) = jax.value_and_grad(loss, (0, 1))(network, weight)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        network = optax.apply_updates(network, updates)
        return network, optimizer_state, weight - 0.5 * of_weight, value

    one = (network.copy(), optimizer.init(network), init(weight))
    two = (network, optimizer.init(network), weight)
    values = []
    for _ in range(20):
        *one, loss = in_factors(*one)
        *two, expected = stored(*two)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        values.append(float(loss))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(weight_of(one[2]), two[2], rtol=1e-2, atol=1e-3)
    assert values[-1] < 0.95 * values[0]


# ------------------------------------------------------------------------------- errors
def call_step(**changes):
    weight, hidden, labels = problem(np.float32)
    given: dict[str, Any] = {
        "state": init(jnp.asarray(weight)),
        "hidden": jnp.asarray(hidden),
        "labels": jnp.asarray(labels),
        "loss": mean_loss("z"),
        "learning_rate": 0.1,
    }
    given = {**given, **changes}
    return given.pop("state").sgd_step(**given)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("optimizer", "got"),
    [
        (optax.adam(1e-3), "GradientTransformationExtraArgs"),
        (optax.sgd(0.1, momentum=0.9), "GradientTransformationExtraArgs"),
        (optax.constant_schedule(0.1), "function"),
    ],
)
def test_anything_but_plain_sgd_raises(optimizer, got):
    with pytest.raises(TypeError, match=rf"`learning_rate` must .*{got}: .*plain SGD"):
        call_step(learning_rate=optimizer)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rate": jnp.ones(CLASSES)}, ValueError, "`learning_rate` must be a"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` must be >= 0"),
        ({"weight_decay": "no"}, TypeError, "`weight_decay` must be a number"),
        ({"hidden": jnp.ones((ROWS, 3))}, ValueError, "`hidden` must have 5 features"),
        ({"hidden": jnp.ones((ROWS, 5), int)}, TypeError, "`hidden` must have a float"),
        ({"labels": jnp.ones(ROWS)}, TypeError, "`labels` must have an integer"),
        ({"labels": jnp.ones(3, int)}, ValueError, "`labels` must have shape"),
        ({"where": jnp.ones(3, bool)}, ValueError, "`where` must broadcast"),
        ({"loss": lambda s: s.mean_logit}, ValueError, "`loss` must give a scalar"),
    ],
)
def test_misuse_of_a_step_is_an_error(changes, error, message):
    with pytest.raises(error, match=message):
        call_step(**changes)


# ------------------------------------------------------------------------------- logits
def stepped(dtype):
    """A head after some steps: no part of it is the identity or zero."""
    weight, hidden, labels = problem(dtype)
    given = (
        jnp.asarray(hidden)[None].repeat(3, 0),
        jnp.asarray(labels)[None].repeat(3, 0),
    )
    return steps(init(jnp.asarray(weight)), *given, name="z", learning_rate=10.0)[0]


QUESTIONS: dict[str, Any] = {
    "cross-entropy": lambda z, y: losses.softmax_cross_entropy(z, y, where=y != 3),
    "focal": lambda z, y: losses.softmax_focal_loss(z, y, gamma=2.0),
    "z-loss": lambda z, y: losses.z_loss(z, y, a=0.5, b=3.0),
    "entropy": lambda z, y: softlib.logits.entropy(z),
    "divergence": lambda z, y: losses.softmax_kl_divergence(z, jnp.zeros(z.shape)),
    "fused": lambda z, y: softlib.logits.logsumexp(
        softlib.logits.FusedLogits([z, jnp.zeros(z.shape)], [2.0, 1.0])
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_logits_are_those_of_the_weight(name):
    """Values and gradients with respect to the head and the features, in float64."""
    with jax.enable_x64():
        state = stepped(np.float64)
        _, hidden, labels = problem(np.float64, seed=5)
        assert np.abs(state.mixing - np.eye(FEATURES)).max() > 0.01
        factors = jnp.cos(jnp.arange(ROWS))

        @functools.partial(jax.jit, static_argnums=2)
        def run(state, hidden, streamed):
            def total(state, hidden):
                array = hidden @ state.weight().T
                logits = state.logits(hidden) if streamed else array
                return (factors * QUESTIONS[name](logits, labels)).sum()

            return jax.value_and_grad(total, argnums=(0, 1))(state, hidden)

        found, wanted = (run(state, jnp.asarray(hidden), s) for s in (True, False))
        for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_best_classes_and_samples_of_a_batch():
    state, (_, hidden, labels) = stepped(np.float32), problem(np.float32, seed=5)
    hidden, labels = hidden.reshape(3, 4, FEATURES), jnp.asarray(labels).reshape(3, 4)
    logits = state.logits(jnp.asarray(hidden, jnp.bfloat16))
    assert logits.shape == (3, 4, CLASSES)
    array = (
        np.asarray(jnp.asarray(hidden, jnp.bfloat16), np.float64)
        @ np.asarray(weight_of(state), np.float64).T
    )
    assert_close(logits.materialize(), array, dtype="float32", length=FEATURES)
    best = softlib.logits.top_k(logits, k=3)
    np.testing.assert_array_equal(best.classes, np.argsort(-array)[..., :3])
    key = jax.random.key(0)
    drawn = softlib.logits.sample(key, logits)
    wanted = softlib.logits.sample(key, jnp.asarray(array, jnp.float32))
    np.testing.assert_array_equal(drawn, wanted)
    mapped = jax.vmap(losses.softmax_cross_entropy, in_axes=(logits.batch_axes(), 0))
    loss = losses.softmax_cross_entropy(jnp.asarray(array, jnp.float32), labels)
    assert_close(mapped(logits, labels), loss, dtype="float32", length=CLASSES)


def test_logits_form_neither_the_weight_nor_themselves():
    """A gradient of the features: temporaries below a tenth of either array."""
    rows, classes, features = 1024, 131_072, 128
    shape: Any = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    vector, square = shape(features), shape(features, features)
    state = losses.FactoredSphericalState(
        shape(classes, features), square, vector, vector, square
    )

    def total(hidden, state, labels):
        return losses.softmax_cross_entropy(state.logits(hidden), labels).sum()

    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    lowered = jax.jit(jax.grad(total)).lower(shape(rows, features), state, labels)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * rows * classes * 4
    assert memory.temp_size_in_bytes < 0.5 * classes * features * 4


@pytest.mark.usefixtures("untyped")
def test_misuse_of_the_others_is_an_error():
    with pytest.raises(ValueError, match="`weight` must have shape"):
        losses.FactoredSphericalState.init(jnp.ones(3))
    with pytest.raises(ValueError, match="`weight` must have shape"):
        losses.FactoredSphericalState.init(jnp.ones((0, 3)))
    with pytest.raises(TypeError, match="`weight` must have a floating"):
        losses.FactoredSphericalState.init(jnp.ones((3, 3), int))
    state, zero = init(jnp.eye(3)), jnp.zeros(1)
    with pytest.raises(
        ValueError, match=r"State\.logits: `hidden` must have 3 features"
    ):
        state.logits(jnp.ones((2, 5)))
    cotangents = SphericalStatistics(zero, zero, jnp.zeros(2), jnp.zeros(()))
    with pytest.raises(ValueError, match="sum_squared_deviations"):
        state.sgd_update(
            jnp.ones((1, 3)), jnp.zeros(1, int), cotangents, learning_rate=0.1
        )
    bad = SphericalStatistics(zero, zero, zero, jnp.ones(()))
    with pytest.raises(ValueError, match="`a` must be positive"):
        bad.z_loss(a=-1.0, b=1.0)
    with pytest.raises(ValueError, match="`epsilon` must be positive"):
        bad.log_spherical_softmax_loss(epsilon=0.0)
