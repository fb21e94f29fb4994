"""The kernels for pairs of keys on Hopper, in the interpreter, against the oracle."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels import _trilinear as lists
from pallas_kernels._devices import H100
from pallas_kernels.gpu_mosaic import (
    trilinear,
    trilinear_gradient,
    trilinear_key_gradient,
    trilinear_lists,
    trilinear_tiles,
)
from pallas_kernels.gpu_mosaic.attention_mask import Index, evaluate, is_constant
from pallas_kernels.gpu_mosaic.trilinear_tiles import Problem, Tiles
from softlib import attention, explain, masks
from softlib.attention._engine.scores import Softmax
from softlib.attention._engine.stream import BackwardOperands
from softlib.attention._engine.tiles import Operands, Options
from softlib.attention._tuples import kernels_gpu as adapter
from softlib.attention._tuples.blocks_gpu import Order
from softlib.masks import Between, Causal, PerAxis, Window
from tests.host import jnp
from tests.kernels import trilinear_problems as problems

SIMULATED = plgpu.InterpretGPUParams(detect_races=True)
NARROW = PerAxis(Window(2, 0), Window(20, 0))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `lengths` of the queries and of both key axes, `heads` (N, K).

    Tiles hold `groups` heads and `keys` of the second axis; `swapped` exchanges the key
    axes for the forward pass and the gradient of the queries.
    """

    lengths: tuple[int, int, int]
    mask: PerAxis = NARROW
    heads: tuple[int, int] = (1, 1)
    features: tuple[int, int] = (64, 64)
    batch: int = 1
    dtype: str = "bfloat16"
    factor: float = 1.0
    groups: int = 1
    keys: int = 64
    swapped: bool = False

    def operands(self) -> Operands:
        return problems.draw_operands(
            *(self.lengths, self.heads, self.features, self.mask),
            batch=self.batch,
            dtype=self.dtype,
            factor=self.factor,
        )

    def options(self) -> Options:
        scale = self.features[0] ** -0.5
        return Options(Softmax(), scale, None, None, jnp.dtype(self.dtype))

    def orders(self, which: Any, operands: Any) -> tuple[Order, ...]:
        del operands
        tiles = Tiles(self.groups, 64 if which == "key" else self.keys, 2)
        both = (False, True) if which == "key" else (self.swapped,)
        return tuple(Order(swapped, tiles) for swapped in both)


