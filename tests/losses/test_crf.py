"""The loss, normaliser and marginals of linear-chain conditional random fields."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import crf as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/valb_case0.npz"
ROWS, STEPS, LABELS = 6, 5, 3
NAMES = ("emissions", "transitions", "start", "end")
METHODS = ("sequential", "associative")
every_method = pytest.mark.parametrize("method", METHODS)


def problem(dtype="float64", seed=0, steps=STEPS, labels=LABELS) -> Any:
    """Arrays, labels, and `where`: full, empty, one step, prefixes, with a hole."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(2 * random.normal(size=shape), dtype)
    arrays = {
        "emissions": draw(ROWS, steps, labels),
        "transitions": draw(labels, labels),
        "start": draw(labels),
        "end": draw(labels),
    }
    lengths = np.array([steps, 0, min(steps, 1), *random.integers(0, steps + 1, 3)])
    where = np.arange(steps) < lengths[:, None]
    where[-1] = random.uniform(size=steps) < 0.6
    return arrays, random.integers(0, labels, (ROWS, steps)), where


def exact(arrays):
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames="method")
def everything(arrays, labels, where, method) -> dict[str, Any]:
    """Values and gradients under the names of the oracle."""
    options = {"where": where, "method": method}

    def total(arrays):
        loss = losses.crf_loss(**arrays, labels=labels, **options)
        return loss.sum(), loss

    gradients, loss = jax.grad(total, has_aux=True)(arrays)
    return gradients | {
        "nll": loss,
        "log_normalizer": losses.crf_log_normalizer(**arrays, **options),
        "marginals": losses.crf_marginals(**arrays, **options),
    }


def check(found, wanted, dtype, length=STEPS):
    computed = jnp.promote_types(dtype, jnp.float32)
    for name, value in found.items():
        given = dtype if name in NAMES else computed
        assert value.dtype == given
        exact = getattr(wanted, name)
        assert_close(value, exact, dtype=given, length=length, c=8)


# ------------------------------------------------------------------------------ oracles
@every_method
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype, method):
    """Values and gradients; what does not count is NaN, or no label."""
    with jax.enable_x64(dtype == "float64"):
        arrays, labels, where = problem(dtype)
        wanted = oracle.field(**exact(arrays), labels=labels, where=where)
        arrays["emissions"] = jnp.where(where[..., None], arrays["emissions"], jnp.nan)
        labels = jnp.asarray(np.where(where, labels, -100))
        check(everything(arrays, labels, jnp.asarray(where), method), wanted, dtype)


@every_method
def test_matches_independent_vectors(method):
    with jax.enable_x64():
        data = dict(np.load(DATA).items())
        arrays = {name: jnp.asarray(data[f"in_{name}"]) for name in NAMES}
        where = np.arange(5) < data["in_lengths"][:, None]
        labels = jnp.asarray(data["in_labels"])
        found = everything(arrays, labels, jnp.asarray(where), method)
        close = functools.partial(assert_close, dtype="float64", length=5)
        close(found["nll"], data["out_nll"])
        close(found["marginals"], data["out_marginals"])
        close(found["emissions"], data["out_grad_emissions_of_sum"])


@every_method
@pytest.mark.parametrize(("steps", "labels"), [(1, 1), (7, 2), (1, 4)])
def test_matches_oracle_for_every_shape(steps, labels, method):
    arrays, targets, where = problem("float32", 1, steps, labels)
    wanted = oracle.field(**exact(arrays), labels=targets, where=where)
    found = everything(arrays, jnp.asarray(targets), jnp.asarray(where), method)
    check(found, wanted, "float32", length=steps)


@every_method
def test_matches_oracle_with_forbidden_transitions(method):
    """Nothing can follow a label, a target is forbidden, and a row is all forbidden."""
    arrays, labels, where = problem("float32", 2)
    for name, places in (("transitions", (0, slice(None))), ("start", 1)):
        arrays[name] = arrays[name].at[places].set(-jnp.inf)
    labels = np.where(labels == 0, 2, labels)
    labels[:, 0] = 2
    labels[3, 0], where[3] = 1, True  # an impossible target
    emissions = arrays["emissions"].at[4].set(-jnp.inf)  # nothing is possible
    arrays["emissions"], where[4] = emissions, True
    wanted = oracle.field(**exact(arrays), labels=labels, where=where)
    assert np.isposinf(wanted.nll[3:5]).all()
    assert np.isneginf(wanted.log_normalizer[4])
    found = everything(arrays, jnp.asarray(labels), jnp.asarray(where), method)
    check(found, wanted, "float32")


# ----------------------------------------------------------------------------- promises
@every_method
def test_equal_transitions_are_independent_cross_entropies(method):
    arrays, labels, where = problem("float32")
    labels, where = jnp.asarray(labels), jnp.asarray(where)

    @jax.jit
    def both(emissions):
        equal = jnp.full((LABELS, LABELS), 0.7)
        loss = losses.crf_loss(emissions, labels, equal, where=where, method=method)
        return loss, losses.softmax_cross_entropy(emissions, labels, where=where)

    loss, apart = both(arrays["emissions"])
    assert_close(loss, apart.sum(-1), dtype="float32", length=STEPS)


