"""The checker of types that runs in tests: beartype, each signature compiled once.

The import hook of jaxtyping decorates nested functions too, every time that the outer
one is called; to compile their checks again would take a tenth of the suite.
"""

from collections.abc import Callable
from typing import Any

import beartype

# An int is a float, as in every Python signature (PEP 484).
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_checked: dict[tuple[object, ...], Any] = {}


def check[T: Callable[..., Any]](function: T) -> T:
    """What jaxtyping hands over has a signature and no body, so that is the key."""
    code = getattr(function, "__code__", None)
    if code is None:  # a class
        return _check(function)
    key = (
        function.__module__,
        function.__qualname__,
        code.co_varnames,
        repr(function.__annotations__),
    )
    if key not in _checked:
        _checked[key] = _check(function)
    return _checked[key]
