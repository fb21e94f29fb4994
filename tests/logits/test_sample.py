"""Samples of the classes: their law, and on what they depend."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import softlib
from softlib import LinearLogits
from softlib.logits import StoredLogits
from softlib.logits._engine import sampling
from tests.compiled import of_head, of_stored
from tests.heads import of
from tests.host import jnp
from tests.oracles import sampling as oracle

stats = pytest.importorskip("scipy.stats")

BATCH, FEATURES, CLASSES = (3, 5), 6, 700
KEY = jax.random.key(7)


def words(key=KEY):
    return np.asarray(sampling.key_words(key))


def problem(seed=0):
    """Arrays, and every option that makes a logit of a product."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype("float32")
    hidden, weight = draw(*BATCH, FEATURES), draw(CLASSES, FEATURES)
    bias = draw(CLASSES)
    options = {
        "bias": bias,
        "scale": 1 + np.abs(draw(*BATCH)),
        "softcap": 5.0,
        "temperature": 1 + np.abs(draw(*BATCH)),
        "class_where": random.uniform(size=CLASSES) < 0.8,
    }
    u = options["scale"][..., None] * (hidden.astype(float) @ weight.T) + bias
    z = 5 * np.tanh(u / 5) / options["temperature"][..., None]
    return hidden, weight, options, np.where(options["class_where"], z, -np.inf)


def assert_drawn(found, z, min_p=None, key=KEY):
    wanted, margin = oracle.sample(z, words(key), min_p)
    assert found.dtype == jnp.int32
    assert found.shape == wanted.shape
    clear = margin > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(found)[clear], wanted[clear])


def chi_square(classes, p):
    """The probability that samples of p are as far from their expectation as these.

    Classes are joined in order of their probability until 20 of each are expected.
    """
    order = np.argsort(p)[(p == 0).sum() :]
    counts = np.bincount(classes, minlength=len(p))[order]
    assert counts.sum() == len(classes)
    expected = len(classes) * p[order] / p.sum()
    bins = np.floor(np.cumsum(expected) / 20).astype(int)
    bins = np.unique(np.minimum(bins, bins[-1] - 1), return_inverse=True)[1]
    join = lambda x: np.bincount(bins, weights=x)
    return stats.chisquare(join(counts), join(expected)).pvalue


def probabilities(z):
    e = np.exp(z - z.max())
    return e / e.sum()


# ---------------------------------------------------------------- by the definition
@pytest.mark.parametrize(
    ("vocab_axis", "chunks", "min_p"),
    [
        (0, (None, None), None),
        (1, (7, 4), None),
        (0, (256, 1), 0.3),
        (1, (700, 11), 0.3),
        (0, (7, 4), 0.3),
    ],
)
def test_is_the_argmax_of_logits_and_noise(vocab_axis, chunks, min_p):
    """Whatever the chunks: the noise of an entry belongs to its row and class."""
    hidden, weight, options, z = problem()
    found = of_head.sample(
        KEY,
        hidden,
        weight.T if vocab_axis else weight,
        vocab_axis=vocab_axis,
        vocab_chunk=chunks[0],
        token_chunk=chunks[1],
        min_p=min_p,
        **options,
    )
    assert_drawn(found, z, min_p)


@pytest.mark.parametrize("min_p", [None, 0.3])
def test_of_an_array_is_that_of_the_head(min_p):
    hidden, weight, options, z = problem()
    products = jnp.asarray(hidden) @ jnp.asarray(weight).T
    assert_drawn(of_stored.sample(KEY, products, min_p=min_p, **options), z, min_p)
    modifiers: Any = options
    head = LinearLogits(jnp.asarray(hidden), jnp.asarray(weight), **modifiers)
    found = of_stored.sample(KEY, head.materialize(), min_p=min_p)
    assert_drawn(found, z, min_p)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_of_every_dtype(dtype):
    random = np.random.default_rng(2)
    with jax.enable_x64(dtype == "float64"):
        hidden = jnp.asarray(random.normal(size=(40, 4)), dtype)
        weight = jnp.asarray(random.normal(size=(90, 4)), dtype)
        z = np.asarray(hidden, float) @ np.asarray(weight, float).T
        assert_drawn(of_head.sample(KEY, hidden, weight, vocab_chunk=32), z)
        stored = jnp.asarray(z, dtype)
        assert_drawn(of_stored.sample(KEY, stored), np.asarray(stored, float))


