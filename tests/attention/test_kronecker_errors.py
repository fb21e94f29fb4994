"""Every bad argument of Kronecker attention: one clear message, of the right type."""

import re
from typing import Any

import jax
import pytest

from softlib import attention, masks
from tests.attention.tensor_problems import PerAxis, attend
from tests.host import jnp

pytestmark = pytest.mark.usefixtures("untyped")

B, T, N, K, H, E = 2, 4, 4, 2, 3, 5
K1, K2 = (jnp.zeros((B, s, K, H)) for s in (6, 7))
V1, V2 = (jnp.zeros((B, s, K, E)) for s in (6, 7))
GOOD: dict[str, Any] = {
    "query": jnp.zeros((B, T, N, H)),
    "keys": (K1, K2),
    "values": (V1, V2),
}
ALIEN = masks.Segments(jnp.zeros((B + 1, T), int), jnp.zeros(7, int))  # another batch

# Argument, its bad value, the error, a part of what was got.
CASES: list[tuple[str, Any, type[Exception], str]] = [
    ("query", jnp.zeros((B, T, N, H), int), TypeError, "int32"),
    ("query", jnp.zeros((N, H)), ValueError, "(4, 3)"),
    ("query", jnp.zeros((B, T, 3, H)), ValueError, "3 and 2"),
    ("query", jnp.zeros((B, T, 1, H)), ValueError, "1 and 2"),
    ("keys", (), ValueError, ""),
    ("keys", K1, TypeError, "(2, 6, 2, 3)"),
    ("keys", 3, TypeError, "int"),
    ("keys", (K1, None), TypeError, "NoneType"),
    ("keys", (K1, K2.astype(int)), TypeError, "int32"),
    ("keys", (K1 > 0, K2), TypeError, "bool"),
    ("keys", (K1, jnp.zeros((B, 7, K, H + 1))), ValueError, "(2, 7, 2, 4)"),
    ("keys", (jnp.zeros((B, 6, K, H + 1)), K2), ValueError, "(2, 6, 2, 4)"),
    ("keys", (K1, jnp.zeros((B + 1, 7, K, H))), ValueError, "(3, 7, 2, 3)"),
    ("keys", (K1, jnp.zeros((7, K, H))), ValueError, "(7, 2, 3)"),
    ("keys", (K1, jnp.zeros((B, 7, N, H))), ValueError, "(2, 7, 4, 3)"),
    ("keys", (K1, jnp.zeros((K, H))), ValueError, "(2, 3)"),
    ("values", V1, TypeError, "(2, 6, 2, 5)"),
    ("values", (V1,), ValueError, "1"),
    ("values", (V1, V2, V2), ValueError, "3"),
    ("values", (V1, V2.astype(int)), TypeError, "int32"),
    ("values", (V1, None), TypeError, "NoneType"),
    ("values", (V2, V1), ValueError, "(2, 7, 2, 5)"),
    ("values", (V1, jnp.zeros((B, 7, K, E + 1))), ValueError, "(2, 7, 2, 6)"),
    ("values", (V1, jnp.zeros((B, 7, N, E))), ValueError, "(2, 7, 4, 5)"),
    ("values", (V1, jnp.zeros((7, K, E))), ValueError, "(7, 2, 5)"),
    ("mask", "causal", TypeError, "str"),
    ("mask", masks.Causal, TypeError, "type"),
    ("mask", (masks.Causal(), None), TypeError, "tuple"),
    ("mask", jnp.ones((T, 6, 7), bool), TypeError, "ArrayImpl"),
    ("mask", PerAxis(masks.Causal()), ValueError, "1"),
    ("mask", PerAxis(None, None, None), ValueError, "3"),
    ("mask", PerAxis(None, ALIEN), ValueError, "(3, 4)"),
    ("mask", ALIEN, ValueError, "(3, 4)"),
    ("scale", jnp.ones(N), ValueError, "(4,)"),
    ("scale", jnp.ones((), int), TypeError, "int32"),
    ("scale", True, TypeError, "bool"),
    ("block_query", 0, ValueError, "0"),
    ("block_query", 2.0, TypeError, "float"),
    ("block_query", True, TypeError, "bool"),
    ("block_keys", 8, ValueError, "8"),
    ("block_keys", (8,), ValueError, "(8,)"),
    ("block_keys", (8, 8, 8), ValueError, "(8, 8, 8)"),
    ("block_keys", (8, 0), ValueError, "0"),
    ("block_keys", (-8, 8), ValueError, "-8"),
    ("block_keys", (8, 2.0), TypeError, "float"),
    ("implementation", "cudnn", ValueError, "'cudnn'"),
]
IDS = [
    f"{c[0]}-{re.sub('[^-A-Za-z0-9.,()]+', '', c[3]) or i}" for i, c in enumerate(CASES)
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), CASES, ids=IDS)
def test_error_names_function_argument_condition_and_value(argument, value, error, got):
    with pytest.raises(error) as raised:
        attend(**(GOOD | {argument: value}))
    message = str(raised.value)
    # Of a tuple, perhaps with its place in it.
    pattern = rf"kronecker_attention: `{argument}(\[\d\])?` must .*{re.escape(got)}.*\."
    assert re.fullmatch(pattern, message), message


def test_errors_come_while_tracing():
    call = lambda query: attend(query, (K1, K2), (V1,))
    with pytest.raises(ValueError, match="kronecker_attention: `values` must"):
        jax.eval_shape(call, jax.ShapeDtypeStruct((B, T, N, H), jnp.float32))


