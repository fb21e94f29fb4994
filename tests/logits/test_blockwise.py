"""Heads that are defined outside the library: losses, gradients, edges, memory."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.logits import BlockwiseLogits
from softlib.testing import assert_close
from tests.host import jnp

ROWS, FEATURES, CLASSES = 8, 4, 256


# --------------------------------------------------------------------- three such heads
class Cosines(BlockwiseLogits):
    """Cosines of hidden states and prototypes, times a learned sharpness."""

    of_rows, of_classes, of_all = ("hidden",), ("prototypes",), ("sharpness",)

    def block(self):
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return self.sharpness * unit(self.hidden) @ unit(self.prototypes).T


class Distances(BlockwiseLogits):
    """Negative distances to centres, by a static power."""

    of_rows, of_classes = ("points",), ("centres",)
    static_fields = ("power",)

    def block(self):
        difference = jnp.abs(self.points[:, None] - self.centres[None])
        return -(difference**self.power).sum(-1)


class WithCache(BlockwiseLogits):
    """A head whose logits a cache has a word in: one number per row and class."""

    of_rows, of_classes, of_entries = ("hidden",), ("weight",), ("cached",)

    def block(self):
        return self.hidden @ self.weight.T + jnp.tanh(self.cached)


def arrays(seed=0, batch=(ROWS,)) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {
        "hidden": draw(*batch, FEATURES),
        "table": draw(CLASSES, FEATURES),
        "cached": draw(*batch, CLASSES),
        "bias": draw(CLASSES),
    }


def heads(given, **options) -> dict[str, BlockwiseLogits]:
    hidden, table = given["hidden"], given["table"]
    sharpness = jnp.asarray(5.0, hidden.dtype)
    cosines = Cosines(hidden=hidden, prototypes=table, sharpness=sharpness, **options)
    return {
        "cosines": cosines,
        "distances": Distances(points=hidden, centres=table, power=2, **options),
        "cache": WithCache(
            hidden=hidden, weight=table, cached=given["cached"], **options
        ),
    }


EVERY = pytest.mark.parametrize("kind", ["cosines", "distances", "cache"])
LABELS = jnp.arange(ROWS) * 31 % CLASSES
SEVERAL = jnp.stack([LABELS, (LABELS + 5) % CLASSES], -1)
TEN: dict[str, Any] = {
    "cross-entropy": lambda z: losses.softmax_cross_entropy(
        z, LABELS, label_smoothing=0.1, logsumexp_penalty=0.01
    ),
    "focal": lambda z: losses.softmax_focal_loss(z, LABELS, gamma=2.0),
    "comp-sum": lambda z: losses.comp_sum_loss(z, LABELS, tau=0.7),
    "poly1": lambda z: losses.poly1_cross_entropy(z, LABELS, epsilon=1.0),
    "symmetric": lambda z: losses.symmetric_cross_entropy(z, LABELS),
    "several labels": lambda z: losses.multi_label_cross_entropy(z, SEVERAL),
    "one versus all": lambda z: losses.one_versus_all_loss(z, SEVERAL),
    "decoupled": lambda z: losses.decoupled_softmax_loss(z, SEVERAL),
    "z-loss": lambda z: losses.z_loss(z, LABELS, a=0.5, b=1.0),
    "sum": lambda z: losses.softmax_cross_entropy_sum(z, LABELS),
    "robust": lambda z: losses.robust_softmax_cross_entropy(
        z, LABELS, temperature=jnp.full(ROWS, 1.3), rho=0.1
    ),
    "entropy": softlib.logits.entropy,
    "spherical": lambda z: losses.log_taylor_softmax_loss(z, LABELS),
}


KINDS = ("cosines", "distances", "cache")
CUTS: dict[str, Any] = {"vocab_chunk": 128, "token_chunk": 4}
RAGGED: dict[str, Any] = {"vocab_chunk": 100, "token_chunk": 3}


@pytest.mark.parametrize(
    ("name", "kind", "cuts"),
    [(name, KINDS[i % 3], CUTS) for i, name in enumerate(TEN)]
    + [("cross-entropy", kind, RAGGED) for kind in KINDS],
    ids=lambda value: "ragged" if value is RAGGED else None,
)
def test_losses_and_gradients_are_those_of_the_array(name, kind, cuts):
    """In pieces of rows and of classes; a modifier of each kind."""
    function, given = TEN[name], arrays()
    factors = jnp.cos(jnp.arange(ROWS))

    def total(given, stored):
        logits = heads(given, softcap=6.0, bias=given["bias"], **cuts)[kind]
        loss = function(logits.materialize() if stored else logits)
        return (factors * loss).sum()

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    ours, gradients = run(given, False)
    with jax.enable_x64():
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), given)
        theirs, wanted = run(exact, True)
    assert_close(ours, theirs, dtype=jnp.float32, length=50 * CLASSES)
    for field, gradient in gradients.items():
        assert np.any(wanted[field]) or (field == "cached" and kind != "cache")
        largest = np.abs(wanted[field]).max()
        np.testing.assert_allclose(
            gradient, wanted[field], rtol=0, atol=2e-5 * largest, err_msg=field
        )


@EVERY
def test_top_classes_ranks_and_sequences(kind):
    given = arrays(batch=(2, 4))
    logits: Any = heads(given, vocab_chunk=128)[kind]
    array = logits.materialize()
    best = softlib.logits.top_k(logits, k=3)
    np.testing.assert_array_equal(best.classes, jax.lax.top_k(array, 3)[1])
    key = jax.random.key(3)
    drawn = softlib.logits.sample(key, logits, temperature=3.0)
    wanted = softlib.logits.sample(key, array, temperature=3.0)
    np.testing.assert_array_equal(drawn, wanted)
    labels = LABELS.reshape(2, 4)
    ids = jnp.stack([labels, labels * 0 + CLASSES, labels + 1], -1)
    gathered = softlib.logits.gather
    assert_close(
        gathered(logits, ids), gathered(array, ids), dtype=jnp.float32, length=FEATURES
    )
    rank = softlib.logits.label_rank
    np.testing.assert_array_equal(rank(logits, labels), rank(array, labels))
    scored = softlib.logits.sequence_log_probs
    assert_close(
        scored(logits, labels), scored(array, labels), dtype=jnp.float32, length=CLASSES
    )


def test_sequences_and_the_best_temperature():
    given = arrays(batch=(2, 4))
    logits: Any = heads(given, vocab_chunk=128)["cosines"]
    array, labels = logits.materialize(), LABELS.reshape(2, 4)
    edits = losses.edit_invariant_sequence_loss
    assert_close(
        edits(logits, labels), edits(array, labels), dtype=jnp.float32, length=CLASSES
    )
    temperature = functools.partial(
        softlib.logits.optimal_temperature,
        rho=0.5,
        temperature_min=0.05,
        temperature_max=5.0,
    )
    assert_close(
        temperature(logits), temperature(array), dtype=jnp.float32, length=10**5
    )


@EVERY
def test_edges(kind):
    """Dropped rows, wrong labels, excluded labels, and what has no gradient."""
    given = arrays()
    given["hidden"] = given["hidden"].at[0].set(jnp.nan)
    given["cached"] = given["cached"].at[0].set(jnp.nan)
    where = jnp.arange(ROWS) != 0
    labels = LABELS.at[1].set(CLASSES).at[2].set(-5).at[3].set(7)
    exists = jnp.arange(CLASSES) != 7

    def total(given):
        logits = heads(given, class_where=exists)[kind]
        loss = losses.softmax_cross_entropy(logits, labels, where=where)
        return jnp.where(jnp.isfinite(loss), loss, 0).sum(), loss

    gradient, loss = jax.jit(jax.grad(total, has_aux=True))(given)
    assert loss[0] == 0
    assert np.isnan(loss[1:3]).all()
    assert loss[3] == np.inf
    assert np.isfinite(loss[4:]).all()
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    assert not np.any(gradient["hidden"][0])
    nothing = heads(arrays(), class_where=jnp.zeros(CLASSES, bool))[kind]
    assert (softlib.logits.logsumexp(nothing) == -np.inf).all()
    assert not np.any(losses.softmax_cross_entropy(nothing, LABELS))


@EVERY
def test_is_a_value(kind):
    """Through jit, checkpoint and vmap; rows of it; the gradient is a value too."""
    given = arrays(batch=(2, 4))
    logits: Any = heads(given, temperature=2.0)[kind]
    labels = LABELS.reshape(2, 4)
    loss = losses.softmax_cross_entropy
    assert logits.shape == (2, 4, CLASSES)
    wanted = loss(logits.materialize(), labels)
    close = functools.partial(assert_close, dtype=jnp.float32, length=CLASSES)
    close(jax.jit(jax.checkpoint(loss))(logits, labels), wanted)
    mapped = jax.vmap(loss, in_axes=(logits.batch_axes(), 0))
    close(mapped(logits, labels), wanted)
    close(loss(logits[:, 1:], labels[:, 1:]), wanted[:, 1:])
    close(loss(logits.reshape(-1), labels.reshape(-1)), wanted.reshape(-1))
    gradient = jax.grad(lambda z: loss(z, labels).sum())(logits)
    assert type(gradient) is type(logits)
    assert jax.tree.structure(gradient) == jax.tree.structure(logits)
    assert repr(logits).startswith(type(logits).__name__ + "(")


def test_forward_over_reverse():
    given = arrays()

    def total(hidden):
        logits = heads(given | {"hidden": hidden}, vocab_chunk=128)["cosines"]
        return losses.softmax_cross_entropy(logits, LABELS).sum()

    def plain(hidden):
        logits = heads(given | {"hidden": hidden})["cosines"].materialize()
        return losses.softmax_cross_entropy(logits, LABELS).sum()

    direction = jnp.ones_like(given["hidden"])
    product = lambda f: jax.jvp(jax.grad(f), (given["hidden"],), (direction,))[1]
    assert_close(product(total), product(plain), dtype=jnp.float32, length=10**4)


def test_an_integer_array_per_class_has_no_gradient():
    class Coded(BlockwiseLogits):
        of_rows, of_classes, of_all = ("hidden",), ("codes",), ("codebook",)

        def block(self):
            return self.hidden @ self.codebook[self.codes].T

    given = arrays()
    codes = jnp.arange(CLASSES) % 7

    def total(hidden, codebook):
        logits = Coded(hidden=hidden, codes=codes, codebook=codebook, vocab_chunk=128)
        return losses.softmax_cross_entropy(logits, LABELS).sum()

    def plain(hidden, codebook):
        array = hidden @ codebook[codes].T
        return losses.softmax_cross_entropy(array, LABELS).sum()

    operands = given["hidden"], given["table"][:7]
    found, wanted = (jax.grad(f, argnums=(0, 1))(*operands) for f in (total, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, dtype=jnp.float32, length=CLASSES * ROWS)


@pytest.mark.parametrize("kind", ["cosines", "cache"])
def test_forms_no_array_of_logits(kind):
    """Temporaries of a gradient, of shapes alone; nothing is run."""
    rows, classes = 2048, 65_536
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    given = {
        "hidden": shape(rows, FEATURES),
        "table": shape(classes, FEATURES),
        "cached": shape(rows, classes),
        "bias": shape(classes),
    }
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def total(given, labels):
        return losses.softmax_cross_entropy(heads(given)[kind], labels).sum()

    def of_few(given, labels):  # without the gradient of what has the logits' size
        learned = {n: a for n, a in given.items() if n != "cached"}
        fixed = {"cached": given["cached"]}
        return jax.grad(lambda learned: total(learned | fixed, labels))(learned)

    compiled = jax.jit(of_few).lower(given, labels).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.12 * rows * classes * 4


def test_explain_names_the_operation():
    text = str(softlib.explain(TEN["focal"], heads(arrays())["cosines"]))
    assert "blockwise_row_statistics" in text
    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        TEN["focal"](heads(arrays(), implementation="pallas_tpu")["cosines"])


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    given = arrays()
    hidden, table = given["hidden"], given["table"]
    with pytest.raises(TypeError, match="Distances: `power` must be given"):
        Distances(points=hidden, centres=table)
    with pytest.raises(TypeError, match="Distances: `centers` must be one of"):
        Distances(points=hidden, centers=table, power=2)
    with pytest.raises(ValueError, match=r"`cached` must have shape \(8, 256\)"):
        WithCache(hidden=hidden, weight=table, cached=table)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(256,\)"):
        Distances(points=hidden, centres=table, power=2, bias=jnp.ones(3))
    with pytest.raises(ValueError, match="`vocab_chunk` must be at least 1"):
        Distances(points=hidden, centres=table, power=2, vocab_chunk=0)
    value: Any = Distances(points=hidden, centres=table, power=2)
    with pytest.raises(TypeError, match="must not become an array operation"):
        jnp.exp(value)
