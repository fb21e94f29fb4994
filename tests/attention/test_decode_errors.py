"""Every bad argument of decode_attention: one clear message, of the right type."""

import re
from typing import Any

import pytest

from softlib.attention import decode_attention
from tests.host import jnp

pytestmark = pytest.mark.usefixtures("untyped")

GOOD = {
    "query": jnp.zeros((2, 1, 4, 3)),
    "key": jnp.zeros((2, 5, 2, 3)),
    "value": jnp.zeros((2, 5, 2, 6)),
}
BAD = [
    ("query", jnp.zeros((2, 1, 4, 3), int), TypeError, "floating dtype, got int32"),
    ("key", jnp.zeros((2, 5, 2, 3), int), TypeError, "floating dtype, got int32"),
    ("value", jnp.zeros((2, 5, 2, 6), int), TypeError, "floating dtype, got int32"),
    ("query", jnp.zeros((4, 3)), ValueError, "at least 3 axes (*batch, T, N, H)"),
    ("key", jnp.zeros((3, 5, 2, 3)), ValueError, "shape (2, S, K, 3)"),
    ("key", jnp.zeros((5, 2, 3)), ValueError, "shape (2, S, K, 3)"),
    ("key", jnp.zeros((2, 5, 2, 4)), ValueError, "got (2, 5, 2, 4)"),
    ("key", jnp.zeros((2, 5, 0, 3)), ValueError, "divides the 4 of `query`, got 0"),
    ("key", jnp.zeros((2, 5, 3, 3)), ValueError, "divides the 4 of `query`, got 3"),
    ("value", jnp.zeros((2, 4, 2, 6)), ValueError, "shape (2, 5, 2, Hv)"),
    ("value", jnp.zeros((2, 5, 1, 6)), ValueError, "got (2, 5, 1, 6)"),
    ("key_value_seq_lengths", jnp.zeros(2), TypeError, "integer dtype, got float32"),
    ("key_value_seq_lengths", jnp.zeros(3, int), ValueError, "shape (2,)"),
    ("key_value_seq_lengths", jnp.zeros((), int), ValueError, "got ()"),
    ("scale", jnp.zeros(2), ValueError, "a number or a scalar array, got shape (2,)"),
    ("scale", float("nan"), ValueError, "got nan"),
    ("softcap", 0.0, ValueError, "positive and finite, got 0.0"),
    ("softcap", jnp.ones(()), TypeError, "a Python number"),
    ("sinks", jnp.zeros(4, int), TypeError, "floating dtype, got int32"),
    ("sinks", jnp.zeros(2), ValueError, "shape (4,)"),
    ("phi", jnp.zeros(2), ValueError, "shape () or (4,)"),
    ("phi", True, TypeError, "floating dtype, got bool"),
    ("valid_range", (1.0, 1.0), ValueError, "a < b, got (1.0, 1.0)"),
    ("valid_range", 1.0, ValueError, "a pair (a, b), got 1.0"),
    ("valid_range", (jnp.zeros(2), 1.0), ValueError, "shape () or (4,)"),
    ("criterion", "max", ValueError, "one of 'row_max', 'elementwise', got 'max'"),
    ("num_splits", 0, ValueError, "at least 1, got 0"),
    ("num_splits", 6, ValueError, "at most the number of keys, 5, got 6"),
    ("num_splits", 2.0, TypeError, "a Python int"),
    ("implementation", "cudnn", ValueError, "got 'cudnn'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bad_argument(name, value, error, message):
    arguments: Any = {**GOOD, name: value}
    if name == "valid_range":
        arguments["phi"] = 0.0
    # Wherever a shape does not fit another's, the later of the two is named.
    named = "key" if "of `query`" in message else name
    with pytest.raises(
        error, match=f"decode_attention: .*`{named}`.* {re.escape(message)}"
    ):
        decode_attention(**arguments)


def test_one_form_of_the_result_at_a_time():
    call: Any = decode_attention
    with pytest.raises(ValueError, match="`return_lse` must be False with"):
        call(**GOOD, return_lse=True, return_statistics=True)


def test_an_implementation_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="too few to gain"):
        decode_attention(**GOOD, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match=r"as a whole \(num_splits\)"):
        decode_attention(**GOOD, implementation="reference", num_splits=2)
