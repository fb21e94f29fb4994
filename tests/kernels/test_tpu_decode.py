"""Decode attention on TPUs, in the simulating interpreter, against the oracle."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import softlib
from pallas_kernels._devices import ANY_TPU, V4, V5E, V5P, V6E, V7X
from pallas_kernels.tpu import decode_tiles
from pallas_kernels.tpu.decode_tiles import Tiles
from softlib.attention import decode_attention
from softlib.attention._decode import kernels as _kernels
from softlib.testing import assert_close
from tests import operations
from tests.attention.decode_problems import problem
from tests.host import jnp
from tests.kernels import decode_problems as problems

SIMULATED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
PLAIN: Any = True
LENGTHS = (150, 0, 77)


@pytest.fixture
def interpreted(monkeypatch):
    """Compiles `decode_attention` by the kernel, with small tiles.

    What comes is a program of arrays, lengths and of the numbers of a unified maximum.
    """
    monkeypatch.setattr(_kernels, "LEAST_KEYS", 1)
    monkeypatch.setattr(_kernels, "LEAST_FEATURES", 1)

    def compiled(arrays, lengths, *, tiles, mode=PLAIN, numbers=(), **options):
        monkeypatch.setattr(_kernels.tpu, "choose_tiles", lambda *_: tiles)

        @jax.jit
        def decode(arrays, traced):
            found = decode_attention(
                **arrays,
                **traced,
                **options,
                implementation="pallas_tpu",
                return_statistics=True,
            )
            return found.output, found

        with pltpu.force_tpu_interpret_mode(mode), operations.kernels_of("tpu"):
            program = decode.lower(arrays, problems.traced(lengths, numbers)).compile()
        return lambda arrays, lengths, numbers=(): program(
            arrays, problems.traced(lengths, numbers)
        )

    return compiled


def small(dtype="float32", *, B=3, S=150, seed=0, **sizes):
    return problem(dtype, B=B, S=S, seed=seed, **{"H": 16, "Hv": 24, **sizes})


# Sizes, tiles, options of the kernel and of the oracle, options of the kernel.
CASES: dict[str, Any] = {
    "no lengths": ({"lengths": None, "S": 128, "B": 2}, Tiles(64, 64), {}, {}),
    "one head": ({"N": 3, "K": 1}, Tiles(128, 128), {}, {"phi": 0.3}),
    "three heads": ({"N": 9, "K": 3}, Tiles(128, 128), {}, {"phi": 0.3}),
    "unified": ({"N": 8}, Tiles(64, 64), {}, {"phi": 0.3}),
    "causal draft, softcap": (
        {"T": 3, "lengths": (150, 2, 65)},
        Tiles(64, 64),
        {"is_causal": True, "softcap": 2.0},
        {"phi": 0.0},
    ),
    "sinks": ({"sinks": True, "B": 2}, Tiles(128, 64), {"softcap": 2.0}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, Tiles(64, 64), {}, {"phi": 0.3}),
    "bfloat16, running": (
        {"dtype": "bfloat16", "N": 10, "K": 5, "T": 2},
        Tiles(128, 128),
        {},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name, interpreted):
    sizes, tiles, shared, options = CASES[name]
    sizes = dict(sizes)
    lengths = sizes.pop("lengths", LENGTHS[: sizes.get("B", 3)])
    arrays = small(**sizes)
    mode: Any = SIMULATED if name in SIMULATED_CASES else PLAIN
    numbers = {n: np.float32(x) for n, x in options.items()}
    call = interpreted(
        arrays, lengths, tiles=tiles, mode=mode, numbers=numbers, **shared
    )
    out, statistics = call(arrays, lengths, numbers)
    check(arrays, lengths, out, statistics, **shared)
    assert not statistics.needs_recompute.any()


def check(arrays, lengths, out, statistics, scale=1, **shared):
    """Results by the oracle's; `scale` is that of the largest scores."""
    keys, features = 150, 16
    problems.check_results(
        *(arrays, lengths, out, statistics),
        # Scores of some hundreds are as exact as their products.
        keys=keys * scale**2,
        features=features * scale**2,
        out_length=keys * scale**2,
        **shared,
    )


# These with races, and "row_max" below.
SIMULATED_CASES = ("bfloat16",)

