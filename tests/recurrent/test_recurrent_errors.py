"""Every bad argument of the recurrent forms: one clear message, of the right type."""

import re

import pytest

from softlib.recurrent import (
    LinearAttentionState,
    attention_matrix,
    decode_step,
    gated_linear_attention,
    linear_attention,
    linear_recurrence,
    normalized_attention,
    quasi_lstm,
    quasi_lstm_matrix,
    selective_scan,
    selective_scan_matrix,
    taylor_feature_map,
)
from tests.host import jnp

pytestmark = pytest.mark.usefixtures("untyped")

ones = jnp.ones
TOKENS = {"query": ones((2, 5, 4, 3)), "key": ones((2, 5, 2, 3))}
VALUE = {"value": ones((2, 5, 2, 6))}
STATE = LinearAttentionState(ones((2, 2, 3, 6)), ones((2, 2, 3)))
U = ones((2, 5, 3))
SCAN = {
    "u": U,
    "delta": U,
    "A": ones((3, 4)),
    "B": ones((2, 5, 4)),
    "C": ones((2, 5, 4)),
}
GATES = dict.fromkeys("fioz", U)

# Whether it is about `linear_attention` alone, the change, the error, what it says.
ATTENTION = [
    ({"query": ones((2, 5, 4, 3), int)}, TypeError, "`query`", "int32"),
    ({"value": ones((2, 5, 2, 6), int)}, TypeError, "`value`", "int32"),
    ({"query": ones((5, 3))}, ValueError, "`query`", "(5, 3)"),
    ({"key": ones((5, 2, 3))}, ValueError, "`key`", "(5, 2, 3)"),
    ({"key": ones((2, 5, 2, 4))}, ValueError, "`key`", "(2, 5, 2, 4)"),
    ({"key": ones((2, 6, 2, 3))}, ValueError, "`value`", "(2, 5, 2, 6)"),
    ({"value": ones((2, 5, 1, 6))}, ValueError, "`value`", "(2, 5, 1, 6)"),
    ({"query": ones((2, 5, 3, 3))}, ValueError, "multiple of the 2 heads", "3"),
    ({"query": ones((2, 4, 4, 3))}, ValueError, "as long as `query` (4)", "5"),
    ({"feature_map": "elu2"}, ValueError, "`feature_map`", "'elu2'"),
    ({"feature_map": "taylor"}, ValueError, "`feature_map`", "'taylor'"),
    ({"feature_map": None}, ValueError, "`feature_map`", "None"),
    ({"feature_map": "identity"}, ValueError, "'identity'", "'sum'"),
    ({"feature_map": "taylor3"}, ValueError, "'taylor3'", "'sum'"),
    ({"normalizer": "mean"}, ValueError, "`normalizer`", "'mean'"),
    ({"normalizer": ones((2, 5, 2))}, ValueError, "`normalizer`", "(2, 5, 2)"),
    ({"normalizer": ones((2, 5, 4), int)}, TypeError, "`normalizer`", "int32"),
    ({"log_decay": ones((2, 5, 3))}, ValueError, "`log_decay`", "(2, 5, 3)"),
    ({"log_decay": ones((2, 5, 2), int)}, TypeError, "`log_decay`", "int32"),
    (
        {"log_decay": ones((2, 5, 2)), "is_causal": False},
        ValueError,
        "`log_decay` must be None",
        "(2, 5, 2)",
    ),
    ({"mask": ones((2, 5))}, TypeError, "`mask`", "float32"),
    ({"mask": ones((2, 5, 1), bool)}, ValueError, "`mask`", "(2, 5, 1)"),
    ({"chunk_size": 0}, ValueError, "`chunk_size`", "0"),
    ({"chunk_size": 2.0}, TypeError, "`chunk_size`", "float"),
    (
        {"initial_state": STATE._replace(memory=ones((2, 2, 3, 3)))},
        ValueError,
        "`initial_state.memory`",
        "(2, 2, 3, 3)",
    ),
    (
        {"initial_state": STATE._replace(normalizer=None)},
        ValueError,
        "`initial_state.normalizer` must be an array",
        "None",
    ),
    (
        {"initial_state": STATE, "normalizer": "none"},
        ValueError,
        "`initial_state.normalizer` must be None",
        "(2, 2, 3)",
    ),
    (
        {"initial_state": STATE._replace(memory=ones((2, 2, 3, 6), int))},
        TypeError,
        "`initial_state`",
        "int32",
    ),
]
OTHERS = [
    (normalized_attention, {"log_normalizer": ones((2, 5))}, ValueError, "(2, 5)"),
    (normalized_attention, {"log_normalizer": ones((2, 5, 4), int)}, TypeError, "int"),
    (gated_linear_attention, {"log_decay": ones((2, 5))}, ValueError, "(2, 5)"),
    (selective_scan, {"u": ones((2, 5, 3), int)}, TypeError, "int32"),
    (selective_scan, {"u": ones(3)}, ValueError, "(3,)"),
    (selective_scan, {"delta": ones((2, 5, 1))}, ValueError, "(2, 5, 1)"),
    (selective_scan, {"A": ones((4, 3))}, ValueError, "(4, 3)"),
    (selective_scan, {"A": ones(3)}, ValueError, "(3,)"),
    (selective_scan, {"B": ones((2, 5, 3))}, ValueError, "(2, 5, 3)"),
    (selective_scan, {"C": ones((2, 4, 4))}, ValueError, "(2, 4, 4)"),
    (selective_scan, {"D": ones(4)}, ValueError, "(4,)"),
    (selective_scan, {"initial_state": ones((2, 3))}, ValueError, "(2, 3)"),
    (selective_scan, {"chunk_size": -1}, ValueError, "-1"),
    (quasi_lstm, {"f": ones((2, 5, 3), int)}, TypeError, "int32"),
    (quasi_lstm, {"f": ones(3)}, ValueError, "(3,)"),
    (quasi_lstm, {"i": ones((2, 5, 1))}, ValueError, "(2, 5, 1)"),
    (quasi_lstm, {"z": ones((2, 5, 1))}, ValueError, "(2, 5, 1)"),
    (quasi_lstm, {"alpha": -1.0}, ValueError, "-1.0"),
    (quasi_lstm, {"alpha": ones(2)}, ValueError, "(2,)"),
    (quasi_lstm, {"alpha": ones(3, int)}, TypeError, "int32"),
    (quasi_lstm, {"initial_state": ones((2, 5, 3))}, ValueError, "(2, 5, 3)"),
    (quasi_lstm, {"method": "tree"}, ValueError, "'tree'"),
]
RECURRENCE = [
    ({"decay": ones((5, 3), int)}, TypeError, "`decay`", "int32"),
    ({"inputs": ones(())}, ValueError, "`inputs`", "()"),
    ({"decay": ones(5)}, ValueError, "`decay`", "(5,)"),
    ({"decay": ones((5, 2))}, ValueError, "`decay`", "(5, 2)"),
    ({"axis": 2}, ValueError, "`axis`", "2"),
    ({"initial_state": ones(5)}, ValueError, "`initial_state`", "(5,)"),
    ({"method": "parallel"}, ValueError, "`method`", "'parallel'"),
    ({"chunk_size": 4}, ValueError, "`chunk_size` must be None", "4"),
    ({"chunk_size": 0, "method": "chunked"}, ValueError, "`chunk_size`", "0"),
]