def test_shapes():
    """No batch axis, no row, one class."""
    hidden, weight = problem()[0], problem()[1][:50]
    z = hidden.astype(float) @ weight.T
    assert_drawn(of_head.sample(KEY, hidden[0, 0], weight), z[0, 0])
    assert of_head.sample(KEY, hidden[:0], weight).shape == (0, 5)
    assert of_stored.sample(KEY, jnp.zeros((0, 3))).shape == (0,)
    np.testing.assert_array_equal(of_stored.sample(KEY, jnp.zeros((4, 1))), 0)
    np.testing.assert_array_equal(of_head.sample(KEY, hidden, weight[:1]), 0)


# ------------------------------------------------------------------------------- law
def test_bits_are_those_of_fold_in():
    key = jax.random.key(3, impl="threefry2x32")
    fold = jax.vmap(lambda c: jax.random.key_data(jax.random.fold_in(key, c)))
    classes = np.array([0, 1, 255_999, 2**31 - 1], np.uint32)
    data = jax.random.key_data(key)
    pair = (np.zeros_like(classes), classes)
    counters = jnp.asarray(pair[0]), jnp.asarray(pair[1])
    found = sampling.threefry((data[0], data[1]), counters)
    np.testing.assert_array_equal(np.stack(found, -1), fold(classes))
    np.testing.assert_array_equal(oracle.threefry(data, pair), found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_is_gumbel(dtype):
    random = np.random.default_rng(0)
    first, second = random.integers(0, 2**32, (2, 200_000), np.uint32)
    # Near 0, where the largest noise comes from.
    small = random.integers(0, 2**32, 1000) // 2 ** random.integers(0, 33, 1000)
    first[:1000] = small
    first[:3], second[:3] = (0, 0, 2**32 - 1), (2**32 - 1, 0, 2**32 - 1)
    with jax.enable_x64(dtype == "float64"):
        found = jax.jit(sampling.gumbel, static_argnums=2)(
            first, second, np.dtype(dtype)
        )
        found = np.asarray(found)
        assert found.dtype == dtype
        wanted = -np.log(oracle.exponential(first, second))
    # Of float64 the coefficients are no more accurate than float64.
    many = 4 if dtype == "float32" else 100
    error = many * np.finfo(dtype).eps * np.maximum(1, np.abs(wanted))
    assert (np.abs(found - wanted) <= error).all()
    assert stats.kstest(wanted[1000:], "gumbel_r").pvalue > 1e-3
    assert wanted.max() > 22


def test_the_largest_noise_of_many_classes_is_no_tie():
    """23 bits, as `jax.random.gumbel` takes, leave thousands of equals here."""
    random = np.random.default_rng(0)
    first = random.integers(0, 2**18, 2000, np.uint32)  # w is below 2^-15
    second = random.integers(2**31, 2**32, 2000, np.uint32)
    make = jax.jit(sampling.gumbel, static_argnums=2)
    noise = np.asarray(make(first, second, np.dtype("float32")))
    assert noise.min() > 9
    assert len(np.unique(noise)) > 1900


@pytest.mark.parametrize("source", ["linear", "logits"])
def test_bits_and_logarithm_are_not_fused(source):
    """LLVM takes seconds for a loop with both, and minutes on a CPU of many threads."""
    hidden, weight, _, _ = problem()
    if source == "linear":
        arrays = (jnp.asarray(hidden), jnp.asarray(weight))
    else:
        arrays = (jnp.asarray(hidden @ weight.T),)
    lowered: Any = jax.jit(of(source).sample).lower(KEY, *arrays)
    # XLA fuses alike where LLVM does little, and the test ends where they are fused.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    shifts, logarithms = [], []
    for computation in compiled.as_text().split("\n}"):
        shifts.append(computation.count("shift-left("))
        logarithms.append(computation.count(" log("))
    assert max(shifts) >= 20  # The bits of a class: one for each round.
    assert max(shifts) < 40  # Not those of the row's key beside them.
    assert sum(logarithms) == 1
    assert shifts[logarithms.index(1)] == 0


@pytest.mark.parametrize("source", ["linear", "logits"])
def test_has_the_law_of_the_softmax(source):
    """A few classes, and rows and keys alike."""
    z = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.04, 0.009, 0.001]))
    arrays = (jnp.asarray(z, "float32"),)
    if source == "linear":
        arrays = (jnp.ones(1), jnp.asarray(z[:, None], "float32"))
    draw = lambda key: of(source).sample(key, *arrays)
    keys = jax.random.split(KEY, 20_000)
    found = jax.jit(jax.vmap(draw))(keys)
    assert chi_square(found, np.exp(z)) > 1e-3
    many = [jnp.broadcast_to(arrays[0], (20_000, *arrays[0].shape)), *arrays[1:]]
    found = of(source).sample(KEY, *many)
    assert chi_square(found, np.exp(z)) > 1e-3
    # The test sees a law that is a little another.
    assert chi_square(found, np.exp(z) + 0.02 * (z < -3)) < 1e-3


