"""Every bad argument of attention: one clear message, of the right type."""

import re
from typing import Any

import numpy as np
import pytest

from softlib import attention, masks
from tests.host import jnp

pytestmark = pytest.mark.usefixtures("untyped")

B, T, S, N, K, H = 2, 4, 6, 4, 2, 3
GOOD: dict[str, Any] = {
    "query": jnp.zeros((B, T, N, H)),
    "key": jnp.zeros((B, S, K, H)),
    "value": jnp.zeros((B, S, K, 5)),
}
PLAN = attention.block_plan(None, T, S)
ALIEN = masks.Segments(jnp.zeros((B + 1, T), int), jnp.zeros(S, int))  # another batch

# Argument, its bad value, the error, a part of what was got, what goes with it.
CASES: list[tuple[str, Any, type[Exception], str, dict[str, Any]]] = [
    ("query", jnp.zeros((B, T, N, H), int), TypeError, "int32", {}),
    ("query", jnp.zeros((N, H)), ValueError, "(4, 3)", {}),
    ("query", jnp.zeros((B, T, 3, H)), ValueError, "3 and 2", {}),
    ("query", jnp.zeros((B, T, 1, H)), ValueError, "1 and 2", {}),
    ("key", jnp.zeros((B, S, K, H), bool), TypeError, "bool", {}),
    ("key", jnp.zeros((S, H)), ValueError, "(6, 3)", {}),
    ("key", jnp.zeros((B + 1, S, K, H)), ValueError, "(3, 6, 2, 3)", {}),
    ("key", jnp.zeros((B, S, K, H + 1)), ValueError, "(2, 6, 2, 4)", {}),
    ("key", jnp.zeros((S, K, H)), ValueError, "(6, 2, 3)", {}),
    ("value", jnp.zeros((B, S, K, 5), int), TypeError, "int32", {}),
    ("value", jnp.zeros((B, S + 1, K, 5)), ValueError, "(2, 7, 2, 5)", {}),
    ("value", jnp.zeros((B, S, N, 5)), ValueError, "(2, 6, 4, 5)", {}),
    ("mask", "causal", TypeError, "str", {}),
    ("mask", masks.Causal, TypeError, "class Causal", {}),
    ("mask", jnp.ones((B, N, T, S)), TypeError, "float32", {}),
    ("mask", np.ones((B, N, T, S), int), TypeError, "int", {}),
    ("mask", jnp.ones((T, S), bool), ValueError, "(4, 6)", {}),
    ("mask", jnp.ones((B, N, T, S + 1), bool), ValueError, "(2, 4, 4, 7)", {}),
    ("mask", jnp.ones((B, K, T, S), bool), ValueError, "(2, 2, 4, 6)", {}),
    ("mask", (masks.Causal(), None), TypeError, "NoneType", {}),
    ("mask", (masks.Causal(), PLAN), TypeError, "BlockPlan", {}),
    ("mask", ALIEN, ValueError, "(3, 4)", {}),
    ("mask", attention.block_plan(ALIEN, T, S), ValueError, "(3, 4)", {}),
    ("mask", PLAN, ValueError, "make the plan of all", {"is_causal": True}),
    ("mask", PLAN, ValueError, "make the plan of all", {"local_window_size": 3}),
    ("mask", PLAN, ValueError, "make the plan of all", {"query_offset": 1}),
    ("mask", PLAN, ValueError, "make the plan of all", {"block_key": 8}),
    ("mask", attention.block_plan(None, T, S + 1), ValueError, "(4, 7)", {}),
    ("bias", jnp.zeros((B, N, T, S), int), TypeError, "int32", {}),
    ("bias", jnp.zeros((N, T, S)), ValueError, "(4, 4, 6)", {}),
    ("bias", jnp.zeros((B, N, S, T)), ValueError, "(2, 4, 6, 4)", {}),
    ("scale", jnp.ones(N), ValueError, "(4,)", {}),
    ("scale", jnp.ones((), int), TypeError, "int32", {}),
    ("scale", True, TypeError, "bool", {}),
    ("softcap", 0.0, ValueError, "0.0", {}),
    ("softcap", -2.0, ValueError, "-2.0", {}),
    ("softcap", float("inf"), ValueError, "inf", {}),
    ("softcap", jnp.ones(()), TypeError, "", {}),
    ("sinks", jnp.zeros(K), ValueError, "(2,)", {}),
    ("sinks", jnp.zeros(N, int), TypeError, "int32", {}),
    ("sinks", jnp.zeros(N), ValueError, "an array", {"normalizer": "softplus"}),
    ("sinks", jnp.zeros(N), ValueError, "an array", {"normalizer": "stablemax"}),
    ("query_offset", 1.5, TypeError, "float", {"is_causal": True}),
    ("query_offset", jnp.zeros(N, int), ValueError, "(4,)", {"is_causal": True}),
    ("local_window_size", -1, ValueError, "-1", {}),
    ("local_window_size", (1, 2, 3), ValueError, "(1, 2, 3)", {}),
    ("local_window_size", (1, None), ValueError, "(1, None)", {}),
    ("local_window_size", 1.5, ValueError, "1.5", {}),
    ("query_seq_lengths", jnp.ones(B), TypeError, "float32", {}),
    ("query_seq_lengths", jnp.ones(B + 1, int), ValueError, "(3,)", {}),
    ("key_value_seq_lengths", jnp.ones(B, bool), TypeError, "bool", {}),
    ("key_value_seq_lengths", jnp.ones((B, 1), int), ValueError, "(2, 1)", {}),
    ("normalizer", "sigmoid", ValueError, "'sigmoid'", {}),
    ("block_query", 0, ValueError, "0", {}),
    ("block_query", 2.0, TypeError, "float", {}),
    ("block_key", -8, ValueError, "-8", {}),
    ("block_key", True, TypeError, "bool", {}),
    ("implementation", "triton", ValueError, "'triton'", {}),
]
IDS = [
    f"{c[0]}-{re.sub('[^-A-Za-z0-9.,()]+', '', c[3]) or i}" for i, c in enumerate(CASES)
]


