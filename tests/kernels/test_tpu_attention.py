"""Block-sparse attention for TPUs, in the interpreter, against the dense oracle."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pallas_kernels._attention_extras import Extras
from pallas_kernels._devices import ANY_TPU, V4, V5E, V5P, V6E, V7X
from pallas_kernels.tpu import (
    attention as forward_pass,
    attention_key_gradient,
    attention_lists,
    attention_query_gradient,
    attention_tiles,
)
from pallas_kernels.tpu.attention_tiles import Tiles
from softlib import attention, explain, masks
from softlib.attention._engine import kernels_tpu
from softlib.attention._engine.plan import plan_of
from softlib.attention._engine.scores import LogSoftplus, Softplus, StableMax
from softlib.attention._engine.tiles import Operands, Options
from tests.host import jnp
from tests.kernels import attention_problems as problems

SIMULATED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
# Two pieces of each kind, so that buffers are used again, and two chunks.
SMALL = Tiles(128, 256, 64, 256)


@dataclasses.dataclass(frozen=True)
class Problem(problems.Problem):
    """With its tiles."""

    T: int = 150
    S: int = 300
    N: int = 2
    H: int = 24
    E: int = 40
    dtype: str = "float32"
    tiles: Tiles = SMALL


class Classes(masks.Mask):
    """Positions of one class, in a table that is part of the program."""

    def attends(self, query_index, key_index):
        table = np.arange(1000) ** 2 % 7
        return jnp.asarray(table)[query_index] == jnp.asarray(table)[key_index]


class Near(masks.Mask):
    """Positions close in time."""

    times: Any = masks.array_field(axes=1)

    def attends(self, query_index, key_index):
        return jnp.abs(self.times[query_index] - self.times[key_index]) < 0.3


BANDED = masks.Window(40, 20)
# No key for the first queries, no query for the last keys.
LATE = masks.Causal(-140) & masks.Window(200, 0)
UNEVEN = Tiles(256, 128, 128, 128)
IN_TURN = Tiles(128, 256, 64, 128, overlapped=False)


def packed(batch: int, length: int) -> np.ndarray:
    """Ids of a few sequences, one after the other; -1 for padding, here and there."""
    ids = np.sort(np.random.default_rng(length).integers(0, 4, (batch, length)))
    ids[:, -7:] = ids[:, 40:44] = -1
    return ids


PROBLEMS = {
    "causal": Problem(tiles=IN_TURN),
    "aligned, heads in groups": Problem(
        *(masks.All(), 256, 256, 6, 2, 128, 128), dtype="bfloat16"
    ),
    "radial": Problem(masks.Radial(70), T=280, S=280, N=1, dtype="bfloat16"),
    "empty rows, sinks": Problem(LATE, T=300, S=400, sinks=True, tiles=IN_TURN),
    "lengths": Problem(
        *(BANDED, 150, 300), B=2, lengths=(0, 100), sinks=True, dtype="bfloat16"
    ),
    "softplus": Problem(LATE, T=260, N=1, kind=Softplus(), dtype="bfloat16"),
    "log softplus": Problem(kind=LogSoftplus(), softcap=3.0, dtype="bfloat16"),
    "stablemax": Problem(
        LATE | masks.Prefix(3), K=2, B=2, kind=StableMax(), dtype="bfloat16"
    ),
    "segments": Problem(
        masks.Segments(packed(2, 150), packed(2, 300)) & masks.Causal(150),
        *(150, 300, 4, 2),
        B=2,
        sinks=True,
        softcap=3.0,
        tiles=IN_TURN,
    ),
    "array, empty rows, heads in groups": Problem(
        masks.Causal(150), K=1, B=2, dense="bts", dtype="bfloat16"
    ),
    "bias, array of keys, ragged": Problem(
        *(BANDED, 150, 300, 2, 2),
        B=2,
        dense="bs",
        bias="nts-",
        sinks=True,
        softcap=3.0,
        dtype="bfloat16",
    ),
    "extreme scores": Problem(spread=300.0, N=1, dtype="bfloat16"),
}
# The same with other tiles, dtypes and combinations.
MORE = {
    "booleans of keys": Problem(BANDED, dense="bs", B=2, K=2, dtype="bfloat16"),
    "float32 bias, ragged": Problem(bias="nts-", sinks=True, softcap=3.0),
    "array per head, bias, aligned": Problem(
        *(masks.All(), 256, 256, 2, 1),
        dense="nts",
        bias="ts",
        bias_dtype="bfloat16",
        dtype="bfloat16",
        tiles=IN_TURN,
    ),
    "bias of keys, array of queries, per head": Problem(
        masks.Segments(packed(2, 150), packed(2, 300)),
        *(150, 300, 4, 2),
        B=2,
        dense="bnt",
        bias="ns",
        dtype="bfloat16",
    ),
    "booleans of queries": Problem(LATE, T=260, N=1, dense="t", tiles=IN_TURN),
    "segments, aligned": Problem(
        masks.Segments(packed(1, 256)[0]), 256, 256, dtype="bfloat16"
    ),
    "ids of one byte, another mask": Problem(
        masks.Window(60, 9) | masks.Segments(packed(2, 290).astype(np.int8)),
        *(280, 290, 3, 1),
        B=2,
        kind=Softplus(),
        dtype="bfloat16",
    ),
    "segments, an offset that is data": Problem(
        (masks.Segments(packed(2, 320)) & masks.Causal()).shift(np.array([9, 150])),
        *(150, 300),
        B=2,
        lengths=(300, 200),
        sinks=True,
        tiles=UNEVEN,
    ),
    "a table": Problem(Classes(), T=300, S=270, N=1, dtype="bfloat16"),
    "times": Problem(
        Near(np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)),
        B=2,
        N=1,
        kind=StableMax(),
        tiles=IN_TURN,
    ),
    "groups, a late start": Problem(masks.Causal(150), N=6, K=2, B=2, tiles=IN_TURN),
    "window": Problem(BANDED, T=300, S=270, N=1, dtype="bfloat16", tiles=UNEVEN),
    "dropped frames": Problem(masks.Radial(5), S=290, N=1, E=136, dtype="bfloat16"),
    "empty rows and columns": Problem(LATE, T=300, S=400, dtype="bfloat16"),
    "softcap": Problem(softcap=2.0, H=136, spread=3.0, tiles=IN_TURN),
    "float32 softplus": Problem(LATE, T=260, N=1, kind=Softplus(), tiles=IN_TURN),
    "float32 stablemax": Problem(BANDED, N=1, kind=StableMax(), tiles=IN_TURN),
    "float32 log softplus": Problem(kind=LogSoftplus(), softcap=3.0, tiles=IN_TURN),
    "overlapped float32": Problem(N=1, T=270, sinks=True),
    "float32 array and bias": Problem(
        *(LATE, 264, 300, 2, 1), dense="bnts", bias="bnts-"
    ),
    "numbers": Problem(B=2, N=2, dense="b", bias="bn", tiles=UNEVEN),
    "array of queries, bias of keys of each entry": Problem(
        *(masks.All(), 290, 280, 2, 2), B=2, dense="bnt", bias="bns", lengths=(0, 170)
    ),
    "softplus, bias": Problem(
        *(BANDED, 150, 300, 2, 1), kind=Softplus(), bias="nts", dense="s", tiles=UNEVEN
    ),
    "log softplus, bias": Problem(
        kind=LogSoftplus(), softcap=3.0, bias="bts", dense="nts", tiles=IN_TURN
    ),
    "stablemax, bias": Problem(
        *(BANDED, 150, 300, 2),
        kind=StableMax(),
        dense="nt",
        bias="ts-",
        bias_dtype="float16",
        dtype="bfloat16",
    ),
}


@pytest.fixture
def given_tiles(monkeypatch):
    """Small tiles, and lists that hold few entries."""

    def give(
        tiles: Tiles, mode: Any, most_entries: int = attention_lists.MOST_ENTRIES
    ) -> None:
        for module, name in (
            (forward_pass, "attention"),
            (attention_query_gradient, "query_gradient"),
            (attention_key_gradient, "key_value_gradient"),
        ):
            kernel = functools.partial(getattr(module, name), interpret=mode)
            monkeypatch.setattr(module, name, kernel)
        turned = dataclasses.replace(tiles, rows=min(tiles.query, 128), keys=128)
        of = lambda which, *_: turned if which == "key" else tiles
        monkeypatch.setattr(kernels_tpu, "_tiles", of)
        monkeypatch.setattr(kernels_tpu, "MOST_ENTRIES", most_entries)
        forget()

    def forget() -> None:
        kernels_tpu._lists.cache_clear()
        jax.clear_caches()  # of traces with other tiles

    yield give
    forget()


def check(problem: Problem) -> Any:
    return problems.check(problem, kernels_tpu, c=4 * problem.spread)


@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_gradients(name, given_tiles):
    given_tiles(PROBLEMS[name].tiles, True)
    check(PROBLEMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_outputs_and_gradients(name, given_tiles):
    given_tiles(MORE[name].tiles, True)
    check(MORE[name])


def test_nothing_races(given_tiles):
    given_tiles(SMALL, SIMULATED)
    problem = dataclasses.replace(PROBLEMS["lengths"], N=1, dense="bts", bias="nts")
    check(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_races_anywhere(name, given_tiles):
    given_tiles(PROBLEMS[name].tiles, SIMULATED)
    check(PROBLEMS[name])


def test_several_lists_write_one_result(given_tiles):
    problem = PROBLEMS["radial"]
    plan = plan_of(problem.mask, (problem.T, problem.S), (SMALL.query, SMALL.key))
    assert plan.whole.shape[1] + plan.partial.shape[1] > 4
    given_tiles(SMALL, True, most_entries=4)
    check(problem)


def test_what_no_query_reads_may_be_nan(given_tiles):
    """Blocks outside of the list are not fetched, and its empty rows are written."""
    given_tiles(SMALL, True)
    mask = masks.Causal(-140) & masks.Window(240, 0)
    problem = Problem(mask, T=300, S=520, N=1, dtype="bfloat16")
    operands, options = problem.operands(), problem.options()

    def blank(x):
        x = np.array(x)
        x[:, 256:] = np.nan
        return jnp.asarray(x)

    forward = jax.jit(functools.partial(kernels_tpu.FORWARD.call, options))
    given = operands._replace(key=blank(operands.key), value=blank(operands.value))
    expected, found = (jax.tree.map(np.asarray, forward(x)) for x in (operands, given))
    np.testing.assert_array_equal(found.out, expected.out)
    np.testing.assert_array_equal(found.out[:, :140], 0)
    np.testing.assert_array_equal(found.normalizer[:, :140], -np.inf)
    assert (found.out[:, 140:] != 0).any((-2, -1)).all()


# ----------------------------------------------------------------- lists and tile sizes
def entries_of(packed: np.ndarray) -> np.ndarray:
    """(row, column, kind, first, last) of every entry."""
    return np.stack([packed >> 17, packed >> 4 & 8191, packed >> 2 & 3, *flags(packed)])


def flags(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return packed >> 1 & 1, packed & 1


def test_a_list_holds_every_block_once_and_rows_without_one():
    rows, columns = np.array([3, 0, 0]), np.array([1, 2, 0])
    whole = np.array([False, True, False])
    (found,) = attention_lists.lists(rows, columns, whole, 5)
    some, every, nothing = attention_lists.SOME, attention_lists.ALL, 0
    expected = [
        *[(0, 0, some, 1, 0), (0, 2, every, 0, 1), (1, 0, nothing, 1, 1)],
        *[(2, 0, nothing, 1, 1), (3, 1, some, 1, 1), (4, 0, nothing, 1, 1)],
    ]
    np.testing.assert_array_equal(entries_of(found).T, expected)


def test_lists_that_are_cut_keep_rows_together():
    rows, columns = np.divmod(np.arange(30), 3)
    found = attention_lists.lists(rows, columns, rows >= 0, 10, most_entries=7)
    assert found.shape == (5, 6)
    for part in found:
        row, _, _, first, last = entries_of(part)
        np.testing.assert_array_equal(row, np.sort(row))
        assert first.sum() == last.sum() == len(set(row.tolist())) == 2


def test_nothing_is_done_by_what_fills_a_short_list():
    rows, columns = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 0])
    found = attention_lists.lists(rows, columns, rows >= 0, 2, most_entries=3)
    row, column, kind, first, last = entries_of(found[1])
    np.testing.assert_array_equal(row, 1)
    np.testing.assert_array_equal(column, 0)
    assert (kind.tolist(), first.tolist(), last.tolist()) == (
        [2, 0, 0],
        [1, 0, 0],
        [1, 0, 0],
    )


@pytest.mark.parametrize(
    "device", [V4, V5E, V5P, V6E, V7X, ANY_TPU], ids=lambda d: d.name
)
@pytest.mark.parametrize("which", ["forward", "query", "key"])
def test_tiles_fit_and_are_divided_by_their_pieces(device, which):
    for dtype in (jnp.bfloat16, jnp.float32):
        for light in (True, False):
            found = attention_tiles.candidates(
                which, (8192, 8192), (128, 128), dtype, device, light=light
            )
            assert found
            for tiles in found:
                size = attention_tiles.vmem_bytes(which, tiles, (128, 128), dtype)
                assert size <= device.vmem_bytes
                assert tiles.query % tiles.rows == tiles.key % tiles.keys == 0
                columns = tiles.rows if which == "key" else tiles.keys
                assert columns % tiles.chunk == tiles.chunk % 128 == 0


@pytest.mark.parametrize("which", ["forward", "query", "key"])
def test_a_bias_takes_vector_memory_from_tiles(which):
    def fitting(*parts: Any) -> list[Tiles]:
        limits = (which, (8192, 8192), (256, 256), jnp.bfloat16, V5E)
        return attention_tiles.candidates(*limits, parts=parts)

    bias: Any = jax.ShapeDtypeStruct((1, 4, 8192, 8192), jnp.float32)
    found = fitting(*attention_tiles.parts_of(Extras(bias=bias)))
    assert set(found) < set(fitting())
    assert len(found) > 1


def test_a_narrow_band_gets_smaller_tiles_than_a_full_square():
    def chosen(mask: masks.Mask) -> Any:
        query = key = value = jnp.zeros((1, 8192, 1, 128), jnp.bfloat16)
        operands = Operands(query, key, value, plan_of(mask, (8192, 8192)))
        options = Options(problems.SOFTMAX, 1.0, None, None, jnp.bfloat16)
        return kernels_tpu._tiles("forward", options, operands)

    narrow, full = chosen(masks.Window(127, 0)), chosen(masks.All())
    assert narrow.query * narrow.key < full.query * full.key


# ----------------------------------------------------------------------------- dispatch
def arrays(
    T=256, S=256, N=4, K=2, H=64, E=64, dtype: Any = jnp.bfloat16, batch=(2,)
) -> list[Any]:
    shapes = ((T, N, H), (S, K, H), (S, K, E))
    return [jax.ShapeDtypeStruct((*batch, *shape), dtype) for shape in shapes]


def training(query, key, value, *rest, **options):
    attend: Any = functools.partial(attention.dot_product_attention, **options)
    return attend(query, key, value, *rest).astype(jnp.float32).sum()


def test_lowered_for_a_tpu_a_training_step_is_three_kernels():
    step = jax.grad(functools.partial(training, is_causal=True), argnums=(0, 1, 2))
    traced = jax.jit(step).trace(*arrays())
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3
    assert "stablehlo.while" not in text
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "tpu_custom_call" not in cuda


def training_on_pairs(query, key, value, bias, dense):
    mask = masks.Causal(), dense
    return training(query, key, value, mask=mask, bias=bias)


def arrays_on_pairs() -> list[Any]:
    bias = jax.ShapeDtypeStruct((2, 1, 300, 260), jnp.bfloat16)
    dense = jax.ShapeDtypeStruct((1, 4, 300, 260), jnp.bool_)
    return [*arrays(T=300, S=260), bias, dense]


def test_lowered_for_a_tpu_arrays_over_pairs_are_read_by_kernels():
    """All gradients: that of the bias has a loop of plain JAX, the others kernels."""
    step, given = jax.grad(training_on_pairs, (0, 1, 2, 3)), arrays_on_pairs()
    text = str(explain(step, *given))
    assert text.count("tpu: pallas_tpu") == 2
    assert "not pallas_tpu" not in text
    assert text.count("the gradient of `bias`, where it is used") == 1
    lowered = jax.jit(step).trace(*given).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("@tpu_custom_call") == 3


@pytest.mark.parametrize("check_vma", [True, False])
def test_lowered_inside_shard_map_with_arrays_over_pairs(check_vma):
    """The interpreter does not run there: what is declared of results is checked.

    A batch entry has a bias of its own, and all share the boolean array.
    """
    rows, shared = PartitionSpec("data"), PartitionSpec()
    step = jax.shard_map(
        jax.grad(training_on_pairs, (0, 1, 2, 3)),
        mesh=AbstractMesh((2,), ("data",), (AxisType.Auto,)),
        in_specs=(*[rows] * 4, shared),
        out_specs=(rows,) * 4,
        check_vma=check_vma,
    )
    traced = jax.jit(step).trace(*arrays_on_pairs())
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3


def test_explain_tells_the_tiles():
    step = jax.grad(functools.partial(training, is_causal=True), argnums=(0, 1, 2))
    text = str(explain(step, *arrays()))
    assert text.count("tpu: pallas_tpu") == 2
    assert "pallas_tpu: tiles of 256 queries x 256 keys" in text


class Sampled(masks.Mask):
    """A table of pairs."""

    pairs: Any = masks.array_field(axes=2)

    def attends(self, query_index, key_index):
        return self.pairs[query_index, key_index]


def alternatives(count: int) -> masks.Mask:
    each = [masks.Segments(np.arange(256) % (2 + n)) for n in range(count)]
    return functools.reduce(operator.or_, each)


REFUSALS = {
    "100 queries are too few": ({"T": 100}, {}),
    "16 features of a query are too few": ({"H": 16}, {}),
    "an axis is empty": ({"batch": (0,)}, {}),
    "`query` is float16": ({"dtype": jnp.float16}, {}),
    "looks into an array for every pair": (
        {},
        {"mask": Sampled(np.ones((256, 256), bool))},
    ),
    "reads 5 numbers per query": ({}, {"mask": alternatives(5)}),
    "weights are rounded": ({}, {"precision": "highest"}),
    # Blocks that softlib would leave out hold pairs, too: a plan decides.
    "it chooses its own blocks": ({}, {"block_key": 128}),
    "or a BlockPlan are given": ({}, {"mask": attention.block_plan(None, 256, 256)}),
    "inside of blocks of 128": (
        {},
        {"mask": masks.Blocks(np.tri(8, dtype=bool), 32)},
    ),
    "no tile of 65536 and 64 features": ({"H": 65_536, "T": 128, "S": 128}, {}),
    "are more than 8192 blocks": (
        {"T": 128, "S": (8192 << 10) + 1, "batch": (1,)},
        {"mask": masks.Window(100, 0)},
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    shapes, options = REFUSALS[reason]
    given = arrays(**shapes)
    text = str(explain(functools.partial(training, **options), *given))
    assert reason in text
    assert "tpu: pallas_tpu" not in text
    pinned = functools.partial(training, implementation="pallas_tpu", **options)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(pinned, *given)


ACCEPTED = {
    "blocks of its own": {"mask": masks.Blocks(np.tri(2, dtype=bool), 128)},
    "lengths": {"key_value_seq_lengths": np.array([3, 200])},
    "an offset that is data": {"is_causal": True, "query_offset": np.array([0, 7])},
    "segments": {
        "mask": masks.Segments(np.zeros((2, 300), np.uint8)),
        "is_causal": True,
    },
    "segments and an offset that is data": {
        "mask": masks.Segments(np.zeros(600, int)) & masks.Causal(),
        "query_offset": np.array([0, 7]),
    },
    "a table": {"mask": Classes()},
    "a boolean array of keys": {"mask": np.ones((2, 1, 1, 260), bool)},
    "a boolean array of queries": {
        "mask": np.ones((1, 1, 300, 1), bool),
        "is_causal": True,
    },
    "a boolean array of batch entries": {"mask": np.ones((2, 1, 1, 1), bool)},
    "a bias of heads": {"bias": jnp.zeros((1, 4, 1, 1)), "is_causal": True},
    "softcap": {"softcap": 5.0, "sinks": jnp.zeros(4)},
    "softplus": {"normalizer": "softplus"},
    "stablemax": {"normalizer": "stablemax", "local_window_size": 10},
    "a traced scale": {"scale": jnp.float32(2)},
    "radial": {"mask": masks.Radial(50, rule="pow2", min_window=16)},
    "dilated": {"mask": masks.Dilated(3) & ~masks.Causal(-5)},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_it_accepts_lowers(name):
    pinned = functools.partial(training, implementation="pallas_tpu", **ACCEPTED[name])
    step = jax.jit(jax.grad(pinned, argnums=(0, 1, 2)))
    traced = step.trace(*arrays(T=300, S=260))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3


def test_a_kernel_is_traced_once_and_only_where_it_is_lowered_for(monkeypatch):
    given = arrays(T=320, S=320)
    attend = lambda *a: attention.dot_product_attention(*a, is_causal=True)
    kernel, calls = forward_pass.attention, []

    def counted(*args, **options):
        calls.append(None)
        return kernel(*args, **options)

    monkeypatch.setattr(forward_pass, "attention", counted)
    traced = [jax.jit(lambda *a: attend(*a)).trace(*given) for _ in range(3)]
    for program in traced:
        program.lower(lowering_platforms=("cpu",))
    assert len(calls) == 0
    for program in traced:
        program.lower(lowering_platforms=("tpu",))
    assert len(calls) == 1
