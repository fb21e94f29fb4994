"""The printed form of masks: the expression that makes them."""

import dataclasses
from typing import Any

from softlib._printed import argument


def call(value: Any) -> str:
    """The call that makes a dataclass, without arguments at their default.

    Optional arguments are named if the class has more than one.
    """
    fields = dataclasses.fields(value)
    optional = [f.name for f in fields if f.default is not dataclasses.MISSING]
    arguments = []
    for field in fields:
        given = getattr(value, field.name)
        if field.name in optional and _is(given, field.default):
            continue
        by_name = len(optional) > 1 and field.name in optional
        name = f"{field.name}=" if by_name else ""
        arguments.append(f"{name}{argument(given)}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _is(given: Any, default: Any) -> bool:
    # `==` of arrays compares by element, that of their stand-ins may raise.
    return given is default or (
        isinstance(given, int | float | str) and given == default
    )