def says(function, *parts):
    condition, got = parts
    return rf"^{function}: .*{re.escape(condition)}.*got .*{re.escape(got)}"


@pytest.mark.parametrize(("change", "error", "condition", "got"), ATTENTION)
def test_linear_attention(change, error, condition, got):
    with pytest.raises(error, match=says("linear_attention", condition, got)):
        linear_attention(**(TOKENS | VALUE | change))


@pytest.mark.parametrize(("function", "change", "error", "got"), OTHERS)
def test_the_others(function, change, error, got):
    given = {selective_scan: SCAN, quasi_lstm: GATES}.get(function, TOKENS | VALUE)
    (name,) = change
    with pytest.raises(error, match=says(function.__name__, f"`{name}`", got)):
        function(**(given | change))


@pytest.mark.parametrize(("change", "error", "condition", "got"), RECURRENCE)
def test_linear_recurrence(change, error, condition, got):
    given = {"decay": ones((5, 3)), "inputs": ones((5, 3))}
    with pytest.raises(error, match=says("linear_recurrence", condition, got)):
        linear_recurrence(**(given | change))


def test_matrices_steps_and_features():
    with pytest.raises(ValueError, match=says("attention_matrix", "'identity'", "")):
        attention_matrix(**TOKENS, feature_map="identity")
    with pytest.raises(ValueError, match=says("decode_step", "`query`", "(3,)")):
        decode_step(None, ones(3), ones((1, 3)), ones((1, 3)))
    x = ones((2, 3))
    with pytest.raises(ValueError, match=says("decode_step", "`log_decay`", "3")):
        decode_step(None, x, x, x, log_decay=ones(3))
    with pytest.raises(ValueError, match=says("selective_scan_matrix", "`A`", "")):
        selective_scan_matrix(U, ones(3), SCAN["B"], SCAN["C"])
    with pytest.raises(ValueError, match=says("quasi_lstm_matrix", "`o`", "(3,)")):
        quasi_lstm_matrix(U, U, ones(3))
    with pytest.raises(TypeError, match=says("taylor_feature_map", "`order`", "float")):
        taylor_feature_map(U, order=2.0)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=says("taylor_feature_map", "`order`", "-1")):
        taylor_feature_map(U, order=-1)
    with pytest.raises(TypeError, match=says("taylor_feature_map", "`x`", "int32")):
        taylor_feature_map(ones(3, int), order=2)
