"""The kernels for pairs of keys on TPUs, in the interpreter, against the oracle."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _trilinear as lists
from pallas_kernels._devices import ANY_TPU, V4, V5E, V6E, V7X
from pallas_kernels.tpu import trilinear, trilinear_gradient, trilinear_tiles
from pallas_kernels.tpu.trilinear_tiles import Problem, Tiles
from softlib import attention, explain, masks
from softlib.attention._engine.scores import Softmax
from softlib.attention._engine.stream import BackwardOperands
from softlib.attention._engine.tiles import Operands, Options
from softlib.attention._tuples import blocks as _blocks, kernels_tpu as tuple_kernels
from softlib.masks import Between, Causal, PerAxis, Window
from tests.host import jnp
from tests.kernels import trilinear_problems as problems

NARROW = PerAxis(Window(4, 0), Window(20, 0))
PASSES = ("forward", "query", "first", "second")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `lengths` of the queries and of both key axes, `heads` (N, K).

    `tiles` are (groups, combined, lanes, first, second); those of the gradient of the
    second axis have as many lanes.
    """

    lengths: tuple[int, int, int]
    tiles: tuple[int, int, int, int, int]
    mask: Any = NARROW
    heads: tuple[int, int] = (2, 1)
    features: tuple[int, int] = (128, 128)
    batch: int = 1
    dtype: str = "float32"
    precision: Any = None
    factor: float = 1.0
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
        return Options(Softmax(), scale, None, self.precision, jnp.dtype(self.dtype))


# Small: what is interpreted takes seconds to compile.
SIMULATED = {
    "ragged": Case((21, 21, 140), (1, 2, 128, 8, 128)),
    "bfloat16": Case((21, 21, 140), (1, 2, 128, 16, 256), dtype="bfloat16"),
}
PLAIN = {
    "three heads": Case(
        *((21, 13, 70), (3, 1, 128, 8, 128)),
        heads=(6, 2),
        batch=2,
        features=(40, 72),
    ),
    "joint": Case(
        *((21, 13, 70), (2, 1, 128, 8, 128)),
        PerAxis(Window(9, 2), None, joint=Between(2, 1, Causal(-1))),
        heads=(4, 1),
    ),
    "empty rows": Case(
        *((21, 13, 70), (1, 2, 128, 8, 128)), PerAxis(None, Causal(-9)), factor=1e4
    ),
    "bfloat16, divided": Case(
        *((16, 21, 70), (1, 2, 128, 8, 128)), dtype="bfloat16", precision="highest"
    ),
}
LARGER = {
    "high": Case((16, 21, 70), (1, 2, 128, 8, 128), precision="high"),
    "default": Case((16, 21, 70), (1, 2, 128, 8, 128), precision="default"),
    "aligned": Case((32, 32, 128), (2, 2, 128, 16, 128)),
    "long": Case((40, 40, 300), (2, 4, 128, 8, 128), PerAxis(Causal(), Window(9, 3))),
    "wide features": Case((20, 20, 128), (1, 8, 128, 16, 128), features=(256, 128)),
    "no mask": Case((16, 20, 130), (2, 2, 128, 8, 256), PerAxis(None, None)),
    "swapped": Case((37, 150, 45), (2, 2, 128, 8, 256), swapped=True),
    "radial": Case(
        *((40, 40, 150), (2, 4, 128, 16, 128)),
        PerAxis(masks.Radial(2, 1), ~Window(3, 3) & masks.Dilated(3)),
    ),
    "many": Case((37, 45, 300), (2, 2, 128, 8, 256), heads=(8, 2), batch=2),
}
EVERY = SIMULATED | PLAIN | LARGER
SIMULATE = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan"
)
# Compiling the interpreted kernels is most of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles for small problems; the choice is tested below."""

    def give(case: Case) -> None:
        def chosen(which: Any, problem: Problem, device: Any) -> Tiles | None:
            # Of the two orders of the key axes only the one that the case wants.
            T, S1, S2 = case.lengths
            order = (T, S2, S1) if case.swapped else (T, S1, S2)
            swapped = problem.lengths != order
            return None if swapped else Tiles(16, *case.tiles)

        monkeypatch.setattr(_blocks, "choose_tiles", chosen)
        _blocks._cheapest.cache_clear()

    yield give
    _blocks._cheapest.cache_clear()


@pytest.fixture(params=[True], ids=["plain"])
def interpreted(request, monkeypatch):
    """Kernels run in the interpreter: the plain one, or the one that simulates."""
    for module, name in (
        (trilinear, "forward"),
        (trilinear_gradient, "gradient"),
    ):
        call = functools.partial(getattr(module, name), interpret=request.param)
        monkeypatch.setattr(module, name, call)