@pytest.mark.parametrize(("argument", "value", "error", "got", "more"), CASES, ids=IDS)
def test_error_names_function_argument_condition_and_value(
    argument, value, error, got, more
):
    with pytest.raises(error) as raised:
        attention.dot_product_attention(**(GOOD | {argument: value} | more))
    message = str(raised.value)
    pattern = rf"dot_product_attention: `{argument}` must .*{re.escape(got)}.*\."
    assert re.fullmatch(pattern, message), message


@pytest.mark.parametrize("names", ["pallas", ("pallas_tpu", "pallas_gpu")])
def test_an_implementation_that_cannot_run_says_why(names):
    with pytest.raises(NotImplementedError, match=r"queries are too few") as raised:
        attention.dot_product_attention(**GOOD, implementation=names)
    assert "not pallas_gpu: it is written for Hopper GPUs" in str(raised.value)


PLANS = [
    ("mask", jnp.ones((T, S), bool), TypeError, "got ArrayImpl; wrap"),
    ("mask", "causal", TypeError, "got str"),
    ("query_length", -1, ValueError, "got -1"),
    ("query_length", 4.0, TypeError, "got float"),
    ("key_length", -2, ValueError, "got -2"),
    ("block_query", 0, ValueError, "got 0"),
    ("block_key", 8.0, TypeError, "got float"),
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), PLANS)
def test_errors_of_block_plan(argument, value, error, got):
    arguments: dict[str, Any] = {
        "mask": masks.Causal(),
        "query_length": 4,
        "key_length": 6,
    }
    with pytest.raises(error) as raised:
        attention.block_plan(**(arguments | {argument: value}))
    message = str(raised.value)
    pattern = rf"block_plan: `{argument}` must .*{re.escape(got)}.*\."
    assert re.fullmatch(pattern, message), message


def test_a_plan_in_the_place_of_a_mask_excludes_lengths():
    lengths = {"query_seq_lengths": jnp.ones(B, int)}
    with pytest.raises(ValueError, match=r"`mask` must not be a BlockPlan together"):
        attention.dot_product_attention(**GOOD, mask=PLAN, **lengths)