# By criterion the valid ranges; in the last the scores of the first sequence are large.
WIDE = (-70.0, 80.0)
RANGES: dict[Any, dict[str, tuple[float, float]]] = {
    None: {},
    "row_max": {"above": (-70.0, 3.0), "below": (2.0, 80.0), "overflow": (-70.0, 2e3)},
    "elementwise": {"an element": (-5.0, 80.0)},
}
PHI = np.full(6, problems.PHI, np.float32)


@pytest.mark.parametrize("criterion", RANGES)
def test_one_program_of_several_problems(criterion, interpreted):
    """Within its range, out of it, and with NaN; the running maximum has no range."""
    arrays, lengths = small(B=3, N=6, K=2, H=6), (150, 40, 0)
    mode: Any = SIMULATED if criterion == "row_max" else PLAIN
    options = {} if criterion is None else {"criterion": criterion}

    numbers = functools.partial(problems.unified, criterion)
    call = interpreted(
        *(arrays, lengths),
        tiles=Tiles(64, 64),
        mode=mode,
        numbers=numbers(PHI, WIDE),
        **options,
    )
    out, statistics = call(
        arrays, lengths, numbers(np.linspace(-2, 2, 6, dtype=np.float32), WIDE)
    )
    check(arrays, lengths, out, statistics)
    assert not statistics.needs_recompute.any()
    for name, valid_range in RANGES[criterion].items():
        given = numbers(PHI, valid_range)
        problems.check_rows_that_leave_the_range(
            name, call, check, arrays, lengths, criterion, given, overflow=200
        )
    # The range is left, so that both passes meet what lies behind.
    left = numbers(0 * PHI, (-70.0, 4.0))
    found = problems.check_what_lies_behind_the_length(
        call, check, arrays, lengths, left
    )
    assert found.needs_recompute.any() or criterion is None
    check_nan_stays_with_the_rows_of_its_head(call, arrays, numbers(0 * PHI, WIDE))


def check_nan_stays_with_the_rows_of_its_head(call, arrays, numbers):
    """All heads share a product: what is not finite in one is not in the others."""
    key, value = np.array(arrays["key"]), np.array(arrays["value"])
    value[0, 7, 1] = np.nan
    key[1, 8, 0] = np.nan
    value[1, 9, 1, 0] = np.inf
    out, _ = call(arrays | {"key": key, "value": value}, (150, 150, 150), numbers)
    nan = np.isnan(out[:, 0])
    of_heads = [[False] * 3 + [True] * 3, [True] * 3 + [False] * 3]
    np.testing.assert_array_equal(nan[0].all(1), of_heads[0])
    np.testing.assert_array_equal(nan[0].any(1), of_heads[0])
    np.testing.assert_array_equal(nan[1].all(1), of_heads[1])
    # Infinity or NaN: a product of float32 is one of parts, some of which are 0.
    assert not np.isfinite(out[1, 0, 3:, 0]).any()
    assert np.isfinite(out[1, 0, 3:, 1:]).all()
    assert np.isfinite(out[2]).all()


@pytest.mark.usefixtures("interpreted")
def test_gradients_are_those_of_plain_jax(monkeypatch):
    """The kernel's lse and out are all that the derivative needs of it."""
    arrays = small(B=2)
    lengths = jnp.asarray([150, 31])

    def loss(arrays, implementation=None):
        options: Any = {"key_value_seq_lengths": lengths, "phi": 0.5}
        out, lse = decode_attention(
            **arrays,
            **options,
            valid_range=(-70.0, 4.0),
            implementation=implementation,
            return_lse=True,
        )
        return (out**2).sum() + (lse**2).sum()

    gradient = lambda name: jax.jit(
        jax.grad(functools.partial(loss, implementation=name))
    )
    plain = gradient("xla")(arrays)
    monkeypatch.setattr(_kernels.tpu, "choose_tiles", lambda *_: Tiles(64, 64))
    with pltpu.force_tpu_interpret_mode(PLAIN), operations.kernels_of("tpu"):
        found = gradient("pallas_tpu")(arrays)
    for name, value in found.items():
        assert_close(value, np.asarray(plain[name]), dtype="float32", length=150)