def test_has_the_law_of_the_softmax_over_thousands_of_classes():
    random = np.random.default_rng(1)
    weight = random.normal(size=(3000, 4)).astype("float32")
    h = np.array([1.0, -0.5, 2.0, 0.3], "float32")
    hidden = np.broadcast_to(h, (4000, 4))
    z = weight.astype(float) @ h
    found = of_head.sample(KEY, hidden, weight, vocab_chunk=512)
    assert chi_square(found, probabilities(z)) > 1e-3
    kept = np.where(z < z.max() + np.log(0.05), -np.inf, z)
    found = of_head.sample(KEY, hidden, weight, min_p=0.05, vocab_chunk=512)
    assert np.isfinite(kept[np.asarray(found)]).all()
    assert chi_square(found, probabilities(kept)) > 1e-3


def test_rows_are_independent():
    """Pairs of rows of equal logits agree as often as independent ones."""
    found = np.asarray(of_stored.sample(KEY, jnp.zeros((40_000, 4))))
    pairs = found[:-1] * 4 + found[1:]
    assert chi_square(pairs[::2], np.full(16, 1 / 16)) > 1e-3
    more = of_stored.sample(jax.random.fold_in(KEY, 1), jnp.zeros((40_000, 4)))
    assert chi_square(found * 4 + np.asarray(more), np.full(16, 1 / 16)) > 1e-3


# ---------------------------------------------------------------------- reproducible
def test_rows_behind_others_do_not_change_these():
    hidden, weight, _, _ = problem()
    whole = of_head.sample(KEY, hidden, weight)
    np.testing.assert_array_equal(of_head.sample(KEY, hidden[:2], weight), whole[:2])
    flat = of_head.sample(KEY, hidden.reshape(-1, FEATURES), weight)
    np.testing.assert_array_equal(flat, np.ravel(whole))


@pytest.mark.usefixtures("eager")
def test_a_key_of_any_kind():
    hidden, weight, _, _ = problem()
    logits = LinearLogits(jnp.asarray(hidden), jnp.asarray(weight))
    draw = softlib.logits.sample
    wanted = draw(KEY, logits)
    np.testing.assert_array_equal(draw(jax.random.key_data(KEY), logits), wanted)
    np.testing.assert_array_equal(jax.jit(draw)(KEY, logits), wanted)
    other = draw(jax.random.key(7, impl="rbg"), logits)
    assert (np.asarray(other) != wanted).any()
    assert_drawn(other, logits.materialize(), key=jax.random.key(7, impl="rbg"))


@pytest.mark.parametrize("source", ["linear", "logits"])
def test_batched_keys(source):
    hidden, weight, _, _ = problem()
    keys = jax.random.split(KEY, BATCH[0])
    if source == "linear":
        draw = lambda key, h: of_head.sample(key, h, weight, vocab_chunk=128)
        rows = jnp.asarray(hidden)
    else:
        draw = of_stored.sample
        rows = jnp.asarray(hidden) @ weight.T
    mapped = jax.jit(jax.vmap(draw))(keys, rows)
    for key, row, found in zip(keys, rows, mapped, strict=True):
        np.testing.assert_array_equal(found, draw(key, row))


def test_temperature_divides_the_logits():
    hidden, weight, _, _ = problem()
    z = hidden.astype(float) @ weight.T
    tau = 0.5 + np.arange(15, dtype="float32").reshape(BATCH) / 10
    for temperature in (0.7, jnp.asarray(0.7), tau):
        wanted = z / np.asarray(temperature, float).reshape(*np.shape(temperature), 1)
        logits = LinearLogits(jnp.asarray(hidden), jnp.asarray(weight))
        found = softlib.logits.sample(KEY, logits, temperature=temperature)
        assert_drawn(found, wanted)
        found = softlib.logits.sample(
            KEY, logits.materialize(), temperature=temperature
        )
        assert_drawn(found, wanted)


