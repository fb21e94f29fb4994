"""The row-statistics kernels for TPUs, in the interpreter, against the oracle."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._devices import ANY_TPU, V4, V5E, V6E, V7X
from pallas_kernels.tpu import _row_call, _row_tiles
from softlib import explain, losses
from softlib.logits._engine import kernels_tpu
from softlib.logits._engine.stream import BackwardOperands
from softlib.logits._engine.tile import Options
from softlib.testing import assert_close
from tests.host import jnp
from tests.kernels import row_problems as problems
from tests.kernels.row_problems import ALL, FEW

SIMULATED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
# A third of the time, and what lies behind the end is NaN in it.
PLAIN: Any = True


@dataclasses.dataclass(frozen=True)
class Problem(problems.Problem):
    """With the rows, classes and features of a step."""

    tiles: tuple[int, int, int] = (16, 128, 72)


PROBLEMS = {
    "aligned": Problem(32, 256, 256, tiles=(16, 128, 256)),
    "ragged": Problem(37, 120, 300, "float32", tiles=(16, 128, 120)),
    "one tile": Problem(5, 40, 100, "float32", tiles=(16, 128, 40)),
    "spans of D": Problem(37, 384, 300, tiles=(16, 128, 128)),
    "columns": Problem(20, 256, 384, "float32", vocab_axis=1, tiles=(16, 256, 128)),
    "columns, ragged": Problem(37, 72, 300, vocab_axis=1),
    "float32 weight": Problem(
        *(37, 120, 300), weight_dtype="float32", tiles=(16, 128, 120)
    ),
    "float32 weight, columns": Problem(
        *(37, 72, 300), weight_dtype="float32", vocab_axis=1
    ),
    # XLA stores these (D, V) as (V, D), and these (V, D) as (D, V).
    "columns, turned": Problem(20, 128, 300, vocab_axis=1, tiles=(16, 256, 128)),
    "rows, turned": Problem(20, 72, 300, "bfloat16", weight_dtype="float32"),
    "all": Problem(
        *(20, 128, 300, "float32"),
        statistics=ALL,
        labels=2,
        bias=True,
        per_row=True,
        class_where=True,
        tiles=(16, 256, 128),
    ),
    "minus infinity": Problem(
        *(37, 72, 300),
        statistics=("lse", "mean_logit", "max_logit", "argmax"),
        bias=True,
        infinite=True,
        per_row=True,
    ),
    "all, columns, softcap": Problem(
        *(40, 256, 384),
        statistics=ALL,
        labels=2,
        vocab_axis=1,
        per_row=True,
        class_where=True,
        softcap=3.0,
        tiles=(16, 256, 128),
    ),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles for small problems; the cost model is tested below."""

    def give(tiles: tuple[int, int, int]) -> None:
        chosen = _row_tiles.Tiles(*tiles, vmem_bytes=8 << 20)
        monkeypatch.setattr(_row_call, "tiles_of", lambda *_: chosen)

    return give


def interpreted(call: Any, mode: Any, *arguments: Any) -> Any:
    with pltpu.force_tpu_interpret_mode(mode):
        return jax.jit(call)(*arguments)


# This with races: it is ragged too, and has the most axes of a grid.
SIMULATED_PROBLEMS = ("spans of D",)


@pytest.mark.parametrize("name", PROBLEMS)
def test_statistics_and_gradients(name, small_tiles):
    check(name, small_tiles, SIMULATED if name in SIMULATED_PROBLEMS else PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*PROBLEMS} - {*SIMULATED_PROBLEMS}))
def test_nothing_races_anywhere(name, small_tiles):
    check(name, small_tiles, SIMULATED)


def check(name: str, small_tiles: Any, mode: Any) -> None:
    problem = PROBLEMS[name]
    small_tiles(problem.tiles)
    with pltpu.force_tpu_interpret_mode(mode):
        problems.check(problem, kernels_tpu)


def test_the_filter_drops_the_blocks_that_the_stream_drops(small_tiles):
    small_tiles((128, 256, 72))
    problem = Problem(300, 72, 500, "float32")
    head = problem.head()
    assert head.labels is not None
    hidden, labels = np.array(head.hidden), np.array(head.labels[:, 0])
    # Sure of the label, whose tile then has nothing to learn either; the rest is not,
    weight = np.asarray(head.weight)
    pulls = 12 * weight / (weight**2).sum(1, keepdims=True)
    hidden[:150] = pulls[np.maximum(labels[:150], 0)]
    # and one of the first rows is in doubt in the second block of the first tile alone.
    doubted = [140, 200]
    hidden[5] = pulls[doubted].sum(0)
    labels[5] = doubted[np.argmin(weight[doubted] @ hidden[5])]
    head = head._replace(
        hidden=jnp.asarray(hidden), labels=jnp.asarray(labels[:, None])
    )
    distance = np.exp(hidden @ weight.T)
    distance /= distance.sum(1, keepdims=True)
    distance[np.arange(300), labels] -= labels >= 0
    eps = 0.15
    visited = [np.abs(distance[:128, i : i + 128]).max() > eps for i in (0, 128, 256)]
    assert visited == [False, True, False]
    options = dataclasses.replace(
        problem.options(), gradient_filter_eps=eps, statistics=FEW
    )
    (_, known), expected, everything = problems.filtered_and_not(options, head)
    given = BackwardOperands(head, known)
    assert np.abs(expected.weight - everything.weight).max() > 1e-4
    gradient = interpreted(
        lambda given: kernels_tpu.BACKWARD.call(options, given), PLAIN, given
    )
    for value, wanted in zip(gradient[:2], expected[:2], strict=True):
        assert_close(value, np.asarray(wanted), dtype=jnp.float32, length=500)


