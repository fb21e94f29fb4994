"""Reads and writes defaults.txt: the numbers and words that a public call begins with.

A default is part of the interface: a program that leaves an option out computes
something else if it changes. Such a change is made here too, where a reader sees it:

    python -m tests.defaults  # after a change of a default, or a new function
"""

import inspect
import pathlib
from collections.abc import Iterator

from tests.public_names import public_names

TABLE = pathlib.Path(__file__).with_name("defaults.txt")


def lines() -> Iterator[str]:
    """Yields the address of each public function and class with its defaults."""
    for public in public_names():
        try:
            signature = inspect.signature(public.value)
        except (TypeError, ValueError):  # an alias of a type, for instance
            continue
        found = [
            f"{parameter.name}={parameter.default!r}"
            for parameter in signature.parameters.values()
            if isinstance(parameter.default, int | float | str)
        ]
        if found:
            yield f"{public.address.removeprefix('softlib.')} {' '.join(found)}"


if __name__ == "__main__":
    TABLE.write_text("".join(f"{line}\n" for line in lines()))