# --------------------------------------------------------------------------- promises
@pytest.mark.parametrize("source", ["linear", "logits"])
def test_a_class_that_is_excluded_is_never_drawn(source):
    hidden = np.zeros((4000, 1), "float32")
    weight = np.ones((6, 1), "float32")
    bias = np.array([0, -np.inf, 0, 0, 30, 0], "float32")
    where = np.array([True, True, True, False, False, True])
    arrays = tuple(map(jnp.asarray, (hidden, weight)))
    arrays = arrays if source == "linear" else (jnp.asarray(hidden @ weight.T),)
    draw = of(source).sample
    found = draw(KEY, *arrays, bias=bias, class_where=where)
    np.testing.assert_array_equal(np.unique(found), [0, 2, 5])


@pytest.mark.parametrize("min_p", [None, 0.5])
@pytest.mark.parametrize("source", ["linear", "logits"])
def test_rows_without_a_class_or_with_nan_are_minus_one(source, min_p):
    hidden = np.zeros((5, 1), "float32")
    weight = np.array([[1.0], [2.0], [0.0], [3.0]], "float32")
    hidden[1], hidden[2], hidden[3] = np.nan, np.inf, -np.inf
    arrays = (jnp.asarray(hidden), jnp.asarray(weight))
    if source == "logits":
        arrays = (jnp.asarray(hidden) @ weight.T,)
    draw = functools.partial(of(source).sample, min_p=min_p)
    found = draw(KEY, *arrays)
    np.testing.assert_array_equal(np.asarray(found) == -1, [0, 1, 1, 1, 0])
    none = draw(KEY, *arrays, class_where=np.zeros(4, bool))
    np.testing.assert_array_equal(none, -1)
    some = draw(KEY, *arrays, bias=np.full(4, -np.inf, "float32"))
    assert (np.asarray(some) == -1)[[0, 4]].all()


def test_an_infinite_logit_makes_the_row_minus_one():
    z = jnp.array([[0.0, jnp.inf, 0.0], [-jnp.inf, 0.0, -jnp.inf], [-jnp.inf] * 3])
    np.testing.assert_array_equal(of_stored.sample(KEY, z), [-1, 1, -1])


@pytest.mark.parametrize("source", ["linear", "logits"])
def test_min_p_keeps_what_is_at_least_its_share_of_the_largest(source):
    p = np.array([0.4, 0.201, 0.199, 0.15, 0.05])
    hidden = np.ones((4000, 1), "float32")
    weight = np.log(p)[:, None].astype("float32")
    arrays = tuple(map(jnp.asarray, (hidden, weight)))
    arrays = arrays if source == "linear" else (jnp.asarray(hidden @ weight.T),)
    draw = of(source).sample
    found = lambda min_p, **more: np.unique(draw(KEY, *arrays, min_p=min_p, **more))
    np.testing.assert_array_equal(found(0.5), [0, 1])
    np.testing.assert_array_equal(found(1), [0])
    np.testing.assert_array_equal(found(0.01), [0, 1, 2, 3, 4])
    # The temperature comes first.
    np.testing.assert_array_equal(found(0.5, temperature=2.0), [0, 1, 2, 3])
    each = jnp.where(jnp.arange(4000) < 2000, 1.0, 0.49)
    classes = np.asarray(draw(KEY, *arrays, min_p=each))
    np.testing.assert_array_equal(classes[:2000], 0)
    np.testing.assert_array_equal(np.unique(classes[2000:]), [0, 1, 2])
    bad = draw(KEY, *arrays, min_p=each.at[3].set(jnp.nan))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(bad) == -1), [3])


def test_min_p_of_one_is_the_likeliest_class():
    hidden, weight, options, z = problem()
    found = of_head.sample(KEY, hidden, weight, min_p=1.0, vocab_chunk=9, **options)
    np.testing.assert_array_equal(found, z.argmax(-1))


def test_has_no_gradient_and_passes_through_grad():
    hidden, weight, _, _ = problem()

    def total(hidden, weight):
        classes = of_head.sample(KEY, hidden, weight, vocab_chunk=64)
        return (hidden.sum(-1) * classes).sum()

    slope = jax.grad(total, (0, 1))(jnp.asarray(hidden), jnp.asarray(weight))
    classes = of_head.sample(KEY, hidden, weight, vocab_chunk=64)
    wanted = np.broadcast_to(np.asarray(classes, "float32")[..., None], hidden.shape)
    np.testing.assert_array_equal(slope[0], wanted)
    np.testing.assert_array_equal(slope[1], 0)


