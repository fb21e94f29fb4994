from typing import Any

import pytest

from tests import type_checks


def function(annotation: Any):
    def scaled(x):
        return x

    scaled.__annotations__ = {"x": annotation}
    return type_checks.check(scaled)


def test_types_are_checked_and_an_int_is_a_float():
    assert function(float)(1) == 1
    with pytest.raises(Exception, match="x"):
        function(float)("1")


def test_a_signature_is_compiled_once():
    assert function(float) is function(float)
    assert function(float) is not function(int)
