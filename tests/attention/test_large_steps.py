"""Attention in the steps of GPUs and TPUs: run on a CPU, and lowered for the others."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from softlib import attention, explain, masks
from softlib.attention._engine import large_steps
from softlib.attention._engine.large_steps import LargeBlocks
from softlib.attention._engine.plan import plan_of
from tests import operations
from tests.attention import test_kronecker, test_sequence_parallel
from tests.attention.test_attention import OPTIONS, check, valid
from tests.host import jnp
from tests.lowered import dtypes_of_products, loops, lowered
from tests.pairwise import name as case_name, pairwise

ACCELERATORS = ("cuda", "tpu")
# Scores of one step: all of a small problem, a few blocks, a part of one.
STEPS = OPTIONS | {"at_once": (1 << 20, 2000, 100)}


@pytest.mark.parametrize("case", pairwise(STEPS, valid), ids=case_name)
def test_values_and_gradients_match_the_oracle(case, monkeypatch):
    case = dict(case)
    scores = case.pop("at_once")
    monkeypatch.setattr(large_steps, "step_scores", lambda *_: scores)
    monkeypatch.setattr(large_steps, "_SIZES", (32, 16, 8))
    monkeypatch.setattr(large_steps, "_STEP", 100)
    wide = jax.enable_x64(case["dtype"] == "float64")
    with wide, operations.in_steps_of_accelerators():
        check(case)


@pytest.mark.parametrize("case", pairwise(test_kronecker.OPTIONS), ids=case_name)
def test_attention_over_tuples_matches_the_oracle(case, monkeypatch):
    if dict(case)["at_once"] == "one":
        monkeypatch.setattr(large_steps, "step_scores", lambda *_: 1)
    with operations.in_steps_of_accelerators():
        test_kronecker.test_matches_oracle(case, monkeypatch)


@pytest.mark.parametrize(
    ("mask", "method", "layout", "check_vma"),
    [
        ("window", "ring", "contiguous", True),
        ("radial", "ring", "paired", False),
        ("empty rows", "ring", "contiguous", True),
        ("window", "all_to_all", "contiguous", True),
    ],
)
def test_a_divided_sequence_equals_one_device(
    mask, method, layout, check_vma, monkeypatch
):
    monkeypatch.setattr(large_steps, "_SIZES", (16, 8))
    monkeypatch.setattr(large_steps, "_STEP", 100)
    monkeypatch.setattr(test_sequence_parallel, "BLOCKS", {})
    with operations.in_steps_of_accelerators():
        test_sequence_parallel.test_equals_one_device(mask, method, layout, check_vma)


def call(mask, **options):
    def function(query, key, value):
        return attention.dot_product_attention(
            query, key, value, mask=mask, implementation="xla", **options
        )

    return function


def gradients(function):
    def backward(query, key, value, cotangent):
        return jax.vjp(function, query, key, value)[1](cotangent)

    return backward


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("platform", ACCELERATORS)
def test_a_program_for_an_accelerator_has_few_steps_of_narrow_products(platform):
    causal = call(masks.Causal())
    arrays = [array(2, 8192, 16, 128)] * 4
    forward = lowered(platform, causal, *arrays[:3])
    # 6 whole blocks of 2048 x 2048 and 4 on the diagonal, for 16 of 32 heads at a time.
    assert loops(forward) == [2, 4, 6]
    both = lowered(platform, gradients(causal), *arrays)
    assert loops(both) == [2, 2, 4, 4, 6, 6]
    for text in (forward, both):
        assert dtypes_of_products(text) == {("bf16", "bf16", "f32")}


def test_a_program_for_a_cpu_has_steps_that_fit_its_caches():
    arrays = [array(2, 8192, 16, 128)] * 3
    text = lowered("cpu", call(masks.Causal()), *arrays)
    assert dtypes_of_products(text) == {("f32", "f32", "f32")}
    assert max(loops(text)) > 100


@pytest.mark.parametrize(
    ("dtypes", "options", "expected"),
    [
        (("bfloat16",) * 3, {"precision": "default"}, "bf16"),
        (("float16",) * 3, {}, "f16"),
        (("float32",) * 3, {}, "f32"),
        (("bfloat16", "float32", "bfloat16"), {}, "f32"),
        (("bfloat16",) * 3, {"precision": "highest"}, "f32"),
        (("bfloat16",) * 3, {"normalizer": "stablemax"}, "bf16"),
        # Its weights are not relative to a maximum: they may leave the range.
        (("float16",) * 3, {"normalizer": "stablemax"}, "f32"),
    ],
)
def test_products_are_narrow_where_all_operands_are(dtypes, options, expected):
    arrays = [array(1, 64, 2, 16, dtype=dtype) for dtype in dtypes]
    text = lowered("cuda", call(None, **options), *arrays)
    assert dtypes_of_products(text) == {(expected, expected, "f32")}


def test_blocks_that_the_user_gave_are_kept():
    function = call(masks.Causal(), block_query=1024, block_key=512)
    text = lowered("cuda", function, *[array(1, 4096, 2, 64)] * 3)
    # 8 on the diagonal, and 12 whole ones that are too few for a loop of their own.
    assert loops(text) == [20]


@pytest.mark.parametrize("copies", [1, 2, 8])
def test_copies_of_a_vmap_share_the_memory_of_a_step(copies):
    function = jax.vmap(call(masks.Causal()))
    text = lowered("cuda", function, *[array(copies, 2, 4096, 16, 64)] * 3)
    shapes = re.findall(r"-> tensor<([\dx]*)xf32>", text)
    most = max(np.prod(list(map(int, shape.split("x")))) for shape in shapes)
    assert most <= large_steps.STEP_MIB * 2**20 / 12


@pytest.mark.parametrize(
    ("mask", "lengths", "blocks", "visited"),
    [
        (masks.Causal(), (8192, 8192), (2048, 2048), 10),
        (masks.All(), (100, 300), (104, 304), 1),
        # Axes are cut into equal parts, not into powers of two.
        (masks.Causal(), (5000, 5000), (1000, 1000), 15),
        (masks.Window(1023, 0), (16384, 16384), (1024, 1024), 31),
        (masks.All(), (1, 100_000), (8, 100_000), 1),
    ],
)
def test_blocks_are_as_large_as_memory_and_mask_allow(mask, lengths, blocks, visited):
    plan = plan_of(mask, lengths, sizes=LargeBlocks(1, 32, 1 << 26))
    assert (plan.blocks, plan.visited) == (blocks, visited)


def test_a_step_never_has_more_scores_than_its_memory_holds():
    for groups in (1, 8):
        plan = plan_of(
            masks.All(), (1 << 17,) * 2, sizes=LargeBlocks(groups, 4, 1 << 22)
        )
        assert groups * np.prod(plan.blocks) <= 1 << 22


def test_explain_states_the_sizes_of_steps():
    function = call(masks.Causal())
    found = explain(gradients(function), *[array(2, 8192, 16, 128)] * 4)
    for operation in found.operations:
        assert "of 2048 x 2048, 16 heads of the batch at a time" in str(operation)


def test_a_plan_is_the_same_for_equal_sizes():
    sizes = LargeBlocks(1, 32, 1 << 26)
    first, second = (
        plan_of(masks.Causal(), (512, 512), sizes=dataclasses.replace(sizes))
        for _ in range(2)
    )
    assert first.whole is second.whole


def test_heads_of_attention_over_tuples_share_a_step():
    def tuples(query, *arrays):
        return attention.kronecker_attention(
            query, arrays[:2], arrays[2:], implementation="xla"
        )

    text = lowered("cuda", tuples, *[array(2, 512, 16, 64)] * 5)
    assert len(loops(text)) == 1
    assert dtypes_of_products(text) == {("f32", "f32", "f32")}