# ---------------------------------------------------------------------- devices, memory
@pytest.mark.parametrize(
    ("kind", "check_vma", "min_p"),
    [(AxisType.Explicit, True, 0.2), (AxisType.Auto, False, None)],
)
def test_divided_classes_give_the_same_samples(kind, check_vma, min_p):
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(kind, kind))
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, table = draw(2, 64, 3), draw(96, 3)
    hidden = hidden.at[0, 0].set(jnp.nan)
    where = jnp.arange(96) >= 30  # the first device has none
    one = lambda rows, key: of_head.sample(
        key, rows, table, class_where=where, min_p=min_p
    )
    keys = jax.random.split(KEY, 2)

    def call(key, rows, table, where):
        key = jax.random.wrap_key_data(key[0])
        logits = LinearLogits(
            rows[0], table, class_where=where, axis_name="classes", vocab_chunk=7
        )
        return softlib.logits.sample(key, logits, min_p=min_p)[None]

    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("classes"), P("classes")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        operands = (
            place(jax.random.key_data(keys), P("data")),
            place(hidden, P("data")),
            place(table, P("classes")),
            place(where, P("classes")),
        )
        several = jax.device_get(jax.jit(mapped)(*operands))
    for found, rows, key in zip(several, hidden, keys, strict=True):
        np.testing.assert_array_equal(found, one(rows, key))
    assert several[0, 0] == -1
    assert len(np.unique(several)) > 10


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (AxisType.Explicit, "linear"),
        (AxisType.Explicit, "stored"),
        (AxisType.Auto, "linear"),
    ],
)
def test_rows_on_a_mesh_are_those_of_one_device(kind, form):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    random = np.random.default_rng(1)
    hidden = jnp.asarray(random.normal(size=(16, 5)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(90, 5)), jnp.float32)

    def call(rows, weight):
        logits: Any = LinearLogits(rows, weight, vocab_chunk=32)
        if form == "stored":
            logits = StoredLogits(rows, temperature=2.0)
        return softlib.logits.sample(KEY, logits, min_p=0.01)

    one = jax.jit(call)(hidden, weight)
    with jax.set_mesh(mesh):
        rows = jax.device_put(hidden, NamedSharding(mesh, P("data")))
        several = jax.jit(call)(rows, jax.device_put(weight, NamedSharding(mesh, P())))
        assert several.sharding.is_equivalent_to(rows.sharding, 1) or kind != "Explicit"
    np.testing.assert_array_equal(several, one)


def test_stores_no_row():
    """Logits of 49 MiB; three tiles of a MiB are what it needs."""
    struct = jax.ShapeDtypeStruct
    arrays = struct((64, 32), jnp.float32), struct((200_000, 32), jnp.float32)
    call = lambda h, w: softlib.logits.sample(KEY, LinearLogits(h, w), min_p=0.1)
    compiled = jax.jit(call).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert 0 < memory.temp_size_in_bytes < 5 * 2**20
    # The noise of a tile is made once, though two reductions read it: 20 rotations.
    program = compiled.as_text() or ""
    assert program.count("= u32[64,4096]{1,0} shift-left(") == 20


# ----------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "`temperature` must be positive, got 0"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive, got 0.0"),
        ({"temperature": np.ones(3)}, ValueError, r"`temperature` must have shape"),
        ({"min_p": 0}, ValueError, r"`min_p` must be in \(0, 1\], got 0"),
        ({"min_p": 1.5}, ValueError, r"`min_p` must be in \(0, 1\], got 1.5"),
        ({"min_p": True}, TypeError, "`min_p` must be a number or a floating array"),
        ({"min_p": np.ones(2, int)}, TypeError, "`min_p` must have a floating dtype"),
    ],
)
def test_wrong_options_are_named(call, error, message):
    logits: Any = jnp.zeros((2, 4))
    with pytest.raises(error, match=f"^sample: {message}"):
        softlib.logits.sample(KEY, logits, **call)


@pytest.mark.usefixtures("untyped")
def test_wrong_logits_are_named():
    eye = jnp.eye(4)
    warm = StoredLogits(eye, temperature=2.0)
    with pytest.raises(ValueError, match="sample: `temperature` of the logits must be"):
        softlib.logits.sample(KEY, warm, temperature=1.0)
    exact = LinearLogits(eye, eye, implementation="reference")
    with pytest.raises(ValueError, match="sample: `implementation` of the logits must"):
        softlib.logits.sample(KEY, exact)
    filtered = LinearLogits(eye, eye, gradient_filter_eps=1e-3)
    with pytest.raises(ValueError, match="sample: `gradient_filter_eps` of the logits"):
        softlib.logits.sample(KEY, filtered)
