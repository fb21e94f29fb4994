"""Tokens of messages, their features, and templates with some of the variables."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from softlib import logs


@given(st.text())
def test_tokens_are_the_message(message):
    tokens = logs.message_tokens(message)
    assert "".join(tokens) == message
    assert all(tokens)
    features = logs.token_features(tokens, buckets=3)
    assert features.shape == (len(tokens), 18)
    assert np.isfinite(features).all()
    assert logs.variable_aware_template(tokens, [""] * len(tokens)) == message


def test_shapes_tell_numbers_words_and_paths_apart():
    tokens = ["12", "1.5", "word", "Word", "WORD", "/a/b", "a-b", "0xff", " ", "="]
    shapes = logs.token_features(tokens)[:, :14]
    assert len({tuple(row) for row in shapes}) == len(tokens)


def test_words_have_the_class_of_their_lower_case_text():
    features = logs.token_features(["Word", "wORD", "other", "12"])[:, 15:]
    np.testing.assert_array_equal(features.sum(1), [1, 1, 1, 0])
    np.testing.assert_array_equal(features[0], features[1])


def test_templates():
    tokens = logs.message_tokens("job 7 on a b: 3 s")
    tags = ["", "", "id", "", "", "", *["name"] * 3, "", "", *["time"] * 3]
    template = logs.variable_aware_template
    assert template(tokens, tags) == "job <*> on <*>: <*>"
    assert template(tokens, tags, keep={"id", "time"}) == "job 7 on <*>: 3 s"
    # Neighbours of two kinds are two variables.
    assert template(["a", "b", "c"], ["x", "y", "y"]) == "<*><*>"
    assert template([], []) == ""


def test_errors():
    with pytest.raises(ValueError, match=r"^variable_aware_template: `tags` must"):
        logs.variable_aware_template(["a"], [])
    with pytest.raises(ValueError, match=r"^token_features: `buckets` must be"):
        logs.token_features(["a"], buckets=0)
