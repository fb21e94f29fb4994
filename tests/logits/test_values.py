"""Logits as values: what they pass through, how they are cut, what they are not."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import softlib
from softlib import LinearLogits, losses
from softlib.logits import StoredLogits
from softlib.testing import assert_close
from tests.host import jnp

BATCH, TIME, FEATURES, CLASSES = 4, 6, 5, 11
EVERY = pytest.mark.parametrize("kind", ["linear", "columns", "stored"])


def normal(seed, *shape):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def value(kind, **more) -> Any:
    """Logits of (BATCH, TIME) rows; the same numbers in every form."""
    modifiers: Any = {"bias": normal(2, CLASSES), "softcap": 3.0, **more}
    hidden, weight = normal(0, BATCH, TIME, FEATURES), normal(1, CLASSES, FEATURES)
    if kind == "stored":
        return StoredLogits(hidden @ weight.T, **modifiers)
    if kind == "columns":
        return LinearLogits(hidden, weight.T, vocab_axis=1, **modifiers)
    return LinearLogits(hidden, weight, **modifiers)


def per_row():
    return {
        "scale": 1 + 0.1 * jnp.arange(BATCH * TIME, dtype=float).reshape(BATCH, TIME),
        "temperature": 2
        - 0.05 * jnp.arange(BATCH * TIME, dtype=float).reshape(BATCH, TIME),
    }


LABELS = jnp.arange(BATCH * TIME).reshape(BATCH, TIME) % CLASSES


def loss(logits, labels=LABELS):
    return losses.softmax_cross_entropy(logits, labels)


def plain(logits, labels=LABELS):
    array = logits.materialize() if hasattr(logits, "materialize") else logits
    log_p = jax.nn.log_softmax(array)
    return -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]


@EVERY
def test_has_the_shape_of_the_array(kind):
    logits = value(kind)
    assert logits.shape == (BATCH, TIME, CLASSES) == logits.materialize().shape
    assert (logits.ndim, logits.dtype) == (3, jnp.float32)
    assert (logits.batch_shape, logits.num_classes) == ((BATCH, TIME), CLASSES)


@EVERY
def test_the_array_is_by_the_definition(kind):
    given = value(kind, **per_row())
    hidden, weight = normal(0, BATCH, TIME, FEATURES), normal(1, CLASSES, FEATURES)
    raw = np.asarray(hidden @ weight.T)
    scale, temperature = (np.asarray(x)[..., None] for x in per_row().values())
    wanted = 3 * np.tanh((scale * raw + np.asarray(normal(2, CLASSES))) / 3)
    wanted = wanted / temperature
    assert_close(given.materialize(), wanted, dtype=jnp.float32, length=FEATURES)


@EVERY
def test_passes_through_transformations(kind):
    logits = value(kind, **per_row())
    wanted = jax.jit(plain)(logits)
    close = functools.partial(assert_close, dtype=jnp.float32, length=CLASSES)
    close(jax.jit(loss)(logits), wanted)
    close(jax.jit(jax.checkpoint(loss))(logits), wanted)
    close(
        jax.jit(lambda logits: loss(jax.tree.map(lambda x: x, logits)))(logits), wanted
    )
    axes = (logits.batch_axes(), 0)
    close(jax.jit(jax.vmap(loss, in_axes=axes))(logits, LABELS), wanted)


@EVERY
def test_gradient_is_a_value_of_gradients(kind):
    logits = value(kind, **per_row())
    found, wanted = (
        jax.jit(jax.grad(lambda logits, f=f: f(logits).sum()))(logits)
        for f in (loss, plain)
    )
    assert type(found) is type(logits)
    assert jax.tree.structure(found) == jax.tree.structure(logits)
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert_close(one, other, dtype=jnp.float32, length=64 * CLASSES)


@EVERY
@pytest.mark.parametrize(
    "index",
    [
        np.s_[:, :-1],
        np.s_[1],
        np.s_[..., 2],
        np.s_[None, ::2],
        np.s_[jnp.array([0, 2]), jnp.array([1, 1])],
        np.s_[np.arange(BATCH) != 1],
    ],
    ids=str,
)
def test_rows_are_cut_as_those_of_the_array(kind, index):
    exists = jnp.arange(CLASSES) != 3
    if kind == "stored":
        exists = jnp.broadcast_to(exists, (BATCH, TIME, CLASSES))
    logits = value(kind, class_where=exists, **per_row())
    cut, whole = logits[index], logits.materialize()
    of_array = (*index, slice(None)) if isinstance(index, tuple) else index
    wanted = whole[of_array]
    np.testing.assert_allclose(cut.materialize(), wanted, rtol=1e-6)
    assert cut.shape == cut.materialize().shape


@EVERY
def test_batch_axes_are_reshaped(kind):
    logits = value(kind, **per_row())
    flat = logits.reshape(-1)
    assert flat.shape == (BATCH * TIME, CLASSES)
    np.testing.assert_array_equal(
        flat.materialize(), logits.materialize().reshape(-1, CLASSES)
    )
    assert logits.reshape(2, 2, TIME).shape == (2, 2, TIME, CLASSES)
    np.testing.assert_allclose(
        loss(flat, LABELS.reshape(-1)), loss(logits).reshape(-1), rtol=1e-6
    )


@EVERY
def test_is_an_argument_of_shard_map(kind):
    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    logits = value(kind, **per_row())
    specs = logits.batch_axes(P("device"), P())
    divided = jax.shard_map(
        loss, mesh=mesh, in_specs=(specs, P("device")), out_specs=P("device")
    )
    assert_close(
        jax.jit(divided)(logits, LABELS),
        jax.jit(plain)(logits),
        dtype=jnp.float32,
        length=CLASSES,
    )


@EVERY
def test_a_list_of_implementations_is_static(kind):
    logits = value(kind, implementation=["xla", "reference"])
    found = jax.jit(loss)(logits)
    assert_close(found, plain(logits), dtype=jnp.float32, length=CLASSES)


def test_no_product_is_formed_by_making_one():
    """A constructor checks and keeps: its jaxpr has no equation but for numbers."""
    make = lambda hidden, weight: LinearLogits(hidden, weight)[:, 1:].hidden
    jaxpr = jax.make_jaxpr(make)(normal(0, 2, 3, FEATURES), normal(1, 7, FEATURES))
    assert "dot_general" not in str(jaxpr)


def test_is_carried_by_a_scan():
    """The weight is closed over and not stacked: rows are what a step slices."""
    logits = value("linear")

    def step(total, hidden_and_labels):
        hidden, labels = hidden_and_labels
        row = logits.over_rows(lambda _: hidden)
        return total + loss(row, labels).sum(), None

    total, _ = lax.scan(step, jnp.zeros(()), (logits.hidden, LABELS))
    np.testing.assert_allclose(total, plain(logits).sum(), rtol=1e-5)


# ------------------------------------------------------------------------------- errors
@EVERY
@pytest.mark.usefixtures("untyped")
def test_is_not_an_array(kind):
    logits = value(kind)
    name = type(logits).__name__
    for use in (
        lambda: jnp.exp(logits),
        lambda: logits + 1,
        lambda: 2 * logits,
        lambda: jnp.ones(CLASSES) * logits,
        lambda: np.asarray(logits),
        lambda: list(logits),
        lambda: logits @ jnp.ones(CLASSES),
        lambda: -logits,
        lambda: logits > 0,
        lambda: abs(logits) ** 2,
    ):
        with pytest.raises(TypeError, match=rf"{name}: .*`materialize\(\)`"):
            use()


@EVERY
def test_has_no_method_of_an_array(kind):
    name = type(value(kind)).__name__
    with pytest.raises(AttributeError, match=rf"^{name}: `argmax` .*`materialize\(\)`"):
        value(kind).argmax(-1)
    assert not hasattr(value(kind), "T")


@EVERY
def test_the_axis_of_the_classes_is_whole(kind):
    with pytest.raises(IndexError, match="of the 2 batch axes, got one of 3"):
        value(kind)[0, 0, 0]


@pytest.mark.usefixtures("untyped")
def test_a_mapped_weight_is_one_sentence():
    logits = LinearLogits(normal(0, CLASSES, FEATURES), normal(1, CLASSES, FEATURES))
    with pytest.raises(ValueError, match=r"Did jax\.vmap map it.*batch_axes"):
        jax.vmap(lambda logits, labels: loss(logits, labels))(
            logits, jnp.arange(CLASSES)
        )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.ones((FEATURES, CLASSES))}, "Did you mean vocab_axis=1"),
        (
            {"weight": jnp.ones((CLASSES, FEATURES), int)},
            "`weight` must have a floating",
        ),
        ({"bias": jnp.ones(3)}, r"`bias` must have shape \(11,\)"),
        ({"scale": jnp.ones(3)}, r"`scale` must have shape \(\) or \(4, 6\)"),
        ({"softcap": -1.0}, "`softcap` must be"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"class_where": jnp.ones(CLASSES)}, "`class_where` must have dtype bool"),
        ({"implementation": "typo"}, "`implementation`"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else None,
)
def test_arguments_are_checked_where_the_value_is_made(change, message):
    given = {
        "hidden": normal(0, BATCH, TIME, FEATURES),
        "weight": normal(1, CLASSES, FEATURES),
    }
    with pytest.raises((TypeError, ValueError), match=f"^LinearLogits: .*{message}"):
        LinearLogits(**(given | change))


def test_prints_as_the_call_that_made_it():
    logits = value("columns", temperature=jnp.ones((BATCH, TIME)))
    assert repr(logits) == (
        "LinearLogits(hidden=float32[4,6,5], weight=float32[5,11], vocab_axis=1, "
        "bias=float32[11], softcap=3.0, temperature=float32[4,6])"
    )
    stored = StoredLogits(jnp.ones((2, 3)))
    assert repr(stored) == "StoredLogits(logits=float32[2,3])"


def test_messages_of_a_loss_begin_with_its_name():
    with pytest.raises(ValueError, match=r"^softmax_cross_entropy: `labels` must have"):
        loss(value("linear"), LABELS[0])
    assert softlib.logits.top_k(value("linear"), k=2).classes.shape == (BATCH, TIME, 2)