# --------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("device", [V4, V5E, V5P, V6E, V7X, ANY_TPU], ids=str)
@pytest.mark.parametrize("heads", [1, 3, 8, 12, 64])
def test_tiles_fit(device, heads):
    for features, size in (((128, 128), 2), ((64, 96), 4), ((576, 512), 2)):
        tiles = decode_tiles.choose_tiles(
            heads, 32_768, heads, features, (size, size), device
        )
        assert tiles is not None
        assert tiles.keys % tiles.chunk == 0
        assert tiles.chunk * heads % 128 == 0
        arrays = (jnp.zeros((1, 1, heads, n), f"float{8 * size}") for n in features)
        assert decode_tiles.vmem_bytes(tiles, *arrays) <= device.vmem_bytes


def test_a_faster_memory_has_larger_blocks():
    choose = functools.partial(
        decode_tiles.choose_tiles, 32, 32_768, 8, (128, 128), (2, 2)
    )
    slow, fast = choose(V5E), choose(V6E)
    assert slow is not None
    assert fast is not None
    assert slow.keys < fast.keys


# ----------------------------------------------------------------------------- dispatch
ARRAYS = {
    "query": jax.ShapeDtypeStruct((4, 1, 32, 128), jnp.bfloat16),
    "key": jax.ShapeDtypeStruct((4, 4096, 8, 128), jnp.bfloat16),
    "value": jax.ShapeDtypeStruct((4, 4096, 8, 128), jnp.bfloat16),
}


@pytest.mark.parametrize("phi", [None, 0.0])
def test_lowered_for_a_tpu_it_is_one_kernel(phi):
    traced = jax.jit(functools.partial(decode_attention, phi=phi)).trace(**ARRAYS)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 1
    assert "stablehlo.dot_general" not in text
    assert "stablehlo.while" not in text
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("phi", [None, 0.0])
def test_devices_that_share_the_keys_have_a_kernel_each(phi):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    cache = P(None, "i")
    call = jax.shard_map(
        lambda query, key, value: decode_attention(
            query, key, value, axis_name="i", phi=phi
        ),
        mesh=mesh,
        in_specs=(P(), cache, cache),
        out_specs=P(),
    )
    text = jax.jit(call).trace(*ARRAYS.values()).lower(lowering_platforms=("tpu",))
    # With phi the kernel by the running maximum stands by.
    assert text.as_text().count("@tpu_custom_call") == (1 if phi is None else 2)


def test_derivatives_have_the_kernel():
    loss = lambda query, key, value: (
        decode_attention(query, key, value, phi=0.0).astype(jnp.float32) ** 2
    ).sum()
    for call in (jax.grad(loss), jax.grad(lambda *a: (jax.grad(loss)(*a) ** 2).sum())):
        lowered = jax.jit(call).trace(*ARRAYS.values())
        text = lowered.lower(lowering_platforms=("tpu",)).as_text()
        assert "@tpu_custom_call" in text


def explained(*, key_shape=(4, 4096, 8, 128), dtype=jnp.bfloat16, **options):
    arrays = {
        "query": jax.ShapeDtypeStruct((4, 1, 32, key_shape[3]), dtype),
        "key": jax.ShapeDtypeStruct(key_shape, dtype),
        "value": jax.ShapeDtypeStruct(key_shape, dtype),
    }
    for name in ("query", "value"):
        shape = options.pop(name, arrays[name].shape)
        arrays[name] = jax.ShapeDtypeStruct(shape, dtype)
    return str(
        softlib.explain(functools.partial(decode_attention, **options), **arrays)
    )


def test_explain_tells_the_blocks():
    for phi in (None, 0.0):
        text = explained(phi=phi)
        assert "tpu: pallas_tpu" in text
        assert "pallas_tpu: blocks of " in text


REFUSALS: dict[str, Any] = {
    "512 keys are too few": {"key_shape": (4, 512, 8, 128)},
    "16 features of a key are too few": {"key_shape": (4, 4096, 8, 16)},
    "`query` is float16, not float32 or bfloat16": {"dtype": jnp.float16},
    "it reads the keys of a sequence in one go (num_splits)": {"num_splits": 2},
    "320 rows of queries are more than 256": {"query": (4, 10, 32, 128)},
    "products are those of the bfloat16 of `key`": {"precision": "highest"},
    "an array is empty": {"query": (4, 0, 32, 128)},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    text = explained(**REFUSALS[reason])
    assert f"not pallas_tpu: {reason}" in text
    assert "tpu: pallas_tpu" not in text.replace("not pallas_tpu", "")
