"""A loss with every option on divided arrays, and the answer of one device.

Used in one process, and by the two that two_processes.py is run in.
"""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from tests.heads import of_head
from tests.host import jnp

ROWS, FEATURES, CLASSES = (8, 4), 16, 48
FLOATING = (
    "hidden",
    "weight",
    "bias",
    "scale",
    "temperature",
    "label_smoothing",
    "logsumexp_penalty",
)
OPERANDS = (*FLOATING, "labels", "class_where")
METRICS = ("loss", "log_prob", "entropy", "correct", "lse")
TOLERANCE = 1e-6


def problem(vocab_axis=0):
    """The operands, and the cotangents of the four floating metrics."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(CLASSES, FEATURES)) / 3
    floating = {
        "hidden": random.normal(size=(*ROWS, FEATURES)),
        "weight": weight.T if vocab_axis else weight,
        "bias": random.normal(size=CLASSES) / 2,
        "scale": 1.5,
        "temperature": random.uniform(1, 2, ROWS),
        "label_smoothing": 0.1,
        "logsumexp_penalty": 0.01,
        "cotangents": random.uniform(-1, 1, (*ROWS, 4)) / 8,
    }
    arrays = {name: np.asarray(a, np.float32) for name, a in floating.items()}
    # The first device of an axis has no class of its own.
    exists = np.arange(CLASSES) >= CLASSES // 4
    labels = random.integers(0, CLASSES, ROWS, np.int32)
    labels[0, 0] = -100
    logits = 1.5 * floating["hidden"] @ weight.T + floating["bias"]
    labels[::3, 1:] = np.where(exists, logits, -np.inf).argmax(-1)[::3, 1:]
    return {**arrays, "labels": labels, "class_where": exists}


def specs(rows=None, classes=None, features=None, vocab_axis=0):
    """How each array is divided."""
    weight = P(features, classes) if vocab_axis else P(classes, features)
    by_name = {
        "hidden": P(rows, None, features),
        "weight": weight,
        "bias": P(classes),
        "temperature": P(rows),
        "cotangents": P(rows),
        "labels": P(rows),
        "class_where": P(classes),
    }
    return {name: by_name.get(name, P()) for name in (*OPERANDS, "cotangents")}


def metrics(operands, axis_name=None, vocab_axis=0):
    """Every number per token, with every option that looks at single classes."""
    found = of_head.token_metrics(
        **operands,
        vocab_axis=vocab_axis,
        where=operands["labels"] >= 0,
        vocab_chunk=5,
        metrics=METRICS,
        axis_name=axis_name,
    )
    # A label on an excluded class costs infinity; no other loss is -1, no log 1.
    finite = lambda x: jnp.where(jnp.isinf(x), -jnp.sign(x), x)
    return found._replace(loss=finite(found.loss), log_prob=finite(found.log_prob))


def vocabulary_parallel(mesh, where, check_vma, vocab_axis=0, axes=("data", "classes")):
    """`metrics` of operands divided over the two axes of the mesh."""
    return jax.shard_map(
        lambda operands: metrics(operands, axes[1], vocab_axis),
        mesh=mesh,
        in_specs=({name: where[name] for name in OPERANDS},),
        out_specs=P(axes[0]),
        check_vma=check_vma,
    )


def with_gradients(function):
    """`function` beside the gradients of a sum that weights its numbers differently."""

    def total(floating, others, cotangents):
        found = function({**floating, **others})
        numbers = [found.loss, found.log_prob, found.entropy, found.lse]
        weighted = [cotangents[..., i] * x for i, x in enumerate(numbers)]
        return sum(x.sum() for x in weighted), found

    def call(arrays):
        floating = {name: arrays[name] for name in FLOATING}
        others = {name: arrays[name] for name in ("labels", "class_where")}
        differentiate = jax.grad(total, has_aux=True)
        gradients, found = differentiate(floating, others, arrays["cotangents"])
        return found._asdict(), gradients

    return jax.jit(call)


@functools.cache
def one_device(vocab_axis=0):
    """Values and gradients in float64 from the same, rounded arrays."""
    function = functools.partial(metrics, vocab_axis=vocab_axis)
    with jax.enable_x64(), jax.default_device(jax.local_devices()[0]):
        arrays = {
            name: jnp.asarray(a, np.float64 if a.dtype == np.float32 else a.dtype)
            for name, a in problem(vocab_axis).items()
        }
        return jax.device_get(with_gradients(function)(arrays))


def place(mesh, where, arrays):
    """The arrays on the mesh, of which this process may hold a part."""
    return {
        name: jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, where[name]), array.__getitem__
        )
        for name, array in arrays.items()
    }


def assert_equal(actual, expected):
    """Every part that this process holds; `actual` is float32 where it is floating."""
    for name, array in actual.items():
        whole = np.asarray(expected[name])
        assert array.dtype in (jnp.float32, jnp.bool)
        bound = TOLERANCE * max(1, np.max(np.abs(whole)))
        for shard in array.addressable_shards:
            np.testing.assert_allclose(
                np.asarray(shard.data, np.float64),
                np.asarray(whole[shard.index], np.float64),
                rtol=0,
                atol=bound,
                err_msg=f"{name} {shard.index}",
            )


def check(mesh, where, function, vocab_axis=0):
    """Compares `function` of divided arrays with one device; returns the gradients."""
    with jax.set_mesh(mesh):
        arrays = place(mesh, where, problem(vocab_axis))
        values, gradients = with_gradients(function)(arrays)
    expected_values, expected_gradients = one_device(vocab_axis)
    assert_equal(values, expected_values)
    assert_equal(gradients, expected_gradients)
    return gradients
