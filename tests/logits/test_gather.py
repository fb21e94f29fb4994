"""Logits at given classes: those of the array, computed alone."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import softlib
from softlib import LinearLogits
from softlib.logits import StoredLogits
from softlib.testing import assert_close, check_transformations
from tests.compiled import of_head, of_stored
from tests.host import jnp

BATCH, FEATURES, CLASSES, IDS = (2, 3), 6, 40, 5
FLOATING = ("hidden", "weight", "bias", "scale", "temperature")


def problem(dtype="float32"):
    """Rounded arrays, ids with repeats, and the classes that exist."""
    random = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(jnp.asarray(random.normal(size=shape), dtype))
    arrays = {
        "hidden": draw(*BATCH, FEATURES),
        "weight": draw(CLASSES, FEATURES),
        "bias": draw(CLASSES),
        "scale": np.abs(draw(*BATCH)) + draw(1) * 0 + 1,
        "temperature": np.abs(draw(*BATCH)) + draw(1) * 0 + 1,
    }
    ids = random.integers(0, CLASSES, (*BATCH, IDS))
    ids[0, 0] = (3, 3, 0, CLASSES - 1, 3)
    where = np.arange(CLASSES) % 4 > 0
    return arrays, ids, where


def wanted(arrays, ids, where, softcap=5.0):
    """By loops in float64."""
    a = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    found = np.full(ids.shape, np.nan)
    for place in np.ndindex(*ids.shape):
        row, c = place[:-1], ids[place]
        if not 0 <= c < CLASSES:
            continue
        u = a["scale"][row] * (a["hidden"][row] @ a["weight"][c]) + a["bias"][c]
        z = softcap * np.tanh(u / softcap) / a["temperature"][row]
        found[place] = z if where[c] else -np.inf
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_matches_loops(dtype, vocab_axis):
    arrays, ids, where = problem(dtype)
    expected = wanted(arrays, ids, where)
    given = arrays | {"weight": arrays["weight"].T if vocab_axis else arrays["weight"]}
    for token_chunk in (None, 4):
        found = of_head.gather(
            **given,
            class_ids=jnp.asarray(ids),
            class_where=where,
            softcap=5.0,
            vocab_axis=vocab_axis,
            token_chunk=token_chunk,
        )
        assert found.dtype == jnp.float32
        finite = np.isfinite(expected)
        assert (~finite).any()
        np.testing.assert_array_equal(np.isneginf(found), ~finite)
        close = functools.partial(assert_close, dtype=jnp.float32, length=FEATURES)
        close(np.where(finite, found, 0), np.where(finite, expected, 0))


@pytest.mark.parametrize("per_row", [False, True])
def test_of_an_array_is_that_of_the_materialized(per_row):
    arrays, ids, where = problem()
    raw = jnp.asarray(arrays["hidden"]) @ arrays["weight"].T
    given = StoredLogits(
        raw,
        bias=jnp.asarray(arrays["bias"]),
        scale=jnp.asarray(arrays["scale"]),
        softcap=5.0,
        temperature=jnp.asarray(arrays["temperature"]),
        class_where=jnp.asarray(
            np.broadcast_to(where, raw.shape) if per_row else where
        ),
    )
    found = softlib.logits.gather(given, jnp.asarray(ids))
    whole = np.take_along_axis(np.asarray(given.materialize()), ids, -1)
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    plain = of_stored.gather(raw, jnp.asarray(ids))
    np.testing.assert_array_equal(plain, np.take_along_axis(np.asarray(raw), ids, -1))


@pytest.mark.parametrize("source", ["linear", "logits"])
def test_an_id_out_of_range_is_nan_and_has_no_gradient(source):
    arrays, ids, _ = problem()
    hidden, weight = jnp.asarray(arrays["hidden"]), jnp.asarray(arrays["weight"])
    good = jnp.asarray(ids)
    bad = good.at[0, 0, 1].set(-1).at[1, 2, 0].set(CLASSES)
    inside = (bad >= 0) & (bad < CLASSES)

    def values(hidden: Any, weight: Any, ids: Any) -> Any:
        if source == "linear":
            return softlib.logits.gather(LinearLogits(hidden, weight), ids)
        return softlib.logits.gather(hidden @ weight.T, ids)

    found = jax.jit(values)(hidden, weight, bad)
    expected = jnp.where(inside, values(hidden, weight, good), jnp.nan)
    np.testing.assert_array_equal(found, expected)

    def total(hidden, weight, ids):
        return jnp.where(inside, values(hidden, weight, ids), 0).sum()

    slopes = [jax.jit(jax.grad(total, (0, 1)))(hidden, weight, i) for i in (bad, good)]
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_array_equal(one, other)
    everything = lambda hidden, weight: values(hidden, weight, bad).sum()
    slope = jax.jit(jax.grad(everything, (0, 1)))(hidden, weight)
    assert all(map(np.isfinite, map(np.sum, slope)))


@pytest.mark.parametrize(
    ("vocab_axis", "token_chunk"),
    [(1, 4), pytest.param(0, None, marks=pytest.mark.slow)],
)
def test_passes_through_every_transformation(vocab_axis, token_chunk):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    weight = draw(FEATURES, 12) if vocab_axis else draw(12, FEATURES)
    per_row = 1 + jnp.abs(draw(8)), 1 + jnp.abs(draw(8))
    ids = jnp.asarray(random.integers(0, 12, (8, 3)))

    def call(hidden, weight, bias, scale, temperature, ids):
        logits = LinearLogits(
            hidden,
            weight,
            bias=bias,
            scale=scale,
            temperature=temperature,
            softcap=5.0,
            vocab_axis=vocab_axis,
            token_chunk=token_chunk,
        )
        return softlib.logits.gather(logits, ids)

    arrays = draw(8, FEATURES), weight, draw(12), *per_row, ids
    check_transformations(call, *arrays, rows=(0, 3, 4, 5))


def test_gradients_are_those_of_the_array():
    arrays, ids, where = problem()
    keys = [jnp.asarray(arrays[name]) for name in FLOATING]
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=ids.shape), "float32")

    def total(form, hidden, weight, bias, scale, temperature):
        own: Any = {"bias": bias, "scale": scale, "temperature": temperature}
        own |= {"softcap": 5.0, "class_where": jnp.asarray(where)}
        if form == "stored":
            logits: Any = StoredLogits(hidden @ weight.T, **own)
        else:
            logits = LinearLogits(hidden, weight, token_chunk=4, **own)
        if form == "array":
            z = jnp.take_along_axis(logits.materialize(), jnp.asarray(ids), -1)
        else:
            z = softlib.logits.gather(logits, jnp.asarray(ids))
        return jnp.where(where[ids], z * cotangent, 0).sum()

    slopes = {
        form: jax.jit(jax.grad(functools.partial(total, form), range(5)))(*keys)
        for form in ("array", "stored", "linear")
    }
    for form in ("stored", "linear"):
        for one, other in zip(slopes[form], slopes["array"], strict=True):
            assert_close(one, np.asarray(other), dtype=jnp.float32, length=64)


def test_gradient_of_a_narrow_weight_is_summed_in_float32():
    """1 + 1000 / 1024 is not reached by steps of less than half a unit in bfloat16."""
    hidden = jnp.full((1001, 1), 2.0**-10, jnp.bfloat16).at[0].set(1)
    weight = jnp.ones((3, 1), jnp.bfloat16)
    ids = jnp.ones((1001, 1), int)
    total = lambda weight: of_head.gather(hidden, weight, ids).sum()
    np.testing.assert_allclose(
        jax.grad(total)(weight)[1, 0], 1 + 1000 / 1024, rtol=0.01
    )


def test_shapes():
    """No batch axis, no row, no id."""
    arrays, ids, _ = problem()
    hidden, weight = jnp.asarray(arrays["hidden"]), jnp.asarray(arrays["weight"])
    one = of_head.gather(hidden[0, 0], weight, jnp.asarray(ids[0, 0]))
    whole = of_head.gather(hidden, weight, jnp.asarray(ids))
    np.testing.assert_allclose(one, whole[0, 0], rtol=1e-6)
    assert of_head.gather(hidden[:0], weight, jnp.asarray(ids[:0])).shape == (0, 3, IDS)
    assert of_head.gather(hidden, weight, jnp.zeros((*BATCH, 0), int)).shape[-1] == 0
    assert of_stored.gather(hidden, jnp.zeros((*BATCH, 0), int)).shape[-1] == 0


def test_vmap_over_rows():
    arrays, ids, _ = problem()
    logits = LinearLogits(jnp.asarray(arrays["hidden"]), jnp.asarray(arrays["weight"]))
    mapped = jax.vmap(softlib.logits.gather, in_axes=(logits.batch_axes(), 0))
    found = jax.jit(mapped)(logits, jnp.asarray(ids))
    expected = softlib.logits.gather(logits, jnp.asarray(ids))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "check_vma"), [(AxisType.Explicit, True), (AxisType.Auto, False)]
)
def test_divided_classes_give_the_same_logits(kind, check_vma):
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(kind, kind))
    arrays, ids, where = problem()
    hidden, weight = jnp.asarray(arrays["hidden"]), jnp.asarray(arrays["weight"])
    ids = jnp.asarray(ids).at[0, 1, 1].set(CLASSES)
    where = jnp.asarray(where)

    def call(hidden, weight, where, ids, axis_name=None):
        logits = LinearLogits(hidden, weight, class_where=where, axis_name=axis_name)
        return softlib.logits.gather(logits, ids)

    mapped = jax.shard_map(
        functools.partial(call, axis_name="classes"),
        mesh=mesh,
        in_specs=(P("data"), P("classes"), P("classes"), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    finite = lambda f: lambda *a: jnp.where(jnp.isfinite(z := f(*a)), z, 0)
    slope = lambda f: jax.grad(lambda *a: (finite(f)(*a) ** 2).sum(), (0, 1))
    one = jax.jit(lambda *a: (call(*a), slope(call)(*a)))(hidden, weight, where, ids)
    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        operands = (
            place(hidden, P("data")),
            place(weight, P("classes")),
            place(where, P("classes")),
            place(ids, P("data")),
        )
        several = jax.jit(lambda *a: (mapped(*a), slope(mapped)(*a)))(*operands)
        several = jax.device_get(several)
    for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["linear", "stored"])
def test_rows_on_an_explicit_mesh(form):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    random = np.random.default_rng(1)
    hidden = jnp.asarray(random.normal(size=(16, 5)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(90, 5)), jnp.float32)
    ids = jnp.asarray(random.integers(0, 5, (16, 2)))

    def call(rows, weight, ids):
        logits: Any = LinearLogits(rows, weight)
        return softlib.logits.gather(rows if form == "stored" else logits, ids)

    one = jax.jit(call)(hidden, weight, ids)
    with jax.set_mesh(mesh):
        rows, places = (
            jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (hidden, ids)
        )
        several = jax.jit(call)(
            rows, jax.device_put(weight, NamedSharding(mesh, P())), places
        )
        assert several.sharding.spec[0] == "data"
    np.testing.assert_allclose(several, one, rtol=1e-5)


def test_neither_logits_nor_all_gathered_rows_are_stored():
    """Logits are 49 MiB, and the gathered rows of all 781 MiB."""
    struct = jax.ShapeDtypeStruct

    def scratch(rows, ids):
        arrays = (
            struct((rows, 32), jnp.float32),
            struct((200_000, 32), jnp.float32),
            struct((rows, ids), jnp.int32),
        )
        total = lambda h, w, ids: of_head.gather(h, w, ids).sum()
        call = jax.value_and_grad(total, (0, 1))
        memory = jax.jit(call).lower(*arrays).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes / 2**20

    assert scratch(64, 10) < 2
    assert scratch(64_000, 100) < 400


def test_ids_of_one_axis_are_those_of_all_rows():
    """Of each kind of logits; the gradient of a class that is asked for twice adds."""
    arrays, _, where = problem()
    ids = jnp.array([7, 0, 7, CLASSES, 4])
    a = {name: jnp.asarray(x) for name, x in arrays.items()}
    modified: Any = {n: a[n] for n in ("bias", "scale", "temperature")}
    modified |= {"softcap": 5.0, "class_where": jnp.asarray(where)}
    table, mapping = a["weight"][:6], jnp.arange(CLASSES) % 6
    kinds = {
        "head": lambda h: LinearLogits(h, a["weight"], **modified),
        "columns": lambda h: LinearLogits(h, a["weight"].T, vocab_axis=1),
        "stored": lambda h: StoredLogits(h @ a["weight"].T, **modified),
        "codes": lambda h: softlib.logits.VQLogits(h, table, mapping),
        "array": lambda h: h @ a["weight"].T,
    }
    inside = jnp.where(ids < CLASSES, ids, 0)
    for make in kinds.values():

        def run(hidden, make=make):
            found = softlib.logits.gather(make(hidden), ids)
            usual = jnp.isfinite(found)
            return jnp.where(usual, found, 0).sum(), found

        def whole(hidden, make=make):
            z = make(hidden)
            z = z if isinstance(z, jax.Array) else z.materialize()
            found = jnp.where(ids < CLASSES, z[..., inside], jnp.nan)
            return jnp.where(jnp.isfinite(found), found, 0).sum(), found

        (slope, found), (same, expected) = (
            jax.jit(jax.grad(f, has_aux=True))(a["hidden"]) for f in (run, whole)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(slope, same, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_named():
    eye: Any = jnp.eye(4)
    for ids, error, message in (
        (jnp.zeros((), int), ValueError, r"`class_ids` must have shape \(4, L\), sev"),
        (jnp.zeros((3, 2), int), ValueError, r"`class_ids` must .* got \(3, 2\)"),
        (jnp.zeros((4, 2)), TypeError, "`class_ids` must have an integer dtype"),
    ):
        for logits in (eye, LinearLogits(eye, eye)):
            with pytest.raises(error, match=f"^gather: {message}"):
                softlib.logits.gather(logits, ids)