simulated = pytest.mark.parametrize(
    "interpreted", [pytest.param(SIMULATE, id="simulated")], indirect=True
)


def run(case: Case, operands: Operands, cotangents: Any) -> Any:
    """Both passes, by one program."""
    options = case.options()

    def both(operands, cotangents):
        found = tuple_kernels.FORWARD.call(options, operands)
        given = BackwardOperands(operands, found.out, found.normalizer, *cotangents)
        return found, tuple_kernels.BACKWARD.call(options, given)

    found = jax.jit(both, compiler_options=FAST)(operands, cotangents)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("name", PLAIN)
def test_interpreted(name, small_tiles, interpreted):
    check(name, PLAIN[name], small_tiles)


@simulated
@pytest.mark.parametrize("name", SIMULATED)
def test_simulated(name, small_tiles, interpreted):
    check(name, SIMULATED[name], small_tiles)


@pytest.mark.slow
@simulated
@pytest.mark.parametrize("name", PLAIN | LARGER)
def test_everything_simulated(name, small_tiles, interpreted):
    check(name, EVERY[name], small_tiles)


def check(name: str, case: Case, small_tiles: Any) -> None:
    small_tiles(case)
    operands = case.operands()
    cotangents = problems.draw_cotangents(operands)
    found, gradients = run(case, operands, cotangents)
    rounded = jnp.dtype(case.dtype)
    # Two pieces lose what is below 16 bits; without any, all is rounded to bfloat16.
    c = 128.0 if case.precision == "high" else 4.0
    if case.precision == "default":
        rounded = jnp.dtype(jnp.bfloat16)
    empty = problems.check(
        operands,
        case.options().scale,
        found,
        gradients,
        cotangents,
        rounded=rounded,
        lse_dtype=jnp.float32 if case.precision == "highest" else rounded,
        factor=case.factor,
        c=c,
    )
    assert empty.any() or name != "empty rows"


def test_rows_that_attend_to_nothing_at_all(small_tiles, interpreted):
    case = dataclasses.replace(EVERY["ragged"], mask=PerAxis(None, Causal(-1000)))
    small_tiles(case)
    operands = case.operands()
    cotangents = problems.draw_cotangents(operands)
    found, gradients = run(case, operands, cotangents)
    np.testing.assert_array_equal(found.out, 0)
    np.testing.assert_array_equal(found.normalizer, -np.inf)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)


