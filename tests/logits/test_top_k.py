"""The first k classes of a linear head."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from softlib import LinearLogits
from tests import operations
from tests.compiled import of_head
from tests.host import jnp

ROWS, FEATURES, CLASSES = 6, 3, 13


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("token_chunk", [None, 4])
def test_top_k_is_that_of_the_stored_logits(vocab_axis, token_chunk):
    """Ties to the lower class, rows cut with a rest, chunks shorter than k."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.integers(-2, 3, (ROWS, FEATURES)), jnp.float32)
    table = jnp.asarray(random.integers(-2, 3, (CLASSES, FEATURES)), jnp.float32)
    where = jnp.asarray(random.uniform(size=CLASSES) < 0.8)
    logits = LinearLogits(hidden, table, class_where=where).materialize()
    values, classes = jax.lax.top_k(logits, 7)
    found = jax.jit(
        functools.partial(
            of_head.top_k,
            k=7,
            vocab_axis=vocab_axis,
            vocab_chunk=5,
            token_chunk=token_chunk,
            class_where=where,
        )
    )(hidden, table.T if vocab_axis else table)
    np.testing.assert_array_equal(found.logits, values)
    np.testing.assert_array_equal(found.classes, classes)


def test_fewer_classes_than_places_are_minus_one():
    table = jnp.asarray(np.eye(4), jnp.bfloat16)
    where = jnp.array([False, True, False, True])
    found = of_head.top_k(table[:2], table, k=3, class_where=where)
    assert found.logits.dtype == jnp.float32
    np.testing.assert_array_equal(found.classes, [[1, 3, -1], [1, 3, -1]])
    np.testing.assert_array_equal(found.logits[:, 2], -jnp.inf)
    slope = jax.grad(lambda h: of_head.top_k(h, table, k=1).logits.sum())
    np.testing.assert_array_equal(slope(table[:2]), 0)


@pytest.mark.parametrize(
    ("kind", "check_vma"), [(AxisType.Explicit, True), (AxisType.Auto, False)]
)
def test_top_k_of_divided_classes(kind, check_vma):
    mesh = jax.make_mesh((2, 4), ("data", "classes"), (kind, kind))
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, table = draw(8, FEATURES), draw(16, FEATURES)
    one = of_head.top_k(hidden, table, k=3)
    call = functools.partial(of_head.top_k, k=3, axis_name="classes")
    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(P("data"), P("classes")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(
            a, jax.sharding.NamedSharding(mesh, spec)
        )
        operands = place(hidden, P("data")), place(table, P("classes"))
        several = jax.device_get(jax.jit(mapped)(*operands))
    np.testing.assert_allclose(several.logits, one.logits, rtol=1e-6)
    np.testing.assert_array_equal(several.classes, one.classes)


def test_top_k_has_no_array_of_rows_by_classes():
    struct = jax.ShapeDtypeStruct
    top = functools.partial(of_head.top_k, k=5, vocab_chunk=512)
    rows, classes = struct((100, 8), jnp.float32), struct((5000, 8), jnp.float32)
    text = str(operations.make_jaxpr(top)(rows, classes))
    assert "[100,5000]" not in text
    assert "[100,512]" in text


def test_top_k_searches_few_large_tiles_and_sorts_none():
    struct = jax.ShapeDtypeStruct
    top = functools.partial(of_head.top_k, k=5)
    arrays = struct((256, 128), jnp.float32), struct((40_000, 128), jnp.float32)
    text = str(operations.make_jaxpr(top)(*arrays))
    assert "[256,40000]" not in text
    assert "[256,16384]" in text
    program = jax.jit(top).lower(*arrays).compile().as_text() or ""
    assert 'custom_call_target="TopK"' in program
    assert " sort(" not in program


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_named():
    eye = jnp.eye(4)
    for call, error, message in (
        (
            lambda: of_head.top_k(eye, eye, k=5),
            ValueError,
            "top_k: `k` must be at most the number of classes, 4, got 5",
        ),
        (
            lambda: of_head.top_k(eye, eye, k=1, implementation="reference"),
            ValueError,
            "top_k: `implementation` of the logits must be None or 'xla', got 'ref",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