@pytest.mark.parametrize("names", ["pallas", ("pallas_tpu", "pallas_gpu")])
def test_an_implementation_that_cannot_run_says_why(names):
    with pytest.raises(NotImplementedError, match=r"are too few to gain by it"):
        attend(**GOOD, implementation=names)


PLAN = attention.block_plan(None, T, (6, 7))
PLANS: list[tuple[Any, str, dict[str, Any]]] = [
    (PLAN, "make the plan of all", {"block_query": 8}),
    (PLAN, "make the plan of all", {"block_keys": (None, 8)}),
    (attention.block_plan(None, T, (7, 6)), "(4, 7, 6)", {}),
    (attention.block_plan(None, T, 6), "(4, 6)", {}),
    (attention.block_plan(PerAxis(None, ALIEN), T, (6, 7)), "(3, 4)", {}),
]


@pytest.mark.parametrize(("plan", "got", "more"), PLANS)
def test_errors_of_a_plan_in_the_place_of_a_mask(plan, got, more):
    with pytest.raises(ValueError, match="kronecker_attention: `mask` must") as raised:
        attend(**GOOD, mask=plan, **more)
    assert got in str(raised.value)


def test_what_is_made_for_tuples_is_no_mask_of_pairs():
    query, key, value = GOOD["query"], K1, V1
    with pytest.raises(
        ValueError, match="dot_product_attention: `mask` must be a plan"
    ):
        attention.dot_product_attention(query, key, value, mask=PLAN)
    with pytest.raises(TypeError, match="dot_product_attention: `mask` must be a mask"):
        attention.dot_product_attention(query, key, value, mask=PerAxis(None))


BAD_PLANS: list[tuple[str, Any, type[Exception], str]] = [
    ("mask", PerAxis(None), ValueError, "1"),
    ("mask", PerAxis(None, None, None), ValueError, "3"),
    ("mask", "causal", TypeError, "str"),
    ("key_length", (6, -1), ValueError, "-1"),
    ("key_length", (6, 2.0), TypeError, "float"),
    ("key_length", (), ValueError, "()"),
    ("block_key", (8,), ValueError, "(8,)"),
    ("block_key", (8, 0), ValueError, "0"),
    ("block_query", 0, ValueError, "0"),
    ("query_length", -4, ValueError, "-4"),
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD_PLANS)
def test_errors_of_block_plan(argument, value, error, got):
    good: dict[str, Any] = {"mask": None, "query_length": T, "key_length": (6, 7)}
    with pytest.raises(error) as raised:
        attention.block_plan(**(good | {argument: value}))
    message = str(raised.value)
    pattern = rf"block_plan: `{argument}` must .*{re.escape(got)}.*\."
    assert re.fullmatch(pattern, message), message


# ----------------------------------------------------------------------- two_simplicial
SIMPLICIAL: dict[str, Any] = {
    "query": jnp.zeros((B, T, N, H)),
    "key1": jnp.zeros((B, T, K, H)),
    "key2": jnp.zeros((B, T, K, H)),
    "value1": jnp.zeros((B, T, K, E)),
    "value2": jnp.zeros((B, T, K, E)),
    "window1": 3,
    "window2": 2,
}
SIMPLICIAL_CASES: list[tuple[str, Any, type[Exception], str]] = [
    ("query", jnp.zeros((B, T, N, H), int), TypeError, "int32"),
    ("query", jnp.zeros((B, T, 3, H)), ValueError, "3 and 2"),
    ("key1", jnp.zeros((B, T, K, H), int), TypeError, "int32"),
    ("key1", jnp.zeros((B, T, K, H + 1)), ValueError, "(2, 4, 2, 4)"),
    ("key2", jnp.zeros((B, T, K, H), bool), TypeError, "bool"),
    ("key2", jnp.zeros((B + 1, T, K, H)), ValueError, "(3, 4, 2, 3)"),
    ("value1", jnp.zeros((B, T + 1, K, E)), ValueError, "(2, 5, 2, 5)"),
    ("value2", jnp.zeros((B, T, K, E + 1)), ValueError, "(2, 4, 2, 6)"),
    ("window1", 0, ValueError, "0"),
    ("window1", 2.0, TypeError, "float"),
    ("window1", None, TypeError, "NoneType"),
    ("window2", -1, ValueError, "-1"),
    ("window2", True, TypeError, "bool"),
    ("key2_bias", jnp.zeros(H), ValueError, "(3,)"),
    ("value2_bias", jnp.zeros((1, 1)), ValueError, "(1, 1)"),
    ("scale", jnp.ones(N), ValueError, "(4,)"),
    ("window2", jnp.ones((), int), TypeError, "ArrayImpl"),
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), SIMPLICIAL_CASES)
def test_errors_of_two_simplicial_attention(argument, value, error, got):
    with pytest.raises(error) as raised:
        attention.two_simplicial_attention(**(SIMPLICIAL | {argument: value}))
    message = str(raised.value)
    pattern = rf"two_simplicial_attention: `{argument}` must .*{re.escape(got)}.*\."
    assert re.fullmatch(pattern, message), message


def test_an_implementation_of_two_simplicial_attention_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match=r"are too few to gain by it"):
        attention.two_simplicial_attention(**SIMPLICIAL, implementation="pallas")