def test_wide_gradients(small_tiles):
    case = EVERY["bfloat16"]
    small_tiles(case)
    operands = case.operands()
    options = dataclasses.replace(case.options(), wide_gradients=True)
    out = jnp.zeros_like(operands.query)
    lse = jnp.zeros(out.shape[:3], jnp.float32)
    given = BackwardOperands(operands, out, lse, out, lse)
    shapes = jax.eval_shape(
        lambda given: tuple_kernels.BACKWARD.call(options, given), given
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


# ------------------------------------------------------------------------------- lists
@pytest.mark.parametrize("owner", [0, 1, 2])
@pytest.mark.parametrize(
    "mask", [NARROW, PerAxis(Causal(-9), Window(None, 1))], ids=str
)
def test_lists_visit_what_the_mask_leaves_once(owner, mask):
    lengths, query, tiles, counts = (53, 41, 70), 16, (3, 8), (4, 2)
    axes = [
        lists.axis(axis.block_status, (lengths[0], length), query, size, count)
        for axis, length, size, count in zip(
            mask.axes, lengths[1:], tiles, counts, strict=True
        )
    ]
    found = lists.visits(axes[0], axes[1], owner)
    owners = (found.rows, found.firsts, found.seconds)[owner]
    assert (np.diff(owners) >= 0).all()
    starts, stops = found.words & lists.FIRST != 0, found.words & lists.LAST != 0
    count = -(
        -lengths[owner] // (query, tiles[0] * counts[0], tiles[1] * counts[1])[owner]
    )
    np.testing.assert_array_equal(owners[starts], np.arange(count))
    np.testing.assert_array_equal(owners[stops], np.arange(count))

    allowed = mask.materialize(*lengths)
    kind = lambda word, tile: word >> (lists.KINDS + 2 * tile) & 3
    visited = np.zeros(allowed.shape, int)
    for row, first, second, word in zip(*found, strict=True):
        for t in range(counts[0]):
            for u in range(counts[1]):
                kinds = {kind(word, t), kind(word, counts[0] + u)}
                if lists.NONE in kinds:
                    continue
                j, l = (first * counts[0] + t) * 3, (second * counts[1] + u) * 8
                part = np.s_[row * 16 : (row + 1) * 16, j : j + 3, l : l + 8]
                visited[part] += 1
                if kinds == {lists.ALL}:
                    assert allowed[part].all()
                    assert j + 3 <= lengths[1]
                    assert l + 8 <= lengths[2]
    assert visited.max() == 1
    assert (visited[allowed] == 1).all()


# -------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("device", [V4, V5E, V6E, V7X, ANY_TPU], ids=lambda d: d.name)
@pytest.mark.parametrize("which", PASSES)
def test_tiles_fit(which, device):
    for groups in (1, 3, 4, 16):
        for pieces, wide in (((1, 1), 2), ((3, 1), 2), ((3, 3), 4)):
            for features in ((128, 128), (256, 128), (512, 512)):
                problem = Problem(groups, (4096,) * 3, features, pieces, wide)
                tiles = trilinear_tiles.choose_tiles(which, problem, device)
                assert tiles is not None
                assert groups % tiles.groups == 0
                assert sum(tiles.counts) <= lists.TILES
                assert tiles.first % tiles.combined == tiles.second % tiles.keys == 0
                assert tiles.first % 8 == tiles.second % 32 == 0
                memory = trilinear_tiles.vmem_bytes(which, tiles, problem)
                assert memory <= device.vmem_bytes


def test_no_tiles_for_features_that_do_not_fit():
    problem = Problem(1, (4096,) * 3, (1 << 14,) * 2, (3, 3), 4)
    assert trilinear_tiles.choose_tiles("first", problem, V4) is None


# ---------------------------------------------------------------------------- dispatch
def arrays(tokens=1024, heads=4, key_heads=2, features=128, dtype="bfloat16"):
    query = jax.ShapeDtypeStruct((1, tokens, heads, features), dtype)
    key = jax.ShapeDtypeStruct((1, tokens, key_heads, features), dtype)
    return query, key, key, key, key


def training(*arrays, window1=256, window2=32, **options):
    out = attention.two_simplicial_attention(
        *arrays, window1=window1, window2=window2, **options
    )
    return out.astype(jnp.float32).sum()


def test_lowered_for_a_tpu_a_training_step_is_four_kernels():
    step = jax.jit(jax.grad(training, argnums=range(5)))
    traced = step.trace(*arrays())
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 4
    assert "stablehlo.while" not in text
    for platform in ("cpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "tpu_custom_call" not in text


def test_the_longer_window_is_streamed_whichever_it_is():
    notes = [
        explain(functools.partial(training, **windows), *arrays()).operations[0].notes
        for windows in (
            {"window1": 512, "window2": 32},
            {"window1": 32, "window2": 512},
        )
    ]
    assert notes[0] == notes[1]
    assert "pallas_tpu" in notes[0]


def test_explain_tells_the_tiles():
    text = str(explain(jax.grad(training, argnums=range(5)), *arrays()))
    assert text.count("tpu: pallas_tpu") == 2
    assert "pallas_tpu: tiles of 16 queries x 2 x 128 keys (forward)" in text


def plain(*arrays, mask=None, **options):
    query, *keys = arrays
    half = len(keys) // 2
    return attention.kronecker_attention(
        query, keys[:half], keys[half:], mask=mask, **options
    )


def an_even_sum(query, *keys):
    return (query + sum(keys)) % 2 == 0


REFUSALS = {
    "it takes two key axes, not 3": lambda q, *k: plain(q, *k, *k[:2]),
    "100 queries are too few": lambda *a: plain(*(x[:, :100] for x in a)),
    "16 features of a query are too few": lambda *a: plain(*(x[..., :16] for x in a)),
    "an argument is float16": lambda *a: plain(*(x.astype("float16") for x in a)),
    "it has no precision 'tensorfloat32'": lambda *a: plain(
        *a, precision="tensorfloat32"
    ),
    "it looks into no array of a mask": lambda *a: plain(
        *a, mask=masks.Padding(None, jnp.asarray([7]))
    ),
    "it evaluates no function as a joint mask": lambda *a: plain(
        *a, mask=PerAxis(Causal(), Causal(), joint=an_even_sum)
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
    text = str(explain(REFUSALS[reason], *arrays()))
    (line,) = (line for line in text.splitlines() if "not pallas_tpu" in line)
    assert reason in line
    assert "tpu: pallas_tpu" not in text


def test_wide_features_of_float32_have_a_forward_kernel_only():
    wide = arrays(features=192, dtype="float32")
    text = str(explain(jax.grad(training, argnums=range(5)), *wide))
    assert text.count("tpu: pallas_tpu") == 1
    assert "192 features of float32 would not fit the registers" in text


def test_pinned_it_raises_with_the_reason():
    call = lambda *a: plain(*(x[:, :100] for x in a), implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="too few to gain"):
        jax.eval_shape(call, *arrays())
