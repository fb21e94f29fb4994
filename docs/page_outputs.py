"""Looks at what the executed cells of a page show to its readers."""

import re
from collections.abc import Iterator
from typing import Any

# `print(a < b)` tells a reader nothing where it holds, and less where it does not.
_BARE_LINE = re.compile(r"\[?\s*((False|None),?\s*)+\]?")
# As a row among others they may be what is shown.
_NO_NUMBERS = re.compile(r"(Array\()?\[*\s*((-?nan|-?inf)[,\s]*)+(\].*)?")


def complaint(output: str) -> str | None:
    """Complaint about the text that a cell prints; None if there is none."""
    if not output.strip():
        return "prints nothing visible"
    lines = [line.strip() for line in output.strip().splitlines()]
    for line in lines:
        if _BARE_LINE.fullmatch(line) or (
            len(lines) == 1 and _NO_NUMBERS.fullmatch(line)
        ):
            return f"prints {line!r} and says not of what"
    return None


def printed(page: Any) -> Iterator[Any]:
    """The nodes with printed text in a page that MyST-NB has executed."""
    for node in page.findall():
        if getattr(node, "attributes", {}).get("nb_element") == "cell_code_output":
            yield from (n for n in node.findall() if n.tagname == "literal_block")
