import ast
import pathlib
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


def test_options_are_unpacked_in_overloads_only(repository: pathlib.Path):
    """Elsewhere a signature says its keywords, so that help() and editors know them."""
    found = set()
    for path in (repository / "softlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
                annotation = node.args.kwarg.annotation
                unpacked = annotation is not None and "Unpack" in ast.unparse(
                    annotation
                )
                decorators = map(ast.unparse, node.decorator_list)
                if unpacked and "overload" not in decorators:
                    found.add(node.name)
    assert not found