CASES = {
    "ragged": Case((67, 3, 9), PerAxis(None, Causal())),
    # Two tiles of queries, five pairs of keys: rings wrap.
    "float16, heads in groups, joint, features": Case(
        (11, 9, 3),
        PerAxis(Window(4, 1), Causal(), joint=Between(1, 2, Causal(-1))),
        heads=(8, 1),
        features=(72, 128),
        groups=8,
        dtype="float16",
    ),
    "empty rows, swapped": Case(
        *((67, 7, 4), PerAxis(Causal(-9), Window(80, 3))),
        factor=100.0,
        swapped=True,
        keys=128,
    ),
    "joint, features": Case(
        *((8, 4, 5), PerAxis(Window(9, 1), None, joint=Between(2, 1, Causal(-1)))),
        features=(72, 128),
        batch=2,
    ),
}
SLOW = {
    "no mask": Case((66, 4, 66), PerAxis(None, None)),
    "many heads": Case(
        *((33, 4, 6), PerAxis(Window(30, 0), Window(30, 0))),
        heads=(12, 2),
        groups=2,
        features=(128, 64),
    ),
    "sixteen heads": Case((20, 20, 9), heads=(16, 1), groups=8, dtype="float16"),
    "rings that wrap": Case((8, 18, 200), PerAxis(Window(99, 8), None)),
    "radial": Case(
        *((66, 12, 20),),
        PerAxis(masks.Radial(2, 1), ~Window(3, 3) & masks.Dilated(3)),
    ),
    "swapped": Case((20, 70, 20), PerAxis(Window(20, 0), Window(9, 0)), swapped=True),
    "large scores": Case((13, 7, 4), PerAxis(Causal(-9), Window(20, 3)), factor=1e3),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels in the interpreter; what is given gives small tiles for a case."""
    for module, name in (
        (trilinear, "forward"),
        (trilinear_gradient, "query_gradient"),
        (trilinear_key_gradient, "key_gradients"),
    ):
        kernel = functools.partial(getattr(module, name), interpret=SIMULATED)
        monkeypatch.setattr(module, name, kernel)
    return lambda case: monkeypatch.setattr(adapter, "orders", case.orders)


def run(case: Case, operands: Operands, cotangents: Any) -> Any:
    """Both passes, by one program."""
    options = case.options()

    @jax.jit
    def both(operands, cotangents):
        found = adapter.FORWARD.call(options, operands)
        given = BackwardOperands(operands, found.out, found.normalizer, *cotangents)
        return found, adapter.BACKWARD.call(options, given)

    return jax.tree.map(np.asarray, both(operands, cotangents))


def check(case: Case) -> np.ndarray:
    operands = case.operands()
    cotangents = problems.draw_cotangents(operands)
    found, gradients = run(case, operands, cotangents)
    return problems.check(
        operands,
        case.options().scale,
        found,
        gradients,
        cotangents,
        rounded=jnp.dtype(case.dtype),
        lse_dtype=jnp.dtype(case.dtype),
        factor=case.factor,
    )


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name, interpreted):
    interpreted(CASES[name])
    empty = check(CASES[name])
    assert empty.any() == ("empty rows" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_outputs_and_gradients(name, interpreted):
    interpreted(SLOW[name])
    check(SLOW[name])


def test_rows_that_attend_to_nothing_at_all(interpreted):
    case = Case((9, 3, 4), PerAxis(None, Causal(-1000)))
    interpreted(case)
    operands = case.operands()
    found, gradients = run(case, operands, problems.draw_cotangents(operands))
    np.testing.assert_array_equal(found.out, 0)
    np.testing.assert_array_equal(found.normalizer, -np.inf)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)


def test_nan_in_tiles_that_are_not_listed_is_not_read(interpreted):
    case = Case((8, 4, 130), PerAxis(None, Causal()))
    interpreted(case)
    operands = case.operands()
    assert operands.value is not None
    unread = (jnp.arange(130) >= 64)[None, :, None, None]
    spoilt = operands._replace(
        key=jnp.where(unread, jnp.nan, operands.key),
        value=jnp.where(unread, jnp.nan, operands.value),
    )
    call = jax.jit(functools.partial(adapter.FORWARD.call, case.options()))
    for found, expected in zip(call(spoilt)[:2], call(operands)[:2], strict=True):
        np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------- lists
@pytest.mark.parametrize("owner", [0, 2])
@pytest.mark.parametrize(
    "mask",
    [NARROW, PerAxis(Causal(-9), Window(None, 1)), PerAxis(Causal(-99), None)],
    ids=["narrow", "late", "nothing"],
)
def test_runs_visit_what_the_mask_leaves_once(owner, mask):
    lengths, query, sizes, counts = (53, 41, 70), 16, (2, 8), (4, 1)
    axes = [
        lists.axis(
            (masks.All() if axis is None else axis).block_status,
            (lengths[0], length),
            *(query, size, count),
        )
        for axis, length, size, count in zip(
            mask.axes, lengths[1:], sizes, counts, strict=True
        )
    ]
    owners = axes[0].grid[0] if owner == 0 else axes[1].grid[1]
    visits = lists.visits(axes[0], axes[1], owner)
    found = trilinear_lists.runs(visits, counts[0], owner, owners)

    assert sorted(found.tiles[:, 0]) == list(range(owners))
    assert (np.diff(found.tiles[:, 5]) <= 0).all()
    allowed = mask.materialize(*lengths)
    visited = np.zeros(allowed.shape, int)
    for own, start, some, stop, first, steps in found.tiles:
        before = 0
        for at in range(start, stop):
            streamed, begin, end = found.runs[at]
            assert begin == before
            before = end
            row, second = (own, streamed) if owner == 0 else (streamed, own)
            whole = mask.axes[1] is None or mask.axes[1].materialize(53, 70)
            here = np.s_[row * 16 : row * 16 + 16], np.s_[second * 8 : second * 8 + 8]
            if at < some:
                assert np.broadcast_to(whole, (53, 70))[here].all()
                assert second * 8 + 8 <= lengths[2]
            for pair in found.pairs[first + begin : first + end]:
                visited[here[0], pair * 2 : pair * 2 + 2, here[1]] += 1
        assert before == steps
    assert visited.max() <= 1
    assert (visited[allowed] == 1).all()


# -------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("which", ["forward", "query", "key"])
@pytest.mark.parametrize("features", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_tiles_fit(which, features):
    for groups in (1, 3, 6, 16):
        found = trilinear_tiles.candidates(which, Problem(groups, features), H100)
        assert found
        for tiles in found:
            assert groups % tiles.groups == 0
            assert tiles.queries % 8 == 0
            assert tiles.stages >= 2
            assert tiles.smem_bytes(which, *features) <= H100.smem_bytes


# ---------------------------------------------------------------------------- dispatch
def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def arrays(tokens=1024, heads=4, key_heads=2, features=128, dtype=jnp.bfloat16):
    query = array(1, tokens, heads, features, dtype=dtype)
    return (query, *[array(1, tokens, key_heads, features, dtype=dtype)] * 4)


def machine(kind: str) -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def hopper() -> Any:
    return machine("NVIDIA H100 80GB HBM3")


def training(*arrays, window1=256, window2=32, **options):
    out = attention.two_simplicial_attention(
        *arrays, window1=window1, window2=window2, **options
    )
    return out.astype(jnp.float32).sum()


def test_lowered_for_hopper_a_training_step_is_four_kernels():
    step = jax.jit(jax.grad(training, argnums=range(5)))
    with hopper():
        traced = step.trace(*arrays())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        plain = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("@mosaic_gpu") == 4
    assert "stablehlo.while" not in text
    assert "custom_call" not in plain


def test_only_indices_that_a_mask_looks_at_are_formed():
    formed = []

    def index(name: str) -> Index:
        return Index((2, 3), lambda: formed.append(name) or jnp.ones((2, 3), int))

    given = index("query"), index("key")
    found = evaluate(
        lambda query, key: jnp.where(key > 1, query == query, False), *given
    )
    assert formed == ["key"]
    np.testing.assert_array_equal(found, np.zeros((2, 3), bool))
    assert is_constant(lambda *at: masks.All()(*at), 0)
    assert not is_constant(lambda *at: Causal()(*at), 0)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        PerAxis(masks.All(), masks.GlobalTokens(0, 7)),
        PerAxis(None, Window(40, 3), joint=Between(1, 2, Causal())),
    ],
    ids=["none", "global", "joint"],
)
def test_masks_that_do_not_look_at_every_index_are_lowered(mask):
    """What nothing uses keeps the compiler's search for layouts busy for ever."""
    with hopper():
        given = (array(1, 200, 1, 64), *[array(1, 201, 1, 64)] * 4)
        traced = jax.jit(functools.partial(plain, mask=mask)).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


def test_lowered_inside_shard_map():
    """The interpreter does not run there: what is declared of results is checked."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    specs = (PartitionSpec("data"),) * 5
    step = jax.grad(training, argnums=range(5))
    given = [array(2, *x.shape[1:]) for x in arrays()]
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
        traced = jax.jit(sharded).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-40GB"])
def test_other_gpus_get_no_kernel(kind):
    with machine(kind):
        text = str(explain(training, *arrays()))
        program = jax.jit(training).trace(*arrays())
        lowered = program.lower(lowering_platforms=("cuda",)).as_text()
    found = "a Blackwell" if kind.endswith("B200") else "another device"
    assert f"not pallas_gpu: it is written for Hopper GPUs, this is {found}" in text
    assert "custom_call" not in lowered


def test_explain_tells_the_tiles_and_the_padding():
    with hopper():
        step = jax.grad(training, argnums=range(5))
        text = str(explain(step, *arrays()))
        odd = str(explain(training, *arrays(1001, features=80)))
    assert text.count("cuda: pallas_gpu") == 2
    assert "pallas_gpu: tiles of 32 queries of 2 heads x 2 x 64 keys (forward)" in text
    assert "x 2 x 64 keys (query), tiles of 32 queries" in text
    assert "pad" not in text
    assert "arrays are copied to pad" in odd


def test_the_longer_window_is_streamed_whichever_it_is():
    with hopper():
        notes = [
            explain(functools.partial(training, **windows), *arrays())
            .operations[0]
            .notes
            for windows in (
                {"window1": 512, "window2": 32},
                {"window1": 32, "window2": 512},
            )
        ]
    assert notes[0] == notes[1]


def plain(*arrays, mask=None, **options):
    query, *keys = arrays
    half = len(keys) // 2
    return attention.kronecker_attention(
        query, keys[:half], keys[half:], mask=mask, **options
    )


class Curved(masks.Mask):
    """A mask that takes a sine."""

    def attends(self, query_index, key_index):
        return jnp.sin(query_index + key_index) > 0


def an_even_sum(query, *keys):
    return (query + sum(keys)) % 2 == 0


REFUSALS = {
    "it takes two key axes, not 3": lambda q, *k: plain(q, *k, *k[:2]),
    "100 queries are too few": lambda *a: plain(*(x[:, :100] for x in a)),
    "16 features of a query are too few": lambda *a: plain(*(x[..., :16] for x in a)),
    "an argument is float32, not bfloat16 or float16": lambda *a: plain(
        *(x.astype("float32") for x in a)
    ),
    "an argument is float16, the queries are bfloat16": lambda q, *k: plain(
        q, *(x.astype("float16") for x in k)
    ),
    "products of queries and keys are rounded to the bfloat16": lambda *a: plain(
        *a, precision="highest"
    ),
    "padded 192 and 192, are more than 128": lambda *a: plain(
        *(jnp.concatenate([x, x[..., :64]], -1) for x in a), mask=Window(9, 0)
    ),
    "it looks into no array of a mask": lambda *a: plain(
        *a, mask=masks.Padding(None, jnp.asarray([7]))
    ),
    "it evaluates no function as a joint mask": lambda *a: plain(
        *a, mask=PerAxis(Causal(), Causal(), joint=an_even_sum)
    ),
    "the mask takes operations that it lacks: sin": lambda *a: plain(*a, mask=Curved()),
    "a part of the mask looks at no position": lambda *a: plain(
        *a, mask=PerAxis(Window(9, 0), ~masks.All())
    ),
    "it chooses its own blocks": lambda *a: plain(*a, block_query=128),
    "or a BlockPlan are given": lambda q, *k: plain(
        q, *k, mask=attention.block_plan(None, q.shape[1], (k[0].shape[1],) * 2)
    ),
    "are more than its lists hold": lambda *a: plain(
        *(jnp.concatenate([x] * 8, 1) for x in a)
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    with hopper():
        text = str(explain(REFUSALS[reason], *arrays()))
    (line,) = (line for line in text.splitlines() if "not pallas_gpu" in line)
    assert reason in line
    assert "cuda: pallas_gpu" not in text


def test_pinned_it_raises_with_the_reason():
    call = lambda *a: plain(*(x[:, :100] for x in a), implementation="pallas_gpu")
    with hopper(), pytest.raises(NotImplementedError, match="too few to gain"):
        jax.eval_shape(call, *arrays())