# --------------------------------------------------------------------------- tile sizes
@pytest.mark.parametrize("device", [V4, V5E, V6E, V7X, ANY_TPU], ids=lambda d: d.name)
@pytest.mark.parametrize("kind", ["forward", "hidden", "weight"])
def test_tiles_fit_and_divide_the_features(device, kind):
    shapes = _row_tiles.Shapes(8192, 2304, 256_000, 2, 2, labels=True)
    tiles = _row_tiles.choose_tiles(kind, shapes, device)
    assert tiles is not None
    assert tiles.vmem_bytes <= device.vmem_bytes
    assert shapes.features % tiles.features == 0
    assert tiles.classes % 128 == 0
    assert tiles.rows % 16 == 0


def test_more_vector_memory_gives_larger_tiles():
    shapes = _row_tiles.Shapes(8192, 2304, 256_000, 2, 2)
    small, large = (_row_tiles.choose_tiles("hidden", shapes, d) for d in (V4, V6E))
    assert small is not None
    assert large is not None
    assert small.rows < large.rows


def test_no_tiles_for_features_that_do_not_fit():
    shapes = _row_tiles.Shapes(8192, 10**6 + 1, 256_000, 2, 2)
    assert _row_tiles.choose_tiles("hidden", shapes, V4) is None


# ----------------------------------------------------------------------------- dispatch
HEAD = (
    jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((50_257, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((256,), jnp.int32),
)


def training(hidden, weight, labels, **options):
    loss = losses.linear_softmax_cross_entropy(hidden, weight, labels, **options)
    return loss.mean()


def test_lowered_for_a_tpu_a_training_step_is_three_kernels():
    step = jax.jit(jax.grad(training, argnums=(0, 1)))
    traced = step.trace(*HEAD)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3
    assert "stablehlo.while" not in text
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_explain_tells_the_tiles():
    text = str(explain(jax.grad(training, argnums=(0, 1)), *HEAD))
    assert text.count("tpu: pallas_tpu") == 2
    assert "pallas_tpu: tiles of 256 rows x" in text


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows are too few": ({"hidden": (8, 128)}, {}),
    "classes are too few": ({"weight": (100, 128)}, {}),
    "is float16": ({"dtype": jnp.float16}, {}),
    "it chooses its own tiles": ({}, {"vocab_chunk": 1000}),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_it_cannot_do_it_says(reason):
    shapes, options = REFUSALS[reason]
    dtype = shapes.get("dtype", jnp.bfloat16)
    rows, features = shapes.get("hidden", (256, 128))
    arrays = (
        jax.ShapeDtypeStruct((rows, features), dtype),
        jax.ShapeDtypeStruct(shapes.get("weight", (50_257, 128)), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    text = str(explain(lambda *a: training(*a, **options), *arrays))
    assert f"not pallas_tpu: {reason}" in text or reason in text
    assert "tpu: pallas_tpu" not in text
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            lambda *a: training(*a, implementation="pallas_tpu", **options), *arrays
        )


def test_on_a_cpu_the_forward_pass_still_keeps_products():
    """Few rows and many features: the plain stream stores what it needs again."""
    hidden, weight, labels = (
        jax.ShapeDtypeStruct((1024, 512), jnp.float32),
        jax.ShapeDtypeStruct((8192, 512), jnp.float32),
        jax.ShapeDtypeStruct((1024,), jnp.int32),
    )

    def products(implementation):
        step = jax.grad(
            lambda *a: training(*a, implementation=implementation), argnums=(0, 1)
        )
        text = jax.jit(step).lower(hidden, weight, labels).as_text()
        return text.count("stablehlo.dot_general")

    assert products(None) == products("xla")


def test_labels_beyond_what_is_compared():
    head = PROBLEMS["aligned"].head()
    rows = jnp.zeros((256, 9), jnp.int32)
    head = head._replace(
        hidden=jnp.zeros((256, 128)), weight=jnp.zeros((4096, 128)), labels=rows
    )
    reason = kernels_tpu.FORWARD.why_not(Options(FEW), head)
    assert reason is not None
    assert "9 labels a row" in reason
