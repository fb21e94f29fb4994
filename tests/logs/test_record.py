import numpy as np
import pytest

from softlib import logs

MESSAGES = ["user ann in 3", "bye", "user  in 4", "odd", "user <*> in 5"]
TEMPLATES = ["user <*> in <*>", "bye", "user <*> in <*>", "even <*>", "user <*> in <*>"]


def test_columns_hold_every_message():
    log = logs.log_of_templates(MESSAGES, TEMPLATES, fields={"level": list("abcde")})
    assert [t.text for t in log.templates] == ["user <*> in <*>", "bye", "<*>"]
    np.testing.assert_array_equal(log.template_ids, [0, 1, 0, 2, 0])
    users = log.templates[0]
    np.testing.assert_array_equal(users.rows, [0, 2, 4])
    assert [column.tolist() for column in users.parameters] == [
        ["ann", "", "<*>"],
        ["3", "4", "5"],
    ]
    assert log.fields["level"].tolist() == list("abcde")
    assert logs.message_texts(log) == MESSAGES


def test_a_message_of_another_template_keeps_its_text():
    log = logs.log_of_templates(["odd"], ["even <*>"])
    assert log.templates[0].text == "<*>"
    assert logs.message_texts(log) == ["odd"]


def test_parameters_may_be_anywhere():
    of = logs.message_parameters
    assert of("a1b2", "a<*>b<*>") == ("1", "2")
    assert of("12", "<*><*>") == ("", "12")
    assert of("x", "y") is None
    assert of("x.y", "x.y") == ()
    assert of("xzy", "x.y") is None
    assert of("two\nlines", "two<*>") == ("\nlines",)


def test_no_messages():
    log = logs.log_of_templates([], [])
    assert log.templates == ()
    assert logs.message_texts(log) == []


def test_errors():
    with pytest.raises(ValueError, match=r"`templates` must have .* 2 .*got 1"):
        logs.log_of_templates(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="`level` must have one entry"):
        logs.log_of_templates(["a"], ["a"], fields={"level": []})