def test_large_scores_of_a_long_sequence_cost_no_accuracy():
    """The scores sum up to 10^5, the loss is 1."""
    steps = 3000
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, steps)
    scores = np.where(np.arange(2) == labels[:, None], 37.25, 29.25)
    apart = np.log1p(np.exp(-8)) * steps
    for method in METHODS:
        crf_loss = jax.jit(functools.partial(losses.crf_loss, method=method))
        zeros = jnp.zeros((2, 2), jnp.float32)
        loss = crf_loss(jnp.asarray(scores, jnp.float32), jnp.asarray(labels), zeros)
        assert_close(loss, apart, dtype="float32", length=steps, c=8)


@every_method
def test_a_label_outside_is_nan_without_gradient(method):
    arrays, labels, _ = problem("float32")
    labels[1, 2], labels[2, 0] = LABELS, -1
    where = jnp.ones((ROWS, STEPS), bool)
    found = everything(arrays, jnp.asarray(labels), where, method)
    bad = (np.arange(ROWS) == 1) | (np.arange(ROWS) == 2)
    np.testing.assert_array_equal(np.isnan(found["nll"]), bad)
    np.testing.assert_array_equal(found["emissions"][bad], 0)
    assert all(np.isfinite(found[name]).all() for name in NAMES)


@every_method
def test_marginals_sum_to_one(method):
    arrays, labels, where = problem("float32")
    where = jnp.asarray(where)
    found = everything(arrays, jnp.asarray(labels), where, method)
    assert_close(found["marginals"].sum(-1), where * 1.0, dtype="float32", length=STEPS)


def test_no_step_and_no_row():
    zeros = jnp.zeros((LABELS, LABELS))
    for shape in ((2, 0, LABELS), (0, 4, LABELS), (0, LABELS)):
        emissions, labels = jnp.zeros(shape), jnp.zeros(shape[:-1], int)
        for method in METHODS:
            loss = losses.crf_loss(emissions, labels, zeros, method=method)
            np.testing.assert_array_equal(loss, np.zeros(shape[:-2]))
            found = losses.crf_marginals(emissions, zeros, method=method)
            assert found.shape == shape


def test_memory_of_the_gradient_does_not_hold_pairs_of_labels():
    """One number per step and label, and not K."""
    steps, labels = 256, 64
    arguments = (
        jax.ShapeDtypeStruct((steps, labels), jnp.float32),
        jax.ShapeDtypeStruct((steps,), jnp.int32),
        jax.ShapeDtypeStruct((labels, labels), jnp.float32),
    )
    gradient = jax.jit(jax.grad(losses.crf_loss, argnums=(0, 2)))
    used = gradient.lower(*arguments).compile().memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < 16 * steps * labels * 4


@pytest.mark.parametrize(
    "method", ["sequential", pytest.param("associative", marks=pytest.mark.slow)]
)
def test_transformations(method):
    arrays, labels, where = problem("float32", steps=3, labels=2)
    rows = slice(0, 4)
    labels, where = jnp.asarray(labels)[rows], jnp.asarray(where)[rows]

    def function(emissions, labels, where, transitions, start, end):
        options = {"start": start, "end": end, "where": where, "method": method}
        return losses.crf_loss(emissions, labels, transitions, **options)

    _, *shared = arrays.values()
    check_transformations(
        function, arrays["emissions"][rows], labels, where, *shared, rows=(0, 1, 2)
    )


# ------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transitions": np.zeros((2, 3))}, r"`transitions` must have shape \(3, 3\)"),
        ({"labels": np.zeros(4, int)}, r"`labels` must have shape \(5,\)"),
        ({"labels": np.zeros(5)}, "`labels` must have an integer dtype"),
        ({"start": np.zeros(2)}, r"`start` must have shape \(3,\)"),
        ({"end": np.zeros((5, 3))}, r"`end` must have shape \(3,\)"),
        ({"where": np.ones(4, bool)}, r"`where` must broadcast to shape \(5,\)"),
        ({"where": np.ones(5)}, "`where` must have dtype bool"),
        ({"emissions": np.zeros(3)}, "`emissions` must have at least 2 axes"),
        ({"emissions": np.zeros((5, 0))}, "`emissions` must have at least one label"),
        ({"method": "chunked"}, "`method` must be one of 'sequential', 'associative'"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_errors(changed, message):
    arguments = {
        "emissions": np.zeros((5, 3)),
        "labels": np.zeros(5, int),
        "transitions": np.zeros((3, 3)),
    }
    with pytest.raises((TypeError, ValueError), match=f"^crf_loss: {message}"):
        losses.crf_loss(**arguments | changed)
